"""`SSDClient` and `AsyncSSDClient`: pictures in, detections in the pictures' own pixels out.

`_Session` holds the logic of both, as generators. A generator yields the steps that a client has to take: send a
message, sleep, work on pixels. The two classes differ only in how they take these steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import time
import warnings
import weakref
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Lock
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig
from .detections import Detections
from .exceptions import (
    ImageError,
    InferenceError,
    InvalidInputError,
    ModelNotReadyError,
    RequestTimeoutError,
    ServerUnavailableError,
    SharedMemoryError,
    SSDClientError,
)
from .preprocess import MAX_PIXELS, ImageSource, Placement, load_image, preprocess
from .shared_memory import Region, RegionPool
from .transport import (
    TLS,
    AsyncTransport,
    Endpoint,
    Input,
    Message,
    Transport,
    async_transport_for,
    codec_for,
    transport_for,
)

Arrays: TypeAlias = "dict[str, NDArray[Any]]"
_OUTPUTS = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")
_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.1, 2.0  # seconds
_CLOSE_TIMEOUT = 2.0  # seconds for making the server let go of shared memory

T = TypeVar("T")


@dataclass(frozen=True)
class _Send:
    message: Message
    timeout: float


@dataclass(frozen=True)
class _Sleep:
    seconds: float


@dataclass(frozen=True)
class _Work:
    function: Callable[[NDArray[np.uint8]], Any]
    images: NDArray[np.uint8]


_Steps: TypeAlias = "Generator[_Send | _Sleep | _Work, Any, T]"


class _Session:
    """Everything that both clients do, without I/O."""

    def __init__(
        self,
        endpoint: Endpoint,
        shared_memory: str | None,
        timeout: float,
        retries: int,
        max_in_flight: int,
        max_pixels: int,
    ) -> None:
        if shared_memory not in (None, "system"):
            raise InvalidInputError(f"shared_memory is {shared_memory!r}", fix="give None or 'system'")
        if not 0 < timeout < math.inf:
            raise InvalidInputError(f"timeout is {timeout!r}", fix="give seconds, more than 0")
        if retries < 0 or max_in_flight < 1 or max_pixels < 1:
            raise InvalidInputError(
                f"retries is {retries}, max_in_flight {max_in_flight}, max_pixels {max_pixels}",
                fix="give retries of at least 0, and at least 1 for the others",
            )
        self.endpoint = endpoint
        self.max_in_flight = max_in_flight
        self.closed = False
        self._codec = codec_for(endpoint)
        self._shared = shared_memory is not None
        self._timeout, self._retries, self._max_pixels = timeout, retries, max_pixels
        self._config: ModelConfig | None = None
        self._regions = RegionPool()
        self.process = os.getpid()

    def config(self, refresh: bool = False) -> _Steps[ModelConfig]:
        """The model's configuration, asked for once."""
        if self._config is None or refresh:
            self._config = self._codec.read_config((yield from self._call(self._codec.config())))
        return self._config

    def infer(
        self,
        images: NDArray[np.uint8],
        score_threshold: NDArray[np.float32] | float | None,
        iou_threshold: NDArray[np.float32] | float | None,
    ) -> _Steps[Arrays]:
        config = yield from self.config()
        row = (config.input_height, config.input_width, 3)
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != row:
            got = f"{images.dtype}{list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
            raise InvalidInputError(
                f"images is {got}, model {config.name!r} takes uint8[batch, {row[0]}, {row[1]}, 3]",
                fix="see preprocess.input_array, or let detect() do it",
            )
        if not 1 <= len(images) <= config.max_batch_size:
            raise InvalidInputError(
                f"the batch has {len(images)} images, model {config.name!r} takes 1 to {config.max_batch_size}",
                fix="send it in parts; detect() does",
            )
        thresholds = _threshold_inputs(config, len(images), score_threshold, iou_threshold)
        if not self._shared:
            return (yield from self._request(images, None, thresholds))

        def fill(out: NDArray[np.uint8]) -> None:
            out[...] = images

        outputs, _ = yield from self._infer_filled(images.shape, fill, thresholds)
        return outputs

    def detect(
        self,
        sources: Sequence[ImageSource],
        score_threshold: float | None,
        iou_threshold: float | None,
        first: int | None,
    ) -> _Steps[list[Detections]]:
        """One request's worth of pictures; `first` is the number of the first one in the caller's list."""
        config = yield from self.config()
        keep_above = None
        if not config.runtime_thresholds:
            keep_above, score_threshold = _fixed_thresholds(config, score_threshold, iou_threshold), None
            iou_threshold = None
        thresholds = _threshold_inputs(config, len(sources), score_threshold, iou_threshold)

        def fill(out: NDArray[np.uint8]) -> list[Placement]:
            return [self._prepare(source, config, out, k, first) for k, source in enumerate(sources)]

        shape = (len(sources), config.input_height, config.input_width, 3)
        outputs, placements = yield from self._infer_filled(shape, fill, thresholds, heavy=True)
        return [
            _detections(config, outputs, k, placement, source, keep_above)
            for k, (placement, source) in enumerate(zip(placements, sources, strict=True))
        ]

    def split(self, count: int, config: ModelConfig) -> list[slice]:
        """Requests for `count` pictures: none above the model's batch, and enough to keep `max_in_flight` busy."""
        size = min(config.max_batch_size, math.ceil(count / self.max_in_flight))
        return [slice(start, start + size) for start in range(0, count, size)]

    def close(self) -> _Steps[None]:
        """Make the server let go of the shared memory. The transport is closed by its owner."""
        self.closed = True
        if os.getpid() != self.process:  # a fork must not take its parent's regions away
            return
        deadline = time.monotonic() + _CLOSE_TIMEOUT
        regions = self._regions.clear()
        for region in regions:
            region.hide()
        for region in regions:
            while True:
                try:
                    yield _Send(self._codec.unregister(region.name), _CLOSE_TIMEOUT)
                    break
                except (ServerUnavailableError, RequestTimeoutError):
                    return  # without a server there are no mappings
                except SSDClientError:  # the server still works on a request that was given up
                    if time.monotonic() > deadline:
                        break
                    yield _Sleep(_FIRST_BACKOFF)

    def _prepare(
        self, source: ImageSource, config: ModelConfig, out: NDArray[np.uint8], k: int, first: int | None
    ) -> Placement:
        try:
            return preprocess(load_image(source, max_pixels=self._max_pixels), config.preprocessing, out[k])
        except ImageError as error:
            if first is None:
                raise
            raise ImageError(f"picture {first + k} of the list: {error}") from error

    def _infer_filled(
        self,
        shape: tuple[int, ...],
        fill: Callable[[NDArray[np.uint8]], T],
        thresholds: Sequence[Input],
        heavy: bool = False,
    ) -> _Steps[tuple[Arrays, T]]:
        """Let `fill` write the images to where they are sent from, and send them."""
        if not self._shared:
            images = np.empty(shape, np.uint8)
            filled: T = (yield _Work(fill, images)) if heavy else fill(images)
            return (yield from self._request(images, None, thresholds)), filled
        for last in (False, True):
            region = yield from self._region(math.prod(shape), fresh=last)
            known = True
            try:
                images = region.images(shape)
                filled = (yield _Work(fill, images)) if heavy else fill(images)
                return (yield from self._request(images, region.name, thresholds)), filled
            except SharedMemoryError:
                known = False  # a server that was started again does not know the regions of its predecessor
                self._regions.forget(region)
                if last:
                    raise
            finally:
                if known:
                    self._regions.give_back(region)
        raise AssertionError("unreachable")

    def _request(self, images: NDArray[np.uint8], region: str | None, thresholds: Sequence[Input]) -> _Steps[Arrays]:
        answer = yield from self._call(self._codec.infer([Input("images", images, region), *thresholds]))
        outputs = self._codec.read_outputs(answer)
        batch, most = len(images), self._config.max_detections if self._config else 0
        shapes = dict(zip(_OUTPUTS, ((batch, 1), (batch, most, 4), (batch, most), (batch, most)), strict=True))
        if {name: array.shape for name, array in outputs.items()} != shapes:
            raise InferenceError(
                f"model {self.endpoint.model!r} answered { ({name: array.shape for name, array in outputs.items()}) }, "
                f"its configuration promises {shapes}",
                why="the model was replaced since its configuration was read",
                fix="read it again: model_config(refresh=True)",
            )
        return outputs

    def _region(self, byte_size: int, fresh: bool) -> _Steps[Region]:
        """A region of at least this size that is registered with the server. With `fresh` it is a new one."""
        region = None if fresh else self._regions.take()
        if region is not None:
            if region.byte_size >= byte_size:
                return region
            with contextlib.suppress(SSDClientError):  # in use by a request that was given up: close() sees to it
                yield _Send(self._codec.unregister(region.name), self._timeout)
                self._regions.forget(region)
        region = Region(byte_size)
        # Before it is registered: a task that is cancelled in between does not know whether it was.
        self._regions.add(region)
        try:
            yield from self._call(self._codec.register(region.name, region.key, byte_size))
        except (InferenceError, InvalidInputError, SharedMemoryError) as error:
            self._regions.forget(region)
            if isinstance(error, SharedMemoryError):
                raise
            raise SharedMemoryError(  # the wording of some versions names no region
                f"the server at {self.endpoint} does not take shared memory: {error}",
                why="Triton 2.68 and newer must be started with --allow-client-shm=true",
                fix="start it accordingly, or use shared_memory=None",
            ) from error
        finally:
            region.hide()
        return region

    def _call(self, message: Message) -> _Steps[Any]:
        """Send, and send again while the server is away and there is time; inference may be repeated without harm."""
        if self.closed:
            raise SSDClientError("the client is closed", fix="make a new one")
        deadline = time.monotonic() + self._timeout
        for attempt in range(self._retries + 1):
            try:
                return (yield _Send(message, max(deadline - time.monotonic(), 0.001)))
            except (ServerUnavailableError, ModelNotReadyError):
                backoff = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2**attempt) * random.uniform(0.5, 1.0)
                if attempt == self._retries or time.monotonic() + backoff >= deadline:
                    raise
                yield _Sleep(backoff)
        raise AssertionError("unreachable")


def _threshold_inputs(config: ModelConfig, batch: int, score: Any, iou: Any) -> list[Input]:
    """The inputs FP32 [batch,1] of a model with run-time thresholds; none for any other."""
    inputs = []
    for name, given, default in (
        ("score_threshold", score, config.score_threshold),
        ("iou_threshold", iou, config.iou_threshold),
    ):
        if not config.runtime_thresholds:
            if given is not None:
                raise InvalidInputError(
                    f"{name} is given, but model {config.name!r} has its thresholds built in",
                    fix="leave it out, or build the model with runtime_thresholds = true",
                )
            continue
        values = np.asarray(default if given is None else given)
        if values.dtype.kind not in "iuf" or values.shape not in ((), (batch, 1)):
            raise InvalidInputError(
                f"{name} is {values.dtype}{list(values.shape)}", fix=f"give a number, or float32[{batch}, 1]"
            )
        if not ((values >= 0) & (values <= 1)).all():  # false for NaN, too
            raise InvalidInputError(f"{name} is {values.tolist()}", fix="give numbers in 0..1")
        inputs.append(Input(name, np.ascontiguousarray(np.broadcast_to(values.astype(np.float32), (batch, 1)))))
    return inputs


def _fixed_thresholds(config: ModelConfig, score: Any, iou: Any) -> float | None:
    """What a model with built-in thresholds can still do: drop what lies below a higher score.

    That is exact: a better box is never suppressed by a worse one.
    """
    for name, given in (("score_threshold", score), ("iou_threshold", iou)):
        if given is not None and not 0 <= given <= 1:
            raise InvalidInputError(f"{name} is {given!r}", fix="give a number in 0..1")
    if (iou is not None and iou != config.iou_threshold) or (score is not None and score < config.score_threshold):
        raise InvalidInputError(
            f"score_threshold {score}, iou_threshold {iou}: model {config.name!r} has {config.score_threshold} and "
            f"{config.iou_threshold} built in",
            fix="leave them out, give a higher score_threshold, or build the model with runtime_thresholds = true",
        )
    return None if score is None else float(score)


