"""A foreign ONNX graph under adaptation: looked at, run, cut and extended with standard operators.

The graph is held as onnx-ir's, where a tensor knows its producer and its readers. Every number that can be measured is
measured: `measure` runs a part of the graph in ONNX Runtime instead of guessing what its nodes compute.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import ImportModelError
from build.graph.precision import reads
from build.session import runner

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

OPSET = 17
OLDEST_OPSET = 13
_FOREIGN = "ssd.foreign"  # domain of operators that no ONNX version has
# Operators that move numbers around and leave their values as they are.
SHAPING = frozenset(
    (
        "Transpose",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Identity",
        "Cast",
        "Concat",
        "Split",
        "Slice",
        "Gather",
    )
)


class Editor:
    """A model to be adapted.

    Args:
        path: the ONNX file, for messages.
        model: its content.

    Attributes:
        path: likewise.
        original: the model as it is in the file.
        model: the onnx-ir model that the methods change.
    """

    def __init__(self, path: Path, model: onnx.ModelProto) -> None:
        import onnx_ir as ir

        self.path, self.original = path, model
        self.model: ir.Model = ir.from_proto(_raised(path, _widened(model)))
        self._count = 0

    @property
    def graph(self) -> ir.Graph:
        return self.model.graph

    def inputs(self) -> list[ir.Value]:
        """The inputs that are no constants."""
        return [value for value in self.graph.inputs if value.name not in self.graph.initializers]

    def values(self) -> dict[str, ir.Value]:
        """Every tensor of the main graph by its name."""
        produced = {value.name: value for node in self.graph for value in node.outputs if value.name}
        given = {value.name: value for value in self.graph.inputs if value.name}
        return {**dict(self.graph.initializers), **given, **produced}

    def value(self, name: str) -> ir.Value:
        """A tensor of the main graph.

        Raises:
            ImportModelError: there is none of that name; names the ones that are spelt alike.
        """
        values = self.values()
        if name not in values:
            inner = {v.name for node in self.graph.all_nodes() for v in node.outputs if v.name} - values.keys()
            near = difflib.get_close_matches(name, list(values), 3)
            outputs = ", ".join(repr(output.name) for output in self.graph.outputs)
            raise ImportModelError(
                f"{self.path}: has no tensor {name!r}",
                why="it is inside a loop or a branch, where a graph cannot be cut" if name in inner else "",
                fix=f"name a tensor of the main graph; alike are {', '.join(map(repr, near))}"
                if near
                else f"name a tensor of the main graph; its outputs are {outputs}",
            )
        return values[name]

    # -- looking -------------------------------------------------------------------------------------------------------

    def nodes(self, *op_types: str) -> Iterator[ir.Node]:
        """The nodes of these operators (of all, if none is named), those inside loops and branches included."""
        return (node for node in self.graph.all_nodes() if not op_types or node.op_type in op_types)

    def constant(self, value: ir.Value | None) -> NDArray[Any] | None:
        """A tensor's value where it is a constant, also one that is made from constants; None where it is not."""
        import onnx_ir as ir

        if value is None:
            return None
        if value.const_value is not None:
            return value.const_value.numpy()
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            return tensor.numpy()
        node = value.producer()
        if node is None or node.op_type in ("Loop", "If", "Scan") or not node.inputs:
            return None
        if any(self.constant(read) is None for read in node.inputs if read is not None):
            return None
        try:
            return self.measure({}, [value])[0]
        except ImportModelError:
            return None

    def back(
        self, value: ir.Value, through: Callable[[ir.Node], bool], follow: Callable[[ir.Node], int] = lambda _: 0
    ) -> ir.Value:
        """The tensor that the way back from `value` reaches when it goes through nodes for which `through` holds."""
        while (node := value.producer()) is not None and through(node):
            read = node.inputs[follow(node)]
            if read is None:
                break
            value = read
        return value

    def ancestors(self, value: ir.Value, until: Collection[str] = ()) -> list[ir.Value]:
        """The tensors that `value` is computed from, nearest first; constants left out.

        Args:
            value: of the main graph.
            until: operators that the way back does not pass.
        """
        seen: dict[str | None, ir.Value] = {}
        queue = [value]
        while queue:
            current = queue.pop(0)
            if current.name in seen or current.const_value is not None:
                continue
            seen[current.name] = current
            node = current.producer()
            if node is not None and node.op_type not in until:
                queue += [read for read in node.inputs if read is not None]
        return list(seen.values())

    # -- running -------------------------------------------------------------------------------------------------------

    def part(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> onnx.ModelProto:
        """The model between these tensors.

        Raises:
            ImportModelError: `outputs` depend on more than `inputs` and constants.
        """
        import onnx_ir as ir

        try:
            self.graph.sort()
            graph = ir.convenience.extract(self.graph, list(inputs), list(outputs))
            graph.name = graph.name or "part"
            model = ir.Model(graph, ir_version=max(self.model.ir_version, 8))
            for domain, version in self.model.opset_imports.items():
                model.opset_imports.setdefault(domain, version)
            return ir.to_proto(model)
        except ValueError as error:
            raise ImportModelError(f"{self.path}: cannot be cut there: {error}") from None

    def measure(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[ir.Value]) -> list[NDArray[Any]]:
        """Runs the part between the fed tensors and `outputs` in ONNX Runtime, node by node as it is written.

        Args:
            feeds: tensors of the main graph by name; what is before them is not run.
            outputs: what to compute.

        Raises:
            ImportModelError: it depends on more than that, or cannot run.
        """
        import onnx_ir as ir

        if not outputs:
            return []
        model = self.part([self.value(name) for name in feeds], outputs)
        for info, array in zip(model.graph.input, feeds.values(), strict=True):
            info.type.tensor_type.elem_type = ir.DataType.from_numpy(array.dtype).value
            info.type.tensor_type.ClearField("shape")
        for info in model.graph.output:
            if info.type.HasField("tensor_type"):
                info.type.tensor_type.ClearField("shape")
        del model.graph.value_info[:]
        try:
            answers = runner(model, optimised=False)(feeds)
        except Exception as error:  # ONNX Runtime's own exceptions have no common type
            raise ImportModelError(f"{self.path}: this part of it cannot run in ONNX Runtime: {error}") from None
        return [answers[str(value.name)] for value in outputs]

    # -- changing ------------------------------------------------------------------------------------------------------

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Appends a node of a standard operator; gives its one output."""
        import onnx_ir as ir

        self._count += 1
        node = ir.node(op_type, inputs, attributes=attributes, name=f"ssd/import/{op_type.lower()}_{self._count}")
        node.outputs[0].name = node.name
        self.graph.append(node)
        return node.outputs[0]

    def number(self, values: Any, dtype: Any = None) -> ir.Value:
        """A constant: FP32 unless told otherwise."""
        import numpy as np
        import onnx_ir as ir

        self._count += 1
        array = np.asarray(values, dtype or np.float32)
        value = ir.Value(
            name=f"ssd/import/constant_{self._count}",
            const_value=ir.tensor(array),
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        )
        value.const_value.name = value.name  # type: ignore[union-attr]
        self.graph.register_initializer(value)
        return value

    def whole(self, *values: int) -> ir.Value:
        """A constant INT64 [n]."""
        import numpy as np

        return self.number(values, np.int64)

    def columns(self, value: ir.Value, start: int, end: int, axis: int = -1) -> ir.Value:
        """value[..., start:end]."""
        return self.op("Slice", value, self.whole(start), self.whole(end), self.whole(axis))

    def pick(self, value: ir.Value, order: Sequence[int]) -> ir.Value:
        """The columns of the last axis in this order."""
        return (
            value if list(order) == list(range(len(order))) else self.op("Gather", value, self.whole(*order), axis=-1)
        )

    def transpose(self, value: ir.Value, *perm: int) -> ir.Value:
        return self.op("Transpose", value, perm=perm)

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        """As ONNX has it: 0 keeps a dimension, -1 is what is left."""
        return self.op("Reshape", value, self.whole(*shape))

    def concat(self, values: Sequence[ir.Value], axis: int) -> ir.Value:
        return values[0] if len(values) == 1 else self.op("Concat", *values, axis=axis)

    def bypass(self, node: ir.Node) -> None:
        """Lets every reader of a node's output read its first input instead."""
        source = node.inputs[0]
        assert source is not None
        node.outputs[0].replace_all_uses_with(source, replace_graph_outputs=True)

    def finish(
        self, pixels: ir.Value, heads: Mapping[str, tuple[ir.Value, int, int]], size: Sequence[int]
    ) -> onnx.ModelProto:
        """The adapted model and nothing else; the batch is open.

        Args:
            pixels: the new input, FP32 [batch,3,H,W].
            heads: name → (tensor [B,N,columns], N, columns).
            size: (H, W).

        Raises:
            ImportModelError: the heads depend on more than the pixels.
        """
        import onnx_ir as ir
        from onnx import TensorProto, helper

        for name, (value, _, _) in heads.items():
            output = self.op("Identity", value) if value is pixels or value.is_graph_output() else value
            self._take_name(output, name)
            output.type = ir.TensorType(ir.DataType.FLOAT)
        proto = self.part([pixels], [self.value(name) for name in heads])
        del proto.graph.value_info[:], proto.graph.input[:], proto.graph.output[:]
        real = TensorProto.FLOAT
        proto.graph.input.append(helper.make_tensor_value_info(str(pixels.name), real, ["batch", 3, *size]))
        for name, (_, rows, columns) in heads.items():
            proto.graph.output.append(helper.make_tensor_value_info(name, real, ["batch", rows, columns]))
        return _swept(proto)

    def _take_name(self, value: ir.Value, name: str) -> None:
        for other in (*self.values().values(),):
            if other.name == name and other is not value:
                other.name = f"source/{name}"
        value.name = name


def _raised(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with standard operators of a version that the build takes.

    Raises:
        ImportModelError: ONNX's converter cannot raise it.
    """
    import onnx

    current = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)
    if current >= OLDEST_OPSET:
        return model
    # Caffe's exporters give PriorBox and others as standard operators, which they are not: the converter would stop.
    for node in model.graph.node:
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type):
            node.domain = _FOREIGN
    if all(item.domain != _FOREIGN for item in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(_FOREIGN, 1))
    try:
        return onnx.version_converter.convert_version(model, OPSET)
    except Exception as error:  # the converter raises whatever its C++ raises
        raise ImportModelError(
            f"{path}: uses operators of version {current}, and ONNX's converter cannot raise them to {OPSET}: {error}",
            fix=f"export it again with opset_version={OPSET}",
        ) from None


def _widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose FP16 tensors are FP32: sources are FP32, precisions are the build's business."""
    import onnx
    from onnx import TensorProto, numpy_helper

    copied = onnx.ModelProto()
    copied.CopyFrom(model)

    def widen(graph: onnx.GraphProto) -> None:
        for constant in graph.initializer:
            _to_float(constant)
        for info in (*graph.input, *graph.output, *graph.value_info):
            if info.type.tensor_type.elem_type == TensorProto.FLOAT16:
                info.type.tensor_type.elem_type = TensorProto.FLOAT
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT16:
                    attribute.i = TensorProto.FLOAT
                if attribute.HasField("t"):
                    _to_float(attribute.t)
                for inner in (attribute.g, *attribute.graphs):
                    widen(inner)

    def _to_float(constant: onnx.TensorProto) -> None:
        if constant.data_type == TensorProto.FLOAT16:
            values = numpy_helper.to_array(constant).astype("float32")
            constant.CopyFrom(numpy_helper.from_array(values, constant.name))

    widen(copied.graph)
    return copied


def _swept(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without constants and opsets that nothing uses."""
    used = {name for node in model.graph.node for name in reads(node)}
    kept = [constant for constant in model.graph.initializer if constant.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    domains = {node.domain for node in model.graph.node} | {""}
    opsets = [item for item in model.opset_import if item.domain in domains]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    return model
