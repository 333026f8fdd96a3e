"""spec.toml → frozen, checked dataclasses: the model's files, its input, how its boxes are filtered, how it is served.

`load("models/shapes/spec.toml")` gives a `Spec`, or one `SpecError` that names the file, the table and key, the value
found and what would be right. The dataclasses are the one list of keys, defaults, ranges; docs/spec.md explains them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from build.errors import SpecError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Floats3 = tuple[float, float, float]
Floats4 = tuple[float, float, float, float]
Names = tuple[str, ...]

_TYPE_NAMES: dict[Any, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Floats3: "a list of 3 numbers",
    Floats4: "a list of 4 numbers",
    Names: "a list of texts",
}


def _key(
    default: Any = MISSING,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    choices: tuple[str, ...] = (),
    pattern: str = "",
) -> Any:
    """A field with what it allows: low ≤ value ≤ high, value > above, one of choices, a full match of pattern."""
    rule = {"low": low, "high": high, "above": above, "choices": choices, "pattern": pattern}
    return field(default=default, metadata=rule)


class _WrongValueError(ValueError):
    """A key and what is wrong with its value; `load` adds file and table."""

    def __init__(self, key: str, problem: str) -> None:
        self.key, self.problem = key, problem
        super().__init__(f"{key} {problem}")


@dataclass(frozen=True)
class Table:
    """One table of spec.toml. Checks its own values, so that one made in Python is as right as one that was read.

    Raises:
        ValueError: a value is of the wrong type or out of its range.
    """

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = _converted(getattr(self, item.name), types[item.name])
            if value is None:
                raise _WrongValueError(
                    item.name, f"is {getattr(self, item.name)!r}, but must be {_TYPE_NAMES[types[item.name]]}"
                )
            rule = item.metadata
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, (int, float)) and not (
                    rule["low"] <= one <= rule["high"] and one > rule["above"] and math.isfinite(one)
                ):
                    raise _WrongValueError(item.name, f"is {getattr(self, item.name)!r}, but must be {_range(rule)}")
                if rule["choices"] and one not in rule["choices"]:
                    near = difflib.get_close_matches(str(one), rule["choices"], 1)
                    hint = f" (did you mean {near[0]!r}?)" if near else ""
                    raise _WrongValueError(
                        item.name, f"is {one!r}, but must be one of {', '.join(rule['choices'])}{hint}"
                    )
            if rule["pattern"] and not re.fullmatch(rule["pattern"], value):
                raise _WrongValueError(item.name, f"is {value!r}, but must match {rule['pattern']}")
            object.__setattr__(self, item.name, value)


def _converted(value: Any, to: Any) -> Any:
    """The value as the field's type, or None where it is of another type; whole numbers count as numbers."""
    if to in (Floats3, Floats4):
        size = 3 if to == Floats3 else 4
        if not isinstance(value, (list, tuple)) or len(value) != size:
            return None
        numbers = tuple(_converted(number, float) for number in value)
        return None if None in numbers else numbers
    if to == Profiles:
        good = isinstance(value, (list, tuple)) and all(isinstance(item, (dict, Profile)) for item in value)
        return tuple(_profile(number, item) for number, item in enumerate(value)) if good else None
    if to == Names:
        good = isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
        return tuple(value) if good else None
    if to is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if type(value) is to else None


def _range(rule: Any) -> str:
    """The allowed range in words."""
    if rule["above"] != -math.inf:
        return f"greater than {rule['above']:g}"
    if rule["high"] == math.inf:
        return f"at least {rule['low']:g}" if rule["low"] != -math.inf else "a finite number"
    return f"in {rule['low']:g}..{rule['high']:g}"


@dataclass(frozen=True)
class Model(Table):
    """[model]: the files of the source model, relative to spec.toml."""

    name: str = _key(pattern="[A-Za-z0-9][A-Za-z0-9_-]*")
    onnx: str = _key("model.onnx", pattern=".+")
    labels: str = _key("labels.txt", pattern=".+")
    anchors: str = _key("anchors.npy", pattern=".+")


