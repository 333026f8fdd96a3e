"""torchvision's two SSDs, exported up to their raw heads, with all that their post-processing needs in the spec."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssd_client.rule import BILINEAR_PLAIN

from build import contract
from build.errors import ImportModelError, OptionError, RuntimeUnavailableError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TORCHVISION = ("ssd300_vgg16", "ssdlite320_mobilenet_v3_large")
_OPSET = 17


def load_torchvision() -> Any:
    """The package torchvision, also beside a torch for which its compiled operators were not built.

    Structure, weights and heads need none of those operators; torchvision only asks that some be declared.

    Raises:
        RuntimeUnavailableError: torch or torchvision is not installed, or they do not fit together.
    """
    torch = _torch()
    try:
        with contextlib.suppress(RuntimeError):
            return importlib.import_module("torchvision")
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            with contextlib.suppress(RuntimeError):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torchvision: Any = importlib.import_module("torchvision")
        torchvision._ssd_declared_operators = library  # they go when the library object goes
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"torchvision cannot be imported: {error}", fix="pip install torchvision"
        ) from None
    except RuntimeError as error:
        raise RuntimeUnavailableError(
            f"torchvision does not fit this torch {torch.__version__}: {error}",
            fix="install the two versions that belong together",
        ) from None
    return torchvision


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise RuntimeUnavailableError(
            "torch is not installed", fix="install the extra: pip install torch torchvision onnxscript"
        ) from None


def torchvision_model(architecture: str, weights: str, labels: Sequence[str] | None = None) -> tuple[Any, list[str]]:
    """A torchvision detector in evaluation mode, and its foreground labels.

    Args:
        architecture: one of `TORCHVISION`.
        weights: default, none, or a file with a state dict.
        labels: the foreground labels where they are not COCO's.

    Raises:
        ImportModelError: the weights cannot be had, or do not fit.
    """
    models = load_torchvision().models
    torch = _torch()

    if weights == "default" and labels is not None:
        raise OptionError("the default weights have COCO's labels", fix="leave --labels out, or name a weights file")
    published = models.get_model_weights(architecture).DEFAULT
    names = list(labels) if labels is not None else _unique(published.meta["categories"][1:])
    make = getattr(models.detection, architecture)
    options: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": len(names) + 1}
    try:
        if weights == "default":
            model = make(weights=published)
        elif weights == "none":
            model = make(**options)
        else:
            model = make(**options)
            model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except OSError as error:
        raise ImportModelError(
            f"the weights {weights!r} of {architecture} cannot be read: {error}",
            why="there is no way from here to torchvision's download server" if weights == "default" else "",
            fix=f"download {published.url} elsewhere and name the file: --weights FILE"
            if weights == "default"
            else "name a file with a state dict, or `none` for random weights",
        ) from None
    except Exception as error:  # torch names many: of unpickling, of keys, of shapes
        text = str(error).strip().splitlines()
        raise ImportModelError(
            f"the weights {weights!r} do not fit {architecture} with {len(names)} labels: {text[0] if text else error}",
            why="they are of another architecture or of other classes",
            fix="name the labels of the classes that it was trained on: --labels FILE",
        ) from None
    return model.eval(), names


def _unique(names: Sequence[str]) -> list[str]:
    """COCO's list has gaps, all called N/A; labels.txt wants every label once."""
    return [f"{name} {i}" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]


def raw_heads(model: Any) -> Any:
    """A torch module: FP32 [B,3,H,W], normalised → box_deltas [B,N,4], class_logits [B,N,C].

    torchvision limits the logarithms of width and height before it decodes; the same limit stands here on the deltas.
    """
    torch = _torch()

    class RawHeads(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = model.backbone, model.head
            limit = [math.inf, math.inf, *(model.box_coder.bbox_xform_clip * w for w in model.box_coder.weights[2:])]
            self.register_buffer("limit", torch.tensor(limit).clamp(max=torch.finfo(torch.float32).max))

        def forward(self, pixels: Any) -> tuple[Any, Any]:
            heads = self.head(list(self.backbone(pixels).values()))
            return torch.minimum(heads["bbox_regression"], self.limit), heads["cls_logits"]

    return RawHeads().eval()


def torchvision_anchors(model: Any) -> NDArray[np.float32]:
    """FP32 [N,4]: the default boxes as cx,cy,w,h in 0..1, in the order of the heads."""
    torch = _torch()
    image_list = load_torchvision().models.detection.image_list
    width, height = model.transform.fixed_size
    images = torch.zeros(1, 3, height, width)
    with torch.no_grad():
        features = list(model.backbone(images).values())
    corners = model.anchor_generator(image_list.ImageList(images, [(height, width)]), features)[0].double()
    size = torch.tensor([width, height], dtype=torch.float64)
    low, high = corners[:, :2] / size, corners[:, 2:] / size
    anchors: NDArray[np.float32] = torch.cat([(low + high) / 2, high - low], 1).float().numpy()
    return anchors


def write_torchvision(
    folder: Path, architecture: str, weights: str, labels: Sequence[str] | None
) -> dict[str, dict[str, Any]]:
    """Writes model.onnx, anchors.npy and labels.txt of a torchvision model into a folder.

    Args:
        folder: an empty one.
        architecture, weights, labels: as for `torchvision_model`.

    Returns:
        The tables of its spec.toml, without its name.

    Raises:
        SSDError: torchvision or the weights cannot be had.
    """
    import numpy as np

    model, names = torchvision_model(architecture, weights, labels)
    torch = _torch()
    width, height = model.transform.fixed_size
    batch = {0: "batch"}
    torch.onnx.export(
        raw_heads(model),
        (torch.zeros(2, 3, height, width),),
        str(folder / "model.onnx"),
        input_names=["pixels"],
        output_names=list(contract.HEADS),
        dynamic_axes={"pixels": batch, **dict.fromkeys(contract.HEADS, batch)},
        opset_version=_OPSET,
        dynamo=False,
        do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,  # BatchNormalization stays a node: fusing is the runtime's work
    )
    np.save(folder / "anchors.npy", torchvision_anchors(model))
    (folder / "labels.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    tables: dict[str, dict[str, Any]] = {
        "model": {},
        "input": {
            "width": width,
            "height": height,
            "color_order": "RGB",
            "resize": "stretch",
            "resample": BILINEAR_PLAIN,  # torchvision interpolates without antialiasing
            "mean": [255 * value for value in model.transform.image_mean],
            "std": [255 * value for value in model.transform.image_std],
        },
        "nms": {
            "score_threshold": model.score_thresh,
            "iou_threshold": model.nms_thresh,
            "max_detections": model.detections_per_img,
            "topk_per_class": model.topk_candidates,
            "background_class": 0,
            "score_activation": "softmax",
            "box_coding": "center_size",
            "box_scales": list(model.box_coder.weights),
            "clip_boxes": True,
            "class_agnostic": False,
            "lowest_score_threshold": contract.lowest_for(model.score_thresh),
            "runtime_thresholds": True,
        },
    }
    return tables
