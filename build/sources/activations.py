"""Which activation made scores, found out by asking the graph: Softmax and Sigmoid nodes, or the same spelt out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from build.sources.decoding import NETWORK
from build.sources.reading import parts_of, three

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from build.sources.editor import Editor
    from build.sources.front import Front

_CLOSE = 1e-5
_DEEPEST = 40  # tensors back from the scores


@dataclass(frozen=True)
class Activation:
    """What stands between logits and scores.

    Attributes:
        kind: softmax or sigmoid.
        logits: [B,N,columns].
        columns: C of the logits: one more than the scores have where the export cuts the background off.
        source: the tensor of the graph that the logits are.
    """

    kind: str
    logits: ir.Value
    columns: int
    source: ir.Value


def find_activation(editor: Editor, front: Front, scores: ir.Value, count: int, wide: int) -> Activation | None:
    """The activation that gives exactly these scores; None where there is none that SSDNMS has.

    Args:
        editor: the graph.
        front: its input.
        scores: [B,N,C].
        count: N.
        wide: C.
    """
    import numpy as np

    candidates = editor.ancestors(scores, until=NETWORK)[1:_DEEPEST]
    values = editor.measure(front.example(), [scores, *candidates])
    activated = values[0].reshape(-1, count, wide)
    if not ((activated >= 0).all() and (activated <= 1).all()):
        return None
    for candidate, array in zip(candidates, values[1:], strict=True):
        if array.dtype.kind != "f":
            continue
        for cut in (0, 1):  # exports cut the background off behind the activation
            if math.prod(array.shape) != count * (wide + cut):
                continue
            turned = array.ndim == 3 and array.shape[1:] == (wide + cut, count) and array.shape[2] != wide + cut
            rows = array.transpose(0, 2, 1) if turned else array.reshape(-1, count, wide + cut)
            for kind in ("softmax", "sigmoid"):
                if wide + cut == 1 and kind == "softmax":
                    continue
                if np.abs(activate(rows, kind)[..., cut:] - activated).max() < _CLOSE:
                    read = three(editor, candidate, array.shape, wide + cut, count)
                    if read is not None:
                        return Activation(kind, read[0], wide + cut, candidate)
    return None


def is_activated(scores: ir.Value) -> bool:
    """Whether every part of the scores comes straight from a Softmax or Sigmoid node."""
    producers = [part.producer() for part in parts_of(scores)]
    return all(node is not None and node.op_type in ("Softmax", "Sigmoid", "HardSigmoid") for node in producers)


def activate(logits: NDArray[np.floating], kind: str) -> NDArray[np.float64]:
    """Softmax over the last axis, or the sigmoid, in FP64."""
    import numpy as np

    values = logits.astype(np.float64)
    if kind == "sigmoid":
        return np.asarray(np.exp(-np.logaddexp(0, -values)))
    powers = np.exp(values - values.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))
