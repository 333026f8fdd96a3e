"""The source model as dataflow: who makes a tensor, what is constant, how large everything is, what a node costs."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from build import contract

if TYPE_CHECKING:
    import onnx

# fmt: off
ACTIVATIONS = frozenset((
    "Relu", "LeakyRelu", "PRelu", "Sigmoid", "Tanh", "Clip", "HardSigmoid", "HardSwish", "Elu", "Selu", "Softplus",
    "Gelu", "Mish",
))

POINTWISE = ACTIVATIONS | frozenset((
    "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Exp", "Log", "Neg", "Abs", "Cast", "Where", "Less", "Greater", "Equal",
    "And", "Or", "Not", "Min", "Max", "Floor", "Ceil", "Round", "Erf", "Reciprocal", "Identity", "Dropout",
    "BatchNormalization", "QuantizeLinear", "DequantizeLinear",
))

HEAVY = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))

LAYOUT = frozenset((
    "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Gather", "Pad", "Expand",
))
# fmt: on


class Source:
    """The source model's dataflow: who makes a tensor, what is constant, how large everything is.

    Args:
        model: the ONNX model; unnamed nodes get names (in place).
        batch: the value for every symbolic first dimension.
    """

    def __init__(self, model: onnx.ModelProto, batch: int = 1) -> None:
        self.model = model
        taken = {node.name for node in model.graph.node}
        for index, node in enumerate(model.graph.node):
            if not node.name:
                plain = f"{node.op_type}_{index}"
                numbered = (f"{plain}_{i}" for i in itertools.count(1))
                node.name = next(name for name in itertools.chain([plain], numbered) if name not in taken)
                taken.add(node.name)
        self.ops = list(model.graph.node)
        self.by_name = {node.name: i for i, node in enumerate(self.ops)}
        self.producer = {name: i for i, node in enumerate(self.ops) for name in node.output if name}
        self.weights = {item.name for item in model.graph.initializer}
        self.inputs = {item.name for item in model.graph.input} - self.weights
        self.outputs = {item.name for item in model.graph.output}
        self.tensors = self.inputs | self.weights | set(self.producer)
        self.consumers: dict[str, list[int]] = {}
        for i, node in enumerate(self.ops):
            for name in reads(node):
                self.consumers.setdefault(name, []).append(i)
        self.functions = {(f.domain, f.name) for f in model.functions}
        self.constant = self._constants()
        self.alias = self._aliases()
        self.shapes = _shapes(model, batch)

    def _constants(self) -> set[str]:
        """Tensors whose value no input can change."""
        constant = set(self.weights)
        for node in self.ops:  # in topological order, as ONNX asks
            if all(name in constant for name in reads(node)) and not node.op_type.startswith("Random"):
                constant.update(name for name in node.output if name)
        return constant

    def _aliases(self) -> dict[str, str]:
        """Outputs of a node that does what an earlier one does, by the earlier one's."""
        first: dict[Any, onnx.NodeProto] = {}
        alias: dict[str, str] = {}
        for node in self.ops:
            inputs = tuple(alias.get(name, name) for name in node.input)
            settings = sorted(item.SerializeToString(deterministic=True) for item in node.attribute)
            twin = first.setdefault((node.op_type, node.domain, inputs, *settings), node)
            if twin is not node and not node.op_type.startswith("Random"):
                alias.update({b: a for a, b in zip(twin.output, node.output, strict=False) if b not in self.outputs})
        return alias

    def known_as(self, tensor: str) -> str:
        """The tensor of the same value that an earlier equal node makes, or itself."""
        return self.alias.get(tensor, tensor)

    def between(self, targets: Iterable[str], stops: set[str]) -> set[int] | None:
        """The nodes that make `targets` out of `stops` and constants; None where they need something else."""
        nodes: set[int] = set()
        todo = list(targets)
        stops = {self.known_as(name) for name in stops}
        while todo:
            tensor = self.known_as(todo.pop())
            if tensor in stops or tensor in self.constant:
                continue
            if tensor not in self.producer:
                return None
            index = self.producer[tensor]
            if index not in nodes:
                nodes.add(index)
                todo += reads(self.ops[index])
        return nodes

    def boundary(self, nodes: Iterable[int]) -> tuple[list[str], list[str], list[str]]:
        """What a group of nodes reads (data, weights) and makes for others."""
        group = set(nodes)
        results = {name for i in group for name in self.ops[i].output if name}
        read = dict.fromkeys(name for i in sorted(group) for name in reads(self.ops[i]) if name not in results)
        data = [name for name in read if name not in self.constant]
        fixed = [name for name in read if name in self.constant]
        outs = [
            name
            for name in results
            if name in self.outputs or any(user not in group for user in self.consumers.get(name, []))
        ]
        return data, fixed, outs

    def size(self, tensor: str) -> float | None:
        """Bytes of a tensor."""
        if tensor not in self.shapes:
            return None
        shape, width = self.shapes[tensor]
        return math.prod(shape) * width

    def operations(self, index: int) -> float | None:
        """Floating-point operations of one node; None where its shapes or its data decide."""
        node = self.ops[index]
        if (node.domain, node.op_type) in self.functions or node.op_type == contract.OP_TYPE:
            return None
        out = self.shapes.get(node.output[0])
        if out is None:
            return None
        elements = float(math.prod(out[0]))
        if node.op_type in HEAVY:
            weight = self.shapes.get(node.input[1])
            first = self.shapes.get(node.input[0])
            if weight is None or first is None:
                return None
            if node.op_type == "Conv":
                return 2 * elements * math.prod(weight[0][1:])
            if node.op_type == "ConvTranspose":
                return 2 * math.prod(first[0]) * math.prod(weight[0][1:])
            flip = node.op_type == "Gemm" and attribute(node, "transA", 0)
            return 2 * elements * first[0][-2 if flip else -1]
        if node.op_type in ("MaxPool", "AveragePool"):
            return elements * float(math.prod(attribute(node, "kernel_shape", [1])))
        if node.op_type in ("GlobalAveragePool", "ReduceMean", "ReduceSum", "ReduceMax"):
            first = self.shapes.get(node.input[0])
            return float(math.prod(first[0])) if first else None
        if node.op_type in ("Identity", "Dropout", "Constant", "Shape", "Resize") or node.op_type in LAYOUT:
            return 0.0
        return elements if node.op_type in POINTWISE else None


