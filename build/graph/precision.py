"""A source model → the same model typed in another precision: casts are nodes of the graph, never a flag of a builder.

Everything here works on the source model, pixels' planes to raw heads, before `graph.attach` puts the contract's front
and SSDNMS around it: those two stay FP32, and so do the source's input and outputs, with a Cast at each border.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from build.contract import PRECISIONS
from build.errors import QuantizeError

if TYPE_CHECKING:
    import onnx

    _Message = TypeVar("_Message", onnx.ModelProto, onnx.NodeProto)

# Beside Q/DQ pairs, FP16 needs the first version of them that takes FP16.
_FP16_QDQ_OPSET = 19
# What NVIDIA's parser and strongly typed builder refuse, though ONNX allows it (seen with TensorRT for RTX).
_BUILDER_REFUSES = {
    "fp16": frozenset[str](),
    "bf16": frozenset({"ConvTranspose", "HardSwish", "LpNormalization", "LpPool", "Mish"}),
}


def half(source: onnx.ModelProto, kind: str) -> onnx.ModelProto:
    """A copy whose floats are FP16 or BF16, its input and outputs FP32 with a Cast at each border.

    By ONNX Runtime's converter. What an operator's type constraints or TensorRT's builder do not take stays FP32. BF16
    takes the same nodes, with every constant rounded from the FP32 original.

    Args:
        source: an FP32 model.
        kind: fp16 or bf16.

    Raises:
        QuantizeError: a constant is out of FP16's range.
    """
    import numpy as np
    from onnx import TensorProto, numpy_helper
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    if kind == "fp16":
        most = float(np.finfo(np.float16).max)
        for constant in source.graph.initializer:
            if constant.data_type == TensorProto.FLOAT and (np.abs(numpy_helper.to_array(constant)) > most).any():
                raise QuantizeError(
                    f"constant {constant.name!r} holds values beyond {most:g}, the most that FP16 can hold",
                    fix="build bf16 instead, which has FP32's range",
                )
    quantises = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in source.graph.node)
    start = at_least(source, max(PRECISIONS[kind].opset, _FP16_QDQ_OPSET if quantises else 0))
    wide = [*DEFAULT_OP_BLOCK_LIST, *_stays_wide(start, kind)]
    model: onnx.ModelProto = convert_float_to_float16(_copy(start), keep_io_types=True, op_block_list=wide)
    if kind == "bf16":
        exact = {constant.name: constant for constant in source.graph.initializer}
        _swap_type(model.graph, exact)
    sort(model)
    return model


def _stays_wide(model: onnx.ModelProto, kind: str) -> set[str]:
    """The operators of a model that cannot read this type: by ONNX's schemas, or because the builder refuses it.

    Inputs that the converter knows to be FP32 always (the scales of Resize) do not count.
    """
    import onnx
    from onnxruntime.transformers.float16 import ALWAYS_FLOAT_INPUTS

    short = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}[kind]
    opset = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
    found = set(_BUILDER_REFUSES[kind])
    for operator in {node.op_type for node in model.graph.node if node.domain in ("", "ai.onnx")}:
        try:
            schema = onnx.defs.get_schema(operator, opset)
        except onnx.defs.SchemaError:
            continue  # no operator of ONNX: whoever runs it says so
        wide = ALWAYS_FLOAT_INPUTS.get(operator, [])
        takes = [place.types for i, place in enumerate(schema.inputs) if i not in wide]
        if any("tensor(float)" in types and short not in types for types in takes):
            found.add(operator)
    return found


def at_least(source: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The model, or a copy with its standard operators raised to version `opset`.

    Raises:
        QuantizeError: ONNX's converter cannot raise it.
    """
    import onnx

    current = next(item.version for item in source.opset_import if item.domain in ("", "ai.onnx"))
    if current >= opset:
        return source
    try:
        raised: onnx.ModelProto = onnx.version_converter.convert_version(source, opset)
        return raised
    except Exception as error:  # the converter raises whatever its C++ raises
        raise QuantizeError(
            f"the source uses operators of version {current}, and ONNX's converter cannot raise them to {opset}: "
            f"{error}",
            fix=f"export the source again with opset_version={opset}",
        ) from None


