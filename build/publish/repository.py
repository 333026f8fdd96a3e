"""The model repository: config.pbtxt, manifest, atomic publish and rollback (docs/design.md, "Publishing").

A version folder is whole before it appears and never changes; replacing the one config.pbtxt above the version folders
by rename decides which is served. A model's first publish renames the whole model folder into the repository, because a
tritonserver refuses to start on a repository with a folder that has no config.pbtxt.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any

from build import contract, files
from build.contract import Target
from build.errors import PublishError
from build.gate import datasets
from build.publish import openvino, picture, staging
from build.publish.backend import Backend
from build.publish.config import check_engine, config, cpu_name, instances_and_threads, text
from build.spec import Spec

CONFIG, MANIFEST, LABELS = "config.pbtxt", "manifest.json", "labels.txt"
MODEL_FILE = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}

# A change in one of these files makes a version stale, as a change in the model's own files does.
_BUILDERS = ("build/contract.py", "build/graph/attach.py", "build/graph/ssd_nms.py", "build/publish")
_OF_PLANS = ("build/tensorrt/engine.py", "build/tensorrt/compat.py")
_OF_TYPED = (
    "build/graph/precision.py",
    *(f"build/quantization/{name}.py" for name in ("calibration", "candidates", "correction", "equalisation")),
    *(f"build/quantization/{name}.py" for name in ("qdq", "rounding")),
)
_OF_IMPLICIT = ("build/quantization/implicit.py",)
_OF_PICTURES = ("build/gate/datasets.py", "client/ssd_client/preprocess.py")
_TOOLS = ("onnx", "onnxscript", "onnxruntime")
_LAST = 2**63 - 1  # version, for Triton
_UNTOUCHED = "not published, what was served before is untouched"


def recipe(spec: Spec, target: Target, served_by: Backend | None = None) -> dict[str, Any]:
    """Everything that decides what is published: a published version with an equal recipe is fresh.

    Args:
        spec: the model.
        target: what it is built for.
        served_by: the backend that runs an ONNX file; None for a plan.

    Returns:
        The first part of manifest.json: every setting of the spec with its defaults resolved, the SHA-256 of every
        input file by its name, tool versions, precision, runtime, the way and method of a calibration, and the
        instances, threads and backend that were chosen for this machine.

    Raises:
        PublishError: an input cannot be read.
    """
    sources = [spec.labels_path, spec.anchors_path] if spec.nms.needs_anchors else [spec.labels_path]
    sources += sorted(spec.onnx_path.parent.glob(f"{spec.onnx_path.name}*"))  # with the files of its external data
    instances, threads = instances_and_threads(spec, target.runtime)
    serving: dict[str, Any] = {"instances": instances, "threads": threads}
    builders: tuple[str, ...] = _BUILDERS
    if target.kind.typed:
        builders += _OF_IMPLICIT if target.implicit else _OF_TYPED
    if target.kind.quantised:
        builders += _OF_PICTURES
    if target.runtime == "tensorrt":
        builders += _OF_PLANS
    if spec.serving.picture_input:
        builders += picture.SOURCES
    settings = spec.quantization
    calibrator = settings.implicit_calibrator if target.implicit else settings.calibrator
    try:
        inputs = {path.name: files.sha256(path) for path in sources}
        for name in builders:
            path = files.ROOT / name
            for source in sorted(path.glob("*.py")) if path.is_dir() else [path]:
                inputs[str(files.relative(source))] = files.sha256(source)
        if served_by is not None:
            serving["backend"] = served_by.name
            if spec.serving.engine != openvino.OTHER:  # which one is faster depends on the CPU and on both versions
                serving |= {"engine": served_by.engine, "cpu": cpu_name()}
                inputs[openvino.LOCK.name] = files.sha256(openvino.LOCK)
            inputs |= {str(files.relative(source)): files.sha256(source) for source in served_by.sources}
        if target.kind.quantised:
            inputs |= datasets.digest(spec)
    except OSError as error:
        raise PublishError(f"{error.filename}: cannot be read: {error.strerror}") from None
    return {
        "contract": contract.VERSION,
        "model": spec.model.name,
        "precision": target.precision,
        "runtime": target.runtime,
        "spec": spec.settings(),
        "inputs": inputs,
        "tools": {name: importlib.metadata.version(name) for name in _TOOLS} | {"python": platform.python_version()},
        "serving": serving,
        **({"calibration": {"way": target.calibration, "method": calibrator}} if target.kind.quantised else {}),
    }


def changed(manifest: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The names of the settings, files and other keys that differ between a manifest and a recipe, sorted."""
    names = []
    for key, value in wanted.items():
        old = manifest.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            names += [name for name in {**value, **old} if value.get(name) != old.get(name)]
        elif old != value:
            names.append(key)
    return sorted(names)


