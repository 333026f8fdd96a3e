"""Equalisation: the channels of an activation get like ranges, because they share one INT8 scale.

A channel is made k times as large by the Conv before it and 1/k times by the Convs behind it: Nagel et al., "Data-Free
Quantization Through Weight Equalization and Bias Correction" (ICCV 2019), section 4.1; here by the ranges of the
activations, since weights have a scale per output channel. Between the two lie only operators f with f(k·x) = k·f(x)
for k > 0. A Clip from 0 to b (ReLU6) is one as long as k times the channel's largest value is at most b. What exceeds
every value of calibration is then clipped there, as INT8 would do anyway.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
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


@dataclass
class Group:
    """Activations whose channels can be scaled, all alike, without any other change of the model's answers.

    Attributes:
        tensors: their names.
        before: the Convs that make them.
        behind: the Convs that read them.
        top: the lowest upper end of the Clips between; infinite without one.
    """

    tensors: list[str] = field(default_factory=list)
    before: list[onnx.NodeProto] = field(default_factory=list)
    behind: list[onnx.NodeProto] = field(default_factory=list)
    top: float = float("inf")


def groups(model: onnx.ModelProto) -> list[Group]:
    """The groups of a folded model, in the order of the graph."""
    from onnx import numpy_helper

    constants = qdq.constants_of(model)
    readers: dict[str, int] = {}
    for node in model.graph.node:
        for name in precision.reads(node):
            readers[name] = readers.get(name, 0) + 1
    parent: dict[str, str] = {}
    tops: dict[str, float] = {}
    blocked = {info.name for info in (*model.graph.input, *model.graph.output)}
    scaled: list[onnx.NodeProto] = []

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for node in model.graph.node:
        if node.op_type in _SHAPES:
            continue
        data = [name for name in precision.reads(node) if name and name not in constants]
        if node.op_type == "Resize":  # the others say how far
            data = data[:1]
        if node.op_type == "Conv" and all(name in constants and readers[name] == 1 for name in node.input[1:] if name):
            scaled.append(node)
            continue
        from_zero = node.op_type == "Clip" and qdq.starts_at_zero(node, constants)
        joined = node.op_type == "Add" and len(data) == 2
        if joined or (len(data) == 1 and data == node.input[:1] and (from_zero or node.op_type in _HOMOGENEOUS)):
            for name in data:
                parent[root(name)] = root(node.output[0])
        else:
            blocked.update([*data, *node.output])
        if from_zero and len(node.input) > 2 and node.input[2]:
            end = constants.get(node.input[2])
            tops[node.output[0]] = 0.0 if end is None else float(numpy_helper.to_array(end))
    made: dict[str, Group] = {}
    for conv in scaled:
        made.setdefault(root(conv.output[0]), Group()).before.append(conv)
        made.setdefault(root(conv.input[0]), Group()).behind.append(conv)
    for name in parent:
        group = made.get(root(name), Group())
        group.tensors.append(name)
        group.top = min(group.top, tops.get(name, float("inf")))
    for name in blocked:
        made.pop(root(name), None)
    return [group for group in made.values() if group.before and group.behind and group.top > 0]


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
    chosen = groups(model)
    rounded = {name for node in model.graph.node if node.op_type in ("Conv", "Add") for name in node.input}
    names = {name for group in chosen for name in group.tensors if name in rounded}
    sizes = _largest(spec, source, names, pictures)
    constants = {constant.name: constant for constant in model.graph.initializer}
    for group in chosen:
        ranges = [sizes[name] for name in group.tensors if name in sizes]
        if len({len(each) for each in ranges}) != 1:
            continue
        factor = _factor(np.stack(ranges), group.top)
        for conv in group.before:
            for name in filter(None, conv.input[1:]):
                _scale(constants[name], factor)
        for conv in group.behind:
            _scale(constants[conv.input[1]], 1 / factor, by_input=True)
    return model


def _factor(ranges: NDArray[np.float32], top: float) -> NDArray[np.float64]:
    """What each channel is multiplied by: at least 1, at most MOST, and no tensor's own range grows.

    Args:
        ranges: FP32 [tensors, C]: the largest absolute values.
        top: where a Clip ends.
    """
    import numpy as np

    ends = ranges.max(axis=1, keepdims=True) if np.isinf(top) else np.full((len(ranges), 1), top)
    share = np.max(ranges / np.maximum(ends, np.finfo(np.float32).tiny), axis=0).astype(np.float64)
    return np.where(share > 0, 1 / np.clip(share, 1 / MOST, 1), 1.0)


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
