"""A source ONNX with raw heads → the served graph: pixels in, detections out.

Puts the pixel front (UINT8 picture → normalised planes) and the SSDNMS back around the source and touches nothing
between: Conv, BatchNormalization and Relu stay the nodes that they were, so that a runtime's fusion remains visible.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from build import contract
from build.errors import GraphError
from build.graph import ssd_nms
from build.session import runner
from build.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

BATCH = "batch"
FRONT_CONSTANTS = ("ssd/front/mean", "ssd/front/std")  # FP32 [1,3,1,1]
PLANES = "ssd/front/div"  # what the source's input is called once the front is attached
OLDEST_OPSET = 13


def attach(spec: Spec, source: onnx.ModelProto | None = None) -> onnx.ModelProto:
    """The served graph of a spec's source model, with the inputs and outputs of docs/design.md, "The served model".

    The source takes FP32 [B,3,H,W] and answers `box_deltas` [B,N,4] and `class_logits` [B,N,C], FP32 or FP16. Boxes
    that are decoded already are SSDNMS's corner deltas of anchors that are all 0: `(0 - 0.5 * 0) + box / 1` is the box.

    Args:
        spec: the spec.
        source: what stands in for the spec's source model: the same one in another precision.

    Raises:
        GraphError: the source is no ONNX model, or not what its spec says.
        SpecError: the anchors cannot be read.
    """
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    anchors = spec.load_anchors() if spec.nms.needs_anchors else None
    model = load_source(spec)
    if anchors is None:
        anchors = np.zeros((_count_boxes(model, spec), 4), np.float32)
    if source is not None:
        model.CopyFrom(source)
    _check(model, spec, len(anchors))
    graph, nms = model.graph, spec.nms

    # The contract's names belong to the contract; whatever had them in the source steps aside.
    inputs = [tensor.name for tensor in spec.inputs]
    pixels = graph.input[0]
    aside = {name: f"source/{name}" for name in (*inputs, *contract.OUTPUTS)}
    batch = pixels.type.tensor_type.shape.dim[0].dim_param
    rename(graph, {**aside, pixels.name: PLANES}, {batch: BATCH} if batch else {})

    front, constants = _front(spec)
    constants["ssd/anchors"] = anchors
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    nodes = [*front, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)

    heads = {output.name: output.type.tensor_type.elem_type for output in graph.output}
    for name, last in zip(contract.HEADS, (4, spec.classes), strict=True):
        graph.value_info.append(helper.make_tensor_value_info(name, heads[name], [BATCH, len(anchors), last]))
    del graph.input[:], graph.output[:]
    graph.input.extend(_value_info(tensor) for tensor in spec.inputs)
    graph.output.extend(_value_info(tensor) for tensor in spec.outputs)
    graph.name = spec.model.name
    model.ir_version = max(model.ir_version, 8)  # the first with model-local functions
    ssd_nms.attach(model, ssd_nms.node(nms, [*contract.HEADS, "ssd/anchors", *inputs[1:]]))
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"{spec.onnx_path}: the attached graph is no valid ONNX: {error}") from None
    return model


def load_source(spec: Spec) -> onnx.ModelProto:
    """The source model as it is, checked to be whole and valid.

    Raises:
        GraphError: no readable ONNX, not valid, or of operators older than version 13.
    """
    import onnx
    from google.protobuf.message import DecodeError

    path = spec.onnx_path
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except OSError as error:
        raise GraphError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        raise GraphError(
            f"{path}: no valid ONNX model: {str(error).strip() or 'it cannot be decoded'}",
            why="the file is truncated, of another kind, or lacks its external data",
            fix="export it again",
        ) from None
    opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)
    if opset < OLDEST_OPSET:
        raise GraphError(
            f"{path}: uses operators of version {opset}, but must use {OLDEST_OPSET} or later",
            fix=f"export it again with opset_version={OLDEST_OPSET} or later, or use onnx.version_converter",
        )
    return model


def before_nms(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that ends at the raw heads: `images` → `box_deltas`, `class_logits`, of standard operators alone.

    Raises:
        GraphError: the model has no SSDNMS node, or one that disagrees with its function.
    """
    import onnx
    from onnx import helper

    ssd_node = ssd_nms.find(model)
    heads = list(ssd_node.input[:2])
    cut = ssd_nms.strip_function(model)
    graph = cut.graph
    graph.node.remove(ssd_node)
    gone = {*ssd_node.input[2:], *heads}
    types = {info.name: info for info in graph.value_info}
    kept: dict[str, list[Any]] = {
        "input": [item for item in graph.input if item.name not in gone],
        "initializer": [item for item in graph.initializer if item.name not in gone],
        "value_info": [item for item in graph.value_info if item.name not in gone],
        "output": [types.get(name) or onnx.ValueInfoProto(name=name) for name in heads],
    }
    for field, items in kept.items():
        del getattr(graph, field)[:]
        getattr(graph, field).extend(items)
    opsets = [
        helper.make_opsetid(item.domain, item.version) for item in cut.opset_import if item.domain != contract.DOMAIN
    ]
    del cut.opset_import[:]
    cut.opset_import.extend(opsets)
    return cut


