"""spec.toml → frozen, checked dataclasses: the model's files, its input, how its boxes are filtered, how it is served.

`load("models/shapes/spec.toml")` gives a `Spec`, or one `SpecError` that names the file, the table and key, the value
found and what would be right. The dataclasses are the one list of keys, defaults, ranges; docs/spec.md explains them.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ssd_client.rule import COLOR_ORDERS, RESAMPLES, RESIZES, Preprocessing
from ssd_client.text import HIDDEN, has_hidden

from build import contract
from build.contract import SpecNms as Nms
from build.errors import SpecError
from build.files import replacing
from build.tables import INT32_MAX, Floats3, Names, Table, WrongValueError, key, register

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Model(Table):
    """[model]: the files of the source model, relative to spec.toml."""

    name: str = key(pattern="[A-Za-z0-9][A-Za-z0-9_-]*")
    onnx: str = key("model.onnx", pattern=".+")
    labels: str = key("labels.txt", pattern=".+")
    anchors: str = key("anchors.npy", pattern=".+")


@dataclass(frozen=True)
class Input(Table):
    """[input]: the picture that the model takes; mean and std are in pixel values, in the order of `color_order`."""

    width: int = key(low=1, high=8192)
    height: int = key(low=1, high=8192)
    color_order: str = key("RGB", choices=COLOR_ORDERS)
    resize: str = key("stretch", choices=RESIZES)
    resample: str = key("bilinear", choices=RESAMPLES)
    pad_value: int = key(114, low=0, high=255)
    mean: Floats3 = key((0.0, 0.0, 0.0))  # noqa: RUF009
    std: Floats3 = key((255.0, 255.0, 255.0), above=0)  # noqa: RUF009

    @property
    def preprocessing(self) -> Preprocessing:
        """How a picture becomes the served input: always RGB, since the graph reorders for a model that wants BGR."""
        return Preprocessing(self.width, self.height, self.resize, self.resample, self.pad_value, "RGB")


@dataclass(frozen=True)
class Serving(Table):
    """[serving]: how tritonserver runs it; 0 leaves `instances` and `threads` to the runtime, the rest switched off.

    The delay is for requests that are batched together; CUDA graphs and warm-up for the runtime tensorrt.
    """

    max_batch_size: int = key(32, low=1, high=4096)
    instances: int = key(0, low=0, high=1024)
    threads: int = key(0, low=0, high=1024)
    engine: str = key("onnxruntime", choices=("auto", "onnxruntime", "openvino"))
    backend: str = key("auto", choices=("auto", "ssd_onnxruntime", "python", "onnxruntime"))
    dynamic_batching: str = key("auto", choices=("auto", "on", "off"))
    max_queue_size: int = key(256, low=0, high=INT32_MAX)
    queue_timeout_ms: int = key(30_000, low=0, high=INT32_MAX)
    queue_delay_us: int = key(0, low=0, high=10**6)
    cuda_graphs: bool = key(False)
    warmup: bool = key(True)
    picture_input: bool = key(False)


@dataclass(frozen=True)
class Profile(Table):
    """[[tensorrt.profiles]]: the batch sizes of one optimisation profile; TensorRT tunes for `opt`."""

    min: int = key(low=1, high=4096)
    opt: int = key(low=1, high=4096)
    max: int = key(low=1, high=4096)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.min <= self.opt <= self.max:
            raise WrongValueError("opt", f"is {self.opt}, but must be between min {self.min} and max {self.max}")


Profiles = tuple[Profile, ...]
_TACTIC_SOURCES = ("cublas", "cublas_lt", "cudnn", "edge_mask_convolutions", "jit_convolutions")


def _profiles(value: Any) -> Profiles | None:
    good = isinstance(value, (list, tuple)) and all(isinstance(item, (dict, Profile)) for item in value)
    return tuple(_profile(number, item) for number, item in enumerate(value)) if good else None


register(Profiles, "a list of tables: [[tensorrt.profiles]], each with min, opt and max", _profiles)


@dataclass(frozen=True)
class TensorRT(Table):
    """[tensorrt]: how the engine is built; 0 or an empty list leaves the choice to TensorRT."""

    profiles: Profiles = key(())  # noqa: RUF009
    workspace_mib: int = key(0, low=0, high=INT32_MAX)
    optimization_level: int = key(3, low=0, high=5)
    tf32: bool = key(False)
    version_compatible: bool = key(False)
    hardware_compatible: str = key("none", choices=("none", "ampere_plus", "same_compute_capability"))
    tactic_sources: Names = key((), choices=_TACTIC_SOURCES)  # noqa: RUF009


@dataclass(frozen=True)
class Data(Table):
    """[data]: the pictures that INT8 and FP8 are calibrated on, and those that every precision is audited on.

    Each is a folder, a video or a split of `generator`; an empty text is none (build/gate/datasets.py).
    """

    generator: str = key("")
    calibration: str = key("")
    calibration_count: int = key(500, low=1, high=10**6)
    held_out: str = key("")
    held_out_count: int = key(500, low=1, high=10**6)
    labels_from: str = key("files", choices=("files", "fp32"))


@dataclass(frozen=True)
class Quantization(Table):
    """[quantization]: how INT8 and FP8 graphs are made, and how much accuracy any precision may lose."""

    calibrator: str = key("auto", choices=("auto", *contract.CALIBRATORS))
    percentile: float = key(99.99, low=50, high=100)
    exclude_nodes: Names = key(())  # noqa: RUF009
    exclude_nodes_fp8: Names = key(())  # noqa: RUF009
    rest: str = key("fp32", choices=("fp32", "fp16"))
    gate: float = key(0.99, low=0, high=1)

    def excluded(self, precision: str) -> Names:
        """The Convs that are left unquantised in a precision: those of every precision, then its own."""
        keys = dict.fromkeys(("exclude_nodes", self.exclude_key(precision)))
        return tuple(name for key in keys for name in getattr(self, key))

    @staticmethod
    def exclude_key(precision: str) -> str:
        """The key to which a search writes what a precision leaves out: FP8 has its own, so INT8 is as it was."""
        return "exclude_nodes_fp8" if precision == "fp8" else "exclude_nodes"

    @property
    def implicit_calibrator(self) -> str:
        """The calibrator where TensorRT calibrates by itself; entropy, its own default, where the spec is open."""
        return "entropy" if self.calibrator == "auto" else self.calibrator


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
        """The .npy file with the anchors, for a model whose boxes are not decoded."""
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

    @property
    def inputs(self) -> tuple[contract.Tensor, ...]:
        """The served model's inputs."""
        return contract.inputs(self.input.height, self.input.width, self.nms.runtime_thresholds)

    @property
    def outputs(self) -> tuple[contract.Tensor, ...]:
        """The served model's outputs."""
        return contract.outputs(self.nms.max_detections)

    def settings(self) -> dict[str, Any]:
        """Every setting as `table.key`, defaults resolved, as JSON has it: equal settings build the same model."""
        return {
            f"{name}.{key}": json.loads(json.dumps(value))
            for name in _TABLES
            for key, value in dataclasses.asdict(getattr(self, name)).items()
        }

    def load_anchors(self) -> NDArray[np.float32]:
        """The anchors: FP32 [N,4], cx,cy,w,h in units of the image's width and height.

        Raises:
            SpecError: the file is no .npy, or not an array of finite numbers [N,4] with w and h above 0; or the boxes
                are decoded, so there are no anchors.
        """
        import numpy as np

        if not self.nms.needs_anchors:
            raise SpecError(f'{self.path}: there are no anchors, as [nms] box_coding = "{contract.DECODED}" says')
        try:
            anchors = np.load(self.anchors_path, allow_pickle=False)
        except Exception as error:  # of a damaged file: tokenize.TokenError, MemoryError and others
            raise SpecError(
                f"{self.anchors_path}: no readable .npy array: {error}",
                why="the file is truncated, of another kind, or holds pickled objects",
                fix="write it again with numpy.save, FP32 [N,4] of cx,cy,w,h",
            ) from None
        good_kind = isinstance(anchors, np.ndarray) and anchors.dtype.kind == "f"
        if not good_kind or anchors.ndim != 2 or anchors.shape[1] != 4 or not len(anchors):
            actual = f"{anchors.dtype} {list(anchors.shape)}" if isinstance(anchors, np.ndarray) else "an archive"
            raise SpecError(f"{self.anchors_path}: anchors must be a float array [N,4] of cx,cy,w,h, got {actual}")
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
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
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
    if not spec.nms.needs_anchors and "anchors" in content["model"]:
        raise SpecError(
            f"{path}: [model] anchors names {spec.anchors_path}, but must be left out",
            why=f'with [nms] box_coding = "{contract.DECODED}" the model itself gives x1,y1,x2,y2 in 0..1',
            fix="remove the key, or set the box_coding by which the model's deltas move these anchors",
        )
    for name in ("onnx", "anchors") if spec.nms.needs_anchors else ("onnx",):
        file = path.parent / getattr(spec.model, name)
        if not file.is_file():
            raise SpecError(
                f"{path}: [model] {name} names {file}, which is not there", fix="put the file there or correct the name"
            )
    generator = (path.parent / spec.data.generator).resolve()
    if not generator.is_relative_to(path.parent.resolve()):
        raise SpecError(
            f"{path}: [data] generator is {spec.data.generator!r}, which lies outside the model's folder ({generator})",
            why="a build runs its code, so a spec.toml from elsewhere could run any file of this machine",
            fix="read it, and put it into the model's folder",
        )
    labels, background = len(spec.labels), spec.nms.background_class
    if background > labels:
        raise SpecError(
            f"{path}: [nms] background_class is {background}, but must be in -1..{labels}",
            why=f"{spec.labels_path} has {labels} labels, so that with a background there are {labels + 1} classes",
        )
    _check_profiles(spec)
    return spec


