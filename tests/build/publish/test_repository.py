"""Publishing: whole or not at all, whatever moment the process dies at; rollback; what makes a version stale."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from build import files
from build import spec as specs
from build.contract import SpecNms, Target
from build.errors import PublishError, ServeError, WriteError
from build.publish import backend, repository
from build.publish.backend import Backend
from build.spec import Spec, load
from tests.build import tiny_model
from tests.build.publish.conftest import Publish

ROOT = Path(__file__).resolve().parents[3]
ONNX, PLAN = Target("onnxruntime"), Target("tensorrt")
FILES = {"config.pbtxt", "labels.txt", "manifest.json", "model.onnx"}


@pytest.fixture
def fresh(spec: Spec, root: Path, stand_in: Backend) -> Callable[[], dict[str, Any] | None]:
    """The served manifest, if the spec as it is now would publish the same again."""
    return lambda: repository.fresh_manifest(load(spec.path), root, ONNX, served_by=stand_in)


def config_of(folder: Path) -> ModelConfig:
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


def snapshot(folder: Path) -> dict[str, str]:
    """Every file with its digest."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def versions_of(root: Path) -> list[int]:
    return sorted(int(path.name) for path in (root / "tiny").iterdir() if path.name.isdigit())


def check_whole(root: Path, versions: list[int], served: int) -> None:
    """Nothing but these versions, each as it was published, and one of them served."""
    folder = root / "tiny"
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["tiny"]
    assert sorted(path.name for path in folder.iterdir()) == [*map(str, versions), "config.pbtxt"]
    assert not list(root.parent.glob(".model_repository*"))
    assert repository.served_version(root, "tiny") == served
    assert (folder / "config.pbtxt").read_bytes() == (folder / str(served) / "config.pbtxt").read_bytes()
    for version in versions:
        assert {path.name for path in (folder / str(version)).iterdir()} == FILES
        assert repository.damage(folder / str(version)) == ""
        assert list(config_of(folder / str(version)).version_policy.specific.versions) == [version]


def check_loadable(root: Path, served: int) -> None:
    """What a server would read is there and untouched; every folder of the repository has a config.pbtxt."""
    for folder in (path for path in root.iterdir() if path.is_dir()):
        assert (folder / "config.pbtxt").is_file(), f"a tritonserver would not start: {folder}"
    assert repository.served_version(root, "tiny") == served
    assert repository.damage(root / "tiny" / str(served)) == ""


