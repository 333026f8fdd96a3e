"""Publishing: whole or not at all, whatever moment the process dies at; rollback; config.pbtxt and manifest."""

from __future__ import annotations

import dataclasses
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from build.errors import PublishError, ServeError
from build.graph.attach import attach
from build.publish import backend, repository
from build.spec import Spec, load
from tests.build import tiny_model

ROOT = Path(__file__).resolve().parent.parent.parent
KIND = ("fp32", "onnxruntime")
FILES = {"config.pbtxt", "labels.txt", "manifest.json", "model.onnx", *backend.prepare().files}


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    return load(tiny_model.write(tmp_path / "models" / "tiny"))


@pytest.fixture
def built(spec: Spec, tmp_path: Path) -> Path:
    path = tmp_path / "built.onnx"
    path.write_bytes(attach(spec).SerializeToString())
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "model_repository"


def config_of(folder: Path) -> ModelConfig:
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


def snapshot(folder: Path) -> dict[str, str]:
    """Every file with its digest."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def check_whole(target: Path, versions: list[int], served: int) -> None:
    """Nothing but these versions, each as it was published, and one of them served."""
    folder = target / "tiny"
    assert sorted(path.name for path in target.iterdir() if path.is_dir()) == ["tiny"]
    assert sorted(path.name for path in folder.iterdir()) == [*map(str, versions), "config.pbtxt"]
    assert not list(target.parent.glob(".model_repository*"))
    assert repository.served_version(target, "tiny") == served
    assert (folder / "config.pbtxt").read_bytes() == (folder / str(served) / "config.pbtxt").read_bytes()
    for version in versions:
        assert {path.name for path in (folder / str(version)).iterdir()} == FILES
        assert repository._damage(folder / str(version)) == ""
        assert list(config_of(folder / str(version)).version_policy.specific.versions) == [version]


def check_loadable(target: Path, served: int) -> None:
    """What a server would read is there and untouched; every folder of the repository has a config.pbtxt."""
    for folder in (path for path in target.iterdir() if path.is_dir()):
        assert (folder / "config.pbtxt").is_file(), f"a tritonserver would not start: {folder}"
    assert repository.served_version(target, "tiny") == served
    assert repository._damage(target / "tiny" / str(served)) == ""


def test_config_says_all_that_a_client_needs(spec: Spec) -> None:
    config = repository.config(spec, 7, *KIND, "ab" * 32)
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", backend.prepare().name, 4)
    assert list(config.version_policy.specific.versions) == [7]
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [
        ("images", 2, [8, 8, 3]),
        ("score_threshold", 11, [1]),
        ("iou_threshold", 11, [1]),
    ]
    assert [(o.name, o.data_type, list(o.dims)) for o in config.output] == [
        ("num_detections", 8, [1]),
        ("detection_boxes", 11, [5, 4]),
        ("detection_scores", 11, [5]),
        ("detection_classes", 8, [5]),
    ]
    assert not config.HasField("dynamic_batching")
    (group,) = config.instance_group
    threads = int(config.parameters["threads"].string_value)
    assert group.kind == ModelInstanceGroup.KIND_CPU
    assert 1 <= group.count * threads <= repository.cores()
    assert {name: value.string_value for name, value in config.parameters.items() if name != "threads"} == {
        "contract": "1",
        "input_width": "8",
        "input_height": "8",
        "color_order": "RGB",
        "resize": "stretch",
        "resample": "bilinear",
        "pad_value": "114",
        "labels": '["cat", "dog"]',
        "score_threshold": "0.1",
        "iou_threshold": "0.45",
        "runtime_thresholds": "true",
        "max_detections": "5",
        "precision": "fp32",
        "runtime": "onnxruntime",
        "manifest_sha256": "ab" * 32,
    }


@pytest.mark.parametrize(
    ("cores", "instances", "threads", "chosen"),
    [(8, 0, 0, (8, 1)), (8, 2, 0, (2, 4)), (8, 0, 4, (2, 4)), (1, 0, 0, (1, 1)), (2, 3, 0, (3, 1)), (4, 1, 2, (1, 2))],
)
def test_instances_and_threads_fill_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, instances: int, threads: int, chosen: tuple[int, int]
) -> None:
    path = tiny_model.write(tmp_path)
    path.write_text(path.read_text() + f"instances = {instances}\nthreads = {threads}\n")
    monkeypatch.setattr(repository, "cores", lambda: cores)
    serving = repository.recipe(load(path), *KIND)["serving"]
    assert (serving["instances"], serving["threads"]) == chosen


def test_published_versions_are_whole_and_the_last_two_stay(spec: Spec, built: Path, target: Path) -> None:
    for version, kept in ((1, [1]), (2, [1, 2]), (3, [2, 3]), (4, [3, 4])):
        assert repository.publish(spec, built, target, *KIND) == version
        check_whole(target, kept, version)
    folder = target / "tiny" / "4"
    assert (folder / "model.onnx").read_bytes() == built.read_bytes()
    assert (folder / "labels.txt").read_text() == "cat\ndog\n"
    data = (folder / "manifest.json").read_bytes()
    manifest = json.loads(data)
    assert data == (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()
    assert config_of(folder).parameters["manifest_sha256"].string_value == hashlib.sha256(data).hexdigest()
    source = hashlib.sha256(spec.onnx_path.read_bytes()).hexdigest()
    assert manifest["inputs"]["model.onnx"] == source
    assert {"spec.toml", "labels.txt", "anchors.npy", "build/ssd_nms.py"} <= set(manifest["inputs"])
    assert str(target.parent) not in data.decode()


@pytest.mark.parametrize(
    "what", ["spec.toml", "labels.txt", "anchors.npy", "model.onnx", "model.onnx.data", "precision"]
)
def test_fresh_until_an_input_changes(spec: Spec, built: Path, target: Path, what: str) -> None:
    assert repository.fresh_manifest(spec, target, *KIND) is None
    repository.publish(spec, built, target, *KIND)
    manifest = repository.fresh_manifest(spec, target, *KIND)
    assert manifest is not None
    assert manifest["version"] == 1
    os.utime(spec.onnx_path)  # the time does not matter, the content does
    assert repository.fresh_manifest(spec, target, *KIND) == manifest
    if what == "precision":
        assert repository.fresh_manifest(spec, target, "int8", "onnxruntime") is None
        return
    with (spec.path.parent / what).open("ab") as file:
        file.write(b"\n")
    assert repository.fresh_manifest(spec, target, *KIND) is None


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "labels.txt", *backend.prepare().files])
def test_a_damaged_version_is_not_fresh(spec: Spec, built: Path, target: Path, name: str) -> None:
    repository.publish(spec, built, target, *KIND)
    with (target / "tiny" / "1" / name).open("ab") as file:
        file.write(b" ")
    assert repository.fresh_manifest(spec, target, *KIND) is None


def test_rollback_and_publish_after_it(spec: Spec, built: Path, target: Path) -> None:
    repository.publish(spec, built, target, *KIND)
    repository.publish(spec, built, target, *KIND)
    assert repository.rollback(target, "tiny") == 1
    check_whole(target, [1, 2], 1)
    with pytest.raises(PublishError, match="no version before version 1"):
        repository.rollback(target, "tiny")
    assert repository.publish(spec, built, target, *KIND) == 3  # never 2 again: a server may have seen that one
    check_whole(target, [1, 3], 3)


def test_rollback_refuses(spec: Spec, built: Path, target: Path) -> None:
    with pytest.raises(PublishError, match="no model 'tiny' is published"):
        repository.rollback(target, "tiny")
    assert not target.exists()
    for _ in range(2):
        repository.publish(spec, built, target, *KIND)
    with pytest.raises(PublishError, match=r"no model 'tony' is published(?s:.*)published are tiny"):
        repository.rollback(target, "tony")
    (target / "tiny" / "1" / "model.onnx").unlink()
    with pytest.raises(PublishError, match="version 1 cannot be served again"):
        repository.rollback(target, "tiny")
    assert repository.served_version(target, "tiny") == 2


# A publish that dies after so many of its steps.
DYING = """
import itertools, os, signal, sys
from pathlib import Path
from typing import Any
from build.publish import repository
from build.spec import load
spec, built, target, steps = sys.argv[1:]
with repository._locked(Path(target), "tiny") as folder:
    steps_of = repository.publishing(load(spec), Path(built), folder, "fp32", "onnxruntime")
    for _ in itertools.islice(steps_of, int(steps)):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
