"""`ssd-client batch` with Daft, as a process of its own: rows, errors, a run that was killed, a real Ray cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from ssd_client import SSDClient
from ssd_client.cli import main

from build.serve import TritonServer
from tests.client.conftest import order, scene
from tests.client.fake_model import RAISE
from tests.deploy.conftest import free_ports, need, running, wait
from tests.optional import optional

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.triton

_READ = """
import daft, json, sys
print(json.dumps(daft.read_parquet(sys.argv[1] + "/*.parquet").sort("path").to_pydict()))
"""


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(optional("batch")), str(ROOT / "client")])}


Batch = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def batch(environment: dict[str, str], server: TritonServer, tmp_path: Path) -> Batch:
    """Runs the command in `tmp_path`."""

    def call(*arguments: str, model: str = "fake") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ssd_client", "batch", "--url", server.grpc_url, "--model", model, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    return call


def rows(folder: Path | str, environment: dict[str, str]) -> dict[str, list[Any]]:
    command = [sys.executable, "-c", _READ, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    found: dict[str, list[Any]] = json.loads(done.stdout)
    return found


def fill(folder: Path, count: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"picture {index:04}.png" for index in range(count)]
    for index, path in enumerate(paths):
        Image.fromarray(np.roll(scene(200, 100), 2 * index, axis=1)).save(path)
    return paths


def test_a_row_for_every_picture_and_errors_are_rows(
    batch: Batch, environment: dict[str, str], server: TritonServer, tmp_path: Path
) -> None:
    paths = fill(tmp_path / "in", 9)
    (tmp_path / "in" / "deep").mkdir()
    for name, content in (
        ("text.jpg", b"hello"),
        ("cut.png", paths[0].read_bytes()[:300]),
        ("notes.txt", b"no picture"),
    ):
        (tmp_path / "in" / "deep" / name).write_bytes(content)
    Image.fromarray(order(RAISE)[0]).save(tmp_path / "in" / "raises.png")
    done = batch("in", "in/*0001.png", "--out", "out", "--score-threshold", "0.55", "--chunk", "5")
    assert done.returncode == 1, done.stderr
    assert "12 of 12 pictures, 3 errors" in done.stderr
    found = rows(tmp_path / "out", environment)
    assert list(found) == [
        *("path", "width", "height", "boxes", "scores", "labels", "error", "model", "manifest_sha256"),
    ]
    assert len(set(found["path"])) == len(found["path"]) == 12
    table = dict(zip(found["path"], zip(*list(found.values())[1:], strict=True), strict=True))
    with SSDClient(server.grpc_url, model="fake") as client:
        digest = client.model_config().manifest_sha256
        for path in paths:
            wanted = client.detect(path, score_threshold=0.55)
            boxes, scores = wanted.boxes.tolist(), wanted.scores.tolist()
            assert table[str(path)] == (200, 100, boxes, scores, list(wanted.labels), "", "fake", digest)
    for name, words, size in (
        ("deep/text.jpg", "not a picture", None),
        ("deep/cut.png", "cut off", None),
        ("raises.png", "the picture asked for an error", 64),
    ):
        row = table[str(tmp_path / "in" / name)]
        assert words in row[5]
        assert (row[0], row[2]) == (size, None)
    # Again: nothing is asked, and what is new is added.
    fill(tmp_path / "in", 10)
    before = {path.name for path in (tmp_path / "out").iterdir()}
    done = batch("in", "--out", "out", "--score-threshold", "0.55")
    assert "12 of 13 pictures, 3 errors" in done.stderr
    assert "13 of 13" in done.stderr
    assert len({path.name for path in (tmp_path / "out").iterdir()} - before) == 1
    refused = batch("in", "--out", "out", model="letterbox")
    assert (refused.returncode, "rows of model 'fake'" in refused.stderr) == (2, True)


def test_goes_on_after_it_was_killed(
    batch: Batch, environment: dict[str, str], server: TritonServer, tmp_path: Path
) -> None:
    fill(tmp_path / "in", 120)
    command = [sys.executable, "-m", "ssd_client", "batch", "in", "--out", "out", "--chunk", "20"]
    command += ["--url", server.grpc_url, "--model", "fake"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("*.parquet"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = batch("in", "--out", "out")
    assert done.returncode == 0, done.stderr
    first = int(done.stderr.split(" of ")[0])
    assert 40 <= first < 120
    found = rows(tmp_path / "out", environment)
    assert len(found["path"]) == len(set(found["path"])) == 120
    assert not any(found["error"])
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".parquet", ""}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing/*.png"], "no picture matches nothing/*.png"),
        (["in", "--url", "localhost:9"], "no server answers at localhost:9"),
        (["in", "--score-threshold", "2"], "give numbers in 0..1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_errors(batch: Batch, tmp_path: Path, arguments: list[str], words: str) -> None:
    fill(tmp_path / "in", 1)
    done = batch(*arguments, "--out", "out", "--retries", "0")
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_without_daft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "daft", None)
    assert main(["batch", "in", "--out", "out", "--model", "fake"]) == 2
    assert "pip install './client[batch]'" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.timeout(600)
def test_two_nodes_of_ray_and_a_killed_worker_give_the_same_rows(
    batch: Batch, environment: dict[str, str], server: TritonServer, tmp_path: Path
) -> None:
    fill(tmp_path / "in", 600)
    (tmp_path / "in" / "bad.png").write_bytes(b"hello")
    assert batch("in", "--out", "local").returncode == 1
    script = Path(__file__).with_name("ray_batch.py")
    command = [sys.executable, str(script), "--kill", "in", "--out", "ray", "--chunk", "300"]
    command += ["--url", server.grpc_url, "--model", "fake"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    print(done.stdout[-500:], done.stderr[-2000:])
    assert done.returncode == 1, done.stderr
    assert "nodes: 2" in done.stdout
    assert "killed a worker" in done.stdout
    assert rows(tmp_path / "ray", environment) == rows(tmp_path / "local", environment)


@pytest.fixture
def bucket(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """An empty bucket on an S3 server, which the variables of AWS name in `environment`."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    for name in [name for name in environment if name.startswith("AWS_")]:
        monkeypatch.delitem(environment, name)
    settings = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    for name, value in {**settings, "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}.items():
        monkeypatch.setitem(environment, name, value)
    with running([need("moto_server"), "-H", "127.0.0.1", "-p", str(port)], tmp_path / "log"):
        wait("moto answers", lambda: urllib.request.urlopen(f"{url}/moto-api/data.json", timeout=5), 60)
        put(f"{url}/pictures", b"")
        yield f"{url}/pictures"


def put(url: str, content: bytes) -> None:
    as_it_is = {"Content-Type": "application/octet-stream"}  # urllib's own type makes moto wait for a form
    with urllib.request.urlopen(urllib.request.Request(url, content, as_it_is, method="PUT"), timeout=10):
        pass


def test_pictures_and_rows_in_a_bucket(
    batch: Batch, environment: dict[str, str], server: TritonServer, tmp_path: Path, bucket: str
) -> None:
    paths = fill(tmp_path / "in", 3)
    names = ["one.png", "deep/ä +#%.png", "deep/SHOUTED.PNG"]
    for path, name in zip(paths, names, strict=True):
        put(f"{bucket}/in/{quote(name)}", path.read_bytes())
    put(f"{bucket}/in/bad.jpg", b"hello")
    put(f"{bucket}/in/notes.txt", b"hello")
    done = batch("s3://pictures/in", "--out", "s3://pictures/out", "--score-threshold", "0.55")
    assert (done.returncode, "4 of 4 pictures, 1 errors" in done.stderr) == (1, True), done.stderr
    found = rows("s3://pictures/out", environment)
    assert found["path"] == sorted(f"s3://pictures/in/{name}" for name in [*names, "bad.jpg"])
    assert [bool(error) for error in found["error"]] == [path.endswith("bad.jpg") for path in found["path"]]
    with SSDClient(server.grpc_url, model="fake") as client:
        for path, name in zip(paths, names, strict=True):
            wanted = client.detect(path, score_threshold=0.55)
            assert found["boxes"][found["path"].index(f"s3://pictures/in/{name}")] == wanted.boxes.tolist()
    again = batch("s3://pictures/in/**/*.png", "--out", "s3://pictures/out")
    assert (again.returncode, again.stderr) == (0, "2 of 2 pictures, 0 errors, 0.0/s\nrows in s3://pictures/out\n")


@pytest.mark.long  # Daft asks again and again
def test_a_bucket_that_may_not_be_read_is_one_error_and_no_rows(
    batch: Batch, environment: dict[str, str], tmp_path: Path, bucket: str
) -> None:
    put(f"{bucket}/in/one.jpg", b"hello")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):  # put back by `bucket`
        del environment[name]
    refused = batch("s3://pictures/in/*.jpg", "--out", "out")
    assert refused.returncode == 2
    assert "AWS_ACCESS_KEY_ID" in refused.stderr
    assert "none of 1 pictures can be read" in refused.stderr or "no credentials" in refused.stderr
    assert not list((tmp_path / "out").glob("*.parquet")), "they would count as done"
