"""Small detectors, each with an operator or a pattern of real ones between its stem and its heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from build.graph.attach import PLANES
from build.session import runner
from tests.build import tiny_model


class Builder:
    """Nodes and constants of a graph, one tensor after the other."""

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(0)

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weights(self, *shape: int) -> str:
        """He's initialisation; output channels of a Conv get different ranges, as training gives them."""
        spread = np.exp(self._random.normal(0, 1, (shape[0], *[1] * (len(shape) - 1)))) / 1.6
        scale = np.sqrt(2 / np.prod(shape[1:]))
        return self.constant((self._random.normal(0, scale, shape) * spread).astype(np.float32))

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def conv(self, x: str, into: int = 0, kernel: int = 3, by: str = "", **attributes: Any) -> str:
        into = into or self.channels
        weights = by or self.weights(into, self.channels, kernel, kernel)
        bias = self.constant(self._random.normal(0, 0.1, into).astype(np.float32))
        return self.add("Conv", x, weights, bias, pads=[kernel // 2] * 4, **attributes)

    def relu6(self, x: str) -> str:
        return self.add("Clip", x, self.constant(np.float32(0)), self.constant(np.float32(6)))

    def depthwise(self, x: str) -> str:
        weights = self.weights(self.channels, 1, 3, 3)
        return self.add("Conv", x, weights, pads=[1, 1, 1, 1], group=self.channels)


def _silu(g: Builder, x: str) -> str:
    y = g.conv(x)
    return g.conv(g.add("Mul", y, g.add("Sigmoid", y)))


def _residual(g: Builder, x: str) -> str:
    y = g.conv(g.add("Relu", g.conv(x)))
    return g.conv(g.add("Relu", g.add("Add", y, x)))


def _bottleneck(g: Builder, x: str) -> str:
    x = g.conv(x, kernel=1)
    y = g.relu6(g.depthwise(g.relu6(g.conv(x, kernel=1))))
    return g.relu6(g.conv(g.add("Add", g.conv(y, kernel=1), x), kernel=1))


def _concat(g: Builder, x: str) -> str:
    parts = [g.add("Relu", g.conv(x, kernel=1)), g.add("Relu", g.conv(x))]
    both = g.add("Concat", *parts, axis=1)
    return g.add("Conv", both, g.weights(g.channels, 2 * g.channels, 1, 1))


def _shared(g: Builder, x: str) -> str:
    weights = g.weights(g.channels, g.channels, 3, 3)
    first = g.add("Relu", g.conv(x, by=weights))
    return g.add("Add", first, g.add("Relu", g.conv(first, by=weights)))


def _squeeze(g: Builder, x: str) -> str:
    y = g.add("Relu", g.conv(x))
    gate = g.conv(g.add("Relu", g.conv(g.add("GlobalAveragePool", y), kernel=1)), kernel=1)
    return g.conv(g.add("Mul", y, g.add("HardSigmoid", gate, alpha=1 / 6)))


def _upsampled(g: Builder, x: str) -> str:
    scales = g.constant(np.array([1, 1, 2, 2], np.float32))
    y = g.add("Resize", g.add("Relu", g.conv(x)), "", scales, mode="nearest")
    return g.conv(g.add("AveragePool", y, kernel_shape=[2, 2], strides=[2, 2]))


def _transposed(g: Builder, x: str) -> str:
    y = g.add("ConvTranspose", g.add("Relu", g.conv(x)), g.weights(g.channels, g.channels, 2, 2), strides=[2, 2])
    return g.conv(g.add("AveragePool", g.add("Relu", y), kernel_shape=[2, 2], strides=[2, 2]))


def _padded(g: Builder, x: str) -> str:
    y = g.add("Pad", g.add("Relu", g.conv(x)), g.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64)))
    return g.add("Conv", y, g.weights(g.channels, g.channels, 3, 3))


def _appended(g: Builder, x: str) -> str:
    """As in BlazeFace: the shortcut gets channels of zeros."""
    more = g.channels + 4
    y = g.conv(g.depthwise(x), into=more, kernel=1)
    shortcut = g.add("Pad", x, g.constant(np.array([0, 0, 0, 0, 0, 4, 0, 0], np.int64)))
    return g.add("Conv", g.add("Relu", g.add("Add", y, shortcut)), g.weights(g.channels, more, 1, 1))


