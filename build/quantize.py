"""Post-training quantisation to explicit Q/DQ graphs: calibrate on real pictures, clip, place the pairs.

One pass over the pictures gives one histogram of absolute values per activation; every calibrator (minmax, entropy,
percentile) reads its clipping point off it. `quantize` then writes what was decided into the graph as nodes, which any
runtime obeys: symmetric, activations per tensor, weights per output channel, bias left in floating point.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import datasets, graph, precision
from build.errors import QuantizeError, RuntimeUnavailableError
from build.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray
    from rich.console import Console

CALIBRATORS = ("minmax", "entropy", "percentile")
BINS = 4096
FEW_PICTURES = 100
_BATCH = 4  # every activation of a batch is in memory at once
_LEVELS = 128  # of a symmetric INT8 without its sign
# The largest value of each quantised type; its INT8 uses -127..127, so that a value and its negative are alike.
_LARGEST = {"int8": 127.0, "fp8": 448.0}
# After one of these, TensorRT fuses the Conv with it and quantises behind both.
_EPILOGUES = ("Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Mul", "Add")


@dataclass
class Histogram:
    """Absolute values of one activation: BINS bins from 0 to `end`, a power of two that grows with what comes in.

    Growing merges neighbouring bins, so that the result does not depend on the order of the pictures.

    Attributes:
        end: the last bin's right edge; 0 before the first value.
        counts: INT64 [BINS].
        largest: the largest absolute value, exactly.
        negative: whether there was a value below 0.
    """

    counts: NDArray[np.int64]
    end: float = 0.0
    largest: float = 0.0
    negative: bool = False

    def add(self, values: NDArray[np.float32]) -> None:
        """Counts an array of finite values.

        Raises:
            QuantizeError: one is infinite or not a number.
        """
        import numpy as np

        size = np.abs(values, dtype=np.float32).ravel()
        largest = float(size.max(initial=0.0))
        if not np.isfinite(largest):
            raise QuantizeError(
                "an activation is infinite or not a number on a calibration picture",
                why="the model overflows, or its weights are damaged",
                fix="see which with the audit of fp32; a quantised graph could only hide it",
            )
        self.negative |= bool(values.min(initial=0.0) < 0)
        self.largest = max(self.largest, largest)
        if largest == 0.0:
            self.counts[0] += size.size
            return
        if self.end == 0.0:
            self.end = float(2.0 ** np.ceil(np.log2(largest)))
        while self.end < largest:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts[:] = 0
            self.counts[: BINS // 2] = merged
            self.end *= 2
        places = np.minimum((size * np.float32(BINS / self.end)).astype(np.int32), BINS - 1)
        self.counts += np.bincount(places, minlength=BINS)

    def clip(self, calibrator: str, percentile: float) -> float:
        """Where this calibrator clips: the largest absolute value that is still represented; 0 if all values are."""
        if calibrator == "minmax" or self.largest == 0.0:
            return self.largest
        found = _entropy(self.counts) if calibrator == "entropy" else _percentile(self.counts, percentile)
        return min(found * self.end / BINS, self.largest)


def _percentile(counts: NDArray[np.int64], percentile: float) -> int:
    """The number of bins that hold at least `percentile` percent of all values."""
    import numpy as np

    below = np.cumsum(counts)
    return int(np.searchsorted(below, below[-1] * (percentile / 100.0), side="left")) + 1


def _entropy(counts: NDArray[np.int64]) -> int:
    """The number of bins whose clipped distribution loses least information when quantised (least KL divergence).

    Migacz, "8-bit inference with TensorRT" (GTC 2017). As in NVIDIA's own tools the first bin counts as much as the
    second: the zeros that a Relu makes are represented exactly whatever the clipping, and would drown the rest.
    """
    import numpy as np

    values = counts.astype(np.float64)
    values[0] = values[1]
    last = int(np.flatnonzero(values)[-1]) + 1 if values.any() else 1
    if last <= _LEVELS:
        return last
    total = values.sum()
    best, best_bins = np.inf, last
    for bins in sorted({*range(_LEVELS, last, _LEVELS // 16), last}):
        kept = values[:bins]
        reference = kept.copy()
        reference[-1] += total - kept.sum()  # what is clipped comes to lie on the last level
        level = np.arange(bins) * _LEVELS // bins
        filled = kept > 0
        share = np.bincount(level, kept, _LEVELS) / np.maximum(np.bincount(level, filled, _LEVELS), 1)
        quantised = np.where(filled, share[level], 0.0)
        p, q = reference / total, quantised / max(quantised.sum(), 1e-300)
        both = (p > 0) & (q > 0)
        if (p[~both] > 0).any():
            p = np.where(both, p, 0.0) / p[both].sum()
        divergence = float((p[both] * np.log(p[both] / q[both])).sum())
        if divergence < best:
            best, best_bins = divergence, bins
    return best_bins


@dataclass(frozen=True)
class Calibration:
    """The activations of one model on one set of pictures.

    Attributes:
        key: what they were measured on and with; another key makes another calibration.
        histograms: by the name of the activation.
        pictures: how many were read.
    """

    key: Mapping[str, str]
    histograms: Mapping[str, Histogram]
    pictures: int

    def clips(self, calibrator: str, percentile: float) -> dict[str, float]:
        """The clipping point of every activation."""
        return {name: one.clip(calibrator, percentile) for name, one in self.histograms.items()}


def calibrate(spec: Spec, source: onnx.ModelProto, cache: Path, console: Console | None = None) -> Calibration:
    """Measures every activation that a quantised Conv can read or answer on the spec's calibration pictures.

    Args:
        spec: names the pictures.
        source: the folded source model.
        cache: a folder; `datasets` in it receives generated pictures, `<name>/calibration.npz` what was measured, which
            is read again as long as pictures, model and tools are the same.
        console: for the progress bar; None = standard error.

    Raises:
        DataError: there are no pictures, or too many of them cannot be read.
        QuantizeError: the model has no Conv, or cannot be run.
    """
    import numpy as np
    import onnxruntime
    from rich.console import Console
    from rich.progress import Progress

    say = console or Console(stderr=True, soft_wrap=True)
    pictures = datasets.calibration(spec, cache / "datasets")
    if len(pictures) < FEW_PICTURES:
        say.print(
            f"warning: {pictures.name} holds {len(pictures)} pictures; with fewer than {FEW_PICTURES} the clipping is "
            "a guess, 500 are usual",
            markup=False,
        )
    names = sorted({name for conv in convs(source) for name in (_outside(source, conv.input[0]), conv.output[0])})
    if not names:
        raise QuantizeError(f"{spec.onnx_path}: has no Conv, so there is nothing to quantise")
    whole = graph.before_nms(graph.attach(spec, source))
    file = cache / spec.model.name / "calibration.npz"
    key = _key(pictures, whole)
    try:
        return read_calibration(file, key)
    except QuantizeError as stale:
        if file.exists():
            say.print(f"{stale.what}: calibrating anew", markup=False)
    import onnx

    del whole.graph.output[:]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
    histograms = {name: Histogram(np.zeros(BINS, np.int64)) for name in names}
    read = 0
    with Progress(console=say, transient=True, disable=not say.is_terminal) as progress:
        task = progress.add_task(f"calibrating {spec.model.name} on {len(pictures)} pictures", total=len(pictures))
        for batch in datasets.arrays(pictures, spec.input, _BATCH):
            for name, values in zip(names, session.run(names, {graph.IMAGES: batch}), strict=True):
                histograms[name].add(values)
            read += len(batch)
            progress.update(task, completed=read)
    found = Calibration(key, histograms, read)
    _write_calibration(file, found)
    return found


def read_calibration(path: Path, key: Mapping[str, str]) -> Calibration:
    """What `calibrate` wrote, if it was measured on and with exactly this.

    Raises:
        QuantizeError: it is missing, damaged or stale; names what differs.
    """
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as held:
            stored = json.loads(str(held["key"]))
            histograms = {
                name: Histogram(counts, float(end), float(largest), bool(negative))
                for name, counts, (end, largest, negative) in zip(
                    held["names"].tolist(), held["counts"], held["ranges"], strict=True
                )
            }
            pictures = int(held["pictures"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise QuantizeError(f"{path}: no readable calibration: {error}") from None
    differs = sorted(name for name in {*stored, *key} if stored.get(name) != key.get(name))
    if differs:
        raise QuantizeError(
            f"{path}: the calibration is stale: other {', '.join(differs)}",
            why="it was measured before that changed, and its ranges may clip what now matters",
            fix="calibrate again",
        )
    return Calibration(stored, histograms, pictures)


def _write_calibration(path: Path, found: Calibration) -> None:
    import numpy as np

    from build.repository import explained

    names = list(found.histograms)
    ranges = [(one.end, one.largest, float(one.negative)) for one in found.histograms.values()]
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".new")
        with unfinished.open("wb") as file:
            np.savez_compressed(
                file,
                key=json.dumps(dict(found.key)),
                names=np.array(names),
                counts=np.stack([one.counts for one in found.histograms.values()]),
                ranges=np.array(ranges),
                pictures=found.pictures,
            )
        unfinished.replace(path)


def _key(pictures: datasets.Pictures, whole: onnx.ModelProto) -> dict[str, str]:
    """What a calibration depends on, by the names that a message about a stale one uses."""
    return {
        "pictures": pictures.digest(),
        "model": hashlib.sha256(whole.SerializeToString(deterministic=True)).hexdigest(),
        "method": f"absolute values in {BINS} bins",
        "onnxruntime": importlib.metadata.version("onnxruntime"),
    }


def write_scales(path: Path, found: Calibration, percentile: float) -> None:
    """The table of scales: per activation what was measured, and each calibrator's clipping point and INT8 scale."""
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        columns = [f"{calibrator}_{what}" for calibrator in CALIBRATORS for what in ("clip", "scale")]
        table.writerow(["activation", "largest", "negative", *columns])
        for name, one in found.histograms.items():
            clips = [one.clip(calibrator, percentile) for calibrator in CALIBRATORS]
            values = [value for clip in clips for value in (clip, (clip or 1.0) / _LARGEST["int8"])]
            table.writerow([name, one.largest, one.negative, *values])


