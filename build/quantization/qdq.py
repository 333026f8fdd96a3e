"""Q/DQ pairs in a graph: what was calibrated, written as nodes that any runtime obeys.

Symmetric, activations per tensor, weights per output channel, bias left in floating point.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from build.contract import PRECISIONS
from build.errors import QuantizeError
from build.graph import precision
from build.graph.attach import FRONT_CONSTANTS, PLANES

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

# The largest value of each quantised type; its INT8 uses -127..127, so that a value and its negative are alike.
_LARGEST = {"int8": 127.0, "fp8": 448.0}
# TensorRT has no fast FP8 kernels for grouped and depthwise Convs (release notes of 10.12, limitations). Those for few
# channels are slower than FP16's, and none takes a large kernel (NVIDIA's Model Optimizer 0.47 leaves these out).
_FP8_TOO_FEW = 16
_FP8_LARGEST_KERNEL = 32
NO_KERNEL = "TensorRT has no fast FP8 kernel for it"
# What has weights: a Conv that none of these reads, not even by way of others, is a head.
_WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")
# A 1x1 head of at most so many channels stays unrounded: that costs little time, and rounding it costs accuracy.
_FEW = 64


def scale_of(clip: float, kind: str) -> float:
    """The scale of a quantised type that represents values up to `clip`; 1 / largest where nothing was ever above 0."""
    return (clip or 1.0) / _LARGEST[kind]


def representable(values: NDArray[np.floating], kind: str) -> NDArray[np.floating]:
    """Values, in units of their scale, each rounded to the nearest that the quantised type has."""
    import ml_dtypes
    import numpy as np

    kept = np.clip(values, -_LARGEST[kind], _LARGEST[kind])
    return np.asarray(np.round(kept) if kind == "int8" else kept.astype(ml_dtypes.float8_e4m3fn).astype(values.dtype))


def weight_scales(weights: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """The scale of each output channel of a Conv's weights [M, C/G, *kernel]: FP32 [M]."""
    import numpy as np

    largest = np.abs(weights).max(axis=tuple(range(1, weights.ndim)), initial=0.0).astype(np.float32)
    scales: NDArray[np.float32] = np.where(largest > 0, largest, np.float32(1)) / np.float32(_LARGEST[kind])
    return scales


def fold(source: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with every BatchNormalization behind a Conv folded into its weights and bias; unnamed Convs get a name.

    Each Conv gets a bias of its own, because quantisation changes it: exporters let equal ones share a constant.

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
    readers = readers_of(model)
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
    readers = readers_of(model)
    for conv in convs(model):
        shared = conv.input[2] if len(conv.input) > 2 else ""
        if shared in constants and len(readers[shared]) > 1:
            conv.input[2] = f"{conv.name}/own_bias"
            model.graph.initializer.append(
                numpy_helper.from_array(numpy_helper.to_array(constants[shared]), conv.input[2])
            )
    used = {name for node in nodes for name in node.input}
    kept = [constant for constant in model.graph.initializer if constant.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def convs(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The Convs of a model, in the order of the graph."""
    return [node for node in model.graph.node if node.op_type == "Conv"]


def why_not(conv: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], kind: str) -> str:
    """Why a Conv gets no pairs in this type, in words; empty where it can have them."""
    if conv.input[1] not in constants:
        return "its weights are no constant"
    outputs, inputs, *kernel = constants[conv.input[1]].dims
    groups = next((attribute.i for attribute in conv.attribute if attribute.name == "group"), 1)
    if kind == "fp8" and (
        groups > 1 or min(outputs, inputs) <= _FP8_TOO_FEW or math.prod(kernel) > _FP8_LARGEST_KERNEL
    ):
        return NO_KERNEL
    return ""


def quantisable(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    """The Convs of a folded model that can be quantised, in the order of the graph."""
    constants = {constant.name: constant for constant in model.graph.initializer}
    return [conv for conv in convs(model) if not why_not(conv, constants, kind)]


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
    source: onnx.ModelProto,
    clips: Mapping[str, float],
    *,
    kind: str = "int8",
    exclude: Collection[str] = (),
    kernels: bool = False,
    errors: Mapping[str, NDArray[np.float32]] | None = None,
    weights: Mapping[str, NDArray[np.float32]] | None = None,
) -> Placed:
    """Puts Q/DQ pairs where TensorRT fuses them; integer kernels of ONNX Runtime take the same places and one more.

    - Before every quantised Conv: one pair on its input, from which all readers of that tensor read but the Convs that
      are left out, and one on its weights, per output channel.
    - Where an Add joins a Conv's result with a shortcut: a pair on the shortcut, so that the sum fuses with the Conv.
    - A concatenation gets its pair behind it, so that all its parts have one scale. The bias stays in floating point.
    - A Conv that TensorRT has no FP8 kernel for gets no FP8 pairs: they would cost accuracy and time (`why_not`).

    Args:
        source: a folded FP32 model.
        clips: the largest absolute value to represent, per activation.
        kind: int8 or fp8 (E4M3).
        exclude: names of Convs that stay as they are.
        kernels: for ONNX Runtime: a pair also behind every Conv, or behind its Relu or ReLU6, whatever follows. Without
            it the Conv has no integer kernel there; with it TensorRT could not fuse the Conv with what follows. Only
            small heads go without, and what a Conv reads that is left out: they are better left unrounded.
        errors: what to take off the biases, by Conv (`correction.mean_errors`).
        weights: weights that lie on the steps already, by initializer (`rounding.rounded`); any other is rounded to
            the nearest step.

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
    model.CopyFrom(precision.at_least(source, PRECISIONS[kind].opset))
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
        measured = served_name(model, name)
        if name not in pairs:
            if measured not in clips:
                raise QuantizeError(f"activation {measured!r} was not calibrated", fix="calibrate this very model")
            scales[measured] = scale_of(clips[measured], kind)
            pair(name, np.array(scales[measured], np.float32))

    chosen, left = [], {}
    readers = readers_of(model)
    for conv in convs(model):
        reason = "excluded" if conv.name in exclude else why_not(conv, constants, kind)
        if reason:
            left[conv.name] = reason
        else:
            chosen.append(conv)
    own = {conv.output[0] for conv in chosen}
    every = constants_of(model)
    for conv in chosen:
        if conv.input[1] not in pairs:
            name = conv.input[1]
            pair(name, weight_scales(numpy_helper.to_array(constants[name]), kind), 0)
            if weights is not None and name in weights:
                model.graph.initializer.append(numpy_helper.from_array(weights[name], f"{name}/rounded"))
                pairs[name][0].input[0] = f"{name}/rounded"
        activation(conv.input[0])
        following = readers.get(conv.output[0], [])
        # A Conv that others read, too, is stored by itself and not summed in registers.
        if len(following) == 1 and following[0].op_type == "Add":
            shortcut = [name for name in following[0].input if name != conv.output[0] and name not in constants]
            known = len(shortcut) == 1 and (shortcut[0] in clips or shortcut[0] in own)
            if known and conv.output[0] not in pairs:  # else this Conv is the shortcut itself
                activation(shortcut[0])
        answer = behind(conv, readers, every)
        exactly = any(node.op_type == "Conv" and node.name in left for node in readers.get(answer, []))
        if kernels and not exactly and not _is_small_head(conv, readers, constants[conv.input[1]]):
            activation(answer)
        if errors is not None and conv.name in errors:
            _correct(model, conv, constants, errors[conv.name])
    _insert(model, pairs, left)
    return Placed(model, tuple(conv.name for conv in chosen), scales, left)


def behind(
    conv: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]], constants: Mapping[str, onnx.TensorProto]
) -> str:
    """The output of a Conv together with the Relu or ReLU6 that alone reads it."""
    following = readers.get(conv.output[0], [])
    fused = len(following) == 1 and starts_at_zero(following[0], constants)
    return following[0].output[0] if fused else conv.output[0]


def _is_small_head(
    conv: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]], weights: onnx.TensorProto
) -> bool:
    """Whether a Conv is 1x1 with few channels, and nothing with weights comes after it."""
    if weights.dims[0] > _FEW or any(size != 1 for size in weights.dims[2:]):
        return False
    waiting, seen = [conv.output[0]], set[str]()
    while waiting:
        for node in readers.get(waiting.pop(), []):
            if node.op_type in _WEIGHTED:
                return False
            new = set(node.output) - seen if node.op_type != "Shape" else set()
            seen |= new
            waiting += new
    return True


def _correct(
    model: onnx.ModelProto,
    conv: onnx.NodeProto,
    constants: Mapping[str, onnx.TensorProto],
    error: NDArray[np.float32],
) -> None:
    """Takes a mean error off a Conv's bias (in place); a bias that is computed stays as it is."""
    from onnx import numpy_helper

    given = conv.input[2] if len(conv.input) > 2 else ""
    if given and given not in constants:
        return
    bias = numpy_helper.to_array(constants[given]) if given else 0.0
    name = f"{conv.name}/corrected"
    model.graph.initializer.append(numpy_helper.from_array((bias - error).astype(error.dtype), name))
    conv.input[:] = [*conv.input[:2], name]


def for_onnxruntime(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy, of what `quantize` made with `kernels`, whose activations are UINT8: what ONNX Runtime runs in integers.

    TensorRT demands INT8 with zero point 0. ONNX Runtime has an integer kernel for a Conv only if its input and
    output are of one type, and drops a Relu only if the quantisation cuts off the same values, which takes UINT8.

    - Zero point 128 and the same scale: the same values as in INT8. For everything that may be negative.
    - Relu: zero point 0 and the same scale. The codes 0..127 are as they were, and what is larger is no longer clipped.
    - Clip from 0 to a constant (ReLU6): zero point 0. ONNX Runtime drops it only if 255 steps are not more than that
      constant. So its 255 steps reach as far as INT8's 127: the largest value stays, the steps are half as long.

    Between integer Convs ONNX Runtime puts channels last, up to the input if the first Conv is one of them. The front's
    mean and deviation by channel would then be read over rows of three values, which took longer than all of a small
    detector. So they are repeated along the width.
    """
    import numpy as np
    import onnx
    from onnx import TensorProto, numpy_helper

    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    makers = {name: node for node in copied.graph.node for name in node.output}
    constants = constants_of(copied)
    for node in copied.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in constants:
            continue
        scale, zero = (constants[name] for name in node.input[1:3])
        if zero.data_type != TensorProto.INT8 or any(zero.raw_data):
            continue
        maker = makers.get(node.input[0])
        from_zero = maker is not None and starts_at_zero(maker, constants)
        zero.CopyFrom(numpy_helper.from_array(np.array(0 if from_zero else 128, np.uint8), zero.name))
        if from_zero and maker is not None and maker.op_type == "Clip":
            largest = numpy_helper.to_array(scale) * np.float32(_LARGEST["int8"])
            steps = np.nextafter(largest, np.float32(0)) / np.float32(255)  # never a rounding above the Clip's end
            scale.CopyFrom(numpy_helper.from_array(steps.astype(np.float32), scale.name))
    for name in FRONT_CONSTANTS:
        if name in constants:
            value = numpy_helper.to_array(constants[name])
            width = copied.graph.input[0].type.tensor_type.shape.dim[2].dim_value
            wide = np.broadcast_to(value, (*value.shape[:-1], width))
            constants[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(wide), name))
    return copied


def starts_at_zero(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether an activation's values begin at 0, where UINT8 with zero point 0 cuts them off as well."""
    from onnx import numpy_helper

    if node.op_type == "Clip" and len(node.input) > 1 and node.input[1] in constants:
        return bool(numpy_helper.to_array(constants[node.input[1]]) == 0)
    return node.op_type == "Relu"


def constants_of(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Initializers and the values of Constant nodes, by name."""
    nodes = [node for node in model.graph.node if node.op_type == "Constant"]
    values = {
        node.output[0]: attribute.t for node in nodes for attribute in node.attribute if attribute.name == "value"
    }
    return values | {constant.name: constant for constant in model.graph.initializer}


def _insert(model: onnx.ModelProto, pairs: Mapping[str, list[onnx.NodeProto]], left: Collection[str]) -> None:
    """Puts each pair behind its tensor and lets every reader of the tensor read the pair (in place).

    The Convs `left` go on reading the tensor itself: what is left out is computed from unrounded inputs. A tensor that
    is an output of the graph keeps its name behind the pair.
    """
    nodes = model.graph.node
    outputs = {output.name for output in model.graph.output}

    def exact(node: onnx.NodeProto) -> bool:
        return node.op_type == "Conv" and node.name in left

    for node in nodes:
        if not exact(node):
            node.input[:] = [f"{name}/dq" if name in pairs else name for name in node.input]
    for name in outputs & pairs.keys():
        quantise, dequantise = pairs[name]
        for node in nodes:
            node.output[:] = [f"{name}/raw" if output == name else output for output in node.output]
            unpaired = f"{name}/raw" if exact(node) else name
            node.input[:] = [unpaired if read in (name, f"{name}/dq") else read for read in node.input]
        quantise.input[0], dequantise.output[0] = f"{name}/raw", name
    for pair in pairs.values():
        nodes.extend(pair)
    read = {name for node in nodes for name in node.input}
    kept = [constant for constant in model.graph.initializer if constant.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    precision.sort(model)


def served_name(model: onnx.ModelProto, name: str) -> str:
    """The name that a source's tensor has once the contract's front is attached."""
    return PLANES if name == model.graph.input[0].name else name


def readers_of(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers
