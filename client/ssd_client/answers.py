"""Everything that a server says is checked here, once: what does not keep the contract is an `SSDClientError`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig
from .endpoint import Endpoint
from .exceptions import InferenceError, SSDClientError

T = TypeVar("T")
_DTYPES = {"INT32": np.int32, "FP32": np.float32}


@dataclass(frozen=True)
class Tensor:
    """An output as the server sent it.

    Attributes:
        name: of the output.
        datatype: Triton's name of the type.
        shape: as stated.
        content: its bytes.
    """

    name: str
    datatype: str
    shape: Sequence[int]
    content: bytes | memoryview


@dataclass(frozen=True)
class Answer:
    """The answer to an inference request.

    Attributes:
        version: of the model that computed it; empty if the server does not say.
        tensors: the outputs.
    """

    version: str
    tensors: Sequence[Tensor]


def checked(endpoint: Endpoint, read: Callable[[Any], T], answer: Any) -> T:
    """Read an answer; whatever its content makes the reader raise is an error of the server.

    Raises:
        SSDClientError: what `read` raises on purpose, or InferenceError.
    """
    try:
        return read(answer)
    except SSDClientError:
        raise
    except Exception as error:  # RecursionError, ValueError, OverflowError, MemoryError ...: the content decides
        raise endpoint.broken(f"{type(error).__name__}: {error!s:.300}") from None


def outputs(endpoint: Endpoint, config: ModelConfig, batch: int, answer: Answer) -> dict[str, NDArray[Any]]:
    """The four outputs as read-only views on the answer, after every check.

    Names, types, shapes and sizes must be the contract's. Counts must fit, boxes and scores be finite, scores fall, and
    classes have a label.

    Args:
        endpoint: for the messages.
        config: of the version that answered.
        batch: images in the request.
        answer: of the server.

    Returns:
        num_detections INT32 [B,1], detection_boxes FP32 [B,K,4], detection_scores FP32 [B,K], detection_classes
        INT32 [B,K].

    Raises:
        InferenceError: something does not hold.
    """
    most = config.max_detections
    promised = {
        "num_detections": ("INT32", [batch, 1]),
        "detection_boxes": ("FP32", [batch, most, 4]),
        "detection_scores": ("FP32", [batch, most]),
        "detection_classes": ("INT32", [batch, most]),
    }
    said = {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in answer.tensors}
    if said != promised or len(answer.tensors) != len(promised):
        raise InferenceError(
            f"model {endpoint.model!r} answered {str(said)[:600]}, its configuration promises {promised}",
            why="the model breaks its own configuration",
            fix="check its labels, max_detections and outputs, and publish it again",
        )
    arrays: dict[str, NDArray[Any]] = {}
    for tensor in answer.tensors:
        datatype, shape = promised[tensor.name]
        dtype = np.dtype(_DTYPES[datatype])
        if len(tensor.content) != math.prod(shape) * dtype.itemsize:
            raise endpoint.broken(f"output {tensor.name!r} is {datatype}{shape} in {len(tensor.content)} bytes")
        arrays[tensor.name] = np.frombuffer(tensor.content, dtype).reshape(shape)
    fault = _fault(config, *(arrays[name] for name in promised))
    if fault:
        raise InferenceError(
            f"model {endpoint.model!r} answered {fault}", fix="check its labels and weights, and publish it again"
        )
    return {name: arrays[name] for name in promised}


def _fault(
    config: ModelConfig,
    counts: NDArray[np.int32],
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    classes: NDArray[np.int32],
) -> str:
    """What is wrong with the values of an answer; empty if nothing is."""
    most = scores.shape[1]
    if counts.min() < 0 or counts.max() > most:
        return f"{counts.ravel()[:20].tolist()} detections a picture; it has room for {most}"
    valid = np.arange(most) < counts
    named = (classes >= 0) & (classes < len(config.labels)) | ~valid
    falling = scores[:, 1:] <= scores[:, :-1]
    # Nearly always all of it is right, also behind the last detection, where it does not matter.
    if np.isfinite(boxes).all() and np.isfinite(scores).all() and falling.all() and named.all():
        return ""
    if not np.isfinite(boxes[valid]).all():
        return f"boxes that are not finite: {boxes[valid][~np.isfinite(boxes[valid]).all(axis=-1)][0].tolist()}"
    if not np.isfinite(scores[valid]).all():
        return f"scores that are not finite: {scores[valid][:20].tolist()}"
    if not falling[valid[:, 1:]].all():
        return f"scores that are not in falling order: {scores[0, :20].tolist()}"
    if not named.all():
        return f"detections of classes {np.unique(classes[valid])[:20].tolist()}; it has {len(config.labels)} labels"
    return ""
