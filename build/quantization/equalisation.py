"""Equalisation: the channels of an activation get like ranges, because they share one INT8 scale.

A channel is made k times as large by the Conv before it and 1/k times by the Convs behind it: Nagel et al., "Data-Free
Quantization Through Weight Equalization and Bias Correction" (ICCV 2019), section 4.1; here by the ranges of the
activations, since weights have a scale per output channel. Between the two lie only operators f with f(k·x) = k·f(x)
for k > 0, and such that pass channels on: concatenations, splits, zeros around them. A Clip from 0 to b (ReLU6) is one
as long as k times the channel's largest value is at most b. What exceeds every value of calibration is then clipped
there, as INT8 would do anyway.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from build import contract
from build.gate import datasets
from build.graph import precision
from build.graph.attach import attach, before_nms
from build.quantization import qdq
from build.session import session
from build.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

MOST = 64.0  # times that a channel is enlarged
_BATCH = 4
_SHAPES = ("Shape", "Size")  # their answers do not depend on values
# f(k·x) = k·f(x) for each channel of the first input.
_HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity", "Resize")
_ROUNDED = ("Conv", "Add", "Concat")  # what they read has a scale in one of the forms


@dataclass(frozen=True)
class Channels:
    """Which channels of which activations can be scaled, each class of them alike, without any other change.

    Attributes:
        classes: of each activation the class of each channel [C].
        tops: of each class the lowest end of the Clips between; infinite without one [classes].
        free: of each class whether it can be scaled at all [classes].
        convs: the Convs that make or read them, and can be scaled themselves.
    """

    classes: Mapping[str, NDArray[np.intp]]
    tops: NDArray[np.float64]
    free: NDArray[np.bool_]
    convs: tuple[onnx.NodeProto, ...]

    def any(self, name: str) -> bool:
        """Whether a channel of this activation can be scaled."""
        return name in self.classes and bool(self.free[self.classes[name]].any())


def channels(model: onnx.ModelProto) -> Channels:
    """The channels of a folded model; those of an activation of unknown shape cannot be scaled."""
    import numpy as np
    from onnx import numpy_helper

    constants = qdq.constants_of(model)
    counts = _counts(model)
    starts = dict(zip(counts, np.cumsum([0, *counts.values()]).tolist(), strict=False))
    parent = list(range(sum(counts.values())))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = place = parent[parent[place]]
        return place

    def join(name: str, into: str, offset: int = 0, skipped: int = 0) -> None:
        """Channel `skipped` and the next ones of an activation are channel `offset` and the next ones of another."""
        for i in range(min(counts[name] - skipped, counts[into] - offset)):
            parent[root(starts[name] + skipped + i)] = root(starts[into] + offset + i)

    readers: dict[str, int] = {}
    for node in model.graph.node:
        for name in precision.reads(node):
            readers[name] = readers.get(name, 0) + 1
    blocked = {info.name for info in (*model.graph.input, *model.graph.output)}
    tops: dict[str, float] = {}
    scaled: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type in _SHAPES:
            continue
        data = [name for name in precision.reads(node) if name and name not in constants]
        if node.op_type == "Resize":  # the others say how far
            data = data[:1]
        known = all(name in counts for name in (*data, *node.output))
        if node.op_type == "Conv" and all(name in constants and readers[name] == 1 for name in node.input[1:] if name):
            scaled.append(node)
        elif known and (both := _parts(node, data)):
            parts, whole = both
            offset = 0
            for part in parts:
                join(part, whole, offset)
                offset += counts[part]
        elif known and node.op_type == "Pad" and (behind := _padded(node, constants)) is not None:
            join(data[0], node.output[0], max(behind, 0), max(-behind, 0))
        elif known and _keeps_scale(node, data, constants) and len({counts[n] for n in (*data, node.output[0])}) == 1:
            for name in data:
                join(name, node.output[0])
            if node.op_type == "Clip" and len(node.input) > 2 and node.input[2]:
                end = constants.get(node.input[2])
                tops[node.output[0]] = 0.0 if end is None else float(numpy_helper.to_array(end))
        else:
            blocked.update([*data, *node.output])
    roots = np.array([root(place) for place in range(len(parent))], np.intp)
    classes = {name: roots[start : start + counts[name]] for name, start in starts.items()}
    ends, free = np.full(len(parent), np.inf), np.ones(len(parent), bool)
    for name, top in tops.items():
        np.minimum.at(ends, classes[name], top)
    for name in blocked & classes.keys():
        free[classes[name]] = False
    return Channels(classes, ends, free & (ends > 0), tuple(scaled))


def _counts(model: onnx.ModelProto) -> dict[str, int]:
    """The number of channels of every activation that has a known one, also behind shapes that are computed."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model).graph
    found = {}
    for info in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = info.type.tensor_type.shape.dim
        if len(dims) > 1 and dims[1].dim_value > 0:
            found[info.name] = int(dims[1].dim_value)
    weights = {constant.name: constant.dims for constant in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in weights:
            found.setdefault(node.output[0], int(weights[node.input[1]][0]))
        elif node.op_type in (*_HOMOGENEOUS, "Clip") and node.input[0] in found:
            found.setdefault(node.output[0], found[node.input[0]])
    return found


def _parts(node: onnx.NodeProto, data: Sequence[str]) -> tuple[Sequence[str], str] | None:
    """The parts, in order, and the whole of a concatenation or a split of channels; None for any other node."""
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    if node.op_type == "Concat" and axis == 1 and len(data) == len(node.input):  # none is constant
        return data, node.output[0]
    return (node.output, data[0]) if node.op_type == "Split" and axis == 1 and len(data) == 1 else None


def _padded(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> int | None:
    """How many channels of zeros a Pad puts before the others; None where it pads with something else."""
    from onnx import numpy_helper

    mode = next((attribute.s for attribute in node.attribute if attribute.name == "mode"), b"constant")
    given = list(node.input[1:]) + [""] * 3
    if mode != b"constant" or given[0] not in constants or (given[1] and given[1] not in constants) or given[2]:
        return None
    if given[1] and numpy_helper.to_array(constants[given[1]]).any():
        return None
    pads = numpy_helper.to_array(constants[given[0]])
    return int(pads[1])


def _keeps_scale(node: onnx.NodeProto, data: Sequence[str], constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether f(k·x) = k·f(x) for k > 0 and each channel of what the node reads."""
    if node.op_type == "Add":
        return len(data) == 2
    alone = len(data) == 1 and list(data) == list(node.input[:1])
    return alone and (node.op_type in _HOMOGENEOUS or (node.op_type == "Clip" and qdq.starts_at_zero(node, constants)))


def equalised(spec: Spec, source: onnx.ModelProto, pictures: datasets.Pictures) -> onnx.ModelProto:
    """A copy of a folded FP32 model with the same answers, whose activations have channels of like ranges.

    Args:
        spec: the model.
        source: the folded model.
        pictures: calibration pictures; all are read.

    Raises:
        DataError: too many of them cannot be read.
    """
    import numpy as np
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(source)
    found = channels(model)
    rounded = {name for node in model.graph.node if node.op_type in _ROUNDED for name in node.input}
    sizes = _largest(spec, source, sorted(name for name in rounded if found.any(name)), pictures)
    share = np.zeros(len(found.tops))
    for name, largest in sizes.items():
        own = found.classes[name]
        ends = np.where(np.isinf(found.tops[own]), largest.max(), found.tops[own])
        np.maximum.at(share, own, largest / np.maximum(ends, np.finfo(np.float32).tiny))
    # At least 1, at most MOST, and no activation's own range grows.
    factor = np.where(found.free & (share > 0), 1 / np.clip(share, 1 / MOST, 1), 1.0)
    constants = {constant.name: constant for constant in model.graph.initializer}
    for conv in found.convs:
        if conv.output[0] in found.classes:
            for name in filter(None, conv.input[1:]):
                _scale(constants[name], factor[found.classes[conv.output[0]]])
        if conv.input[0] in found.classes:
            _scale(constants[conv.input[1]], 1 / factor[found.classes[conv.input[0]]], by_input=True)
    return model


def _scale(constant: onnx.TensorProto, factor: NDArray[np.float64], *, by_input: bool = False) -> None:
    """Multiplies a Conv's weights or bias by output channel, or weights by input channel (in place)."""
    from onnx import numpy_helper

    value = numpy_helper.to_array(constant)
    rest = [1] * (value.ndim - 1)
    if by_input:  # [M, C/G, ...]: the M/G filters of a group read its C/G channels
        groups_ = len(factor) // value.shape[1]
        by_group = factor.reshape(groups_, 1, value.shape[1], *rest[1:])
        scaled = (value.reshape(groups_, -1, *value.shape[1:]) * by_group).reshape(value.shape)
    else:
        scaled = value * factor.reshape(-1, *rest)
    constant.CopyFrom(numpy_helper.from_array(scaled.astype(value.dtype), constant.name))


def _largest(
    spec: Spec, source: onnx.ModelProto, names: Collection[str], pictures: datasets.Pictures
) -> Mapping[str, NDArray[np.float32]]:
    """The largest absolute value of each channel: FP32 [C], by activation."""
    import numpy as np
    import onnx
    from onnx import helper

    found: dict[str, NDArray[np.float32]] = {}
    if not names:
        return found
    whole = before_nms(attach(spec, source))
    del whole.graph.output[:]
    for name in names:
        whole.graph.node.append(helper.make_node("Abs", [name], [f"{name}/size"]))
        whole.graph.node.append(helper.make_node("GlobalMaxPool", [f"{name}/size"], [f"{name}/largest"]))
        whole.graph.output.append(onnx.ValueInfoProto(name=f"{name}/largest"))
    runs = session(whole)
    for batch in datasets.arrays(pictures, spec.input, _BATCH):
        for name, rows in zip(names, runs.run(None, {contract.IMAGES: batch}), strict=True):
            largest = rows.reshape(len(rows), -1).max(0)
            found[name] = np.maximum(found.get(name, largest), largest)
    return found