@dataclass(frozen=True)
class Input(Table):
    """[input]: the picture that the model takes; mean and std are in pixel values, in the order of `color_order`."""

    width: int = _key(low=1, high=8192)
    height: int = _key(low=1, high=8192)
    color_order: str = _key("RGB", choices=("RGB", "BGR"))
    resize: str = _key("stretch", choices=("stretch", "letterbox"))
    resample: str = _key("bilinear", choices=("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"))
    pad_value: int = _key(114, low=0, high=255)
    mean: Floats3 = _key((0.0, 0.0, 0.0))  # noqa: RUF009
    std: Floats3 = _key((255.0, 255.0, 255.0), above=0)  # noqa: RUF009


@dataclass(frozen=True)
class Nms(Table):
    """[nms]: the attributes of the SSDNMS node (docs/design.md), and whether the thresholds are inputs, too."""

    score_threshold: float = _key(0.05, low=0, high=1)
    iou_threshold: float = _key(0.45, low=0, high=1)
    max_detections: int = _key(100, low=1, high=2**31 - 1)
    topk_per_class: int = _key(0, low=0, high=2**31 - 1)
    background_class: int = _key(0, low=-1, high=2**31 - 1)
    score_activation: str = _key("softmax", choices=("softmax", "sigmoid", "none"))
    box_coding: str = _key("center_size", choices=("center_size", "corner"))
    box_scales: Floats4 = _key((10.0, 10.0, 5.0, 5.0), above=0)  # noqa: RUF009
    clip_boxes: bool = _key(True)
    class_agnostic: bool = _key(False)
    runtime_thresholds: bool = _key(False)


@dataclass(frozen=True)
class Serving(Table):
    """[serving]: how tritonserver runs it; 0 leaves `instances` and `threads` to the runtime, the rest switched off.

    Queue and delay are for requests that are batched together; CUDA graphs and warm-up for the runtime tensorrt.
    """

    max_batch_size: int = _key(32, low=1, high=4096)
    instances: int = _key(0, low=0, high=1024)
    threads: int = _key(0, low=0, high=1024)
    backend: str = _key("auto", choices=("auto", "ssd_onnxruntime", "python"))
    dynamic_batching: str = _key("auto", choices=("auto", "on", "off"))
    max_queue_size: int = _key(256, low=0, high=2**31 - 1)
    queue_timeout_ms: int = _key(1000, low=0, high=2**31 - 1)
    queue_delay_us: int = _key(0, low=0, high=10**6)
    cuda_graphs: bool = _key(False)
    warmup: bool = _key(True)


@dataclass(frozen=True)
class Profile(Table):
    """[[tensorrt.profiles]]: the batch sizes of one optimisation profile; TensorRT tunes for `opt`."""

    min: int = _key(low=1, high=4096)
    opt: int = _key(low=1, high=4096)
    max: int = _key(low=1, high=4096)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.min <= self.opt <= self.max:
            raise _WrongValueError("opt", f"is {self.opt}, but must be between min {self.min} and max {self.max}")


Profiles = tuple[Profile, ...]
_TACTIC_SOURCES = ("cublas", "cublas_lt", "cudnn", "edge_mask_convolutions", "jit_convolutions")
_TYPE_NAMES[Profiles] = "a list of tables: [[tensorrt.profiles]], each with min, opt and max"


@dataclass(frozen=True)
class TensorRT(Table):
    """[tensorrt]: how the engine is built; 0 or an empty list leaves the choice to TensorRT."""

    profiles: Profiles = _key(())  # noqa: RUF009
    workspace_mib: int = _key(0, low=0, high=2**31 - 1)
    optimization_level: int = _key(3, low=0, high=5)
    tf32: bool = _key(False)
    version_compatible: bool = _key(False)
    hardware_compatible: str = _key("none", choices=("none", "ampere_plus", "same_compute_capability"))
    tactic_sources: Names = _key((), choices=_TACTIC_SOURCES)  # noqa: RUF009


@dataclass(frozen=True)
class Data(Table):
    """[data]: the pictures that INT8 and FP8 are calibrated on, and those that every precision is audited on.

    Each is a folder with an `instances.json`, or a split of `generator`; an empty text is none (build/datasets.py).
    """

    generator: str = _key("")
    calibration: str = _key("")
    calibration_count: int = _key(500, low=1, high=10**6)
    held_out: str = _key("")
    held_out_count: int = _key(500, low=1, high=10**6)