def runnable(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """A graph of a precision as ONNX Runtime can run it on a CPU: widened where it has no kernels for its types."""
    return widened(model) if PRECISIONS[name].widened else model


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in FP32 that computes what a graph with BF16 in it computes, for runtimes without BF16 kernels.

    Every BF16 constant becomes FP32 with the same value. Every BF16 result of a node is rounded to BF16 and widened
    again; sums stay FP32 inside a node, as on tensor cores. What was FP32 stays as it is.

    Args:
        model: a typed graph, with or without the contract's front and SSDNMS.

    Raises:
        QuantizeError: the types of its tensors cannot be inferred.
    """
    import onnx
    from onnx import TensorProto, helper

    short, wide = TensorProto.BFLOAT16, TensorProto.FLOAT
    copied = _copy(model)
    try:
        inferred = onnx.shape_inference.infer_shapes(copied).graph
    except onnx.shape_inference.InferenceError as error:
        raise QuantizeError(f"the types of {model.graph.name or 'the graph'} cannot be inferred: {error}") from None
    graph = copied.graph
    infos = (*inferred.value_info, *inferred.input, *inferred.output)
    rounds = {info.name for info in infos if info.type.tensor_type.elem_type == short}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for constant in (attribute.t for attribute in node.attribute if attribute.HasField("t")):
            _widen(constant)
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == short:
                attribute.i = wide
        nodes.append(node)
        for place, name in enumerate(node.output):
            if name in rounds and node.op_type != "Constant":
                node.output[place] = f"{name}/exact"
                nodes.append(helper.make_node("Cast", [f"{name}/exact"], [f"{name}/short"], to=short))
                nodes.append(helper.make_node("Cast", [f"{name}/short"], [name], to=wide))
    for constant in graph.initializer:
        _widen(constant)
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type == short:
            info.type.tensor_type.elem_type = wide
    nodes = [_copy(node) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return copied


def _widen(constant: onnx.TensorProto) -> None:
    """BF16 → FP32 of the same value (in place)."""
    from onnx import TensorProto, numpy_helper

    if constant.data_type == TensorProto.BFLOAT16:
        values = numpy_helper.to_array(constant).astype("float32")
        constant.CopyFrom(numpy_helper.from_array(values, constant.name))


def sort(model: onnx.ModelProto) -> None:
    """Puts the nodes of the main graph in an order in which each comes after those that it reads (in place).

    Raises:
        QuantizeError: they form a circle.
    """
    graph = model.graph
    produced = {name for node in graph.node for name in node.output}
    ready = {""}
    left, nodes = list(graph.node), []
    while left:
        later = []
        for node in left:
            if all(name in ready or name not in produced for name in reads(node)):
                nodes.append(node)
                ready.update(node.output)
            else:
                later.append(node)
        if len(later) == len(left):
            raise QuantizeError(f"the nodes form a circle around {left[0].name!r}")
        left = later
    del graph.node[:]
    graph.node.extend(nodes)


def reads(node: onnx.NodeProto) -> Iterable[str]:
    """What a node reads, its subgraphs included."""
    yield from node.input
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            for inner_node in inner.node:
                yield from reads(inner_node)


def _swap_type(graph: onnx.GraphProto, exact: dict[str, onnx.TensorProto]) -> None:
    """FP16 → BF16 in constants, casts and value infos (in place); constants from `exact` where it has them."""
    from onnx import TensorProto

    half_type, wanted = TensorProto.FLOAT16, TensorProto.BFLOAT16
    for info in (*graph.input, *graph.output, *graph.value_info):
        if info.type.tensor_type.elem_type == half_type:
            info.type.tensor_type.elem_type = wanted
    for constant in graph.initializer:
        if constant.data_type == half_type:
            _make_bfloat16(constant, exact.get(constant.name, constant))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == half_type:
                attribute.i = wanted
            if attribute.HasField("t") and attribute.t.data_type == half_type:
                _make_bfloat16(attribute.t, attribute.t)
            for inner in (attribute.g, *attribute.graphs):
                _swap_type(inner, exact)


def _make_bfloat16(constant: onnx.TensorProto, values: onnx.TensorProto) -> None:
    from onnx import numpy_helper

    constant.CopyFrom(numpy_helper.from_array(_to_bfloat16(numpy_helper.to_array(values)), constant.name))


def _to_bfloat16(values: Any) -> Any:
    import ml_dtypes

    return values.astype(ml_dtypes.bfloat16)


def _copy(message: _Message) -> _Message:
    copied = type(message)()
    copied.CopyFrom(message)
    return copied
