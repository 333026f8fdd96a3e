"""torchvision's SSDs, imported, to the same detections as torchvision's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ssd_client.rule import BILINEAR_PLAIN

from build import spec
from build.errors import ImportModelError, OptionError, SSDError
from build.gate import datasets
from build.gate.matching import ious
from build.graph.attach import attach
from build.reports.fusion import picture
from build.session import runner
from build.sources.import_model import import_model
from build.sources.torchvision import (
    TORCHVISION,
    load_torchvision,
    raw_heads,
    torchvision_anchors,
    torchvision_model,
)

LABELS = ["alpha", "beta", "gamma"]


def torchvision() -> Any:
    """torchvision with an `nms`: its compiled one, or else its documentation restated in torch.

    https://pytorch.org/vision/stable/generated/torchvision.ops.nms.html: "iteratively removes lower scoring boxes which
    have an IoU greater than iou_threshold with another (higher scoring) box"; kept indices by decreasing score.
    """
    torch = pytest.importorskip("torch", reason="needs torch (extra `train`)")
    try:
        module = load_torchvision()
    except SSDError as error:
        pytest.skip(f"needs torchvision (extra `train`): {error.what}")
    if module.extension._has_ops():
        return module

    def nms(boxes: Any, scores: Any, iou_threshold: float) -> Any:
        order = scores.argsort(descending=True, stable=True)
        overlaps = module.ops.box_iou(boxes[order], boxes[order])
        alive, kept = torch.ones(len(order), dtype=torch.bool), []
        for i in range(len(order)):
            if alive[i]:
                kept.append(order[i])
                alive &= overlaps[i] <= iou_threshold
                alive[i] = False
        return torch.stack(kept) if kept else torch.zeros(0, dtype=torch.int64)

    if not torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "CPU"):
        implementation = torch.library.Library("torchvision", "IMPL")
        implementation.impl("nms", nms, "CPU")
        module.ops.boxes._assert_has_ops = lambda: None
        module._restated_nms = implementation
    return module


def random_detector(architecture: str) -> Any:
    """Random weights whose scores and boxes are spread out, so that every step of the post-processing has work."""
    import torch

    torch.manual_seed(1)
    model, _ = torchvision_model(architecture, "none", LABELS)
    heads = raw_heads(model)
    pixels = torch.from_numpy(picture(*model.transform.fixed_size[::-1])).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        # Every layer's output to mean 0 and deviation 1 on a picture: untrained networks fade out or explode.
        def even(module: Any, _: Any, output: Any) -> Any:
            module.weight /= output.std().clamp(min=1e-6)
            if module.bias is not None:
                module.bias.normal_(0, 0.3)
            return output / output.std().clamp(min=1e-6)

        convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
        hooks = [module.register_forward_hook(even) for module in convolutions]
        normalised = (pixels - torch.tensor(model.transform.image_mean)[:, None, None]) / torch.tensor(
            model.transform.image_std
        )[:, None, None]
        heads(normalised)
        for hook in hooks:
            hook.remove()
        for head in heads(normalised):
            assert 0.1 < head.std() < 10
    return model


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("architecture", TORCHVISION)
def test_detections_are_torchvisions_own(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision()
    import torch

    model = random_detector(architecture)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "labels.txt").write_text("\n".join(LABELS) + "\n")
    folder = import_model(
        architecture,
        "theirs",
        weights=str(tmp_path / "weights.pth"),
        labels=tmp_path / "labels.txt",
        models=tmp_path / "models",
    )
    checked = spec.load(folder)
    assert np.array_equal(checked.load_anchors(), torchvision_anchors(model))
    width, height = model.transform.fixed_size
    pictures = [picture(height, width), picture(height, width)[::-1, ::-1], picture(height, width)[:, :, ::-1]]
    with torch.no_grad():
        wanted = model([torch.from_numpy(p.copy()).permute(2, 0, 1).float() / 255 for p in pictures])

    number, boxes, scores, classes = runner(attach(checked))(checked.nms.feeds(np.stack(pictures))).values()
    for row, want in enumerate(wanted):
        count = int(number[row, 0])
        assert count == len(want["scores"]) > 20
        assert np.array_equal(classes[row, :count] + 1, want["labels"].numpy())
        assert len(set(classes[row, :count].tolist())) > 1
        np.testing.assert_allclose(scores[row, :count], want["scores"].numpy(), atol=2e-5)
        in_unit = want["boxes"].numpy() / [width, height, width, height]
        np.testing.assert_allclose(boxes[row, :count], in_unit, atol=1e-4)


@pytest.mark.slow
def test_labels_are_cocos_and_unlike(tmp_path: Path) -> None:
    torchvision()
    _, names = torchvision_model("ssdlite320_mobilenet_v3_large", "none")
    assert len(names) == len(set(names)) == 90
    assert names[0] == "person"


@pytest.mark.slow
def test_weights_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    torchvision()
    import torch

    torch.save({"not": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ImportModelError, match="do not fit"):
        torchvision_model("ssdlite320_mobilenet_v3_large", str(tmp_path / "weights.pth"))
    with pytest.raises(ImportModelError, match="cannot be read"):
        torchvision_model("ssdlite320_mobilenet_v3_large", str(tmp_path / "nowhere.pth"))
    with pytest.raises(OptionError, match="COCO"):
        torchvision_model("ssdlite320_mobilenet_v3_large", "default", LABELS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("architecture", TORCHVISION)
def test_from_the_picture_file_on_detections_are_torchvisions(architecture: str, tmp_path: Path) -> None:
    """With torchvision's own resizing on its side, and the client's on ours."""
    torchvision()
    import torch

    model = random_detector(architecture)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "labels.txt").write_text("\n".join(LABELS) + "\n")
    folder = import_model(
        architecture,
        "theirs",
        weights=str(tmp_path / "weights.pth"),
        labels=tmp_path / "labels.txt",
        models=tmp_path / "models",
    )
    checked = spec.load(folder)
    assert checked.input.resample == BILINEAR_PLAIN
    run = runner(attach(checked))

    def agreeing(resample: str) -> float:
        """The share of torchvision's detections that are ours, too: the class, IoU 0.9, the score within 0.02.

        The client rounds the resized picture to 8 bits and torchvision does not, and lists end at 200 or 300 rows.
        """
        into, shares = dataclasses.replace(checked.input, resample=resample), []
        for number, photograph in enumerate(datasets.photographs()[:4]):
            file = tmp_path / f"{number}.png"
            photograph.save(file)
            pixels, placement = datasets.load(file, into)
            outputs = run(checked.nms.feeds(pixels[None]))
            count = int(outputs["num_detections"][0, 0])
            boxes = placement.to_image(outputs["detection_boxes"][0, :count])
            with torch.no_grad():
                (wanted,) = model([torch.from_numpy(np.asarray(photograph).copy()).permute(2, 0, 1).float() / 255])
            assert count == len(wanted["scores"]) > 20
            same = ious(boxes.astype(float), wanted["boxes"].numpy().astype(float))
            same *= outputs["detection_classes"][0, :count, None] + 1 == wanted["labels"].numpy()
            same *= np.abs(outputs["detection_scores"][0, :count, None] - wanted["scores"].numpy()) < 0.02
            shares.append((same.max(0) > 0.9).mean())
        return float(np.mean(shares))

    plain, antialiased = agreeing(BILINEAR_PLAIN), agreeing("bilinear")
    print(f"{architecture}: {plain:.3f} of torchvision's detections, {antialiased:.3f} with antialiasing")
    assert plain > 0.95
    assert plain > antialiased
