"""A Caffe detector (deploy.prototxt and .caffemodel) → ONNX, for the layers that SSDs are made of.

PriorBox and DetectionOutput become nodes of the same names with the layer's settings as attributes: ONNX has no such
operators. `families_with_nms.caffe` reads anchors and thresholds from them. Everything else becomes standard operators.

Why not a package: caffe2onnx (last release 2021) pins onnx 1.6, which has no wheel for Python 3.10 and later. Caffe
itself does not change any more, so this file need not change with it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import ImportModelError

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

OPSET = 17

# The fields of caffe.proto (https://github.com/weiliu89/caffe, branch ssd) that decide what these layers compute:
# name=number:type, then * if it is repeated, or its default. A,B,C is an enumeration with its default first. Only the
# text file's enumerations are used: text has no numbers for them. Files may hold other fields; those are passed over.
_MESSAGES = {
    "Net": "input=3:string* input_dim=4:int32* input_shape=8:Shape* layer=100:Layer*",
    "Shape": "dim=1:int64*",
    "Blob": "num=1:int32 channels=2:int32 height=3:int32 width=4:int32 data=5:float* shape=7:Shape "
    "double_data=8:double*",
    "Layer": "name=1:string type=2:string bottom=3:string* top=4:string* blobs=7:Blob* concat_param=104:Concat "
    "convolution_param=106:Convolution eltwise_param=110:Eltwise pooling_param=121:Pooling relu_param=123:ReLU "
    "softmax_param=125:Softmax reshape_param=133:Reshape flatten_param=135:Flatten batch_norm_param=139:BatchNorm "
    "scale_param=142:Scale input_param=143:Input permute_param=202:Permute prior_box_param=203:PriorBox "
    "detection_output_param=204:DetectionOutput norm_param=206:Normalize",
    "BatchNorm": "eps=3:float:1e-05",
    "Concat": "concat_dim=1:uint32:1 axis=2:int32:1",
    "Convolution": "pad=3:uint32* kernel_size=4:uint32* group=5:uint32:1 stride=6:uint32* pad_h=9:uint32 "
    "pad_w=10:uint32 stride_h=13:uint32 stride_w=14:uint32 dilation=18:uint32*",
    "DetectionOutput": "num_classes=1:uint32 share_location=2:bool:true background_label_id=3:int32:0 "
    "nms_param=4:Suppression code_type=6:CORNER,CENTER_SIZE,CORNER_SIZE keep_top_k=7:int32:-1 "
    "variance_encoded_in_target=8:bool confidence_threshold=9:float",
    "Eltwise": "operation=1:SUM,MAX,PROD coeff=2:float*",
    "Flatten": "axis=1:int32:1 end_axis=2:int32:-1",
    "Input": "shape=1:Shape*",
    "Normalize": "across_spatial=1:bool:true channel_shared=3:bool:true",
    "Permute": "order=1:uint32*",
    "Pooling": "pool=1:MAX,AVE,STOCHASTIC kernel_size=2:uint32 stride=3:uint32 pad=4:uint32 kernel_h=5:uint32 "
    "kernel_w=6:uint32 stride_h=7:uint32 stride_w=8:uint32 pad_h=9:uint32 pad_w=10:uint32 global_pooling=12:bool "
    "round_mode=13:CEIL,FLOOR",
    "PriorBox": "min_size=1:float* max_size=2:float* aspect_ratio=3:float* flip=4:bool:true clip=5:bool "
    "variance=6:float* img_size=7:uint32 img_h=8:uint32 img_w=9:uint32 step=10:float "
    "step_h=11:float step_w=12:float offset=13:float:0.5",
    "ReLU": "negative_slope=1:float",
    "Reshape": "shape=1:Shape axis=2:int32:0 num_axes=3:int32:-1",
    "Scale": "axis=1:int32:1 num_axes=2:int32:1",
    "Softmax": "axis=2:int32:1",
    "Suppression": "nms_threshold=1:float:0.3 top_k=2:int32:-1 eta=3:float:1",
}


@functools.cache
def _net() -> Any:
    """The protobuf class of a whole network, as text or with weights."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package="caffe", syntax="proto2")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields.split():
            key, number, kind, default = re.fullmatch(r"(\w+)=(\d+):([\w,]+\*?):?(\S*)", field).groups()  # type: ignore[union-attr]
            entry = message.field.add(name=key, number=int(number), label=kinds.LABEL_OPTIONAL)
            if kind.endswith("*"):
                entry.label, kind = kinds.LABEL_REPEATED, kind[:-1]
            if "," in kind:
                values = message.enum_type.add(name=key.capitalize())
                for index, value in enumerate(kind.split(",")):
                    values.value.add(name=value, number=index)
                entry.type, entry.type_name = kinds.TYPE_ENUM, f".caffe.{name}.{values.name}"
            elif kind in _MESSAGES:
                entry.type, entry.type_name = kinds.TYPE_MESSAGE, f".caffe.{kind}"
            else:
                entry.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
            if default:
                entry.default_value = default
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("caffe.Net"))


