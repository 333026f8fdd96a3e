"""The picture input: published, rolled back and removed with its model; bit for bit what a client finds."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image
from ssd_client import SSDClient
from tritonclient.utils import InferenceServerException

from build import spec as specs
from build.contract import Target
from build.errors import PublishError, ServeError
from build.graph.attach import attach
from build.publish import backend, picture
from build.publish import repository as store
from build.publish.backend import Backend
from build.serve import TritonServer
from build.spec import Spec
from tests.build import tiny_model

TARGET = Target("onnxruntime")
PARTS = picture.parts("tiny")
ROOT = Path(__file__).parents[3]


def with_picture(spec: Spec, wanted: bool = True) -> Spec:
    source = spec.labels_path.parent / "spec.toml"
    specs.edit(source, {"serving.picture_input": wanted})
    return specs.load(source)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A tiny letterboxed model with run-time thresholds and its picture input."""
    folder = tmp_path_factory.mktemp("picture")
    source = tiny_model.write(folder / "models" / "tiny", thresholds=True)
    edits = {"input.resize": "letterbox", "serving.picture_input": True, "serving.instances": 1}
    specs.edit(source, edits)
    spec = specs.load(source)
    (folder / "built.onnx").write_bytes(attach(spec).SerializeToString())
    served_by = backend.prepare("auto")
    root = folder / "model_repository"
    version = store.publish(spec, folder / "built.onnx", root, TARGET, served_by=served_by)
    assert picture.bring_about(spec, root, version, "onnxruntime")
    with TritonServer(root) as running:
        yield running
        running.check()


def files() -> dict[str, bytes]:
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (37, 91, 4), np.uint8)
    turned = Image.Exif()
    turned[274] = 6
    made = {}
    for name, image, kind, options in (
        ("wide.jpg", Image.fromarray(pixels[..., :3]), "JPEG", {"quality": 80}),
        ("turned.jpg", Image.fromarray(pixels[..., :3]), "JPEG", {"exif": turned}),
        ("clear.png", Image.fromarray(pixels), "PNG", {}),
        ("deep.png", Image.fromarray(rng.integers(0, 65536, (60, 20)).astype(np.uint16)), "PNG", {}),
        ("tall.webp", Image.fromarray(np.rot90(pixels[..., :3])), "WEBP", {}),
    ):
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        made[name] = stream.getvalue()
    return made


def ask(server: TritonServer, file: bytes, **parameters: Any) -> dict[str, Any]:
    with triton.InferenceServerClient(server.http_url) as client:
        given = triton.InferInput("image", [1, len(file)], "UINT8")
        given.set_data_from_numpy(np.frombuffer(file, np.uint8)[None])
        answer = client.infer("tiny_picture", [given], parameters=parameters or None)
        return {output["name"]: answer.as_numpy(output["name"])[0] for output in answer.get_response()["outputs"]}


@pytest.mark.triton
@pytest.mark.parametrize("parameters", [{}, {"score_threshold": "0.35", "iou_threshold": "0.2"}], ids=["own", "given"])
def test_finds_what_a_client_finds_bit_for_bit(server: TritonServer, parameters: dict[str, str]) -> None:
    found = 0
    with SSDClient(server.grpc_url, model="tiny") as client:
        for name, file in files().items():
            answer = ask(server, file, **parameters)
            wanted = client.detect(file, **{key: float(value) for key, value in parameters.items()})
            count = int(answer["num_detections"][0])
            found += count
            assert count == len(wanted), name
            assert answer["detection_boxes"][:count].tobytes() == wanted.boxes.tobytes(), name
            assert answer["detection_scores"][:count].tobytes() == wanted.scores.tobytes(), name
            assert answer["detection_classes"][:count].tobytes() == wanted.class_ids.tobytes(), name
            assert not answer["detection_boxes"][count:].any()
            assert tuple(answer["image_size"]) == wanted.image_size
    assert found > 5


@pytest.mark.triton
def test_errors_are_the_clients_and_stay_with_their_request(server: TritonServer) -> None:
    file = files()["wide.jpg"]
    for given, parameters, words in (
        (b"hello", {}, "is not a picture in any known format"),
        (file[:500], {}, "damaged or was cut off"),
        (file, {"score_threshold": "2"}, "score_threshold is '2'"),
        (file, {"iou_threshold": "x"}, "iou_threshold is 'x'"),
    ):
        with pytest.raises(InferenceServerException, match=words):
            ask(server, given, **parameters)
    assert ask(server, file)["image_size"].tolist() == [91, 37]


