"""A model that is replaced, and rolled back, while clients use it."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from ssd_client import InvalidInputError, SSDClient

from build.serve import TritonServer
from tests.client.conftest import CLIENTS, HEIGHT, LETTERBOX, PARAMETERS, WIDTH, config_proto, scene, server_on, url_of

pytestmark = pytest.mark.triton
OTHER = {**LETTERBOX, "labels": '["circle", "square", "sum"]', "runtime_thresholds": "true", "iou_threshold": "0.5"}
LARGER = {**PARAMETERS, "labels": '["a", "b", "c"]', "input_width": "100", "input_height": "90"}


class Model:
    """The model `fake` of a server with explicit model control."""

    def __init__(self, repository: Path, server: TritonServer) -> None:
        self._folder, self._server = repository / "fake", server

    def serve(self, version: int, parameters: dict[str, str], most: int = 8, named: bool = True) -> None:
        """Serve a version with these parameters; `named`: the configuration names its version, as ours do."""
        if not (self._folder / str(version)).exists():
            shutil.copytree(self._folder / "1", self._folder / str(version))
        config = config_proto("fake", parameters, most)
        config.input[0].dims[:2] = [int(parameters["input_height"]), int(parameters["input_width"])]
        if named:
            config.version_policy.specific.versions.append(version)
        else:
            config.version_policy.latest.num_versions = 1
        (self._folder / "config.pbtxt").write_text(text_format.MessageToString(config))
        url = f"http://{self._server.http_url}/v2/repository/models/fake/load"
        urllib.request.urlopen(urllib.request.Request(url, data=b"{}")).close()


@pytest.fixture(scope="module")
def model(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, TritonServer]]:
    folder = shutil.copytree(repository, tmp_path_factory.mktemp("replaced") / "repository")
    with server_on(folder, "--model-control-mode=explicit", "--load-model=fake") as server:
        yield Model(folder, server), server


def test_every_client_sees_every_version(model: tuple[Model, TritonServer]) -> None:
    control, server = model
    picture = scene(1000, 250)
    with contextlib.ExitStack() as stack:
        clients: dict[str, Any] = {
            f"{kind.__name__} {protocol} {memory}": stack.enter_context(
                kind(url_of(server, protocol), model="fake", protocol=protocol, shared_memory=memory, timeout=20)
            )
            for kind in CLIENTS
            for protocol in ("grpc", "http")
            for memory in (None, "system")
        }

        def check(labels: str, versions: str, iou: float) -> None:
            for name, client in clients.items():
                detections = client.detect(picture)
                assert detections.labels == tuple(labels.split()), name
                # A letterbox read as a stretched picture, or the other way round, is off by hundreds of pixels.
                assert np.abs(detections.boxes[0] - [200, 50, 400, 150]).max() < 1.5 * 1000 / WIDTH, name
                assert detections.scores[2] == np.float32(iou), f"{name}: the model's own threshold was sent"
                assert client.model_config().version == versions, name
                assert len(client.detect([picture] * 9)) == 9

        control.serve(1, PARAMETERS, named=False)
        check("red blue checksum", "1", 0.45)
        control.serve(2, OTHER)
        check("circle square sum", "2", 0.5)
        control.serve(3, LARGER, most=2)  # every request of before is refused
        check("a b c", "3", 0.45)
        control.serve(2, OTHER)  # a rollback
        check("circle square sum", "2", 0.5)


def test_images_made_by_the_rules_before(model: tuple[Model, TritonServer]) -> None:
    """Nobody but the caller of infer() can make them again."""
    control, server = model
    images = np.zeros((1, HEIGHT, WIDTH, 3), np.uint8)
    control.serve(1, PARAMETERS)
    with SSDClient(server.grpc_url, model="fake") as client:
        client.infer(images)
        control.serve(5, {**PARAMETERS, "iou_threshold": "0.5"})
        assert client.infer(images)["detection_scores"][0, 0] == np.float32(0.5), "asked again by itself"
        control.serve(6, OTHER)
        with pytest.raises(InvalidInputError, match=r"was replaced by one whose input is made by .*letterbox"):
            client.infer(images)
        assert client.infer(images)["detection_scores"][0, 0] == np.float32(0.5)
        control.serve(7, LARGER)
        with pytest.raises(InvalidInputError, match=r"takes uint8\[batch, 90, 100, 3\]"):
            client.infer(images)


@pytest.mark.long
def test_versions_that_take_turns(model: tuple[Model, TritonServer]) -> None:
    """Eight clients ask without pause for half a minute; three versions that want different requests take turns."""
    control, server = model
    control.serve(1, PARAMETERS)
    labels = {("red", "blue", "checksum"), ("circle", "square", "sum"), ("a", "b", "c")}
    picture, end = scene(1000, 250), time.monotonic() + 30

    def ask(client: Any) -> int:
        count = 0
        while time.monotonic() < end:
            detections = client.detect(picture)
            assert detections.labels in labels
            assert np.abs(detections.boxes[0] - [200, 50, 400, 150]).max() < 1.5 * 1000 / WIDTH
            count += 1
        return count

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(8) as threads:
        answers = [
            threads.submit(
                ask,
                stack.enter_context(
                    kind(url_of(server, protocol), model="fake", protocol=protocol, shared_memory=memory, retries=6)
                ),
            )
            for kind in CLIENTS
            for protocol in ("grpc", "http")
            for memory in (None, "system")
        ]
        for turn in itertools.count():
            if time.monotonic() > end - 2:
                break
            control.serve(*((1, PARAMETERS), (2, OTHER), (3, LARGER))[turn % 3])
            time.sleep(0.5)
        assert all(answer.result() > 10 for answer in answers)