def convert(prototxt: Path, caffemodel: Path) -> onnx.ModelProto:
    """The network as ONNX. Tensors have the names of Caffe's blobs, or of the layer that writes over one.

    Args:
        prototxt: the network's layers (a deploy.prototxt: without layers for training).
        caffemodel: their weights.

    Raises:
        ImportModelError: a file cannot be read, or has a layer that SSDs do not have.
    """
    from google.protobuf import text_format
    from google.protobuf.message import DecodeError

    try:
        net = text_format.Parse(prototxt.read_bytes(), _net()(), allow_unknown_field=True)
        trained = _net().FromString(caffemodel.read_bytes())
    except OSError as error:
        raise ImportModelError(f"{error.filename}: cannot be read: {error.strerror}", fix="correct the path") from None
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise ImportModelError(f"{prototxt}: no prototxt: {error}", fix="give the network's deploy.prototxt") from None
    except DecodeError as error:
        raise ImportModelError(
            f"{caffemodel}: no weights of Caffe: {error}", why="the file is truncated or of another kind"
        ) from None
    if not net.layer:
        raise ImportModelError(
            f"{prototxt}: has no `layer`",
            why="it is empty, or from before 2014 (`layers`)",
            fix="upgrade it with Caffe",
        )
    graph = _Graph(prototxt, {layer.name: layer.blobs for layer in trained.layer})
    sizes = [shape.dim for shape in net.input_shape] or [
        net.input_dim[i : i + 4] for i in range(0, len(net.input_dim), 4)
    ]
    for name, size in zip(net.input, sizes, strict=False):
        graph.input(name, size)
    for layer in net.layer:
        write = _LAYERS.get(layer.type)
        if write is None:
            raise graph.refused(layer, f"only these types of layers are converted: {', '.join(_LAYERS)}")
        for blob in layer.bottom:
            if blob not in graph.now:
                raise graph.refused(layer, f"no layer before it writes {blob!r}")
        write(graph, layer)
    return graph.model()


class _Graph:
    """What is converted so far.

    Attributes:
        now: Caffe's blob → the tensor that holds it now: a layer may write over its input, an ONNX node may not.
        constants: by tensor.
        nodes: in their order.
    """

    def __init__(self, path: Path, blobs: dict[str, Any]) -> None:
        self.path, self.blobs = path, blobs
        self.now: dict[str, str] = {}
        self.constants: dict[str, NDArray[Any]] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: dict[str, list[int]] = {}

    def refused(self, layer: Any, why: str) -> ImportModelError:
        return ImportModelError(
            f"{self.path}: layer {layer.name!r} of the type {layer.type} cannot be converted", why=why
        )

    def input(self, name: str, size: Any) -> None:
        self.inputs[name], self.now[name] = list(size), name

    def weights(self, layer: Any, at_least: int) -> list[NDArray[np.float32]]:
        import numpy as np

        blobs = self.blobs.get(layer.name, [])
        if len(blobs) < at_least:
            raise self.refused(layer, f"the .caffemodel has {len(blobs)} arrays for it, but it needs {at_least}")
        arrays = []
        for blob in blobs:
            legacy = [blob.num, blob.channels, blob.height, blob.width]  # files from before 2015
            shape = list(blob.shape.dim) or (legacy if any(legacy) else [-1])
            try:
                arrays.append(np.array(blob.data or blob.double_data, np.float32).reshape(shape))
            except ValueError as error:
                raise self.refused(layer, f"its weights in the .caffemodel are damaged: {error}") from None
        return arrays

    def add(
        self, operator: str, layer: Any, *constants: NDArray[Any], reads: Sequence[str] = (), **attributes: Any
    ) -> None:
        """A node that reads blobs (default: the layer's), then the constants, and writes the layer's blob."""
        from onnx import helper

        read = [self.now[blob] for blob in reads or layer.bottom]
        taken = {*self.inputs, *(name for node in self.nodes for name in node.output)}
        written = next(name for name in (layer.top[0], layer.name, f"{layer.name}/{operator}") if name not in taken)
        for index, array in enumerate(constants):
            read.append(f"{written}/{operator}.{index}")
            self.constants[read[-1]] = array
        named = any(node.name == layer.name for node in self.nodes)
        stated = {key: value for key, value in attributes.items() if value != []}  # ONNX has no empty lists
        self.nodes.append(
            helper.make_node(operator, read, [written], f"{layer.name}/{operator}" if named else layer.name, **stated)
        )
        self.now[layer.top[0]] = written

    def model(self) -> onnx.ModelProto:
        from onnx import TensorProto, helper, numpy_helper

        read = {name for node in self.nodes for name in node.input}
        sizes: dict[str, list[int | str | None]] = {"DetectionOutput": [1, 1, "detections", 7]}  # OpenCV asks for it
        ends = [(name, sizes.get(node.op_type)) for node in self.nodes for name in node.output if name not in read]
        graph = helper.make_graph(
            self.nodes,
            "caffe",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in self.inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in ends],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        return helper.make_model(
            graph, producer_name="caffe", opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8
        )


# -- one function for each type of layer ------------------------------------------------------------------------------


def _enumerated(options: Any, field: str) -> str:
    """The name of an enumeration's value."""
    return str(options.DESCRIPTOR.fields_by_name[field].enum_type.values_by_number[getattr(options, field)].name)


def _pair(values: Any, height: int, width: int, default: int) -> list[int]:
    """Two numbers, height first, from Caffe's three ways to write them."""
    if height or width:
        return [height, width]
    listed = [values] if isinstance(values, int) else list(values)
    return [listed[0] or default, listed[-1] or default] if listed else [default] * 2


def _input(graph: _Graph, layer: Any) -> None:
    for name, shape in zip(layer.top, layer.input_param.shape, strict=False):
        graph.input(name, shape.dim)


def _same(graph: _Graph, layer: Any) -> None:
    for name in layer.top:
        graph.now[name] = graph.now[layer.bottom[0]]


def _convolution(graph: _Graph, layer: Any) -> None:
    options = layer.convolution_param
    weights = graph.weights(layer, 1)
    pads = _pair(options.pad, options.pad_h, options.pad_w, 0)
    graph.add(
        "Conv",
        layer,
        *(weights[:1] + [bias.reshape(-1) for bias in weights[1:2]]),
        kernel_shape=list(weights[0].shape[2:]),
        pads=pads * 2,
        strides=_pair(options.stride, options.stride_h, options.stride_w, 1),
        dilations=_pair(options.dilation, 0, 0, 1),
        group=options.group,
    )


def _batch_norm(graph: _Graph, layer: Any) -> None:
    import numpy as np

    mean, variance, scale = (array.reshape(-1) for array in graph.weights(layer, 3)[:3])
    factor = np.float32(1 / scale[0] if scale[0] else 0)
    ones, zeros = np.ones_like(mean), np.zeros_like(mean)
    graph.add(
        "BatchNormalization", layer, ones, zeros, mean * factor, variance * factor, epsilon=layer.batch_norm_param.eps
    )


def _scale(graph: _Graph, layer: Any) -> None:
    import numpy as np

    options = layer.scale_param
    if len(layer.bottom) != 1 or options.axis != 1 or options.num_axes != 1:
        raise graph.refused(layer, "it does not scale channels by weights of its own")
    weights = [array.reshape(-1) for array in graph.weights(layer, 1)]
    scale, bias = weights[0], weights[1] if len(weights) > 1 else np.zeros_like(weights[0])
    last = graph.nodes[-1:]
    if (
        layer.top == layer.bottom
        and last
        and last[0].op_type == "BatchNormalization"
        and last[0].output[0] == graph.now[layer.top[0]]
    ):
        graph.constants[last[0].input[1]], graph.constants[last[0].input[2]] = scale, bias
        return
    graph.add("Mul", layer, scale.reshape(1, -1, 1, 1))
    graph.add("Add", layer, bias.reshape(1, -1, 1, 1), reads=layer.top[:1])


def _relu(graph: _Graph, layer: Any) -> None:
    slope = layer.relu_param.negative_slope
    graph.add("LeakyRelu", layer, alpha=slope) if slope else graph.add("Relu", layer)