def _detections(
    config: ModelConfig,
    outputs: Arrays,
    row: int,
    placement: Placement,
    source: ImageSource,
    keep_above: float | None,
) -> Detections:
    count, boxes, scores, classes = (outputs[name][row] for name in _OUTPUTS)
    number = int(count[0])
    if not 0 <= number <= len(scores) or not ((classes[:number] >= 0) & (classes[:number] < len(config.labels))).all():
        raise InferenceError(
            f"model {config.name!r} answered {number} detections of classes {classes[: max(number, 0)].tolist()}; "
            f"it has room for {len(scores)} and {len(config.labels)} labels",
            fix="check that its labels belong to its weights, and publish it again",
        )
    if keep_above is not None:
        number = int((scores[:number] > keep_above).sum())  # best first
    ids = classes[:number].astype(np.int32)
    return Detections(
        boxes=placement.to_image(boxes[:number]),
        scores=scores[:number].astype(np.float32),
        class_ids=ids,
        labels=tuple(config.labels[k] for k in ids.tolist()),
        image_size=placement.image_size,
        source=source,
    )


def _as_list(images: Any) -> tuple[list[ImageSource], bool]:
    """The pictures as a list, and whether it was a single picture that came without a list."""
    if isinstance(images, Iterable) and not isinstance(
        images, (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray)
    ):
        return list(images), False
    return [images], True


