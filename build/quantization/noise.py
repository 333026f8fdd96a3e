"""Quantisation noise in the raw heads, where something is detected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from build import contract
from build.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from build.session import Runner


def heads(run: Runner, pictures: Sequence[NDArray[np.uint8]]) -> dict[str, NDArray[np.float32]]:
    """The raw heads on all pictures: [pictures,N,4] and [pictures,N,C].

    Args:
        run: a graph before SSDNMS.
        pictures: UINT8 [1,H,W,3] each.
    """
    import numpy as np

    answers = [run({contract.IMAGES: pixels}) for pixels in pictures]
    return {name: np.concatenate([answer[name] for answer in answers]).astype(np.float32) for name in contract.HEADS}


def confidence(spec: Spec, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """The best foreground score of each anchor: [pictures,N,1]. Noise matters where something is detected."""
    import numpy as np

    scores: NDArray[np.floating] = logits
    if spec.nms.score_activation == "softmax":
        exponents = np.exp(logits - logits.max(-1, keepdims=True))
        scores = exponents / exponents.sum(-1, keepdims=True)
    elif spec.nms.score_activation == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    if spec.nms.background_class >= 0:
        scores = np.delete(scores, spec.nms.background_class, axis=-1)
    return np.asarray(scores.max(-1, keepdims=True), np.float32)


def sqnr(
    exact: Mapping[str, NDArray[np.float32]], heads: Mapping[str, NDArray[np.float32]], weights: NDArray[np.float32]
) -> float:
    """10·log10 of signal over quantisation noise, weighted by anchor; both heads' shares of noise are added."""
    import numpy as np

    share = 0.0
    for name, right in exact.items():
        signal = float((weights * np.square(right, dtype=np.float64)).sum())
        noise = float((weights * np.square(heads[name].astype(np.float64) - right)).sum())
        share += noise / max(signal, 1e-30)
    return -10 * float(np.log10(max(share, 1e-12)))