def with_labels_from(spec: Spec, labels_from: str) -> Spec:
    """The spec with another [data] labels_from.

    Raises:
        SpecError: there is no such choice.
    """
    return dataclasses.replace(
        spec, data=_table(spec.path, "data", Data, {**dataclasses.asdict(spec.data), "labels_from": labels_from})
    )


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
    for given in values:
        if given not in keys:
            raise SpecError(f"{path}: [{name}] {given} is an unknown key", fix=_nearest(given, list(keys), "{}"))
    missing = [known for known, item in keys.items() if item.default is MISSING and known not in values]
    if missing:
        raise SpecError(f"{path}: [{name}] {missing[0]} is missing", fix=f"add it under [{name}] (docs/spec.md)")
    try:
        return kind(**values)
    except WrongValueError as wrong:
        raise SpecError(f"{path}: [{name}] {wrong.key} {wrong.problem}", fix="see docs/spec.md") from None


def _profile(number: int, values: Profile | dict[str, Any]) -> Profile:
    """One profile of the list; what is wrong with it names its place."""
    if isinstance(values, Profile):
        return values
    known = [item.name for item in dataclasses.fields(Profile)]
    if set(values) != set(known):
        problem = f"{number} has the keys {', '.join(values)}, but must have {', '.join(known)}"
        raise WrongValueError("profiles", problem)
    try:
        return Profile(**values)
    except WrongValueError as wrong:
        raise WrongValueError("profiles", f"{number}: {wrong}") from None