def _take(steps: _Steps[T], send: Callable[[Message, float], Any]) -> T:
    """Take the steps one after the other in this thread."""
    resume: Callable[[], _Send | _Sleep | _Work] = partial(next, steps)
    while True:
        try:
            step = resume()
        except StopIteration as stop:
            value: T = stop.value
            return value
        try:
            result: Any = None
            if isinstance(step, _Send):
                result = send(step.message, step.timeout)
            elif isinstance(step, _Work):
                result = step.function(step.images)
            else:
                time.sleep(step.seconds)
            resume = partial(steps.send, result)
        except BaseException as error:
            resume = partial(steps.throw, error)


async def _take_async(steps: _Steps[T], send: Callable[[Message, float], Awaitable[Any]]) -> T:
    """Take the steps one after the other in this task. Work on pixels is done in a thread."""
    resume: Callable[[], _Send | _Sleep | _Work] = partial(next, steps)
    while True:
        try:
            step = resume()
        except StopIteration as stop:
            value: T = stop.value
            return value
        try:
            result: Any = None
            if isinstance(step, _Send):
                result = await send(step.message, step.timeout)
            elif isinstance(step, _Work):
                result = await _in_thread(step)
            else:
                await asyncio.sleep(step.seconds)
            resume = partial(steps.send, result)
        except BaseException as error:
            resume = partial(steps.throw, error)


async def _in_thread(step: _Work) -> Any:
    """Work in a thread. When cancelled, wait for it: it writes to memory that the next request will use."""
    work = asyncio.ensure_future(asyncio.to_thread(step.function, step.images))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with contextlib.suppress(asyncio.CancelledError):  # once more does not end the thread either
                await asyncio.wait([work])
        raise


def _abandon(session: _Session, transport: Transport | None) -> None:
    """Release what a client that was never closed still holds. Opens no connection and raises nothing.

    Shared memory has no name in /dev/shm any more, and its mapping here goes with the session. The server keeps its own
    mapping unless a blocking client's connection is still open to tell it.

    Args:
        session: of the client.
        transport: of a blocking client; None for asyncio, whose transport belongs to an event loop and goes with it.
    """

    def send_if_connected(message: Message, timeout: float) -> Any:
        if transport is None or not transport.connected:
            raise session.endpoint.unavailable("no connection is open")
        return transport.send(message, timeout)

    if os.getpid() != session.process:
        return
    with contextlib.suppress(Exception):
        _take(session.close(), send_if_connected)
    with contextlib.suppress(Exception):
        if transport is not None:
            transport.close()
    warnings.warn(f"the client of {session.endpoint} was never closed", ResourceWarning, stacklevel=2)


class _Client:
    """What both clients are made of."""

    def __init__(
        self,
        url: str,
        *,
        model: str,
        protocol: Literal["grpc", "http"] = "grpc",
        shared_memory: Literal["system"] | None = None,
        timeout: float = 30.0,
        retries: int = 3,
        ssl: TLS | None = None,
        max_in_flight: int = 4,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        endpoint = Endpoint.parse(url, protocol, model, ssl)
        self._session = _Session(endpoint, shared_memory, timeout, retries, max_in_flight, max_pixels)
        self._set_up(endpoint)

    def _set_up(self, endpoint: Endpoint) -> None:
        raise NotImplementedError


class SSDClient(_Client):
    """A blocking client of one model. Safe from several threads; a context manager.

    Args:
        url: `host:port` of the server; the port is 8001 for gRPC and 8000 for HTTP unless given.
        model: the model's name on the server.
        protocol: `grpc` or `http`.
        shared_memory: `system` hands pictures over in shared memory, for a server on this machine; None sends them.
        timeout: seconds for one request, with its retries.
        retries: how often a request is repeated while the server is unavailable, with growing pauses.
        ssl: encrypt; None = do not.
        max_in_flight: how many requests `detect` has on the way at once for a list of pictures.
        max_pixels: refuse picture files that decode to more pixels than this.

    Raises:
        InvalidInputError: an argument is wrong. Nothing is sent before the first call.
    """

    def _set_up(self, endpoint: Endpoint) -> None:
        self._transport = transport_for(endpoint)
        self._threads: ThreadPoolExecutor | None = None
        self._lock = Lock()
        self._finalizer = weakref.finalize(self, _abandon, self._session, self._transport)

    def model_config(self, *, refresh: bool = False) -> ModelConfig:
        """The model's configuration. It is requested once, and again with `refresh`.

        Raises:
            ModelNotFoundError: the server does not have the model.
            ModelConfigError: the model does not obey this client's contract.
            ServerUnavailableError: no server answers.
            RequestTimeoutError: the answer did not come within `timeout`.
        """
        return _take(self._session.config(refresh), self._transport.send)

    @overload  # a str is a sequence of str, too: the first match counts
    def detect(  # type: ignore[overload-overlap]
        self, images: ImageSource, *, score_threshold: float | None = None, iou_threshold: float | None = None
    ) -> Detections: ...

    @overload
    def detect(
        self,
        images: Sequence[ImageSource],
        *,
        score_threshold: float | None = None,
        iou_threshold: float | None = None,
    ) -> list[Detections]: ...

    def detect(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        score_threshold: float | None = None,
        iou_threshold: float | None = None,
    ) -> Detections | list[Detections]:
        """Find the objects in one picture, or in each of a list.

        Args:
            images: a path, the bytes of an image file, a Pillow image, UINT8 [H,W,3] (RGB) or [H,W]; or a list.
            score_threshold: keep scores above this, 0..1; None = the model's own.
            iou_threshold: suppress boxes that overlap a better one by more than this, 0..1; None = the model's own.

        Returns:
            One `Detections`, or a list of them in the order of the pictures.

        Raises:
            ImageError: a picture cannot be read; of a list, none is returned.
            InvalidInputError: a threshold is wrong, or built into the model.
            InferenceError: the server failed.
            SharedMemoryError: shared memory cannot be used.
            SSDClientError: all of these, and those of `model_config`.
        """
        sources, single = _as_list(images)
        if single:
            return self._detect(sources, score_threshold, iou_threshold, None)[0]
        if not sources:
            return []
        parts = self._session.split(len(sources), self.model_config())
        if len(parts) == 1:
            return self._detect(sources, score_threshold, iou_threshold, 0)
        threads = self._executor()
        futures = [
            threads.submit(self._detect, sources[part], score_threshold, iou_threshold, part.start) for part in parts
        ]
        try:
            return [detections for future in futures for detections in future.result()]
        finally:
            for future in futures:
                future.cancel()

    def infer(
        self,
        images: NDArray[np.uint8],
        score_threshold: NDArray[np.float32] | float | None = None,
        iou_threshold: NDArray[np.float32] | float | None = None,
    ) -> dict[str, NDArray[Any]]:
        """One request with images that are the model's input already.

        Args:
            images: UINT8 [B,H,W,3] of the model's size and colour order.
            score_threshold: FP32 [B,1] or a number, 0..1; None = the model's own.
            iou_threshold: FP32 [B,1] or a number, 0..1; None = the model's own.

        Returns:
            The outputs bit for bit, read-only: num_detections INT32 [B,1], detection_boxes FP32 [B,K,4] in 0..1 of the
            input, detection_scores FP32 [B,K], detection_classes INT32 [B,K].

        Raises:
            InvalidInputError: a wrong shape, type, batch or threshold.
            SSDClientError: what `detect` raises.
        """
        return _take(self._session.infer(images, score_threshold, iou_threshold), self._transport.send)

    def close(self) -> None:
        """Wait for the requests in flight and release everything. May be called twice."""
        with self._lock:
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(cancel_futures=True)
        if self._finalizer.detach() is not None:
            try:
                _take(self._session.close(), self._transport.send)
            finally:
                self._transport.close()

    def __enter__(self) -> SSDClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _detect(
        self, sources: list[ImageSource], score: float | None, iou: float | None, first: int | None
    ) -> list[Detections]:
        return _take(self._session.detect(sources, score, iou, first), self._transport.send)

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self._session.max_in_flight, "ssd_client")
            return self._threads