def publish(
    spec: Spec,
    model: Path,
    repository: Path,
    target: Target,
    facts: Mapping[str, Any] = MappingProxyType({}),
    served_by: Backend | None = None,
    rehearse: Callable[[Path], None] | None = None,
) -> int:
    """Publishes a built model as the next version, which is served from then on; the version before stays for rollback.

    Args:
        spec: its spec.
        model: the built file, model.onnx or model.plan.
        repository: the model repository; created where it is missing.
        target: what it was built for.
        facts: more for the manifest: `target` and `engine` of a plan, `verified` of the gate.
        served_by: as for `recipe`.
        rehearse: called with the version folder as it is about to be published; what it raises stops the publish.

    Returns:
        The new version.

    Raises:
        PublishError: config.pbtxt does not fit the plan, the repository cannot be written or another publish is under
            way; what was served is still served.
    """
    version = 0
    with _locked(repository, spec.model.name) as folder, files.explained(folder, _UNTOUCHED, PublishError):
        for step in publishing(spec, model, folder, target, facts, served_by, rehearse):
            version = step
    return version


def publishing(
    spec: Spec,
    model: Path,
    folder: Path,
    target: Target,
    facts: Mapping[str, Any] = MappingProxyType({}),
    served_by: Backend | None = None,
    rehearse: Callable[[Path], None] | None = None,
) -> Iterator[int]:
    """The steps of `publish`, one by one: the process may die after any of them, and what was served is still served.

    Yields:
        The new version, after each step.
    """
    if target.runtime == "tensorrt":
        check_engine(spec, config(spec, 0, target, ""), facts["engine"])
    _clear(folder)
    served = served_version(folder.parent, folder.name)
    # Never a number that a server may have seen with other content, even if somebody deleted its folder.
    version = max([*_versions(folder), *_taken(folder), served or 0], default=0) + 1
    if version > _LAST:
        raise PublishError(
            f"{folder} has had version {version - 1}, and Triton counts no further",
            fix=f"remove that folder, and the number from {_lock_file(folder)}",
        )
    place = staging.place(folder)
    try:
        content = place / str(version)
        content.mkdir(parents=True)
        yield version
        contents = {MODEL_FILE[target.runtime]: model.read_bytes(), LABELS: spec.labels_path.read_bytes()}
        if served_by:
            contents |= {name: path.read_bytes() for name, path in served_by.files.items()}
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
        manifest = {
            **recipe(spec, target, served_by),
            **facts,
            "version": version,
            "files": digests,
            **({"libraries": dict(served_by.libraries)} if served_by and served_by.libraries else {}),
            "built": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        contents[MANIFEST] = (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()
        digest = hashlib.sha256(contents[MANIFEST]).hexdigest()
        model_digest = digests[MODEL_FILE[target.runtime]]
        contents[CONFIG] = text(config(spec, version, target, digest, served_by, model_digest)).encode()
        for name, data in contents.items():
            _write(content / name, data)
            yield version
        if rehearse is not None:
            rehearse(content)
        if place.parent == folder:
            _sync(content)
            content.rename(folder / str(version))
            _sync(folder)
            yield version
            _serve_config(folder, contents[CONFIG])
        else:
            _write(place / CONFIG, contents[CONFIG])
            for written in (content, place):
                _sync(written)
            yield version
            place.rename(folder)
            _sync(folder.parent)
        with suppress(OSError):  # it is served: too late to refuse
            _take(folder, version)
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
    if not is_published(repository / name):
        known = sorted(path.parent.name for path in repository.glob(f"*/{CONFIG}"))
        raise PublishError(
            f"no model {name!r} is published in {repository}",
            fix=f"published are {', '.join(known)}" if known else "publish one: ./invoke build-engines",
        )
    with _locked(repository, name) as folder, files.explained(folder, _UNTOUCHED, PublishError):
        served = served_version(repository, name)
        if served is None:
            raise _nothing_named(folder)
        earlier = [version for version in _versions(folder) if version < served]
        if not earlier:
            raise PublishError(f"{name}: there is no version before version {served}, which is served")
        version = max(earlier)
        fault = damage(folder / str(version))
        if fault:
            raise PublishError(
                f"{name}: version {version} cannot be served again: {fault}",
                fix="publish again: ./invoke build-engines",
            )
        _serve_config(folder, (folder / str(version) / CONFIG).read_bytes())
    return version


def served_version(repository: Path, name: str) -> int | None:
    """The version that the repository's config.pbtxt names; None where nothing readable is published."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        config_of = text_format.Parse((repository / name / CONFIG).read_text(), ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError):
        return None
    versions = config_of.version_policy.specific.versions
    return int(versions[0]) if len(versions) == 1 else None


def served(repository: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """The folder of the served version, and its manifest.

    Raises:
        PublishError: nothing is published, or it is damaged.
    """
    version = served_version(repository, name)
    if version is None:
        raise PublishError(f"no model {name!r} is published in {repository}", fix="publish one: ./invoke build-engines")
    folder = repository / name / str(version)
    fault = damage(folder)
    if fault:
        raise PublishError(f"{name}: version {version} is damaged: {fault}", fix=_again(name))
    return folder, json.loads((folder / MANIFEST).read_bytes())


def fresh_manifest(
    spec: Spec,
    repository: Path,
    target: Target,
    machine: Mapping[str, str] | None = None,
    served_by: Backend | None = None,
) -> dict[str, Any] | None:
    """The served version's manifest if that version is whole and a publish would give the same again, else None.

    Args:
        spec, repository, target, served_by: as for `publish`.
        machine: for a plan, what this machine would build it for.
    """
    version = served_version(repository, spec.model.name)
    folder = repository / spec.model.name / str(version)
    if version is None or damage(folder):
        return None
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    wanted = recipe(spec, target, served_by) | ({"target": dict(machine)} if machine else {})
    return None if changed(manifest, wanted) else manifest


def damage(folder: Path) -> str:
    """What is wrong with a version folder, in words; empty if it is as it was published."""
    try:
        data = (folder / MANIFEST).read_bytes()
        if hashlib.sha256(data).hexdigest() not in (folder / CONFIG).read_text():
            return f"{MANIFEST} is not the one that {CONFIG} names"
        digests: Mapping[str, str] = json.loads(data)["files"]
        different = [name for name, digest in digests.items() if files.sha256(folder / name) != digest]
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return f"{different[0]} has changed since" if different else ""


def fault(folder: Path) -> str:
    """What is wrong with a published model, in words: its config.pbtxt, or the version that this names.

    Args:
        folder: of the model, in a repository.

    Returns:
        Empty if it is as it was published, or was not published by this project (no version has a manifest).
    """
    if name := picture.owner(folder):
        return picture.fault(folder, served_version(folder.parent, name))
    versions = _versions(folder)
    if not any((folder / str(version) / MANIFEST).exists() for version in versions):
        return ""
    if not (folder / CONFIG).is_file():
        return f"its {CONFIG} is missing, so nothing of it is served"
    served = served_version(folder.parent, folder.name)
    if served is None:
        return f"its {CONFIG} cannot be read, or names no version"
    if served not in versions:
        return f"its {CONFIG} names version {served}, there are {versions}"
    harm = damage(folder / str(served))
    if harm:
        return f"version {served}: {harm}"
    same = (folder / CONFIG).read_bytes() == (folder / str(served) / CONFIG).read_bytes()
    return "" if same else f"its {CONFIG} is not that of version {served}"


def is_published(folder: Path) -> bool:
    """Whether a folder of a repository is a model: it has a config.pbtxt, or lost it."""
    return (folder / CONFIG).exists() or any((folder / str(v) / MANIFEST).exists() for v in _versions(folder))


def carries_libraries(folder: Path) -> bool:
    """Whether a version folder holds libraries, where this project put them until backends/ held them."""
    return any(folder.glob("*.so*"))


def _nothing_named(folder: Path) -> PublishError:
    """The error where config.pbtxt does not tell which version is served."""
    whole = [version for version in _versions(folder) if not damage(folder / str(version))]
    there = (folder / CONFIG).is_file()
    copy = f"; or serve version {max(whole)}: cp {folder / str(max(whole)) / CONFIG} {folder}/" if whole else ""
    return PublishError(
        f"{folder.name} {f'has a damaged {CONFIG}' if there else f'lost its {CONFIG}'}: which version was served is "
        "not known",
        fix=f"publish again: {_again(folder.name)}{copy}",
    )


def _again(name: str) -> str:
    return f"./invoke build-engines --model {name} --force"


@contextmanager
def _locked(repository: Path, name: str) -> Iterator[Path]:
    """The model's folder, held against a second publish until the end of the block or of the process."""
    with ExitStack() as held:
        with files.explained(repository, _UNTOUCHED, PublishError):
            try:
                held.enter_context(files.locked(_lock_file(repository / name), wait=False))
            except BlockingIOError as error:
                raise PublishError(
                    f"{name} is being published to {repository} by another process",
                    why=f"{error.filename}: {error.strerror}" if error.filename else "",
                    fix="wait for it, then try again",
                ) from None
        yield repository / name


def _lock_file(folder: Path) -> Path:
    """A file, with every number that a version ever had: of folders, tritonserver takes even hidden ones for models."""
    return folder.parent / f".{folder.name}.lock"


def _taken(folder: Path) -> list[int]:
    """The numbers that versions of a model had, as far as they were noted."""
    try:
        return [int(line) for line in _lock_file(folder).read_text().split() if line.isdecimal()]
    except (OSError, UnicodeDecodeError):
        return []


def _take(folder: Path, version: int) -> None:
    with _lock_file(folder).open("a") as file:
        file.write(f"{version}\n")


def _clear(folder: Path) -> None:
    """Removes what an interrupted publish left; the caller holds the lock."""
    (folder / f".{CONFIG}").unlink(missing_ok=True)
    staging.clear(folder)


def _versions(folder: Path) -> list[int]:
    """The version folders, in order."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal() and path.is_dir())


def _serve_config(folder: Path, data: bytes) -> None:
    """Replaces config.pbtxt: the moment from which another version is served."""
    new = folder / f".{CONFIG}"
    _write(new, data)
    new.replace(folder / CONFIG)
    _sync(folder)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        files.flush(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        files.flush(descriptor)
    finally:
        os.close(descriptor)