def draw_histograms(path: Path, found: Calibration, percentile: float) -> None:
    """A picture of every activation's histogram, with each calibrator's clipping point as a line.

    Raises:
        RuntimeUnavailableError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeUnavailableError(
            "drawing histograms needs the package matplotlib", fix="install it: pip install matplotlib"
        ) from None
    import numpy as np

    columns = 4
    rows = -(-len(found.histograms) // columns)
    figure = Figure(figsize=(4 * columns, 2.2 * rows), layout="constrained")
    colors = dict(zip(CALIBRATORS, ("tab:red", "tab:green", "tab:blue"), strict=True))
    for axes, (name, one) in zip(
        figure.subplots(rows, columns, squeeze=False).flat, found.histograms.items(), strict=False
    ):
        merged = one.counts.reshape(-1, 32).sum(1)
        axes.stairs(merged, np.linspace(0, one.end or 1.0, len(merged) + 1), fill=True, color="lightgrey")
        for calibrator, color in colors.items():
            axes.axvline(one.clip(calibrator, percentile), color=color, label=calibrator, linewidth=1)
        axes.set(yscale="log", xlim=(0, (one.largest or 1.0) * 1.02))
        axes.set_title(name if len(name) < 44 else f"...{name[-40:]}", fontsize=7)
        axes.tick_params(labelsize=6)
    figure.axes[0].legend(fontsize=6)
    for axes in figure.axes[len(found.histograms) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=100)


# -- the graph ---------------------------------------------------------------------------------------------------------


def fold(source: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with every BatchNormalization behind a Conv folded into its weights and bias; unnamed Convs get a name.

    Computed in FP64: W·γ/√(σ²+ε) and (b-μ)·γ/√(σ²+ε) + β, per output channel (Ioffe and Szegedy 2015, section 3.1).

    Raises:
        QuantizeError: the model is quantised already.
    """
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    quantised = [node for node in source.graph.node if "Quantize" in node.op_type or "QLinear" in node.op_type]
    if quantised:
        raise QuantizeError(
            f"the source is quantised already: it has {len(quantised)} nodes like {quantised[0].op_type} "
            f"{quantised[0].name!r}",
            fix="give the floating-point model; a quantised one can only be built as it is, as precision fp32",
        )
    model = onnx.ModelProto()
    model.CopyFrom(source)
    nodes = model.graph.node
    constants = {constant.name: constant for constant in model.graph.initializer}
    readers = _readers(model)
    outputs = {output.name for output in model.graph.output}
    for conv in convs(model):
        conv.name = conv.name or f"Conv/{conv.output[0]}"
        following = readers.get(conv.output[0], [])
        norm = following[0] if len(following) == 1 and following[0].op_type == "BatchNormalization" else None
        parameters = [*conv.input[1:], *norm.input[1:]] if norm else []
        if norm is None or conv.output[0] in outputs or any(name not in constants for name in parameters):
            continue
        gamma, beta, mean, variance = (
            numpy_helper.to_array(constants[name]).astype(np.float64) for name in norm.input[1:]
        )
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        factor = gamma / np.sqrt(variance + epsilon)
        weights = numpy_helper.to_array(constants[conv.input[1]])
        bias = numpy_helper.to_array(constants[conv.input[2]]) if len(conv.input) > 2 else 0.0
        folded = {
            f"{conv.name}/weights": weights * factor.reshape(-1, *[1] * (weights.ndim - 1)),
            f"{conv.name}/bias": (bias - mean) * factor + beta,
        }
        model.graph.initializer.extend(
            numpy_helper.from_array(value.astype(weights.dtype), name) for name, value in folded.items()
        )
        replaced = helper.make_node("Conv", [conv.input[0], *folded], [norm.output[0]], name=conv.name)
        replaced.attribute.extend(conv.attribute)
        conv.CopyFrom(replaced)
        nodes.remove(norm)
    used = {name for node in nodes for name in node.input}
    kept = [constant for constant in model.graph.initializer if constant.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def convs(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The Convs of a model, in the order of the graph."""
    return [node for node in model.graph.node if node.op_type == "Conv"]


@dataclass(frozen=True)
class Placed:
    """A quantised source model and what was decided for it.

    Attributes:
        model: the model.
        nodes: names of the Convs that are quantised.
        scales: of every quantised activation.
        left: names of the Convs that are not, each with the reason.
    """

    model: onnx.ModelProto
    nodes: tuple[str, ...]
    scales: Mapping[str, float]
    left: Mapping[str, str] = field(default_factory=dict)


def quantize(
    source: onnx.ModelProto, clips: Mapping[str, float], *, kind: str = "int8", exclude: Collection[str] = ()
) -> Placed:
    """Puts Q/DQ pairs where TensorRT fuses them; integer kernels of ONNX Runtime take the same places.

    - Before every quantised Conv: one pair on its input, from which all readers of that tensor read, and one on its
      weights, per output channel.
    - Behind a Conv that no activation, product or sum follows (a head): a pair on its output.
    - Where an Add joins a Conv's result with a shortcut: a pair on the shortcut, so that the sum fuses with the Conv.
    - A concatenation gets its pair behind it, so that all its parts have one scale. The bias stays in floating point.

    Args:
        source: a folded FP32 model.
        clips: the largest absolute value to represent, per activation.
        kind: int8 or fp8 (E4M3).
        exclude: names of Convs that stay as they are.

    Raises:
        QuantizeError: an excluded name is no Conv, or an activation has no clipping point.
    """
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    unknown = sorted(set(exclude) - {conv.name for conv in convs(source)})
    if unknown:
        names = ", ".join(conv.name for conv in convs(source))
        raise QuantizeError(
            f"exclude_nodes names {unknown[0]!r}, but no Conv has this name", fix=f"the Convs are {names}"
        )
    model = onnx.ModelProto()
    model.CopyFrom(precision.at_least(source, precision.OPSETS["fp8"] if kind == "fp8" else 0))
    constants = {constant.name: constant for constant in model.graph.initializer}
    zero_type = TensorProto.INT8 if kind == "int8" else TensorProto.FLOAT8E4M3FN
    pairs: dict[str, list[onnx.NodeProto]] = {}
    scales: dict[str, float] = {}

    def pair(name: str, scale: NDArray[np.float32], axis: int | None = None) -> None:
        """Makes the pair behind tensor `name`; its readers are turned to it at the end."""
        zero = helper.make_tensor(f"{name}/zero", zero_type, scale.shape, bytes(scale.size), raw=True)
        model.graph.initializer.extend([numpy_helper.from_array(scale, f"{name}/scale"), zero])
        where: dict[str, Any] = {} if axis is None else {"axis": axis}
        parameters = [f"{name}/scale", f"{name}/zero"]
        pairs[name] = [
            helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}/q"], name=f"{name}/q", **where),
            helper.make_node(
                "DequantizeLinear", [f"{name}/q", *parameters], [f"{name}/dq"], name=f"{name}/dq", **where
            ),
        ]

    def activation(name: str) -> None:
        measured = _outside(model, name)
        if name not in pairs:
            if measured not in clips:
                raise QuantizeError(f"activation {measured!r} was not calibrated", fix="calibrate this very model")
            scales[measured] = (clips[measured] or 1.0) / _LARGEST[kind]
            pair(name, np.array(scales[measured], np.float32))

    chosen, left = [], {}
    readers = _readers(model)
    for conv in convs(model):
        if conv.name in exclude:
            left[conv.name] = "excluded"
        elif conv.input[1] not in constants:
            left[conv.name] = "its weights are no constant"
        else:
            chosen.append(conv)
    own = {conv.output[0] for conv in chosen}
    for conv in chosen:
        weights = np.abs(numpy_helper.to_array(constants[conv.input[1]]))
        largest = weights.max(axis=tuple(range(1, weights.ndim)), initial=0.0).astype(np.float32)
        if conv.input[1] not in pairs:
            pair(conv.input[1], np.where(largest > 0, largest, 1.0).astype(np.float32) / np.float32(_LARGEST[kind]), 0)
        activation(conv.input[0])
        following = readers.get(conv.output[0], [])
        if not any(node.op_type in _EPILOGUES for node in following):
            activation(conv.output[0])
        for node in following:
            shortcut = [name for name in node.input if name != conv.output[0] and name not in constants]
            known = len(shortcut) == 1 and (shortcut[0] in clips or shortcut[0] in own)
            if node.op_type == "Add" and known and conv.output[0] not in pairs:  # else this Conv is the shortcut itself
                activation(shortcut[0])
    _insert(model, pairs)
    return Placed(model, tuple(conv.name for conv in chosen), scales, left)


def for_onnxruntime(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose quantised Relus are UINT8 with the same scales: what ONNX Runtime runs in integers on a CPU.

    TensorRT demands INT8 with zero point 0, of which a Relu uses 0..127. UINT8 with zero point 0 and the same scale
    keeps these codes as they are, stops clipping at 127, and its own clip at 0 IS the Relu, which ONNX Runtime then
    drops. With INT8 it finds no integer kernel for Conv-Relu-Quantize and falls back to floats.
    """
    import onnx
    from onnx import TensorProto

    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    made_by = {name: node for node in copied.graph.node for name in node.output}
    constants = {constant.name: constant for constant in copied.graph.initializer}
    for node in copied.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in made_by:
            zero = constants[node.input[2]]
            if (
                made_by[node.input[0]].op_type == "Relu"
                and zero.data_type == TensorProto.INT8
                and not any(zero.raw_data)
            ):
                zero.data_type = TensorProto.UINT8
    return copied


def _insert(model: onnx.ModelProto, pairs: Mapping[str, list[onnx.NodeProto]]) -> None:
    """Puts each pair behind its tensor and lets every reader of the tensor read the pair (in place).

    A tensor that is an output of the graph keeps its name behind the pair.
    """
    nodes = model.graph.node
    outputs = {output.name for output in model.graph.output}
    for node in nodes:
        node.input[:] = [f"{name}/dq" if name in pairs else name for name in node.input]
    for name in outputs & pairs.keys():
        quantise, dequantise = pairs[name]
        for node in nodes:
            node.output[:] = [f"{name}/raw" if made == name else made for made in node.output]
            node.input[:] = [name if read == f"{name}/dq" else read for read in node.input]
        quantise.input[0], dequantise.output[0] = f"{name}/raw", name
    for one in pairs.values():
        nodes.extend(one)
    precision.sort(model)


def _outside(model: onnx.ModelProto, name: str) -> str:
    """The name that a source's tensor has once the contract's front is attached."""
    return "ssd/front/div" if name == model.graph.input[0].name else name


def _readers(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers
