"""The first look at an attached graph: it runs, and its heads and outputs are what its spec says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from build import contract
from build.errors import GraphError
from build.graph.attach import before_nms
from build.session import runner
from build.spec import Spec

if TYPE_CHECKING:
    import onnx

    from build.session import Arrays

_ROWS = 2


def self_check(model: onnx.ModelProto, spec: Spec) -> None:
    """Runs the graph in ONNX Runtime: heads and outputs have the contract's shapes, types and values in range.

    Args:
        model: the graph, in types that ONNX Runtime has kernels for.
        spec: what it was made from.

    Raises:
        GraphError: it does not run, or answers something else.
    """
    import numpy as np

    def run(part: onnx.ModelProto, feeds: Arrays) -> Arrays:
        try:
            return runner(part)(feeds)
        except Exception as error:  # ONNX Runtime's own exceptions have no common type
            raise GraphError(f"{spec.onnx_path}: ONNX Runtime cannot run it: {error}") from error

    size = (_ROWS, spec.input.height, spec.input.width, 3)
    images = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    heads = run(before_nms(model), {contract.IMAGES: images})
    count = len(spec.load_anchors()) if spec.nms.needs_anchors else heads[contract.HEADS[1]].shape[1]
    for name, last in zip(contract.HEADS, (4, spec.classes), strict=True):
        shape, wanted = heads[name].shape, (_ROWS, count, last)
        if shape != wanted:
            raise GraphError(
                f"{spec.onnx_path}: {name} has the shape {list(shape)}, but must have {list(wanted)}",
                why="anchors.npy or labels.txt belong to another model",
            )
    outputs = run(model, spec.nms.feeds(images))
    for tensor in spec.outputs:
        array, shape = outputs[tensor.name], (_ROWS, *tensor.shape)
        if array.shape != shape or array.dtype != tensor.dtype:
            raise GraphError(
                f"{spec.onnx_path}: {tensor.name} is {array.dtype}{list(array.shape)}, not {tensor.dtype}{list(shape)}"
            )
    number, _, scores, classes = (outputs[name] for name in contract.OUTPUTS)
    disordered = (np.diff(scores, axis=1) > 0).any()
    if number.max() > spec.nms.max_detections or classes.max() >= len(spec.labels) or disordered:
        raise GraphError(f"{spec.onnx_path}: its detections are not in order, or more or other ones than there can be")
