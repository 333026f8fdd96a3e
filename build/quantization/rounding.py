"""Rounding of weights to INT8 or FP8 by what they are multiplied with, not each to its nearest step.

A filter's output is off by Δw·x for inputs x, on average by the square ΔwᵀHΔw with the second moments H = E[x·xᵀ].
Rounding to the nearest step ignores H: behind a Relu all inputs are positive, and a filter's rounding errors add up. So
the weights of a filter are rounded one after the other, and what one is off by is made up by those that follow:
Frantar, Singh and Alistarh, "Optimal Brain Compression" (NeurIPS 2022), in the order and with the Cholesky factor of
Frantar et al., "GPTQ" (ICLR 2023). The steps stay as they are, so this costs no time when served.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from build import contract
from build.gate import datasets
from build.graph.attach import attach, before_nms
from build.quantization import qdq
from build.session import session
from build.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

PICTURES = 32
POSITIONS = 256  # of a Conv's output, in each picture
_BLOCK = 64  # columns
_DAMPING = 0.01  # of the mean of H's diagonal, as in GPTQ


def rounded(
    spec: Spec, source: onnx.ModelProto, pictures: datasets.Pictures, kind: str
) -> dict[str, NDArray[np.float32]]:
    """The weights of each Conv that can be quantised, on the type's values by output channel, by initializer.

    Args:
        spec: the model.
        source: the folded FP32 model.
        pictures: calibration pictures, of which at most PICTURES are read, spread evenly.
        kind: int8 or fp8.

    Raises:
        DataError: too many of them cannot be read.
    """
    from onnx import numpy_helper

    constants = {constant.name: constant for constant in source.graph.initializer}
    found = {}
    for weights, moments in _moments(spec, source, pictures, kind).items():
        found[weights] = round_by(numpy_helper.to_array(constants[weights]), moments, kind)
    return found


def round_by(weights: NDArray[np.float32], moments: NDArray[np.floating], kind: str = "int8") -> NDArray[np.float32]:
    """Weights on the values of INT8 or FP8 so that the outputs change least for inputs of these moments.

    Args:
        weights: [M, C/G, *kernel]; the scale is by channel (`qdq.weight_scales`).
        moments: [G, K, K] with K = C/G times the kernel's size; times any constant.
        kind: int8 or fp8.
    """
    import numpy as np

    groups, size, _ = moments.shape
    rows = weights.reshape(groups, -1, size).astype(np.float64)
    steps = qdq.weight_scales(weights, kind).reshape(groups, -1).astype(np.float64)
    diagonal = np.einsum("gkk->gk", moments).astype(np.float64)
    damped = moments + np.eye(size) * (_DAMPING * diagonal.mean(1)[:, None, None] + 1e-12)
    order = np.argsort(-np.einsum("gkk->gk", damped), axis=1, kind="stable")
    damped = np.take_along_axis(np.take_along_axis(damped, order[:, :, None], 1), order[:, None, :], 2)
    rows = np.take_along_axis(rows, order[:, None, :], 2)
    # The upper Cholesky factor of the inverse: row k holds how an error in column k is best made up by those behind.
    upper = np.swapaxes(np.linalg.cholesky(np.linalg.inv(damped)), 1, 2)
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        errors = np.empty((*rows.shape[:2], end - start))
        for k in range(start, end):
            exact = rows[:, :, k].copy()
            rows[:, :, k] = qdq.representable(exact / steps, kind) * steps
            errors[:, :, k - start] = (exact - rows[:, :, k]) / upper[:, None, k, k]
            rows[:, :, k + 1 : end] -= errors[:, :, k - start, None] * upper[:, None, k, k + 1 : end]
        rows[:, :, end:] -= errors @ upper[:, start:end, end:]  # the same for what is behind the block, all at once
    back = np.argsort(order, axis=1)
    return np.take_along_axis(rows, back[:, None, :], 2).reshape(weights.shape).astype(np.float32)


def _moments(
    spec: Spec, source: onnx.ModelProto, pictures: datasets.Pictures, kind: str
) -> dict[str, NDArray[np.float32]]:
    """The sum of x·xᵀ over the patches that meet each initializer of weights: FP32 [G, K, K], by its name."""
    import numpy as np
    import onnx

    held = {constant.name: constant for constant in source.graph.initializer}
    convs = qdq.quantisable(source, kind)
    if not convs:
        return {}
    whole = before_nms(attach(spec, source))
    names = sorted({qdq.served_name(source, conv.input[0]) for conv in convs})
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    runs = session(whole)
    rng = np.random.default_rng(0)
    sums: dict[str, NDArray[np.float32]] = {}
    few = pictures.spread(PICTURES)
    for batch in datasets.arrays(few, spec.input, 1):
        values = dict(zip(names, runs.run(names, {contract.IMAGES: batch}), strict=True))
        for conv in convs:
            shape = tuple(held[conv.input[1]].dims)
            x = values[qdq.served_name(source, conv.input[0])][0]
            patches = _patches(conv, x, shape, rng)
            product = patches.transpose(0, 2, 1) @ patches
            sums[conv.input[1]] = sums[conv.input[1]] + product if conv.input[1] in sums else product
    return sums


def _patches(
    conv: onnx.NodeProto, x: NDArray[np.float32], shape: tuple[int, ...], rng: np.random.Generator
) -> NDArray[np.float32]:
    """What a Conv multiplies its weights with, at POSITIONS random places: FP32 [G, P, K]."""
    import numpy as np
    from onnx import helper

    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in conv.attribute}
    kernel = shape[2:]
    rank = len(kernel)
    dilations = attributes.get("dilations", [1] * rank)
    strides = attributes.get("strides", [1] * rank)
    groups = attributes.get("group", 1)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = attributes.get("pads", [0] * (2 * rank))
    automatic = attributes.get("auto_pad", b"NOTSET").decode()
    if automatic.startswith("SAME"):
        total = [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(x.shape[1:], strides, reach, strict=True)]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = [*less, *more] if automatic == "SAME_UPPER" else [*more, *less]
    padded = np.pad(x, [(0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, tuple(range(1, rank + 1)))
    every = [slice(None, None, step) for step in (1, *strides, *dilations)]
    windows = windows[tuple(every)]  # [C, *output, *kernel]
    places = windows.shape[1 : rank + 1]
    count = int(np.prod(places))
    chosen = rng.choice(count, POSITIONS, replace=False) if count > POSITIONS else np.arange(count)
    where: Any = (slice(None), *np.unravel_index(chosen, places))
    taken = windows[where]
    taken = taken.reshape(groups, x.shape[0] // groups, len(chosen), -1)  # [G, C/G, P, kernel]
    return np.ascontiguousarray(taken.transpose(0, 2, 1, 3)).reshape(groups, len(chosen), -1)
