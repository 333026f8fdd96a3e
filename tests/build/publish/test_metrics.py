"""The metrics of our backends: what they count, and that a version's series go with it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from build.contract import Target
from build.files import ROOT, sha256
from build.publish import backend, repository
from build.serve import TritonServer
from build.spec import Spec
from models.shapes.scenes import scene
from tests.build.publish.test_hot import wait_for
from tests.reliability.overload import feeds

HISTOGRAMS = ("ssd_execution_seconds", "ssd_detections_per_image")
SOURCES = Path(backend.__file__).parent / "backends"
LINE = re.compile(r"^(ssd_\w+)\{(.*)\} (\S+)$", re.M)


def page(server: TritonServer) -> str:
    """The page of metrics, which a server opens a moment after it is ready."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return read(server)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def read(server: TritonServer) -> str:
    with urllib.request.urlopen(server.metrics_url) as answer:
        text: str = answer.read().decode()
        return text


def series(server: TritonServer, model: str = "shapes", version: str = "1") -> Counter[tuple[str, str]]:
    """Our series of one version: (name, bound of the bucket or nothing) → value."""
    values: Counter[tuple[str, str]] = Counter()
    for name, text, value in LINE.findall(page(server)):
        labels = dict(re.findall(r'(\w+)="([^"]*)"', text))
        if (labels.pop("model"), labels.pop("version")) == (model, version):
            assert set(labels) <= {"le"}
            values[name, labels.get("le", "")] = float(value)
    return values


def bounds(source: str) -> dict[str, list[float]]:
    """What a backend's source gives as bounds of its histograms."""
    text = (SOURCES / source).read_text()
    if source.endswith(".h"):
        found = re.findall(r'"(ssd_\w+)",[^{]*?\{([\d., \n]+)\}', text)
    else:
        lists = re.findall(r"^(\w+)_BOUNDS = \[([^\]]*)\]", text, re.M)
        found = [(name, numbers) for name, (_, numbers) in zip(HISTOGRAMS, lists, strict=True)]
    return {name: [float(number) for number in re.findall(r"[\d.]+", numbers)] for name, numbers in found}


def test_both_backends_have_the_same_buckets() -> None:
    assert bounds("ssd_onnxruntime/metrics.h") == bounds("python/model.py")
    assert set(bounds("python/model.py")) == set(HISTOGRAMS)


def check_counts(server: TritonServer) -> None:
    """Six images in three requests, a request without num_detections and an invalid one, counted exactly."""
    before = series(server)
    with closing(triton_grpc.InferenceServerClient(server.grpc_url)) as client:
        detections = []
        for images in (1, 2, 3):  # the first one of each request is blank
            inputs = feeds(images)
            pixels = np.zeros((images, 300, 300, 3), np.uint8)
            for row in range(1, images):
                pixels[row] = scene("held_out", row).image
            inputs[0].set_data_from_numpy(pixels)
            answer = client.infer("shapes", inputs)
            detections += answer.as_numpy("num_detections").ravel().tolist()
        client.infer("shapes", feeds(1), outputs=[triton_grpc.InferRequestedOutput("detection_scores")])
        wrong = feeds(1)
        wrong[1].set_data_from_numpy(np.full((1, 1), 7, np.float32))
        with pytest.raises(InferenceServerException):
            client.infer("shapes", wrong)
    after = series(server)
    added = Counter({key: value - before[key] for key, value in after.items()})
    assert added["ssd_client_errors", ""] == 1
    assert added["ssd_execution_seconds_count", ""] == 4
    assert 0 < added["ssd_execution_seconds_sum", ""] < 60
    assert added["ssd_detections_per_image_count", ""] == len(detections) == 6
    assert added["ssd_detections_per_image_sum", ""] == sum(detections) > 0
    for name, numbers in bounds("ssd_onnxruntime/metrics.h").items():
        seen = {bound: value for (series_name, bound), value in added.items() if series_name == f"{name}_bucket"}
        assert sorted(map(float, seen)) == [*numbers, np.inf]
        assert seen["+Inf"] == added[f"{name}_count", ""]
        if name == "ssd_detections_per_image":
            assert all(value == sum(count <= float(bound) for count in detections) for bound, value in seen.items())
        else:
            assert sorted(seen.values()) == [seen[bound] for bound in sorted(seen, key=float)]


@pytest.mark.triton
def test_what_is_answered_is_counted(server: TritonServer) -> None:
    check_counts(server)
    kinds = re.findall(r"^# TYPE (ssd_\w+) (\w+)$", page(server), re.M)
    assert dict(kinds) == {"ssd_client_errors": "counter", **dict.fromkeys(HISTOGRAMS, "histogram")}


@pytest.mark.triton
def test_canaries_count_no_detections(server: TritonServer) -> None:
    """Their images are blank: an idle server would look as if its model found nothing any more."""
    before = series(server)
    server.check()
    command = [sys.executable, "-I", str(ROOT / "deploy" / "docker" / "canary.py"), f"http://{server.http_url}"]
    subprocess.run(command, check=True)
    after = series(server)
    assert after["ssd_execution_seconds_count", ""] == before["ssd_execution_seconds_count", ""] + 2
    assert after["ssd_detections_per_image_count", ""] == before["ssd_detections_per_image_count", ""]


@pytest.mark.triton
@pytest.mark.long
def test_a_server_that_knows_no_histograms_has_the_same_series(native: None, repository: Path, tmp_path: Path) -> None:
    """Compiled to look for a function that no server has, as an older Triton has not the right one."""
    target = tmp_path / backend.NATIVE
    shutil.copytree(backend.BACKENDS / backend.NATIVE, target)
    compiler, renamed = shutil.which("c++") or "g++", "-DTRITONSERVER_MetricObserve=TRITONSERVER_NotThere"
    sources = sorted(map(str, (SOURCES / backend.NATIVE).glob("*.cpp")))
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", renamed]
    subprocess.run([compiler, *flags, "-o", str(target / backend.LIBRARY), *sources, "-ldl"], check=True)
    facts = json.loads((target / backend.INSTALLED).read_bytes())
    facts["files"][backend.LIBRARY] = sha256(target / backend.LIBRARY)
    (target / backend.INSTALLED).write_text(json.dumps(facts))
    with TritonServer(repository, backends=tmp_path) as server:
        check_counts(server)
        assert "# TYPE ssd_execution_seconds_bucket counter" in page(server)


@pytest.mark.triton
@pytest.mark.parametrize("name", [backend.NATIVE, pytest.param(backend.PYTHON, marks=pytest.mark.long)])
def test_the_series_of_an_old_version_go_with_it(native: None, spec: Spec, built: Path, root: Path, name: str) -> None:
    served_by = backend.prepare(name)
    for _ in range(2):
        repository.publish(spec, built, root, Target("onnxruntime"), served_by=served_by)
    with TritonServer(root, poll_seconds=1) as server:
        assert series(server, "tiny", "2")["ssd_execution_seconds_bucket", "+Inf"] == 0
        assert not series(server, "tiny", "1")
        repository.publish(spec, built, root, Target("onnxruntime"), served_by=served_by)
        wait_for(server, 3)
        deadline = time.monotonic() + 15
        while series(server, "tiny", "2"):
            assert time.monotonic() < deadline, "the series of a version that is unloaded are still there"
            time.sleep(0.1)
        assert len(series(server, "tiny", "3")) == sum(len(b) + 3 for b in bounds("python/model.py").values()) + 1