"""


def die_after(steps: int, spec: Spec, built: Path, target: Path) -> None:
    command = [sys.executable, "-c", DYING, str(spec.path), str(built), str(target), str(steps)]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == -signal.SIGKILL


@pytest.mark.parametrize("before", [0, 1, 2])
def test_killed_after_any_step_the_old_version_is_served(spec: Spec, built: Path, target: Path, before: int) -> None:
    for _ in range(before):
        repository.publish(spec, built, target, *KIND)
    backup = target.with_name("backup")
    whole = 0
    for steps in range(len(FILES) + 7):
        if before:
            shutil.rmtree(backup, ignore_errors=True)
            shutil.copytree(target, backup)
        else:
            shutil.rmtree(target, ignore_errors=True)
        die_after(steps, spec, built, target)
        new = before + 1
        if repository.served_version(target, "tiny") == new:
            whole += 1
            check_loadable(target, new)
        elif before:
            check_loadable(target, before)
        else:
            assert not [path for path in target.glob("*") if path.is_dir()]  # a tritonserver takes any for a model
        repository.publish(spec, built, target, *KIND)
        last = repository.served_version(target, "tiny")
        assert last is not None
        assert last >= new
        check_whole(target, repository._versions(target / "tiny"), last)
        assert len(repository._versions(target / "tiny")) <= 2
        shutil.rmtree(target)
        if before:
            shutil.copytree(backup, target)
    assert 1 <= whole <= 4  # some deaths came after the commit, most before


# Publishes over and over, and tells when the first is done.
ENDLESS = """
import sys
from pathlib import Path
from typing import Any
from build.publish import repository
from build.spec import load
spec, built, target = sys.argv[1:]
while True:
    print(repository.publish(load(spec), Path(built), Path(target), "fp32", "onnxruntime"), flush=True)