class AsyncSSDClient(_Client):
    """`SSDClient` for asyncio: the same arguments, methods and errors, with `async with` and `await`.

    It belongs to the event loop in which it is used first.
    """

    def _set_up(self, endpoint: Endpoint) -> None:
        self._transport: AsyncTransport | None = None
        self._finalizer = weakref.finalize(self, _abandon, self._session, None)

    async def model_config(self, *, refresh: bool = False) -> ModelConfig:
        """See `SSDClient.model_config`."""
        return await _take_async(self._session.config(refresh), self._connected().send)

    @overload  # a str is a sequence of str, too: the first match counts
    async def detect(  # type: ignore[overload-overlap]
        self, images: ImageSource, *, score_threshold: float | None = None, iou_threshold: float | None = None
    ) -> Detections: ...

    @overload
    async def detect(
        self,
        images: Sequence[ImageSource],
        *,
        score_threshold: float | None = None,
        iou_threshold: float | None = None,
    ) -> list[Detections]: ...

    async def detect(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        score_threshold: float | None = None,
        iou_threshold: float | None = None,
    ) -> Detections | list[Detections]:
        """See `SSDClient.detect`."""
        sources, single = _as_list(images)
        if single:
            return (await self._detect(sources, score_threshold, iou_threshold, None))[0]
        if not sources:
            return []
        parts = self._session.split(len(sources), await self.model_config())
        lanes = asyncio.Semaphore(self._session.max_in_flight)

        async def detect_part(part: slice) -> list[Detections]:
            async with lanes:
                return await self._detect(sources[part], score_threshold, iou_threshold, part.start)

        tasks = [asyncio.ensure_future(detect_part(part)) for part in parts]
        try:
            return [detections for part in await asyncio.gather(*tasks) for detections in part]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def infer(
        self,
        images: NDArray[np.uint8],
        score_threshold: NDArray[np.float32] | float | None = None,
        iou_threshold: NDArray[np.float32] | float | None = None,
    ) -> dict[str, NDArray[Any]]:
        """See `SSDClient.infer`."""
        return await _take_async(self._session.infer(images, score_threshold, iou_threshold), self._connected().send)

    async def close(self) -> None:
        """See `SSDClient.close`."""
        transport, self._transport = self._transport, None
        if transport is not None:
            try:
                await _take_async(self._session.close(), transport.send)
            finally:
                await transport.close()
        self._session.closed = True
        self._finalizer.detach()

    async def __aenter__(self) -> AsyncSSDClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _detect(
        self, sources: list[ImageSource], score: float | None, iou: float | None, first: int | None
    ) -> list[Detections]:
        return await _take_async(self._session.detect(sources, score, iou, first), self._connected().send)

    def _connected(self) -> AsyncTransport:
        if self._session.closed:
            raise SSDClientError("the client is closed", fix="make a new one")
        if self._transport is None:
            self._transport = async_transport_for(self._session.endpoint)
        return self._transport