def reads(node: onnx.NodeProto) -> list[str]:
    """All tensors that a node reads, those that its subgraphs take from outside included."""
    names = [str(name) for name in node.input if name]
    for item in node.attribute:
        for inner in [item.g, *item.graphs]:
            if not inner.node:
                continue
            own = {value.name for value in inner.input} | {value.name for value in inner.initializer}
            own |= {name for inside in inner.node for name in inside.output}
            names += [name for inside in inner.node for name in reads(inside) if name not in own]
    return names


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)


def _shapes(model: onnx.ModelProto, batch: int) -> dict[str, tuple[tuple[int, ...], float]]:
    """Shape and bytes per element of every tensor whose shape is known at this batch."""
    import onnx
    from onnx import TensorProto, helper

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    symbols: dict[str, int] = {}
    for item in fixed.graph.input:
        dims = item.type.tensor_type.shape.dim
        if dims and not dims[0].HasField("dim_value"):
            symbols[dims[0].dim_param] = batch
            dims[0].dim_value = batch
    for item in [*fixed.graph.value_info, *fixed.graph.output]:
        for dim in item.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_value = batch
    with contextlib.suppress(Exception):  # what cannot be inferred stays unknown
        fixed = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    widths: dict[int, float] = {TensorProto.BOOL: 1.0, TensorProto.INT4: 0.5, TensorProto.UINT4: 0.5}
    shapes: dict[str, tuple[tuple[int, ...], float]] = {}
    for item in [*fixed.graph.input, *fixed.graph.value_info, *fixed.graph.output]:
        tensor = item.type.tensor_type
        dims = tensor.shape.dim
        if tensor.HasField("shape") and tensor.elem_type and all(d.HasField("dim_value") for d in dims):
            width = widths.get(tensor.elem_type) or helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
            shapes[item.name] = (tuple(d.dim_value for d in dims), float(width))
    for weight in fixed.graph.initializer:
        width = widths.get(weight.data_type) or helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize
        shapes[weight.name] = (tuple(weight.dims), float(width))
    return shapes
