"""Bias correction: what rounding shifts a Conv's output by on average, taken off its bias.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (ICCV 2019), section 4.2, with
the mean measured on calibration pictures. The bias stays in floating point, so this costs no time when served.
"""

from __future__ import annotations

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

PICTURES = 32
_BATCH = 4  # every measured Conv is computed twice
_PREFIX = "quantised/"


def mean_errors(
    spec: Spec, source: onnx.ModelProto, placed: qdq.Placed, pictures: datasets.Pictures
) -> dict[str, NDArray[np.float32]]:
    """How far each quantised Conv's output is off on average: FP32 [output channels], by the Conv's name.

    Every Conv is computed twice from the FP32 network's own activations: as it is, and with its input and weights
    rounded. So an error depends on this Conv alone, and stays right whichever others are left unquantised.

    Args:
        spec: the model.
        source: the folded FP32 model.
        placed: the same with Q/DQ pairs.
        pictures: calibration pictures, of which at most PICTURES are read, spread evenly.

    Raises:
        DataError: too many of them cannot be read.
    """
    import numpy as np
    import onnx

    if not placed.nodes:
        return {}
    whole = before_nms(attach(spec, _beside(source, placed)))
    names = [f"{_PREFIX}{name}/mean" for name in placed.nodes]
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    runs = session(whole)
    sums: list[NDArray[np.float64]] = []
    read = 0
    few = pictures.spread(PICTURES)
    for batch in datasets.arrays(few, spec.input, _BATCH):
        means = [np.asarray(row, np.float64).reshape(len(row), -1).sum(0) for row in runs.run(names, _feeds(batch))]
        sums = means if not sums else [total + mean for total, mean in zip(sums, means, strict=True)]
        read += len(batch)
    return {name: (total / read).astype(np.float32) for name, total in zip(placed.nodes, sums, strict=True)}


def _feeds(batch: NDArray[np.uint8]) -> dict[str, NDArray[np.uint8]]:
    return {contract.IMAGES: batch}


def _beside(source: onnx.ModelProto, placed: qdq.Placed) -> onnx.ModelProto:
    """The FP32 model with, beside each quantised Conv, a rounded one and the mean of their difference by channel."""
    import onnx
    from onnx import helper

    model = onnx.ModelProto()
    model.CopyFrom(source)
    model.opset_import[0].CopyFrom(placed.model.opset_import[0])
    pairs = {node.output[0]: node for node in placed.model.graph.node}
    held = {constant.name for constant in model.graph.initializer}
    model.graph.initializer.extend(each for each in placed.model.graph.initializer if each.name not in held)
    outputs = {conv.name: conv.output[0] for conv in qdq.convs(source)}
    added: dict[str, onnx.NodeProto] = {}
    for conv in qdq.convs(placed.model):
        if conv.name not in placed.nodes:
            continue
        twin = onnx.NodeProto()
        twin.CopyFrom(conv)
        for place, name in enumerate(conv.input[:2]):
            dequantise, quantise = onnx.NodeProto(), onnx.NodeProto()
            dequantise.CopyFrom(pairs[name])
            quantise.CopyFrom(pairs[dequantise.input[0]])
            tensor = quantise.input[0].removesuffix("/raw")
            twin.input[place] = f"{_PREFIX}{tensor}/dq"
            quantise.input[0], quantise.output[0] = tensor, f"{_PREFIX}{tensor}/q"
            dequantise.input[0], dequantise.output[0] = quantise.output[0], twin.input[place]
            for node in (quantise, dequantise):
                node.name = node.output[0]
                added[node.name] = node
        own = f"{_PREFIX}{conv.name}"
        twin.name = twin.output[0] = own
        added[own] = twin
        added[f"{own}/error"] = helper.make_node("Sub", [own, outputs[conv.name]], [f"{own}/error"])
        added[f"{own}/mean"] = helper.make_node("GlobalAveragePool", [f"{own}/error"], [f"{own}/mean"])
    model.graph.node.extend(added.values())
    precision.sort(model)
    return model