@dataclass(frozen=True)
class Quantization(Table):
    """[quantization]: how INT8 and FP8 graphs are made, and how much accuracy any precision may lose."""

    calibrator: str = _key("auto", choices=("auto", "minmax", "entropy", "percentile"))
    percentile: float = _key(99.99, low=50, high=100)
    exclude_nodes: Names = _key(())  # noqa: RUF009
    rest: str = _key("fp32", choices=("fp32", "fp16"))
    gate: float = _key(0.99, low=0, high=1)


@dataclass(frozen=True)
class Spec:
    """A whole spec.toml, with its labels read.

    Attributes:
        path: the spec.toml itself.
        labels: the foreground labels, in the order of `detection_classes`.
    """

    path: Path
    model: Model
    input: Input
    nms: Nms
    serving: Serving
    tensorrt: TensorRT
    data: Data
    quantization: Quantization
    labels: tuple[str, ...]

    @property
    def onnx_path(self) -> Path:
        """The source model."""
        return self.path.parent / self.model.onnx

    @property
    def labels_path(self) -> Path:
        """The text file with one foreground label per line."""
        return self.path.parent / self.model.labels

    @property
    def anchors_path(self) -> Path:
        """The .npy file with the anchors."""
        return self.path.parent / self.model.anchors

    @property
    def classes(self) -> int:
        """C: what the model's `class_logits` must have in its last dimension."""
        return len(self.labels) + (self.nms.background_class >= 0)

    @property
    def profiles(self) -> Profiles:
        """The optimisation profiles: those of [tensorrt], else one for every batch size that is served."""
        most = self.serving.max_batch_size
        return self.tensorrt.profiles or (Profile(1, min(8, most), most),)

    def load_anchors(self) -> NDArray[np.float32]:
        """The anchors: FP32 [N,4], cx,cy,w,h in units of the image's width and height.

        Raises:
            SpecError: the file is no .npy, or not an array of finite numbers [N,4] with w and h above 0.
        """
        import numpy as np

        try:
            anchors = np.load(self.anchors_path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise SpecError(
                f"{self.anchors_path}: no readable .npy array: {error}",
                why="the file is truncated, of another kind, or holds pickled objects",
                fix="write it again with numpy.save, FP32 [N,4] of cx,cy,w,h",
            ) from None
        good_kind = isinstance(anchors, np.ndarray) and anchors.dtype.kind == "f"
        if not good_kind or anchors.ndim != 2 or anchors.shape[1] != 4 or not len(anchors):
            found = f"{anchors.dtype} {list(anchors.shape)}" if isinstance(anchors, np.ndarray) else "an archive"
            raise SpecError(f"{self.anchors_path}: anchors must be a float array [N,4] of cx,cy,w,h, got {found}")
        if not np.isfinite(anchors).all() or not (anchors[:, 2:] > 0).all():
            bad = int(np.argmax(~(np.isfinite(anchors).all(1) & (anchors[:, 2:] > 0).all(1))))
            raise SpecError(
                f"{self.anchors_path}: anchor {bad} is {anchors[bad].tolist()}",
                fix="make all four finite, and w and h greater than 0",
            )
        return np.ascontiguousarray(anchors, np.float32)


_TABLES: dict[str, type[Table]] = {
    "model": Model,
    "input": Input,
    "nms": Nms,
    "serving": Serving,
    "tensorrt": TensorRT,
    "data": Data,
    "quantization": Quantization,
}
_T = TypeVar("_T", bound=Table)


def load(path: str | Path) -> Spec:
    """Reads and checks a spec.toml and the labels that it names; the other files must exist.

    Args:
        path: a spec.toml, or the folder that holds one.

    Raises:
        SpecError: anything missing, unreadable, unknown, of the wrong type or out of range.
    """
    path = Path(path)
    if path.is_dir():
        path /= "spec.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}", fix="give the path of a spec.toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: no valid TOML: {error}", fix="mend the line that is named (docs/spec.md)") from None
    for name, value in content.items():
        if name not in _TABLES or not isinstance(value, dict):
            where = f"a table [{name}]" if isinstance(value, dict) else f"a key {name!r} outside its tables"
            raise SpecError(f"{path}: has {where}, which is unknown", fix=_nearest(name, list(_TABLES), "[{}]"))
    tables = {name: _table(path, name, table, content.get(name, {})) for name, table in _TABLES.items()}
    spec = Spec(path, labels=(), **tables)  # type: ignore[arg-type]
    spec = dataclasses.replace(spec, labels=_labels(spec))
    for key in ("onnx", "anchors"):
        file = path.parent / getattr(spec.model, key)
        if not file.is_file():
            raise SpecError(
                f"{path}: [model] {key} names {file}, which is not there", fix="put the file there or correct the name"
            )
    labels, background = len(spec.labels), spec.nms.background_class
    if background > labels:
        raise SpecError(
            f"{path}: [nms] background_class is {background}, but must be in -1..{labels}",
            why=f"{spec.labels_path} has {labels} labels, so that with a background there are {labels + 1} classes",
        )
    _check_profiles(spec)
    return spec


