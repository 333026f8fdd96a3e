"""The model repository: config.pbtxt, manifest, atomic publish and rollback (docs/design.md, "Publishing").

A version folder is whole before it appears and never changes; replacing the one config.pbtxt above the version folders
by rename decides which is served. A model's first publish renames the whole model folder into the repository, because a
tritonserver refuses to start on a repository with a folder that has no config.pbtxt.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from build import backend, datasets, implicit, ssd_nms
from build.errors import PublishError
from build.spec import Spec

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

CONTRACT = "1"
CONFIG, MANIFEST, LABELS = "config.pbtxt", "manifest.json", "labels.txt"
MODEL_FILE = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}

_ROOT = Path(__file__).resolve().parent.parent
# A change in one of these can change what is published.
_BUILDERS = tuple(map(Path, ("build/graph.py", "build/ssd_nms.py", "build/repository.py")))
_ENGINEERS = tuple(map(Path, ("build/engine.py", "build/tensorrt_compat.py")))
_TYPERS = tuple(map(Path, ("build/precision.py", "build/quantize.py", "build/datasets.py")))
_CALIBRATORS = (Path("build/implicit.py"), Path("build/datasets.py"))
_TOOLS = ("onnx", "onnxscript", "onnxruntime")
_STAGING = ".publishing"


def recipe(spec: Spec, precision: str, runtime: str, calibration: str = "explicit") -> dict[str, Any]:
    """All that decides what is published: equal recipes make the same model, so that a published one is still fresh.

    Args:
        spec, precision, runtime: what is published.
        calibration: explicit or implicit: who chose the scales of a quantised precision, the graph or TensorRT.

    Returns:
        The first part of manifest.json: SHA-256 of every input file by its name, tool versions, precision, runtime, the
        way and method of the calibration where there is one, and the instances, threads and backend chosen for this
        machine.

    Raises:
        PublishError: an input cannot be read.
        RuntimeUnavailableError: the spec asks for a backend that cannot be had here.
    """
    sources = [spec.path, spec.labels_path, spec.anchors_path]
    sources += sorted(spec.onnx_path.parent.glob(f"{spec.onnx_path.name}*"))  # with the files of its external data
    instances, threads = _instances_and_threads(spec, runtime)
    method = implicit.method_of(spec) if calibration == "implicit" else spec.quantization.calibrator
    serving: dict[str, Any] = {"instances": instances, "threads": threads}
    builders = _BUILDERS
    if precision not in ("fp32", "tf32"):
        builders += _CALIBRATORS if calibration == "implicit" else _TYPERS
    if runtime == "tensorrt":
        builders += _ENGINEERS
    else:
        chosen = backend.choose(spec.serving.backend)
        serving["backend"] = chosen.name
        builders += tuple(path.relative_to(_ROOT) for path in chosen.sources)
    try:
        inputs = {path.name: _sha256(path) for path in sources}
        inputs |= {str(path): _sha256(_ROOT / path) for path in builders}
        if precision in ("int8", "fp8"):
            inputs |= datasets.digest(spec)
    except OSError as error:
        raise PublishError(f"{error.filename}: cannot be read: {error.strerror}") from None
    return {
        "contract": CONTRACT,
        "model": spec.model.name,
        "precision": precision,
        "runtime": runtime,
        "inputs": inputs,
        "tools": {name: importlib.metadata.version(name) for name in _TOOLS} | {"python": platform.python_version()},
        "serving": serving,
        **({"calibration": {"way": calibration, "method": method}} if precision in ("int8", "fp8") else {}),
    }


def config(spec: Spec, version: int, precision: str, runtime: str, manifest_sha256: str) -> ModelConfig:
    """config.pbtxt of one version: the contract's inputs and outputs, and all that a client needs as parameters."""
    from tritonclient.grpc import model_config_pb2 as pb

    instances, threads = _instances_and_threads(spec, runtime)
    most = spec.nms.max_detections
    thresholds = ssd_nms.THRESHOLDS if spec.nms.runtime_thresholds else ()
    parameters = {
        "contract": CONTRACT,
        "input_width": str(spec.input.width),
        "input_height": str(spec.input.height),
        "color_order": "RGB",  # of the input tensor; the graph itself reorders for a model that wants BGR
        "resize": spec.input.resize,
        "resample": spec.input.resample,
        "pad_value": str(spec.input.pad_value),
        "labels": json.dumps(spec.labels),
        "score_threshold": repr(spec.nms.score_threshold),
        "iou_threshold": repr(spec.nms.iou_threshold),
        "runtime_thresholds": json.dumps(spec.nms.runtime_thresholds),
        "max_detections": str(most),
        "precision": precision,
        "runtime": runtime,
        "manifest_sha256": manifest_sha256,
    }
    made = pb.ModelConfig(name=spec.model.name, max_batch_size=spec.serving.max_batch_size)
    made.version_policy.specific.versions.append(version)
    made.input.add(name="images", data_type=pb.TYPE_UINT8, dims=[spec.input.height, spec.input.width, 3])
    for name in thresholds:
        made.input.add(name=name, data_type=pb.TYPE_FP32, dims=[1])
    kinds = (pb.TYPE_INT32, pb.TYPE_FP32, pb.TYPE_FP32, pb.TYPE_INT32)
    for name, kind, dims in zip(ssd_nms.OUTPUTS, kinds, ([1], [most, 4], [most], [most]), strict=True):
        made.output.add(name=name, data_type=kind, dims=dims)
    # On a CPU it gained nothing: a session answers a batch's requests one after the other (docs/perf.md).
    if spec.serving.dynamic_batching == "on" or (spec.serving.dynamic_batching == "auto" and runtime == "tensorrt"):
        made.dynamic_batching.max_queue_delay_microseconds = spec.serving.queue_delay_us
        policy = made.dynamic_batching.default_queue_policy
        policy.timeout_action = pb.ModelQueuePolicy.REJECT
        policy.default_timeout_microseconds = spec.serving.queue_timeout_ms * 1000
        policy.max_queue_size = spec.serving.max_queue_size
    if runtime == "tensorrt":
        _serve_with_tensorrt(made, spec, instances)
    else:
        made.backend = backend.choose(spec.serving.backend).name
        made.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=instances)
        parameters["threads"] = str(threads)
    for name, value in parameters.items():
        made.parameters[name].string_value = value
    return made