"""


def test_killed_at_random_moments(spec: Spec, built: Path, target: Path) -> None:
    chance = random.Random(0)
    for _ in range(8):
        command = [sys.executable, "-c", ENDLESS, str(spec.path), str(built), str(target)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(chance.uniform(0, 0.15))
            process.kill()
        served = repository.served_version(target, "tiny")
        assert served is not None
        check_loadable(target, served)
    version = repository.publish(spec, built, target, *KIND)
    check_whole(target, repository._versions(target / "tiny"), version)


@pytest.mark.parametrize(
    ("before", "function"),
    [
        *((0, name) for name in ("mkdir", "rename", "open", "fsync")),
        *((1, name) for name in ("mkdir", "rename", "replace", "open", "fsync")),
    ],
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_the_system_refuses_leaves_the_old_version(
    spec: Spec,
    built: Path,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: int,
    function: str,
    number: int,
) -> None:
    for _ in range(before):
        repository.publish(spec, built, target, *KIND)
    target.mkdir(exist_ok=True)
    old = snapshot(target)

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
    with pytest.raises(PublishError, match=os.strerror(number)):
        repository.publish(spec, built, target, *KIND)
    monkeypatch.undo()
    new = snapshot(target)
    new.pop(".tiny.lock", None)
    old.pop(".tiny.lock", None)
    assert new == old
    assert repository.served_version(target, "tiny") == (before or None)
    assert repository.publish(spec, built, target, *KIND) == before + 1
    check_whole(target, list(range(1, before + 2)), before + 1)


def test_a_disk_that_fills_up_in_mid_file(spec: Spec, built: Path, target: Path) -> None:
    repository.publish(spec, built, target, *KIND)
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (built.stat().st_size // 2, hard))
    try:
        with pytest.raises(PublishError, match="what was served before is untouched: File too large"):
            repository.publish(spec, built, target, *KIND)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    check_whole(target, [1], 1)


def test_a_repository_that_is_no_folder(spec: Spec, built: Path, target: Path) -> None:
    target.write_text("a file")
    with pytest.raises(PublishError, match="File exists"):
        repository.publish(spec, built, target, *KIND)


def test_two_publishes_at_once(spec: Spec, built: Path, target: Path) -> None:
    with repository._locked(target, "tiny"), pytest.raises(PublishError, match="by another process"):
        repository.publish(spec, built, target, *KIND)
    with repository._locked(target, "other"):
        assert repository.publish(spec, built, target, *KIND) == 1


@pytest.mark.triton
def test_a_real_server_starts_on_what_a_killed_publish_left(spec: Spec, built: Path, target: Path) -> None:
    from build.serve import TritonServer

    # A first publish that died: the server has nothing to load, and nothing to stumble over.
    die_after(4, spec, built, target)
    with pytest.raises(ServeError, match="no model is published"):
        TritonServer(target).start()
    repository.publish(spec, built, target, *KIND)
    die_after(3, spec, built, target)  # half-written beside the version folders
    with TritonServer(target, extra_args=["--exit-on-error=true"]):
        pass
    die_after(len(FILES) + 2, spec, built, target)  # version 2 whole, config.pbtxt still names 1
    assert repository._versions(target / "tiny") == [1, 2]
    with TritonServer(target, extra_args=["--exit-on-error=true"]) as server:
        assert server.check() is None


GOLDEN = ROOT / "tests" / "build" / "golden" / "tensorrt.pbtxt"


@pytest.fixture
def tensorrt_spec(spec: Spec) -> Spec:
    """Everything that [serving] and the profiles say, said."""
    text = spec.path.read_text().replace(
        "max_batch_size = 4",
        "max_batch_size = 4\ninstances = 2\nmax_queue_size = 64\nqueue_timeout_ms = 50\nqueue_delay_us = 100\n"
        "cuda_graphs = true",
    )
    profiles = ("\n[[tensorrt.profiles]]\nmin = {}\nopt = {}\nmax = {}\n".format(*s) for s in ((1, 1, 1), (2, 3, 4)))
    spec.path.write_text(text + "".join(profiles))
    return load(spec.path)


def test_the_config_of_a_plan_is_the_golden_one(tensorrt_spec: Spec) -> None:
    made = repository.config(tensorrt_spec, 3, "fp16", "tensorrt", "ab" * 32)
    repository.check_engine(made, tiny_model.engine_of(tensorrt_spec))
    text = repository._text(made)
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_a_plans_config_with_the_defaults(spec: Spec) -> None:
    made = repository.config(spec, 1, "fp32", "tensorrt", "")
    assert (made.platform, made.backend) == ("tensorrt_plan", "")
    assert made.instance_group[0].count == 1
    assert not made.instance_group[0].profile
    assert not made.HasField("optimization")
    assert [warm.batch_size for warm in made.model_warmup] == [1, 4]
    policy = made.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (256, 1_000_000)
    assert not policy.allow_timeout_override


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("batching", ["on", "off"])
def test_batching_can_be_asked_for_and_refused(spec: Spec, runtime: str, batching: str) -> None:
    serving = dataclasses.replace(spec.serving, dynamic_batching=batching, queue_delay_us=200)
    made = repository.config(dataclasses.replace(spec, serving=serving), 1, "fp32", runtime, "")
    assert made.HasField("dynamic_batching") == (batching == "on")
    assert made.dynamic_batching.max_queue_delay_microseconds == (200 if batching == "on" else 0)


@pytest.mark.parametrize(
    ("tensor", "key", "value", "complaint"),
    [
        (0, "dtype", "FLOAT", r"inputs are .*images.*FLOAT\[-1, 8, 8, 3\]"),
        (0, "shape", [-1, 9, 8, 3], "inputs are"),
        (1, "name", "threshold", "inputs are"),
        (3, "dtype", "INT64", "outputs are .*INT64"),
        (4, "shape", [-1, 6, 4], "outputs are"),
        (0, "profiles", [[[1, 8, 8, 3]] * 3], "allow batches of 4, but the plan ends at 1"),
    ],
)
def test_a_plan_that_the_config_does_not_fit_is_not_published(
    tensor: int, key: str, value: Any, complaint: str, spec: Spec, built: Path, target: Path
) -> None:
    engine = tiny_model.engine_of(spec)
    engine["io"][tensor][key] = value
    if key == "profiles":
        for other in engine["io"][1:3]:
            other["profiles"] = []
    with pytest.raises(PublishError, match=complaint):
        repository.publish(spec, built, target, "fp32", "tensorrt", {"engine": engine})
    assert not (target / "tiny").exists()


def test_a_plan_is_published_with_its_facts(spec: Spec, built: Path, target: Path) -> None:
    here = {"gpu": "NVIDIA H200", "compute_capability": "9.0", "tensorrt": "10.13.2", "plugin_sha256": "cd" * 32}
    facts = {"target": here, "engine": tiny_model.engine_of(spec), "verified": {"passed": True}}
    assert repository.publish(spec, built, target, "fp32", "tensorrt", facts) == 1
    names = {path.name for path in (target / "tiny" / "1").iterdir()}
    assert names == {"config.pbtxt", "labels.txt", "manifest.json", "model.plan"}
    manifest = repository.fresh_manifest(spec, target, "fp32", "tensorrt", here)
    assert manifest is not None
    assert manifest["engine"]["tensorrt"] == "10.13.2"
    assert manifest["verified"] == {"passed": True}
    for key in here:  # another GPU, TensorRT or plugin: stale
        assert repository.fresh_manifest(spec, target, "fp32", "tensorrt", here | {key: "other"}) is None