def _value_info(tensor: contract.Tensor) -> onnx.ValueInfoProto:
    import numpy as np
    from onnx import helper

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return helper.make_tensor_value_info(tensor.name, kind, [BATCH, *tensor.shape])


def _front(spec: Spec) -> tuple[list[onnx.NodeProto], dict[str, NDArray[np.generic]]]:
    """Nodes and constants from `images` to normalised planes: (pixel - mean) / std, in the source's channel order."""
    import numpy as np
    from onnx import TensorProto, helper

    per_channel = (1, 3, 1, 1)
    constants: dict[str, NDArray[np.generic]] = {
        name: np.reshape(np.array(values, np.float32), per_channel)
        for name, values in zip(FRONT_CONSTANTS, (spec.input.mean, spec.input.std), strict=True)
    }
    mean, deviation = FRONT_CONSTANTS
    steps: list[tuple[str, list[str], dict[str, Any]]] = [
        ("Cast", [], {"to": TensorProto.FLOAT}),
        ("Transpose", [], {"perm": [0, 3, 1, 2]}),
        ("Sub", [mean], {}),
        ("Div", [deviation], {}),
    ]
    if spec.input.color_order == "BGR":
        constants["ssd/front/bgr"] = np.array([2, 1, 0], np.int64)
        steps.insert(2, ("Gather", ["ssd/front/bgr"], {"axis": 1}))
    nodes, current = [], contract.IMAGES
    for op_type, operands, attributes in steps:
        name = f"ssd/front/{op_type.lower()}"
        nodes.append(helper.make_node(op_type, [current, *operands], [name], name=name, **attributes))
        current = name
    return nodes, constants


def _count_boxes(model: onnx.ModelProto, spec: Spec) -> int:
    """N, which no anchors tell: from shape inference or, where that does not know it, from one run.

    Raises:
        GraphError: the source is not what its spec says, or ONNX Runtime cannot run it.
    """
    import numpy as np

    count = _check(model, spec, None)
    if count:
        return count
    pixels = np.zeros((1, 3, spec.input.height, spec.input.width), np.float32)
    try:
        shape = runner(model)({model.graph.input[0].name: pixels})[contract.HEADS[0]].shape
    except Exception as error:  # ONNX Runtime's own exceptions have no common type
        raise GraphError(f"{spec.onnx_path}: ONNX Runtime cannot run it: {error}") from error
    if len(shape) != 3:
        raise GraphError(f"{spec.onnx_path}: box_deltas has the shape {list(shape)}, but must have [1, N, 4]")
    return int(shape[1])