def _pooling(graph: _Graph, layer: Any) -> None:
    options = layer.pooling_param
    kind = {"MAX": "Max", "AVE": "Average"}.get(_enumerated(options, "pool"))
    if kind is None:
        raise graph.refused(layer, "it pools neither maximum nor average")
    if options.global_pooling:
        graph.add(f"Global{kind}Pool", layer)
        return
    more: dict[str, Any] = {"count_include_pad": 1} if kind == "Average" else {}
    graph.add(
        f"{kind}Pool",
        layer,
        kernel_shape=_pair(options.kernel_size, options.kernel_h, options.kernel_w, 1),
        pads=_pair(options.pad, options.pad_h, options.pad_w, 0) * 2,
        strides=_pair(options.stride, options.stride_h, options.stride_w, 1),
        ceil_mode=int(_enumerated(options, "round_mode") == "CEIL"),
        **more,
    )


def _eltwise(graph: _Graph, layer: Any) -> None:
    options = layer.eltwise_param
    if len(layer.bottom) != 2 or any(coefficient != 1 for coefficient in options.coeff):
        raise graph.refused(layer, "it has other than two inputs, or weighs them (coeff)")
    graph.add({"SUM": "Add", "MAX": "Max", "PROD": "Mul"}[_enumerated(options, "operation")], layer)


def _normalize(graph: _Graph, layer: Any) -> None:
    if layer.norm_param.across_spatial:
        raise graph.refused(layer, "it normalises over rows and columns (across_spatial)")
    (scale,) = graph.weights(layer, 1)
    graph.add("LpNormalization", layer, axis=1, p=2)
    graph.add("Mul", layer, scale.reshape(1, -1, 1, 1), reads=layer.top[:1])


def _reshape(graph: _Graph, layer: Any) -> None:
    import numpy as np

    options = layer.reshape_param
    if options.axis != 0 or options.num_axes != -1:
        raise graph.refused(layer, "it reshapes some of the axes only")
    graph.add("Reshape", layer, np.array(options.shape.dim, np.int64))


def _flatten(graph: _Graph, layer: Any) -> None:
    if layer.flatten_param.axis != 1 or layer.flatten_param.end_axis != -1:
        raise graph.refused(layer, "it keeps other axes than the first")
    graph.add("Flatten", layer, axis=1)


def _prior_box(graph: _Graph, layer: Any) -> None:
    options = layer.prior_box_param
    graph.add(
        "PriorBox",
        layer,
        reads=layer.bottom[:1],  # of the second, the picture, only the size matters
        min_sizes=list(options.min_size),
        max_sizes=list(options.max_size),
        aspect_ratios=list(options.aspect_ratio),
        flip=int(options.flip),
        clip=int(options.clip),
        variances=list(options.variance) or [0.1],
        img_sizes=_pair(options.img_size, options.img_h, options.img_w, 0),
        steps=[options.step_h or options.step, options.step_w or options.step],
        offset=options.offset,
    )


def _detection_output(graph: _Graph, layer: Any) -> None:
    options = layer.detection_output_param
    graph.add(
        "DetectionOutput",
        layer,
        num_classes=options.num_classes,
        share_location=int(options.share_location),
        background_label_id=options.background_label_id,
        nms_threshold=options.nms_param.nms_threshold,
        top_k=options.nms_param.top_k,
        eta=options.nms_param.eta,
        code_type=("CORNER", "CENTER_SIZE", "CORNER_SIZE").index(_enumerated(options, "code_type")) + 1,
        variance_encoded_in_target=int(options.variance_encoded_in_target),
        keep_top_k=options.keep_top_k,
        confidence_threshold=options.confidence_threshold,
    )


def _concat(graph: _Graph, layer: Any) -> None:
    options = layer.concat_param
    graph.add("Concat", layer, axis=options.concat_dim if options.HasField("concat_dim") else options.axis)


_LAYERS: Mapping[str, Callable[[_Graph, Any], None]] = {
    "BatchNorm": _batch_norm,
    "Concat": _concat,
    "Convolution": _convolution,
    "DetectionOutput": _detection_output,
    "Dropout": _same,
    "Eltwise": _eltwise,
    "Flatten": _flatten,
    "Input": _input,
    "Normalize": _normalize,
    "Permute": lambda graph, layer: graph.add("Transpose", layer, perm=list(layer.permute_param.order)),
    "Pooling": _pooling,
    "PriorBox": _prior_box,
    "ReLU": _relu,
    "Reshape": _reshape,
    "Scale": _scale,
    "Softmax": lambda graph, layer: graph.add("Softmax", layer, axis=layer.softmax_param.axis),
    "Split": _same,
}
