"""`[serving] picture_input`: an ensemble `<name>_picture` beside the model, a picture's file in, boxes in pixels out.

It has three parts: a step that decodes, the model itself, a step that brings the boxes to pixels. Every part has the
model's own version number, and the ensemble names it: a picture is never decoded by one version's rule for another's
model.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from build import contract, files
from build.errors import PublishError
from build.publish import staging
from build.publish.config import instances_and_threads, text
from build.spec import Spec

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

_STEP = files.ROOT / "build" / "publish" / "backends" / "picture" / "model.py"
_CLIENT = files.ROOT / "client" / "ssd_client"
MARK = "picture_of"  # the parameter by which a part tells whose it is
_DIGEST = "files_sha256"
BLANK = b"P6 1 1 255\n\0\0\0"  # a whole picture's file: one black pixel as PPM


def _modules(name: str = "preprocess.py") -> frozenset[str]:
    """A module of the client, and those of the client that it needs."""
    nodes = ast.walk(ast.parse((_CLIENT / name).read_text(encoding="utf-8")))
    needed = {f"{node.module}.py" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1}
    return frozenset({name}).union(*map(_modules, needed))


_MODULES = sorted(_modules())
# What decides how a picture becomes an input, beside the spec.
SOURCES = tuple(str(files.relative(path)) for path in (_STEP, *(_CLIENT / name for name in _MODULES)))
_CONFIG = "config.pbtxt"


def parts(name: str) -> tuple[str, str, str]:
    """The folders of a model's picture input; the last one is what a client asks."""
    return f"{name}_picture_decode", f"{name}_picture_place", f"{name}_picture"


def owner(folder: Path) -> str:
    """The model that a folder of the repository is a part of; "" if it is a model of its own."""
    config = _read(folder)
    return str(config.parameters[MARK].string_value) if config else ""


def fault(folder: Path, served: int | None) -> str:
    """What is wrong with a published part, in words; empty if it is as it was published.

    Args:
        folder: of the part.
        served: the version of its model that is served.
    """
    config = _read(folder)
    versions = list(config.version_policy.specific.versions) if config else []
    if config is None or versions != [served]:
        return f"it is for version {', '.join(map(str, versions)) or '?'}, its model serves {served or 'none'}"
    at = folder / str(served)
    contents = {path.relative_to(at).as_posix(): path.read_bytes() for path in at.rglob("*") if path.suffix == ".py"}
    return "" if _digest(contents) == config.parameters[_DIGEST].string_value else "a file of it has changed since"


def _read(folder: Path) -> ModelConfig | None:
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        return text_format.Parse((folder / _CONFIG).read_text(), ModelConfig(), allow_unknown_field=True)
    except (OSError, UnicodeDecodeError, text_format.ParseError):
        return None


def _digest(contents: Mapping[str, bytes]) -> str:
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def bring_about(spec: Spec, repository: Path, version: int, runtime: str) -> bool:
    """Publishes the parts for a version of the model, or removes them, as the spec says.

    Args:
        spec: of the model.
        repository: where the model is published.
        version: that is served.
        runtime: of that version.

    Returns:
        Whether anything was changed.

    Raises:
        PublishError: a part's name is that of another model, or the repository cannot be written.
    """
    name = spec.model.name
    if not spec.serving.picture_input:
        return remove(repository, name)
    changed = False
    for config in (_decode(spec, version, runtime), _place(spec, version), _ensemble(spec, version)):
        folder = repository / config.name
        if folder.exists() and owner(folder) != name:
            raise PublishError(
                f"{folder} is a model of its own, but {name} needs the name for its picture input",
                fix="rename one of the two, or set picture_input = false in [serving]",
            )
        contents = {}
        if config.backend == "python":
            contents["model.py"] = _STEP.read_bytes()
            contents |= {f"ssd_client/{module}": (_CLIENT / module).read_bytes() for module in _MODULES}
            contents["ssd_client/__init__.py"] = b'"""The part of ssd_client that turns pictures into inputs."""\n'
        config.parameters[_DIGEST].string_value = _digest(contents)
        contents[_CONFIG] = text(config).encode()
        with files.explained(folder, "the model itself is published", PublishError):
            changed |= _publish(folder, version, contents)
    return changed


def serve(repository: Path, name: str, version: int) -> None:
    """Serves the parts of an earlier version again, or none if it had none.

    Args:
        repository: where the model is published.
        name: of the model.
        version: that is served again.
    """
    folders = [repository / part for part in parts(name) if owner(repository / part) == name]
    if all((folder / str(version) / _CONFIG).is_file() for folder in folders):
        for folder in folders:
            files.write(folder / _CONFIG, (folder / str(version) / _CONFIG).read_bytes())
    else:
        remove(repository, name)


