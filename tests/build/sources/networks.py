"""A tiny detector network, as ONNX nodes and again in NumPy: what the layouts of layouts.py are numbers of.

A picture of 64×64 becomes feature maps of 8×8 (3 boxes a cell) and 4×4 (3 boxes a cell): 240 boxes. `Network.rows`
writes a head into the graph as exporters do, and `Network.numbers` computes the same [B,240,columns] in NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
SIZE, BOXES = 64, 240
LEVELS = ((8, 8), (4, 4))
CELL = 3  # boxes of a cell
INDEX = np.int64


class Network:
    """An ONNX graph under construction.

    Args:
        opset: of the standard operators.
        batch: the input's first dimension.
        channels_last: whether the picture is [B,H,W,3].
        picture: NumPy's name of the input's type.
        name: of the input.
        heads: name → columns of a box.
        scale: of the heads' numbers.
        size: H and W in the input's declaration.
        cells: boxes of a cell.
        levels: how many feature maps have heads.
        half: whether the weights are numbers that FP16 has.
    """

    def __init__(
        self,
        heads: dict[str, int],
        *,
        opset: int = 17,
        batch: int | str = "batch",
        channels_last: bool = False,
        picture: str = "float32",
        name: str = "images",
        scale: float = 1.0,
        size: Sequence[int | str] = (SIZE, SIZE),
        half: bool = False,
        cells: int = CELL,
        levels: int = 2,
    ) -> None:
        random = np.random.default_rng(7)
        self.opset, self.batch, self.channels_last, self.picture = opset, batch, channels_last, picture
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.outputs: list[tuple[str, int, Sequence[int | str]]] = []
        self.input = name
        shape = [batch, *size, 3] if channels_last else [batch, 3, *size]
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(picture))
        self.inputs = [helper.make_tensor_value_info(name, kind, shape)]
        self.first = (random.normal(0, 0.02, (16, 3, 8, 8)).astype("f4"), random.normal(0, 0.1, 16).astype("f4"))
        self.second = (random.normal(0, 0.2, (16, 16, 2, 2)).astype("f4"), random.normal(0, 0.1, 16).astype("f4"))
        self.heads = {
            head: [
                (
                    random.normal(0, 0.3 * scale, (cells * columns, 16, 1, 1)).astype("f4"),
                    random.normal(0, 0.2 * scale, cells * columns).astype("f4"),
                )
                for _ in LEVELS[:levels]
            ]
            for head, columns in heads.items()
        }
        if half:
            self.first, self.second = _rounded(self.first), _rounded(self.second)
            self.heads = {head: [_rounded(pair) for pair in pairs] for head, pairs in self.heads.items()}
        self.cells = cells
        self._maps: list[str] = []

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def add(self, op_type: str, *inputs: str, to: str = "", **attributes: Any) -> str:
        """A node; gives its output."""
        output = to or f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=f"n/{output}", **attributes))
        return output

    def const(self, value: Any, dtype: Any = np.float32, name: str = "") -> str:
        name = name or f"c{len(self.constants)}"
        self.constants[name] = np.asarray(value, dtype)
        return name

    def axes(self, op_type: str, value: str, *axes: int, **attributes: Any) -> str:
        """Squeeze, Unsqueeze or ReduceSum in any opset."""
        if self.opset < 13:
            return self.add(op_type, value, axes=list(axes), **attributes)
        return self.add(op_type, value, self.const(axes, INDEX), **attributes)

    def cut(self, value: str, start: int, end: int, axis: int) -> str:
        """A slice in any opset."""
        if self.opset < 10:
            return self.add("Slice", value, starts=[start], ends=[end], axes=[axis])
        return self.add("Slice", value, *(self.const([number], INDEX) for number in (start, end, axis)))

    def reshape(self, value: str, *shape: int) -> str:
        return self.add("Reshape", value, self.const(shape, INDEX))

    # -- the network ---------------------------------------------------------------------------------------------------

    def maps(self, source: str = "") -> list[str]:
        """The feature maps of `source`, [B,3,H,W]; empty = the input."""
        if not self._maps:
            value = source or self.input
            if not source and self.channels_last:
                value = self.add("Transpose", value, perm=[0, 3, 1, 2])
            for number, ((weights, bias), stride) in enumerate(((self.first, 8), (self.second, 2))):
                names = self.const(weights, name=f"w{number}"), self.const(bias, name=f"b{number}")
                value = self.add("Conv", value, *names, kernel_shape=[stride] * 2, strides=[stride] * 2)
                value = self.add("Relu", value)
                self._maps.append(value)
        return self._maps

    def level(self, head: str, number: int) -> str:
        """[B,3·columns,H,W]."""
        weights, bias = self.heads[head][number]
        names = self.const(weights, name=f"{head}_w{number}"), self.const(bias, name=f"{head}_b{number}")
        return self.add("Conv", self.maps()[number], *names, kernel_shape=[1, 1])

    def rows(self, head: str, batch: str = "0", columns: int = 0) -> str:
        """[B,240,columns], with the batch of the Reshapes written as `0`, `1`, `8`, `-1` or `shape`."""
        parts = []
        width = columns or len(self.heads[head][0][1]) // CELL
        for number, (height, across) in enumerate(LEVELS):
            value = self.add("Transpose", self.level(head, number), perm=[0, 2, 3, 1])
            count = height * across * CELL
            if batch == "shape":
                first = self.cut(self.add("Shape", value), 0, 1, 0)
                value = self.add("Reshape", value, self.add("Concat", first, self.const([-1, width], INDEX), axis=0))
            else:
                value = self.reshape(value, int(batch), count if batch == "-1" else -1, width)
            parts.append(value)
        return self.add("Concat", *parts, axis=1)

    def out(self, value: str, name: str, shape: Sequence[int | str], dtype: int = TensorProto.FLOAT) -> None:
        """Makes a tensor an output."""
        for node in self.nodes:
            node.output[:] = [name if output == value else output for output in node.output]
            node.input[:] = [name if read == value else read for read in node.input]
        self.outputs.append((name, dtype, shape))

    def build(self, ir_version: int = 8, domains: dict[str, int] | None = None) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "detector",
            self.inputs,
            [helper.make_tensor_value_info(name, dtype, shape) for name, dtype, shape in self.outputs],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        opsets = [helper.make_opsetid(d, v) for d, v in {"": self.opset, **(domains or {})}.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)

    # -- the same in NumPy ---------------------------------------------------------------------------------------------

    def numbers(self, pixels: Array, head: str) -> Array:
        """[B,240,columns] of pictures FP32 [B,3,64,64]."""
        maps = []
        value = pixels.astype(np.float64)
        for (weights, bias), stride in ((self.first, 8), (self.second, 2)):
            batch, channels, height, width = value.shape
            blocks = value.reshape(batch, channels, height // stride, stride, width // stride, stride)
            value = np.maximum(np.einsum("bcyixj,ocij->boyx", blocks, weights) + bias[:, None, None], 0)
            maps.append(value)
        rows = []
        for value, (weights, bias) in zip(maps, self.heads[head], strict=False):
            numbers = np.einsum("bcyx,oc->byxo", value, weights[:, :, 0, 0]) + bias
            rows.append(numbers.reshape(len(pixels), -1, len(bias) // self.cells))
        return np.concatenate(rows, 1)


def _rounded(pair: tuple[Array, Array]) -> tuple[Array, Array]:
    return pair[0].astype("f2").astype("f4"), pair[1].astype("f2").astype("f4")


def anchors() -> Array:
    """FP32 [240,4] of cx,cy,w,h in 0..1: three squares and oblongs a cell."""
    rows = []
    for side, scale in ((8, 0.2), (4, 0.45)):
        for y in range(side):
            for x in range(side):
                for w, h in ((1, 1), (1.4, 0.7), (0.7, 1.4)):
                    rows.append(((x + 0.5) / side, (y + 0.5) / side, scale * w, scale * h))
    return np.array(rows, np.float32)


def softmax(values: Array) -> Array:
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sigmoid(values: Array) -> Array:
    return 1 / (1 + np.exp(-values))


def decoded(deltas: Array, table: Array, scales: Sequence[float] = (10, 10, 5, 5)) -> Array:
    """Liu et al. 2016, eq. 2: x1,y1,x2,y2."""
    moves = deltas / np.array(scales)
    centre = moves[..., :2] * table[:, 2:] + table[:, :2]
    extent = np.exp(moves[..., 2:]) * table[:, 2:]
    return corners(np.concatenate([centre, extent], -1))


def corners(boxes: Array) -> Array:
    """cx,cy,w,h as x1,y1,x2,y2."""
    return np.concatenate([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)
