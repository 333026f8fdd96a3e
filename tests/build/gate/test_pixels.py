"""One way from picture to tensor: calibration, gate, audit and SDK see the same pixels of every kind of picture."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from PIL import Image
from ssd_client import ImageError, ModelConfig, SSDClient
from ssd_client.preprocess import input_array
from tritonclient.grpc.model_config_pb2 import ModelConfig as TritonConfig

from build.contract import Target
from build.errors import DataError
from build.files import ROOT
from build.gate import datasets, labels, scoring, verify
from build.gate.accuracy import mean_average_precision
from build.pipeline import build_engines
from build.publish import backend
from build.publish.config import config
from build.serve import TritonServer
from build.spec import Spec, load
from tests.build import tiny_model
from tests.client.test_preprocess import tiff

SIZE = (40, 30)


def noise(bands: int, high: int = 256, dtype: type = np.uint8) -> np.ndarray:
    shape = (SIZE[1], SIZE[0], bands) if bands > 1 else (SIZE[1], SIZE[0])
    return np.random.default_rng(3).integers(0, high, shape).astype(dtype)


def transparent(mode: str) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(noise(4)).convert(mode).save(path)


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise(3)).save(path, exif=exif)


def twelve_bits(path: Path) -> None:
    rows = b""
    for row in noise(1, 4096, np.uint16):
        rows += b"".join(
            struct.pack(">I", (int(a) << 12) | int(b))[1:] for a, b in zip(row[::2], row[1::2], strict=True)
        )
    path.write_bytes(tiff(rows, [12], 1, size=SIZE))


KINDS: dict[str, Callable[[Path], None]] = {
    "rgb.png": lambda path: Image.fromarray(noise(3)).save(path),
    "grey.png": lambda path: Image.fromarray(noise(1)).save(path),
    "cmyk.jpg": lambda path: Image.fromarray(noise(3)).convert("CMYK").save(path),
    "turned.jpg": turned,
    "rgba.png": transparent("RGBA"),
    "grey-alpha.png": transparent("LA"),
    "palette-alpha.png": lambda path: Image.fromarray(noise(4)).quantize(16).save(path),
    "frames.gif": lambda path: Image.fromarray(noise(1)).save(
        path, save_all=True, append_images=[Image.new("L", SIZE)]
    ),
    "16-bits.png": lambda path: Image.fromarray(noise(1, 65536, np.uint16)).save(path),
    "16-bits-transparent.png": lambda path: Image.fromarray(noise(1, 65536, np.uint16)).save(path, transparency=7),
    "12-bits.tif": twelve_bits,
    "16-bits-white-is-zero.tif": lambda path: path.write_bytes(
        tiff(noise(1, 65536, np.uint16).astype("<u2").tobytes(), [16], 0, size=SIZE)
    ),
}


@pytest.fixture(params=["stretch", "letterbox"])
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> Spec:
    path = tiny_model.write(tmp_path / "tiny")
    path.write_text(
        path.read_text().replace("[input]\n", f'[input]\nresize = "{request.param}"\n')
        + '\n[data]\ncalibration = "pictures"\nheld_out = "pictures"\n'
    )
    (tmp_path / "tiny" / "pictures").mkdir()
    return load(path)


def sdk(spec: Spec) -> ModelConfig:
    """What the SDK reads from the config.pbtxt that a publish of this spec writes."""
    written = text_format.MessageToString(config(spec, 1, Target("onnxruntime"), "", backend.look()))
    served = text_format.Parse(written, TritonConfig())
    parameters = {name: value.string_value for name, value in served.parameters.items()}
    return ModelConfig.from_triton(served.name, served.max_batch_size, parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_all_see_the_pixels_that_clients_send(spec: Spec, kind: str, tmp_path: Path) -> None:
    path = spec.path.parent / "pictures" / kind
    KINDS[kind](path)
    pixels, placement = input_array(path, sdk(spec).preprocessing)
    assert pixels.std() > 5, "there is something to compare"

    calibrated = np.concatenate(list(datasets.arrays(datasets.calibration(spec, tmp_path), spec.input, 4)))
    assert np.array_equal(calibrated, pixels[None])
    truth = {
        "images": [{"id": 1, "file_name": kind, "width": SIZE[0], "height": SIZE[1]}],
        "categories": [{"id": i + 1, "name": label} for i, label in enumerate(spec.labels)],
        "annotations": [],
    }
    (path.parent / labels.COCO_FILE).write_text(json.dumps(truth))
    looked_at, _ = verify.images_for(spec, tmp_path, 1)
    assert np.array_equal(looked_at, pixels[None])

    boxes = np.random.default_rng(4).uniform(0, 1, (1, 5, 4)).astype(np.float32)
    seen: list[np.ndarray] = []

    def runner(feeds: Any) -> dict[str, np.ndarray]:
        seen.append(feeds["images"])
        scores, classes = np.full((1, 5), 0.5, np.float32), np.zeros((1, 5), np.int32)
        return dict(zip(("num_detections", "detection_boxes", "detection_scores", "detection_classes"),
                        (np.array([[5]], np.int32), boxes, scores, classes), strict=True))  # fmt: skip

    (judged,) = scoring.detector(spec, runner)([path])
    assert np.array_equal(seen[0], pixels[None])
    assert np.array_equal(judged.boxes, placement.to_image(boxes[0]))


def test_what_the_sdk_refuses_the_gate_refuses_too(spec: Spec) -> None:
    path = spec.path.parent / "pictures" / "floats.tif"
    Image.fromarray(noise(1).astype(np.float32)).save(path)
    with pytest.raises(ImageError) as of_the_sdk:
        input_array(path, sdk(spec).preprocessing)
    with pytest.raises(DataError) as of_the_gate:
        datasets.load(path, spec.input)
    assert str(of_the_gate.value) == str(of_the_sdk.value)


@pytest.mark.triton
def test_a_model_for_16_bit_pictures_is_published_with_its_true_map(tmp_path: Path) -> None:
    """shapes on 16-bit greys: plainly converted, they are all white, and nothing is detected."""
    from models.shapes.scenes import write_split
    from perf.served_accuracy import evaluate_served

    sources, count = tmp_path / "models", 24
    folder = sources / "shapes"
    folder.mkdir(parents=True)
    for name in ("model.onnx", "labels.txt", "anchors.npy"):
        (folder / name).symlink_to(ROOT / "models" / "shapes" / name)
    text = (ROOT / "models" / "shapes" / "spec.toml").read_text()
    settings = text.split("[data]")[0] + '[data]\nheld_out = "sixteen"\n\n[quantization]\ngate = 0.9\n'
    (folder / "spec.toml").write_text(settings)
    pictures, truth = write_split(tmp_path / "scenes", "held_out", count)
    (folder / "sixteen").mkdir()
    for path in pictures:
        grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 257
        Image.fromarray(grey).save(folder / "sixteen" / path.name)
    (folder / "sixteen" / "instances.json").write_text(json.dumps(truth))
    maps: list[float] = []

    def judge(ground_truth: dict[str, Any], detections: list[dict[str, Any]]) -> float:
        maps.append(mean_average_precision(ground_truth, detections))
        return maps[-1]

    repository = tmp_path / "served"
    build_engines(
        ["shapes"], "onnxruntime", repository=repository, sources=sources, artifacts=tmp_path / "artifacts", judge=judge
    )
    assert maps[0] == maps[1] > 0.5
    sixteen = [folder / "sixteen" / path.name for path in pictures]
    with TritonServer(repository) as server, SSDClient(server.grpc_url, model="shapes") as client:
        served = evaluate_served(client, sixteen, truth)
    assert served.map == pytest.approx(maps[0], abs=1e-9)


def test_a_model_that_detects_nothing_is_refused(tmp_path: Path) -> None:
    """FP32 with mAP 0 proves nothing: neither the gate nor an audit may pass on it, nor divide by it."""
    spec = load(tiny_model.write(tmp_path / "tiny"))
    pictures = SimpleNamespace(truth={}, paths=(), image_ids=(), category_ids=(), __len__=lambda: 0)
    check = verify.check_accuracy(spec, lambda _: {}, lambda _: {}, pictures, lambda *_: 0.0, 1)  # type: ignore[arg-type]
    assert not check.passed
    assert "0.0000 against 0.0000" in check.detail
    assert "detects nothing of what is labelled" in check.detail
    with pytest.raises(verify.VerifyError, match=r"FP32 has mAP 0\.0000 on the held-out pictures"):
        verify.share_kept(spec, 0.0, 0.0)
    assert verify.share_kept(dataclasses.replace(spec), 0.4, 0.5) == pytest.approx(0.8)