def _check_profiles(spec: Spec) -> None:
    """Every batch size from 1 to max_batch_size lies in a profile, and none beyond.

    Raises:
        SpecError: naming the first that does not.
    """
    reached, most = 0, spec.serving.max_batch_size
    for profile in sorted(spec.profiles, key=lambda profile: profile.min):
        if profile.min > reached + 1:
            break
        reached = max(reached, profile.max)
    if reached < most:
        raise SpecError(
            f"{spec.path}: [[tensorrt.profiles]] leave out batch size {reached + 1} of [serving] max_batch_size {most}",
            fix="let the profiles cover 1 to max_batch_size without a gap, or lower max_batch_size",
        )
    if reached > most:
        raise SpecError(
            f"{spec.path}: [[tensorrt.profiles]] go up to {reached}, but [serving] max_batch_size is {most}",
            fix=f"set max_batch_size = {reached}, or end the profiles at {most}",
        )


def _table(path: Path, name: str, kind: type[_T], values: dict[str, Any]) -> _T:
    keys = {item.name: item for item in dataclasses.fields(kind)}
    for key in values:
        if key not in keys:
            raise SpecError(f"{path}: [{name}] {key} is an unknown key", fix=_nearest(key, list(keys), "{}"))
    missing = [key for key, item in keys.items() if item.default is MISSING and key not in values]
    if missing:
        raise SpecError(f"{path}: [{name}] {missing[0]} is missing", fix=f"add it under [{name}] (docs/spec.md)")
    try:
        return kind(**values)
    except _WrongValueError as wrong:
        raise SpecError(f"{path}: [{name}] {wrong.key} {wrong.problem}", fix="see docs/spec.md") from None


def _profile(number: int, values: Profile | dict[str, Any]) -> Profile:
    """One profile of the list; what is wrong with it names its place."""
    if isinstance(values, Profile):
        return values
    known = [item.name for item in dataclasses.fields(Profile)]
    if set(values) != set(known):
        problem = f"{number} has the keys {', '.join(values)}, but must have {', '.join(known)}"
        raise _WrongValueError("profiles", problem)
    try:
        return Profile(**values)
    except _WrongValueError as wrong:
        raise _WrongValueError("profiles", f"{number}: {wrong}") from None


def _nearest(wrong: str, known: list[str], form: str) -> str:
    near = difflib.get_close_matches(wrong, known, 1)
    choice = ", ".join(form.format(name) for name in known)
    return (f"did you mean {form.format(near[0])}? " if near else "") + f"known are {choice}"


def _labels(spec: Spec) -> tuple[str, ...]:
    try:
        labels = spec.labels_path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            f"{spec.path}: [model] labels names {spec.labels_path}, which cannot be read: {error}",
            fix="write one foreground label per line, UTF-8, without the background",
        ) from None
    if not labels:
        raise SpecError(f"{spec.labels_path}: has no labels", fix="write one foreground label per line")
    for number, label in enumerate(labels, 1):
        if not label.strip() or label != label.strip():
            raise SpecError(f"{spec.labels_path}: line {number} is {label!r}", fix="a text without spaces around it")
        if label in labels[: number - 1]:
            raise SpecError(f"{spec.labels_path}: line {number} repeats the label {label!r}")
    return tuple(labels)