def _serve_with_tensorrt(made: ModelConfig, spec: Spec, instances: int) -> None:
    """What only a plan needs: its GPU and profiles, CUDA graphs, and requests that find a warm model."""
    from tritonclient.grpc import model_config_pb2 as pb

    serving = spec.serving
    made.platform = "tensorrt_plan"
    group = made.instance_group.add(kind=pb.ModelInstanceGroup.KIND_GPU, count=instances)
    if len(spec.profiles) > 1:  # an instance takes the profile that fits each batch
        group.profile.extend(str(index) for index in range(len(spec.profiles)))
    if serving.cuda_graphs:  # without bounds of our own: graph_lower_bound would show rows that nothing wrote
        made.optimization.cuda.graphs = True
    if serving.warmup:
        for batch in sorted({1, serving.max_batch_size}):
            warm = made.model_warmup.add(name=f"batch {batch}", batch_size=batch)
            for entry in made.input:
                given = warm.inputs[entry.name]
                given.data_type = entry.data_type
                given.dims.extend(entry.dims)
                if entry.name == "images":
                    given.random_data = True
                else:
                    given.zero_data = True


def check_engine(made: ModelConfig, engine: Mapping[str, Any]) -> None:
    """Compares config.pbtxt with the plan's own table of inputs and outputs.

    Args:
        made: the configuration.
        engine: the manifest's part `engine` (build/engine.py).

    Raises:
        PublishError: they differ; the server would refuse the model, or answer with other shapes.
    """
    from tritonclient.grpc import model_config_pb2 as pb

    kinds = {"UINT8": pb.TYPE_UINT8, "FLOAT": pb.TYPE_FP32, "INT32": pb.TYPE_INT32}
    for mode, entries in (("INPUT", made.input), ("OUTPUT", made.output)):
        wanted = {entry.name: (entry.data_type, [-1, *entry.dims]) for entry in entries}
        found = {t["name"]: (kinds.get(t["dtype"], -1), list(t["shape"])) for t in engine["io"] if t["mode"] == mode}
        if wanted != found:
            table = {t["name"]: f"{t['dtype']}{list(t['shape'])}" for t in engine["io"] if t["mode"] == mode}
            said = {name: f"{pb.DataType.Name(kind)}{dims}" for name, (kind, dims) in wanted.items()}
            raise PublishError(
                f"{made.name}: the plan's {mode.lower()}s are {table}, but config.pbtxt would say {said}",
                why="the plan was built from another graph or spec",
                fix="build it again: ./invoke build-engines --runtime tensorrt --force",
            )
    most = max((shapes[2][0] for t in engine["io"] for shapes in t["profiles"]), default=0)
    if made.max_batch_size != most:
        raise PublishError(
            f"{made.name}: config.pbtxt would allow batches of {made.max_batch_size}, but the plan ends at {most}",
            fix="build it again: ./invoke build-engines --runtime tensorrt --force",
        )