def _check(model: onnx.ModelProto, spec: Spec, anchors: int | None) -> int:
    """Compares the source's one input and its heads with the spec, as far as their shapes are known.

    Args:
        model: the source.
        spec: its spec.
        anchors: how many there are; None = no anchors.

    Returns:
        N, or 0 where shape inference does not know it.

    Raises:
        GraphError: something differs.
    """
    import onnx
    from onnx import TensorProto

    path, graph = spec.onnx_path, model.graph
    constants = {item.name for item in graph.initializer}
    inputs = [item for item in graph.input if item.name not in constants]
    del graph.input[:]
    graph.input.extend(inputs)
    if len(inputs) != 1:
        raise GraphError(f"{path}: has the inputs {[i.name for i in inputs]}, but must have one: FP32 [B,3,H,W]")
    outputs = [item.name for item in graph.output]
    if sorted(outputs) != sorted(contract.HEADS):
        last = {node.op_type for node in graph.node if set(node.output) & set(outputs)}
        raise GraphError(
            f"{path}: has the outputs {outputs}, but must have {' and '.join(contract.HEADS)}",
            why="it was exported with its post-processing"
            if "NonMaxSuppression" in {n.op_type for n in graph.node}
            else f"the outputs have other names, or are not the raw heads (they come from {', '.join(sorted(last))})",
            fix="export the network up to its raw heads: box_deltas [B,N,4] and class_logits [B,N,C]",
        )
    size = (spec.input.height, spec.input.width)
    _compare(path, inputs[0], ("B", 3, *size), (TensorProto.FLOAT,))
    if inputs[0].type.tensor_type.shape.dim[0].HasField("dim_value"):
        raise GraphError(
            f"{path}: input {inputs[0].name!r} has the fixed batch {inputs[0].type.tensor_type.shape.dim[0].dim_value}",
            fix="export it with a dynamic batch dimension",
        )
    # With the input's shape fixed, shape inference knows the heads' shapes of most models.
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    for dimension, value in zip(probe.graph.input[0].type.tensor_type.shape.dim, (1, 3, *size), strict=True):
        dimension.dim_value = value
    for output in probe.graph.output:
        output.type.tensor_type.ClearField("shape")
    probe = onnx.shape_inference.infer_shapes(probe, data_prop=True)
    count = 0
    for output in probe.graph.output:
        last_size = 4 if output.name == "box_deltas" else spec.classes
        _compare(path, output, ("B", anchors or "N", last_size), (TensorProto.FLOAT, TensorProto.FLOAT16))
        sizes = [dimension.dim_value for dimension in output.type.tensor_type.shape.dim]
        count = count or (sizes[1] if sizes else 0)
    return count


def _compare(path: object, info: onnx.ValueInfoProto, shape: tuple[int | str, ...], kinds: tuple[int, ...]) -> None:
    from onnx import TensorProto

    tensor = info.type.tensor_type
    names = [TensorProto.DataType.Name(kind) for kind in kinds]
    if tensor.elem_type not in kinds:
        actual = TensorProto.DataType.Name(tensor.elem_type)
        raise GraphError(f"{path}: {info.name!r} is of type {actual}, but must be {' or '.join(names)}")
    if not tensor.HasField("shape"):
        return
    shape_here = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]
    differs = len(shape_here) != len(shape) or any(
        isinstance(actual, int) and isinstance(wanted, int) and actual != wanted
        for actual, wanted in zip(shape_here, shape, strict=True)
    )
    if differs:
        raise GraphError(
            f"{path}: {info.name!r} has the shape {shape_here}, but must have {list(shape)}",
            why="spec.toml, labels.txt, anchors.npy and the model are not of one kind",
            fix="the spec gives height and width, anchors.npy gives N (where boxes are decoded, both heads "
            "have the same N), labels.txt (and a background) gives C",
        )


def rename(graph: onnx.GraphProto, values: Mapping[str, str], dimensions: Mapping[str, str]) -> None:
    """Renames values and symbolic dimensions in a graph and the graphs in it."""
    for info in (*graph.input, *graph.output, *graph.value_info):
        info.name = values.get(info.name, info.name)
        for dimension in info.type.tensor_type.shape.dim if info.type.tensor_type.HasField("shape") else ():
            if dimension.dim_param in dimensions:
                dimension.dim_param = dimensions[dimension.dim_param]
    for constant in graph.initializer:
        constant.name = values.get(constant.name, constant.name)
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [values.get(name, name) for name in names]
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                rename(inner, values, dimensions)