def test_published_versions_are_whole_and_the_last_two_stay(
    spec: Spec, built: Path, root: Path, publish: Publish
) -> None:
    for version, kept in ((1, [1]), (2, [1, 2]), (3, [2, 3]), (4, [3, 4])):
        assert publish() == version
        check_whole(root, kept, version)
    folder = root / "tiny" / "4"
    assert (folder / "model.onnx").read_bytes() == built.read_bytes()
    assert (folder / "labels.txt").read_text() == "cat\ndog\n"
    data = (folder / "manifest.json").read_bytes()
    manifest = json.loads(data)
    assert data == (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()
    assert config_of(folder).parameters["manifest_sha256"].string_value == hashlib.sha256(data).hexdigest()
    source = hashlib.sha256(spec.onnx_path.read_bytes()).hexdigest()
    assert manifest["inputs"]["model.onnx"] == source
    assert {"labels.txt", "anchors.npy", "build/graph/ssd_nms.py", "build/publish/repository.py"} <= set(
        manifest["inputs"]
    )
    assert manifest["spec"] == spec.settings()
    assert str(root.parent) not in data.decode()


# -- what makes a version stale ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["labels.txt", "anchors.npy", "model.onnx", "model.onnx.data", "precision"])
def test_fresh_until_an_input_changes(
    spec: Spec, root: Path, publish: Publish, fresh: Callable[[], Any], stand_in: Backend, what: str
) -> None:
    assert fresh() is None
    publish()
    manifest = fresh()
    assert manifest is not None
    assert manifest["version"] == 1
    os.utime(spec.onnx_path)  # the time does not matter, the content does
    assert fresh() == manifest
    if what == "precision":
        int8 = Target("onnxruntime", "int8")
        assert repository.fresh_manifest(spec, root, int8, served_by=stand_in) is None
        return
    with (spec.path.parent / what).open("ab") as file:
        file.write(b"\n")
    assert repository.fresh_manifest(spec, root, ONNX, served_by=stand_in) is None


def changed(spec: Spec, root: Path, served_by: Backend) -> list[str]:
    """What differs between the served version and what spec.toml would publish now."""
    _, manifest = repository.served(root, "tiny")
    return repository.changed(manifest, repository.recipe(load(spec.path), ONNX, served_by))


def test_a_changed_setting_makes_it_stale_and_is_named(
    spec: Spec, root: Path, publish: Publish, fresh: Callable[[], Any], stand_in: Backend
) -> None:
    publish()
    assert changed(spec, root, stand_in) == []
    specs.edit(spec.path, {"nms.score_threshold": 0.2, "input.pad_value": 7})
    assert fresh() is None
    assert changed(spec, root, stand_in) == ["input.pad_value", "nms.score_threshold"]


def test_a_changed_default_makes_it_stale_and_is_named(
    spec: Spec,
    root: Path,
    publish: Publish,
    fresh: Callable[[], Any],
    stand_in: Backend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish()
    assert "iou_threshold" not in spec.path.read_text()
    defaults = SpecNms.__init__.__defaults__
    assert defaults
    assert defaults[1] == 0.45
    monkeypatch.setattr(SpecNms.__init__, "__defaults__", (defaults[0], 0.5, *defaults[2:]))
    assert fresh() is None
    assert changed(spec, root, stand_in) == ["nms.iou_threshold"]


def test_comments_and_defaults_that_are_written_out_leave_it_fresh(
    spec: Spec, publish: Publish, fresh: Callable[[], Any]
) -> None:
    publish()
    text = spec.path.read_text().replace("[serving]\n", "[serving]\nqueue_delay_us = 0  # none\n")
    spec.path.write_text(f"# a comment\n{text}\n[quantization]\ngate = 0.99\n")
    assert fresh() is not None


def test_another_backend_makes_it_stale(spec: Spec, root: Path, publish: Publish) -> None:
    publish()
    assert "backend" in changed(spec, root, backend.look(backend.PYTHON))


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "labels.txt"])
def test_a_damaged_version_is_not_fresh(root: Path, publish: Publish, fresh: Callable[[], Any], name: str) -> None:
    publish()
    assert fresh()
    with (root / "tiny" / "1" / name).open("ab") as file:
        file.write(b" ")
    assert fresh() is None


# -- rollback ----------------------------------------------------------------------------------------------------------


def test_rollback_and_publish_after_it(root: Path, publish: Publish) -> None:
    publish()
    publish()
    assert repository.rollback(root, "tiny") == 1
    check_whole(root, [1, 2], 1)
    with pytest.raises(PublishError, match="no version before version 1"):
        repository.rollback(root, "tiny")
    assert publish() == 3  # never 2 again: a server may have seen that one
    check_whole(root, [1, 3], 3)


def test_rollback_refuses(root: Path, publish: Publish) -> None:
    with pytest.raises(PublishError, match="no model 'tiny' is published"):
        repository.rollback(root, "tiny")
    assert not root.exists()
    for _ in range(2):
        publish()
    with pytest.raises(PublishError, match=r"no model 'tony' is published(?s:.*)published are tiny"):
        repository.rollback(root, "tony")
    (root / "tiny" / "1" / "model.onnx").unlink()
    with pytest.raises(PublishError, match="version 1 cannot be served again"):
        repository.rollback(root, "tiny")
    assert repository.served_version(root, "tiny") == 2


# -- death at any moment -----------------------------------------------------------------------------------------------