def _split(g: Builder, x: str) -> str:
    """As in CSP networks: half of the channels go through a Conv, then both halves are together again."""
    half = g.channels // 2
    y, sizes = g.add("Relu", g.conv(x)), g.constant(np.array([half, half], np.int64))
    first, second = f"{y}_first", f"{y}_second"
    g.nodes.append(helper.make_node("Split", [y, sizes], [first, second], name=f"{y}_split", axis=1))
    first = g.add("Relu", g.add("Conv", first, g.weights(half, half, 3, 3), pads=[1, 1, 1, 1]))
    return g.conv(g.add("Concat", first, second, axis=1), kernel=1)


def _matmul(g: Builder, x: str) -> str:
    y = g.add("MatMul", g.add("Transpose", x, perm=[0, 2, 3, 1]), g.weights(g.channels, g.channels))
    return g.add("Transpose", y, perm=[0, 3, 1, 2])


def _gemm(g: Builder, x: str) -> str:
    pooled = g.add("Flatten", g.add("GlobalAveragePool", g.conv(x)))
    y = g.add("Gemm", pooled, g.weights(g.channels, g.channels), g.constant(np.zeros(g.channels, np.float32)), transB=1)
    return g.add("Add", x, g.add("Reshape", y, g.constant(np.array([0, -1, 1, 1], np.int64))))


BODIES: dict[str, Callable[[Builder, str], str]] = {
    "relu": lambda g, x: g.conv(g.add("Relu", g.conv(x))),
    "relu6": lambda g, x: g.conv(g.relu6(g.conv(x))),
    "hardswish": lambda g, x: g.conv(g.add("HardSwish", g.conv(x))),
    "leakyrelu": lambda g, x: g.conv(g.add("LeakyRelu", g.conv(x), alpha=0.1)),
    "prelu": lambda g, x: g.conv(g.add("PRelu", g.conv(x), g.constant(np.full((g.channels, 1, 1), 0.2, np.float32)))),
    "silu": _silu,
    "residual": _residual,
    "bottleneck": _bottleneck,
    "concat": _concat,
    "depthwise": lambda g, x: g.conv(g.add("Relu", g.depthwise(x)), kernel=1),
    "shared_weights": _shared,
    "squeeze_excite": _squeeze,
    "resize": _upsampled,
    "conv_transpose": _transposed,
    "pad": _padded,
    "appended_channels": _appended,
    "split": _split,
    "einsum": lambda g, x: g.conv(g.add("Einsum", x, g.weights(g.channels, g.channels), equation="bchw,cd->bdhw")),
    "matmul": _matmul,
    "gemm": _gemm,
}


def network(*bodies: str, channels: int = 8, size: int = 8) -> onnx.ModelProto:
    """FP32 [B,3,size,size] → box_deltas [B,N,4], class_logits [B,N,3]; 8 anchors where size is 8, as tiny_model's."""
    g = Builder(channels)
    x = g.add("Relu", g.add("Conv", "images", g.weights(channels, 3, 4, 4), strides=[4, 4]))
    for body in bodies:
        x = BODIES[body](g, x)
    for head, last in (("box_deltas", 4), ("class_logits", 3)):
        y = g.add("Transpose", g.conv(x, into=2 * last), perm=[0, 2, 3, 1])
        shape = g.constant(np.array([0, -1, last], np.int64))
        g.nodes.append(helper.make_node("Reshape", [y, shape], [head], name=head))
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        g.nodes,
        "_".join(bodies),
        [tensor("images", TensorProto.FLOAT, ["b", 3, size, size])],
        [
            tensor("box_deltas", TensorProto.FLOAT, ["b", "n", 4]),
            tensor("class_logits", TensorProto.FLOAT, ["b", "n", len(tiny_model.LABELS) + 1]),
        ],
        g.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def clips_of(model: onnx.ModelProto, images: np.ndarray) -> dict[str, float]:
    """The largest absolute value of everything in a source model, by the calibration's names."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    names = [name for node in model.graph.node for name in node.output]
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    values = runner(probe)({model.graph.input[0].name: images}) | {PLANES: images}
    return {name: float(np.abs(value).max(initial=0)) for name, value in values.items()}