def _nearest(wrong: str, known: list[str], form: str) -> str:
    near = difflib.get_close_matches(wrong, known, 1)
    choice = ", ".join(form.format(name) for name in known)
    return (f"did you mean {form.format(near[0])}? " if near else "") + f"known are {choice}"


def _labels(spec: Spec) -> tuple[str, ...]:
    try:
        labels = spec.labels_path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            f"{spec.path}: [model] labels names {spec.labels_path}, which cannot be read: {error}",
            fix="write one foreground label per line, UTF-8, without the background",
        ) from None
    if labels == [""]:
        raise SpecError(f"{spec.labels_path}: has no labels", fix="write one foreground label per line")
    for number, label in enumerate(labels, 1):
        if not label.strip() or label != label.strip():
            raise SpecError(f"{spec.labels_path}: line {number} is {label!r}", fix="a text without spaces around it")
        if has_hidden(label):
            raise SpecError(
                f"{spec.labels_path}: line {number} is {label!r}",
                why=f"it has {HIDDEN}, which nobody sees",
                fix="write the label without them",
            )
        if label in labels[: number - 1]:
            raise SpecError(f"{spec.labels_path}: line {number} repeats the label {label!r}")
    return tuple(labels)


def edit(path: Path, settings: Mapping[str, Any]) -> None:
    """Sets keys of a spec.toml and leaves everything else, comments included, as it is; whole or not at all.

    Args:
        path: the spec.toml.
        settings: `table.key` → value.

    Raises:
        SpecError: the file cannot be read or changed, or these values make it a wrong spec.toml; it is then as it was.
        WriteError: the operating system refuses.
    """
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        text = path.read_bytes().decode("utf-8-sig")
        document, wanted = tomlkit.parse(text), tomllib.loads(text)
    except (OSError, ValueError) as error:  # neither UTF-8 nor TOML
        raise SpecError(f"{path}: cannot be read: {error}") from None
    try:
        for setting, given in settings.items():
            table, key = setting.split(".")
            value = list(given) if isinstance(given, tuple) else given
            if table not in document:
                while document.body and not tomlkit.dumps(document).replace("\r", "").endswith("\n\n"):
                    document.add(tomlkit.nl())
                document.add(table, tomlkit.table())
            item = tomlkit.item(value)
            if isinstance(item, tomlkit.items.Array):
                item.multiline(bool(value))
            place, behind = document[table], list[Any]()
            if isinstance(place, tomlkit.items.Table) and key not in place:
                body = place.value.body  # a new key comes before blank lines and comments: the next table's, maybe
                while body and isinstance(body[-1][1], (tomlkit.items.Comment, tomlkit.items.Whitespace)):
                    behind.insert(0, body.pop())
            place[key] = item
            if behind:
                place.value.body.extend(behind)
            wanted.setdefault(table, {})[key] = value
        content = tomlkit.dumps(document)
        if "\r\n" in text and "\n" not in text.replace("\r\n", ""):
            content = content.replace("\r\n", "\n").replace("\n", "\r\n")
        right = tomllib.loads(content) == wanted
    except (TOMLKitError, TypeError, ValueError):
        right = False
    if not right:
        lines = "; ".join(f"{name} = {json.dumps(value)}" for name, value in settings.items())
        raise SpecError(f"{path}: cannot be changed in the way it is written", fix=f"write by hand: {lines}")
    with replacing(path) as unfinished:
        unfinished.write_bytes(content.encode())
        shutil.copymode(path, unfinished)
        load(unfinished)