# Reads jobs, and has a fork of itself do each: a publish that dies after so many steps, or publishes without end.
MORTALS = """
import itertools, json, os, signal, sys
from pathlib import Path
import google.protobuf.text_format, tritonclient.grpc.model_config_pb2
from build.contract import Target
from build.publish import repository
from build.publish.backend import Backend
from build.spec import load
ONNX = Target("onnxruntime")
for line in sys.stdin:
    spec, built, root, name, steps = json.loads(line)
    child = os.fork()
    if not child:
        try:
            spec, built, root = load(spec), Path(built), Path(root)
            served_by = Backend(name, "", {}, ())
            print(os.getpid(), flush=True)
            while steps is None:
                print(repository.publish(spec, built, root, ONNX, served_by=served_by), flush=True)
            with repository._locked(root, "tiny") as folder:
                publishing = repository.publishing(spec, built, folder, ONNX, served_by=served_by)
                for _ in itertools.islice(publishing, steps):
                    pass
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Mortals:
    """Publishes of the tiny model that die; every one is a process of its own, forked from one that has no threads."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def _start(self, spec: Spec, built: Path, root: Path, served_by: Backend, steps: int | None) -> int:
        assert self._process.stdin is not None
        job = [str(spec.path), str(built), str(root), served_by.name, steps]
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the helper ended"
        return line.strip()

    def die_after(self, steps: int, spec: Spec, built: Path, root: Path, served_by: Backend) -> None:
        """One publish, killed after so many of its steps."""
        self._start(spec, built, root, served_by, steps)
        assert int(self._line()) == -signal.SIGKILL

    def die_within(self, seconds: float, spec: Spec, built: Path, root: Path, served_by: Backend) -> None:
        """Publish upon publish, killed that long after the first is done."""
        process = self._start(spec, built, root, served_by, None)
        self._line()
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
        while int(self._line()) != -signal.SIGKILL:
            pass