def remove(repository: Path, name: str) -> bool:
    """Removes the parts, the ensemble first; whether there were any."""
    folders = [repository / part for part in reversed(parts(name)) if owner(repository / part) == name]
    for folder in folders:
        staging.remove(folder)
    return bool(folders)


def _publish(folder: Path, version: int, contents: dict[str, bytes]) -> bool:
    """One part, as build/publish/repository.py publishes a model; whether it was not there already."""
    at = folder / str(version)
    wanted = [(folder / _CONFIG, contents[_CONFIG]), *((at / name, data) for name, data in contents.items())]
    if all(path.is_file() and path.read_bytes() == data for path, data in wanted):
        return False
    served = {path.name for path in folder.glob("[0-9]*")}
    staging.clear(folder)
    place = staging.place(folder)
    for name, data in contents.items():
        path = place / str(version) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    if place.parent != folder:
        files.write(place / _CONFIG, contents[_CONFIG])
        place.rename(folder)
    else:
        if at.exists():  # damaged
            at.rename(place / "damaged")
        (place / str(version)).rename(at)
        files.write(folder / _CONFIG, contents[_CONFIG])
    staging.clear(folder)
    newest = sorted(served - {str(version)}, key=int)[-1:]  # stays for rollback
    for old in served - {str(version), *newest}:
        shutil.rmtree(folder / old, ignore_errors=True)
    return True


def _step(spec: Spec, version: int, name: str, step: str, count: int) -> ModelConfig:
    from tritonclient.grpc import model_config_pb2 as pb

    config = pb.ModelConfig(name=name, backend="python", max_batch_size=1)
    config.version_policy.specific.versions.append(version)
    config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=count)
    config.parameters[MARK].string_value = spec.model.name
    config.parameters["step"].string_value = step
    return config


def _decode(spec: Spec, version: int, runtime: str) -> ModelConfig:
    from tritonclient.grpc import model_config_pb2 as pb

    config = _step(spec, version, parts(spec.model.name)[0], "decode", instances_and_threads(spec, runtime)[0])
    config.input.add(name="image", data_type=pb.TYPE_UINT8, dims=[-1])
    for tensor in spec.inputs:
        config.output.add(name=tensor.name, data_type=pb.DataType.Value(f"TYPE_{tensor.triton}"), dims=tensor.shape)
    config.output.add(name="placement", data_type=pb.TYPE_FP64, dims=[8])
    config.output.add(name="image_size", data_type=pb.TYPE_INT32, dims=[2])
    names = contract.THRESHOLDS if spec.nms.runtime_thresholds else ()
    thresholds = {name: getattr(spec.nms, name) for name in names}
    config.parameters["thresholds"].string_value = json.dumps(thresholds)
    config.parameters["lowest_score_threshold"].string_value = repr(spec.nms.lowest_score_threshold)
    config.parameters["preprocessing"].string_value = json.dumps(dataclasses.asdict(spec.input.preprocessing))
    return config


def _place(spec: Spec, version: int) -> ModelConfig:
    from tritonclient.grpc import model_config_pb2 as pb

    config = _step(spec, version, parts(spec.model.name)[1], "place", 1)
    shape = [spec.nms.max_detections, 4]
    config.input.add(name="boxes", data_type=pb.TYPE_FP32, dims=shape)
    config.input.add(name="placement", data_type=pb.TYPE_FP64, dims=[8])
    config.output.add(name="detection_boxes", data_type=pb.TYPE_FP32, dims=shape)
    return config


def _ensemble(spec: Spec, version: int) -> ModelConfig:
    from tritonclient.grpc import model_config_pb2 as pb

    decode, place, name = parts(spec.model.name)
    config = pb.ModelConfig(name=name, platform="ensemble", max_batch_size=1)
    config.version_policy.specific.versions.append(version)
    config.parameters[MARK].string_value = spec.model.name
    config.input.add(name="image", data_type=pb.TYPE_UINT8, dims=[-1])
    for tensor in spec.outputs:
        config.output.add(name=tensor.name, data_type=pb.DataType.Value(f"TYPE_{tensor.triton}"), dims=tensor.shape)
    config.output.add(name="image_size", data_type=pb.TYPE_INT32, dims=[2])
    inputs = {tensor.name: tensor.name for tensor in spec.inputs}
    boxes = "detection_boxes"
    outputs = {tensor.name: "boxes" if tensor.name == boxes else tensor.name for tensor in spec.outputs}
    for model, takes, gives in (
        (decode, {"image": "image"}, {**inputs, "placement": "placement", "image_size": "image_size"}),
        (spec.model.name, inputs, outputs),
        (place, {"boxes": "boxes", "placement": "placement"}, {boxes: boxes}),
    ):
        step = config.ensemble_scheduling.step.add(model_name=model, model_version=version)
        step.input_map.update(takes)
        step.output_map.update(gives)
    return config