@pytest.mark.triton
def test_canaries_send_a_picture_and_leave_the_steps_alone(server: TritonServer) -> None:
    command = [sys.executable, "-I", ROOT / "deploy" / "docker" / "canary.py", f"http://{server.http_url}"]
    for ask_all in (server.check, lambda: subprocess.run(command, check=True)):
        before = {name: server.requests(name) for name in server.models}
        ask_all()
        assert {name: server.requests(name) - count for name, count in before.items()} == {
            "tiny": 2,  # once by itself, once for a picture
            **dict.fromkeys(PARTS, 1),
        }


def served(root: Path) -> dict[str, int | None]:
    return {name: store.served_version(root, name) for name in ("tiny", *PARTS) if (root / name).exists()}


def test_goes_with_its_model(spec: Spec, built: Path, root: Path, stand_in: Backend) -> None:
    def publish(wanted: bool) -> int:
        chosen = with_picture(spec, wanted)
        version = store.publish(chosen, built, root, TARGET, served_by=stand_in)
        picture.bring_about(chosen, root, version, "onnxruntime")
        assert not picture.bring_about(chosen, root, version, "onnxruntime"), "not the second time"
        return version

    def roll_back() -> None:
        picture.serve(root, "tiny", store.rollback(root, "tiny"))

    assert publish(True) == 1
    assert served(root) == dict.fromkeys(("tiny", *PARTS), 1)
    publish(True)
    publish(True)
    assert served(root) == dict.fromkeys(("tiny", *PARTS), 3)
    assert {path.name for path in (root / PARTS[0]).iterdir()} == {"2", "3", "config.pbtxt"}
    roll_back()
    assert served(root) == dict.fromkeys(("tiny", *PARTS), 2)
    assert "model_version: 2" in (root / PARTS[-1] / "config.pbtxt").read_text()
    publish(False)
    assert served(root) == {"tiny": 4}
    roll_back()
    assert served(root) == {"tiny": 2}
    assert not [path for path in root.parent.iterdir() if "publishing" in path.name]


def test_what_is_damaged_is_mended_and_what_is_of_others_stays(
    spec: Spec, built: Path, root: Path, stand_in: Backend
) -> None:
    chosen = with_picture(spec)
    version = store.publish(chosen, built, root, TARGET, served_by=stand_in)
    picture.bring_about(chosen, root, version, "onnxruntime")
    step = root / PARTS[0] / "1" / "model.py"
    assert not [store.fault(root / part) for part in PARTS if store.fault(root / part)]
    step.write_text("")
    assert store.fault(root / PARTS[0]) == "a file of it has changed since"
    with pytest.raises(ServeError, match=rf"{PARTS[0]} is damaged: a file (.|\n)*--model tiny --force"):
        TritonServer(root).start()
    assert picture.bring_about(chosen, root, version, "onnxruntime")
    assert "class TritonPythonModel" in step.read_text()
    store.publish(chosen, built, root, TARGET, served_by=stand_in)  # and dies before the parts
    assert {store.fault(root / part) for part in PARTS} == {"it is for version 1, its model serves 2"}
    config = root / PARTS[-1] / "config.pbtxt"
    config.write_text('name: "tiny_picture"\nplatform: "ensemble"\n')
    with pytest.raises(PublishError, match="is a model of its own"):
        picture.bring_about(chosen, root, version, "onnxruntime")
    assert not picture.owner(config.parent)
    picture.remove(root, "tiny")
    assert config.is_file()
    assert not (root / PARTS[0]).exists()


def test_a_change_of_the_step_makes_a_version_stale(spec: Spec, stand_in: Backend) -> None:
    names = set(store.recipe(with_picture(spec), TARGET, stand_in)["inputs"])
    assert set(picture.SOURCES) <= names
    assert not set(picture.SOURCES) & set(store.recipe(with_picture(spec, False), TARGET, stand_in)["inputs"])
    settings = json.dumps(store.recipe(with_picture(spec), TARGET, stand_in)["spec"])
    assert '"serving.picture_input": true' in settings