@pytest.fixture(scope="module")
def mortals() -> Iterator[Mortals]:
    command = [sys.executable, "-c", MORTALS]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Mortals(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize("before", [0, 1, 2])
def test_killed_after_any_step_the_old_version_is_served(
    spec: Spec, built: Path, root: Path, stand_in: Backend, publish: Publish, mortals: Mortals, before: int
) -> None:
    for _ in range(before):
        publish()
    backup = root.with_name("backup")
    if before:
        shutil.copytree(root, backup)
    whole = 0
    for steps in range(len(FILES) + 7):
        shutil.rmtree(root, ignore_errors=True)
        if before:
            shutil.copytree(backup, root)
        mortals.die_after(steps, spec, built, root, stand_in)
        new = before + 1
        if repository.served_version(root, "tiny") == new:
            whole += 1
            check_loadable(root, new)
        elif before:
            check_loadable(root, before)
        else:
            assert not [path for path in root.glob("*") if path.is_dir()]  # a tritonserver takes any for a model
        publish()
        last = repository.served_version(root, "tiny")
        assert last is not None
        assert last >= new
        check_whole(root, versions_of(root), last)
        assert len(versions_of(root)) <= 2
    assert 1 <= whole <= 4  # some deaths came after the commit, most before


def test_killed_at_random_moments(
    spec: Spec, built: Path, root: Path, stand_in: Backend, publish: Publish, mortals: Mortals
) -> None:
    publish()
    started = time.monotonic()
    publish()
    longest = 2 * (time.monotonic() - started)
    chance = random.Random(0)
    for _ in range(8):
        mortals.die_within(chance.uniform(0, longest), spec, built, root, stand_in)
        served = repository.served_version(root, "tiny")
        assert served is not None
        check_loadable(root, served)
    version = publish()
    check_whole(root, versions_of(root), version)


@pytest.mark.triton
def test_a_real_server_starts_on_what_a_killed_publish_left(
    spec: Spec, built: Path, root: Path, mortals: Mortals
) -> None:
    from build.serve import TritonServer

    served_by = backend.prepare()
    if served_by.files:
        pytest.skip("needs a C++ compiler: the steps are counted for our own backend")
    # A first publish that died: the server has nothing to load, and nothing to stumble over.
    mortals.die_after(4, spec, built, root, served_by)
    with pytest.raises(ServeError, match="no model is published"):
        TritonServer(root).start()
    repository.publish(spec, built, root, ONNX, served_by=served_by)
    mortals.die_after(len(FILES) + 2, spec, built, root, served_by)  # version 2 whole, config.pbtxt still names 1
    assert versions_of(root) == [1, 2]
    mortals.die_after(3, spec, built, root, served_by)  # and version 3 half-written beside the version folders
    assert versions_of(root) == [1, 2]
    assert [path.name for path in (root / "tiny").glob(".*")] == [".publishing"]
    with TritonServer(root, extra_args=["--exit-on-error=true"]) as server:
        assert server.check() is None


# -- what the system refuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "function"),
    [
        *((0, name) for name in ("mkdir", "rename", "open", "fsync")),
        *((1, name) for name in ("mkdir", "rename", "replace", "open", "fsync")),
    ],
)
@pytest.mark.parametrize(
    ("number", "why"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "it is mounted read-only"),
        (errno.EACCES, "it belongs to another user"),
    ],
)
def test_what_the_system_refuses_leaves_the_old_version(
    root: Path,
    publish: Publish,
    monkeypatch: pytest.MonkeyPatch,
    before: int,
    function: str,
    number: int,
    why: str,
) -> None:
    for _ in range(before):
        publish()
    root.mkdir(exist_ok=True)
    old = snapshot(root)

    def refuse(real: Callable[..., object]) -> Callable[..., object]:
        def refusing(*args: object, **kwargs: object) -> object:
            inside = not args or isinstance(args[0], int) or "model_repository" in str(args[0])
            writes = function != "open" or "wb" in args
            if inside and writes:
                raise OSError(number, os.strerror(number), None if isinstance(args[0], int) else str(args[0]))
            return real(*args, **kwargs)

        return refusing

    owner = os if function == "fsync" else Path
    monkeypatch.setattr(owner, function, refuse(getattr(owner, function)))
    with pytest.raises(PublishError, match=os.strerror(number)) as caught:
        publish()
    monkeypatch.undo()
    assert "not published, what was served before is untouched" in caught.value.what
    assert caught.value.why == why
    new = snapshot(root)
    new.pop(".tiny.lock", None)
    old.pop(".tiny.lock", None)
    assert new == old
    assert repository.served_version(root, "tiny") == (before or None)
    assert publish() == before + 1
    check_whole(root, list(range(1, before + 2)), before + 1)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.write(path, b"a calibration"),
        lambda path: files.write_json(path, {"an": "audit"}),
        lambda path: specs.edit(path, {"nms.score_threshold": 0.5}),
    ],
    ids=["calibration", "audit", "spec.toml"],
)
def test_only_publishing_speaks_of_what_is_served(
    spec: Spec, write: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = snapshot(spec.path.parent)

    def refuse(path: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(WriteError, match=r"spec\.toml: cannot be written, and is as it was: No space left") as caught:
        write(spec.path)
    assert (caught.value.why, caught.value.fix) == ("the disk is full", "free some space")
    assert "not published" not in str(caught.value)
    assert "served" not in str(caught.value).replace(str(spec.path.parent), "")
    assert snapshot(spec.path.parent) == old


def test_a_disk_that_fills_up_in_mid_file(built: Path, root: Path, publish: Publish) -> None:
    publish()
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (built.stat().st_size // 2, hard))
    try:
        with pytest.raises(PublishError, match="what was served before is untouched: File too large"):
            publish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    check_whole(root, [1], 1)


def test_a_repository_that_is_no_folder(root: Path, publish: Publish) -> None:
    root.write_text("a file")
    with pytest.raises(PublishError, match="File exists"):
        publish()


def test_two_publishes_at_once(root: Path, publish: Publish) -> None:
    with repository._locked(root, "tiny"), pytest.raises(PublishError, match="by another process"):
        publish()
    with repository._locked(root, "other"):
        assert publish() == 1


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_plan_is_published_with_its_facts(spec: Spec, built: Path, root: Path) -> None:
    here = {"gpu": "NVIDIA H200", "compute_capability": "9.0", "tensorrt": "10.13.2", "plugin_sha256": "cd" * 32}
    facts = {"target": here, "engine": tiny_model.engine_of(spec), "verified": {"passed": True}}
    assert repository.publish(spec, built, root, PLAN, facts) == 1
    names = {path.name for path in (root / "tiny" / "1").iterdir()}
    assert names == {"config.pbtxt", "labels.txt", "manifest.json", "model.plan"}
    manifest = repository.fresh_manifest(spec, root, PLAN, here)
    assert manifest is not None
    assert manifest["engine"]["tensorrt"] == "10.13.2"
    assert manifest["verified"] == {"passed": True}
    for key in here:  # another GPU, TensorRT or plugin: stale
        assert repository.fresh_manifest(spec, root, PLAN, here | {key: "other"}) is None