def publish(
    spec: Spec,
    model: Path,
    repository: Path,
    precision: str,
    runtime: str,
    facts: Mapping[str, Any] = MappingProxyType({}),
    calibration: str = "explicit",
) -> int:
    """Publishes a built model as the next version, which is served from then on; the version before stays for rollback.

    Args:
        spec: its spec.
        model: the built file, model.onnx or model.plan.
        repository: the model repository; made where it is not there.
        precision, runtime: what it was built for.
        facts: more for the manifest: `target` and `engine` of a plan, `verified` of the gate.
        calibration: as for `recipe`.

    Returns:
        The new version.

    Raises:
        PublishError: config.pbtxt does not fit the plan, the repository cannot be written or another publish is under
            way; what was served is still served.
    """
    version = 0
    with _locked(repository, spec.model.name) as folder, explained(folder):
        for step in publishing(spec, model, folder, precision, runtime, facts, calibration):
            version = step
    return version


def publishing(
    spec: Spec,
    model: Path,
    folder: Path,
    precision: str,
    runtime: str,
    facts: Mapping[str, Any] = MappingProxyType({}),
    calibration: str = "explicit",
) -> Iterator[int]:
    """The steps of `publish`, one by one: the process may die after any of them, and what was served is still served.

    Yields:
        The new version, after each step.
    """
    if runtime == "tensorrt":
        check_engine(config(spec, 0, precision, runtime, ""), facts["engine"])
    _clear(folder)
    served = served_version(folder.parent, folder.name)
    version = max(_versions(folder), default=0) + 1  # never a number that a server may have seen with other content
    staging = folder / _STAGING if folder.exists() else _first_staging(folder)
    try:
        content = staging / str(version)
        content.mkdir(parents=True)
        yield version
        files = {MODEL_FILE[runtime]: model.read_bytes(), LABELS: spec.labels_path.read_bytes()}
        if runtime == "onnxruntime":
            files |= {name: path.read_bytes() for name, path in backend.choose(spec.serving.backend).files.items()}
        manifest = {
            **recipe(spec, precision, runtime, calibration),
            **facts,
            "version": version,
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
            "built": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        files[MANIFEST] = (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()
        digest = hashlib.sha256(files[MANIFEST]).hexdigest()
        files[CONFIG] = _text(config(spec, version, precision, runtime, digest)).encode()
        for name, data in files.items():
            _write(content / name, data)
            yield version
        if staging.parent == folder:
            _sync(content)
            content.rename(folder / str(version))
            _sync(folder)
            yield version
            _serve_config(folder, files[CONFIG])
        else:
            _write(staging / CONFIG, files[CONFIG])
            for made in (content, staging):
                _sync(made)
            yield version
            staging.rename(folder)
            _sync(folder.parent)
        yield version
    except OSError:
        if served_version(folder.parent, folder.name) == served:
            shutil.rmtree(folder / str(version), ignore_errors=True)
        raise
    finally:
        _clear(folder)
    for old in _versions(folder):
        if old not in (served, version):
            shutil.rmtree(folder / str(old), ignore_errors=True)
            yield version


def rollback(repository: Path, name: str) -> int:
    """Serves the version before the current one again.

    Returns:
        That version.

    Raises:
        PublishError: there is none, or it is damaged.
    """
    if not (repository / name / CONFIG).is_file():
        known = sorted(path.parent.name for path in repository.glob(f"*/{CONFIG}"))
        raise PublishError(
            f"no model {name!r} is published in {repository}",
            fix=f"published are {', '.join(known)}" if known else "publish one: invoke build-engines",
        )
    with _locked(repository, name) as folder, explained(folder):
        served = served_version(repository, name) or 0
        earlier = [version for version in _versions(folder) if version < served]
        if not earlier:
            raise PublishError(f"{name}: there is no version before version {served}, which is served")
        version = max(earlier)
        damage = _damage(folder / str(version))
        if damage:
            raise PublishError(
                f"{name}: version {version} cannot be served again: {damage}", fix="publish anew: invoke build-engines"
            )
        _serve_config(folder, (folder / str(version) / CONFIG).read_bytes())
    return version


def served_version(repository: Path, name: str) -> int | None:
    """The version that the repository's config.pbtxt names; None where nothing readable is published."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        found = text_format.Parse((repository / name / CONFIG).read_text(), ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError):
        return None
    versions = found.version_policy.specific.versions
    return int(versions[0]) if len(versions) == 1 else None


def served(repository: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """The folder of the served version, and its manifest.

    Raises:
        PublishError: nothing is published, or it is damaged.
    """
    version = served_version(repository, name)
    if version is None:
        raise PublishError(f"no model {name!r} is published in {repository}", fix="publish one: invoke build-engines")
    folder = repository / name / str(version)
    damage = _damage(folder)
    if damage:
        raise PublishError(f"{name}: version {version} is damaged: {damage}", fix="invoke build-engines --force")
    return folder, json.loads((folder / MANIFEST).read_bytes())


def fresh_manifest(
    spec: Spec,
    repository: Path,
    precision: str,
    runtime: str,
    target: Mapping[str, str] | None = None,
    calibration: str = "explicit",
) -> dict[str, Any] | None:
    """The served version's manifest if that version is whole and what a publish would make again, else None.

    Args:
        spec, repository, precision, runtime: as for `publish`.
        target: for a plan, what this machine would build it for.
        calibration: as for `recipe`.
    """
    version = served_version(repository, spec.model.name)
    folder = repository / spec.model.name / str(version)
    if version is None or _damage(folder):
        return None
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    wanted = recipe(spec, precision, runtime, calibration) | ({"target": dict(target)} if target else {})
    return manifest if all(manifest.get(key) == value for key, value in wanted.items()) else None


def _damage(folder: Path) -> str:
    """What a version folder lacks, in words; empty when it is as it was published."""
    try:
        data = (folder / MANIFEST).read_bytes()
        files: Mapping[str, str] = json.loads(data)["files"]
        if hashlib.sha256(data).hexdigest() not in (folder / CONFIG).read_text():
            return f"{MANIFEST} is not the one that {CONFIG} was made with"
        changed = [name for name, digest in files.items() if _sha256(folder / name) != digest]
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return f"{changed[0]} has changed since" if changed else ""


def cores() -> int:
    """The processor cores that this process may use, container limits included."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return count if quota == "max" else max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):
        return count


def _instances_and_threads(spec: Spec, runtime: str) -> tuple[int, int]:
    """Sessions and threads of each; where the spec leaves them open, together as many as there are cores.

    A plan takes one execution context per instance on the GPU, one where the spec leaves it open.
    """
    instances, threads = spec.serving.instances, spec.serving.threads
    if runtime == "tensorrt":
        return instances or 1, 1
    instances = instances or max(1, cores() // max(1, threads))
    return instances, threads or max(1, cores() // instances)


@contextmanager
def _locked(repository: Path, name: str) -> Iterator[Path]:
    """The model's folder, held against a second publish until the end of the block or of the process."""
    with explained(repository):
        repository.mkdir(parents=True, exist_ok=True)
        lock = (repository / f".{name}.lock").open(
            "a"
        )  # a file: of folders, tritonserver takes even hidden ones for models
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PublishError(
                f"{name} is being published to {repository} by another process", fix="wait for it, then try again"
            ) from None
        yield repository / name


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """What the operating system refuses, as a PublishError."""
    causes = {
        errno.ENOSPC: ("the disk is full", "free some space"),
        errno.EDQUOT: ("your disk quota is used up", "free some space"),
        errno.EROFS: ("it is mounted read-only", "publish on the machine that owns it, or mount it for writing"),
        errno.EACCES: ("it belongs to another user", "change its owner, or publish as that user"),
        errno.EPERM: ("it belongs to another user", "change its owner, or publish as that user"),
        errno.EXDEV: (
            "the repository is a mount point of its own",
            f"make the folder {folder} first, or publish to one inside",
        ),
    }
    try:
        yield
    except OSError as error:
        why, fix = causes.get(error.errno or 0, ("", "check the folder and try again"))
        raise PublishError(
            f"{folder}: not published, what was served before is untouched: {error.strerror}"
            + (f": {error.filename}" if error.filename else ""),
            why=why,
            fix=fix,
        ) from error


def _first_staging(folder: Path) -> Path:
    """Where a model's first publish is prepared: outside of the repository, on the same file system."""
    repository = folder.parent.resolve()
    return repository.parent / f".{repository.name}{_STAGING}" / folder.name


def _clear(folder: Path) -> None:
    """Removes what an interrupted publish left; the caller holds the lock."""
    first = _first_staging(folder)
    for left in (folder / _STAGING, first):
        shutil.rmtree(left, ignore_errors=True)
    (folder / f".{CONFIG}").unlink(missing_ok=True)
    with suppress(OSError):  # another model's first publish may be there
        first.parent.rmdir()


def _versions(folder: Path) -> list[int]:
    """The version folders, in order."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit() and path.is_dir())


def _serve_config(folder: Path, data: bytes) -> None:
    """Replaces config.pbtxt: the moment from which another version is served."""
    new = folder / f".{CONFIG}"
    _write(new, data)
    new.replace(folder / CONFIG)
    _sync(folder)


def _text(message: ModelConfig) -> str:
    from google.protobuf import text_format

    return (
        f"# Written by build/repository.py; invoke build-engines makes it anew.\n{text_format.MessageToString(message)}"
    )


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
