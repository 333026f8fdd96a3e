"""`SSDClient` and `AsyncSSDClient`: pictures in, detections in the pictures' own pixels out.

`Session` holds the logic of both. The two classes differ only in how they take its steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import warnings
import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig
from .detections import Detections
from .endpoint import TLS, Endpoint
from .exceptions import SSDClientError
from .messages import Message
from .preprocess import MAX_PIXELS, ImageSource, whole
from .session import Send, Session, Step, Steps, Work
from .transport import AsyncTransport, Transport, async_transport_for, transport_for

T = TypeVar("T")
_clients: weakref.WeakSet[_Client] = weakref.WeakSet()


def _begin_in_child() -> None:
    """After a fork: no client may use the connections and the shared memory of the process before."""
    for client in list(_clients):
        client.begin_in_child()


os.register_at_fork(after_in_child=_begin_in_child)


def _as_list(images: Any) -> tuple[list[ImageSource], bool]:
    """The pictures as a list, and whether it was a single picture that came without a list.

    Open files are read, since a picture may be needed more than once.
    """
    single = isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray)) or hasattr(images, "read")
    if single or not isinstance(images, Iterable):
        return [whole(images)], True
    return [whole(image) for image in images], False


def _take(steps: Steps[T], send: Callable[[Message, float], Any]) -> T:
    """Take the steps one after the other in this thread."""
    resume: Callable[[], Step] = partial(next, steps)
    while True:
        try:
            step = resume()
        except StopIteration as stop:
            value: T = stop.value
            return value
        try:
            result: Any = None
            if isinstance(step, Send):
                result = send(step.message, step.timeout)
            elif isinstance(step, Work):
                result = step.function(step.images)
            else:
                time.sleep(step.seconds)
            resume = partial(steps.send, result)
        except BaseException as error:
            resume = partial(steps.throw, error)


async def _take_async(steps: Steps[T], send: Callable[[Message, float], Awaitable[Any]]) -> T:
    """Take the steps one after the other in this task. Work on pixels is done in a thread."""
    resume: Callable[[], Step] = partial(next, steps)
    while True:
        try:
            step = resume()
        except StopIteration as stop:
            value: T = stop.value
            return value
        try:
            result: Any = None
            if isinstance(step, Send):
                result = await send(step.message, step.timeout)
            elif isinstance(step, Work):
                result = await _in_thread(step)
            else:
                await asyncio.sleep(step.seconds)
            resume = partial(steps.send, result)
        except BaseException as error:
            resume = partial(steps.throw, error)


async def _in_thread(step: Work) -> Any:
    """Work in a thread. When cancelled, wait for it: it writes to memory that the next request will use."""
    work = asyncio.ensure_future(asyncio.to_thread(step.function, step.images))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with contextlib.suppress(asyncio.CancelledError):  # once more does not end the thread either
                await asyncio.wait([work])
        raise


def _abandon(session: Session, transports: Sequence[Transport] | None) -> None:
    """Release what a client that was never closed still holds. Opens no connection and raises nothing.

    Shared memory has no name in /dev/shm any more, and its mapping here goes with the session. The server keeps its own
    mapping unless a blocking client's connection is still open to tell it.

    Args:
        session: of the client.
        transports: of a blocking client; None for asyncio, whose transports belong to event loops and go with them.
    """

    def send_if_connected(message: Message, timeout: float) -> Any:
        for transport in transports or ():
            if transport.connected:
                return transport.send(message, timeout)
        raise session.endpoint.unavailable("no connection is open")

    if os.getpid() != session.process:
        return
    with contextlib.suppress(Exception):
        _take(session.close(), send_if_connected)
    for transport in transports or ():
        with contextlib.suppress(Exception):
            transport.close()
    warnings.warn(f"the client of {session.endpoint} was never closed", ResourceWarning, stacklevel=2)


class _Client:
    """What both clients are made of."""

    _finalizer: Any

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        model: str,
        protocol: Literal["grpc", "http"] | None = None,
        shared_memory: Literal["system"] | None = None,
        timeout: float = 30.0,
        retries: int = 3,
        ssl: TLS | None = None,
        max_in_flight: int = 4,
        max_pixels: int = MAX_PIXELS,
        headers: Mapping[str, str] | None = None,
        try_timeout: float | None = None,
    ) -> None:
        self._settings = {name: value for name, value in locals().items() if name != "self"}
        endpoint = Endpoint.parse(url, protocol, model, ssl, headers)
        self._session = Session(endpoint, shared_memory, timeout, retries, max_in_flight, max_pixels, try_timeout)
        self._set_up()
        self._watch()
        _clients.add(self)

    def _set_up(self) -> None:
        """Have no connection and no lock yet."""
        raise NotImplementedError

    def _watch(self) -> None:
        """Have what is left open released when this client is dropped."""
        raise NotImplementedError

    def _transports(self) -> Iterable[Transport | AsyncTransport]:
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, here or in a process that was spawned, has these settings and connections of its own."""
        return partial(type(self), **self._settings), ()

    def begin_in_child(self) -> None:
        """After a fork: leave everything to the process before, and begin anew when this client is used here."""
        if self._finalizer is not None:
            self._finalizer.detach()
        for transport in self._transports():
            transport.abandon()
        self._session.start()
        self._set_up()


class SSDClient(_Client):
    """A blocking client of one model. Safe from several threads; a context manager.

    Args:
        url: `host:port` of the server; the port is 8001 for gRPC and 8000 for HTTP unless given. Also
            `https://host/prefix`, `unix:/path`, and for several servers `dns:///name:port` or a list of `host:port`,
            which gRPC asks in turn.
        model: the model's name on the server.
        protocol: `grpc` or `http`; None = `http` for URLs that begin with http, else `grpc`.
        shared_memory: `system` hands pictures over in shared memory, for a server on this machine; None sends them.
        timeout: seconds for one request, with its retries.
        retries: how often a request is repeated while the server is unavailable, with growing pauses, and after
            `try_timeout`.
        ssl: encrypt; None = do not.
        max_in_flight: how many requests `detect` has on the way at once for a list of pictures.
        max_pixels: refuse picture files that decode to more pixels than this, and decode no more than this at once.
        headers: sent with every request, such as {"Authorization": "Bearer ..."}; with gRPC as metadata.
        try_timeout: seconds for one try; None = `timeout`, or with several servers its part for each try.

    A client that was made before a fork can be used in both processes: each has connections of its own. So has a copy,
    by `copy` or `pickle` (spawned processes, Ray, Dask); a pickled client holds its `headers`.

    Raises:
        InvalidInputError: an argument is wrong. Nothing is sent before the first call.
    """

    def _set_up(self) -> None:
        self._lock = Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._open: list[Transport] = []  # none or one, which the finaliser sees
        self._finalizer: Any = None

    def model_config(self, *, refresh: bool = False) -> ModelConfig:
        """The model's configuration. It is requested once, and again with `refresh`.

        Raises:
            ModelNotFoundError: the server does not have the model.
            ModelConfigError: the model does not obey this client's contract.
            ServerUnavailableError: no server answers.
            RequestTimeoutError: the answer did not come within `timeout`.
        """
        return _take(self._session.config(refresh), self._send)

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
        return _take(self._session.infer(images, score_threshold, iou_threshold), self._send)

    def close(self) -> None:
        """Wait for the requests in flight and release everything. May be called twice."""
        with self._lock:
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(cancel_futures=True)
        if self._finalizer is not None:
            self._finalizer.detach()
        try:
            _take(self._session.close(), self._send)
        finally:
            for transport in self._open:
                transport.close()
            self._open.clear()

    def __enter__(self) -> SSDClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _detect(
        self, sources: list[ImageSource], score: float | None, iou: float | None, first: int | None
    ) -> list[Detections]:
        return _take(self._session.detect(sources, score, iou, first), self._send)

    def _send(self, message: Message, timeout: float) -> Any:
        with self._lock:
            if not self._open:
                self._open.append(transport_for(self._session.endpoint))
                self._watch()
            transport = self._open[0]
        return transport.send(message, timeout)

    def _watch(self) -> None:
        if self._finalizer is None:
            self._finalizer = weakref.finalize(self, _abandon, self._session, self._open)

    def _transports(self) -> Iterable[Transport]:
        return self._open

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self._session.max_in_flight, "ssd_client")
            return self._threads


class AsyncSSDClient(_Client):
    """`SSDClient` for asyncio: the same arguments, methods and errors, with `async with` and `await`.

    It may be used in several event loops, one after the other or at once: each has connections of its own.
    """

    def _set_up(self) -> None:
        self._lock = Lock()
        self._loops: dict[asyncio.AbstractEventLoop, AsyncTransport] = {}
        self._finalizer = None

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
        with self._lock:
            loops, self._loops = self._loops, {}
        if self._session.has_regions and asyncio.get_running_loop() not in loops:
            loops[asyncio.get_running_loop()] = async_transport_for(self._session.endpoint)
        transport = loops.pop(asyncio.get_running_loop(), None)
        try:
            if transport is not None:
                await _take_async(self._session.close(), transport.send)
        finally:
            self._session.closed = True
            if self._finalizer is not None:
                self._finalizer.detach()
            if transport is not None:
                await transport.close()
            for loop, other in loops.items():
                if loop.is_running():  # in another thread
                    asyncio.run_coroutine_threadsafe(other.close(), loop)
                else:
                    other.drop()

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
        loop = asyncio.get_running_loop()
        with self._lock:
            if loop not in self._loops:
                for ended in [each for each in self._loops if each.is_closed()]:
                    self._loops.pop(ended).drop()
                self._loops[loop] = async_transport_for(self._session.endpoint)
                self._watch()
            return self._loops[loop]

    def _watch(self) -> None:
        if self._finalizer is None:
            self._finalizer = weakref.finalize(self, _abandon, self._session, None)

    def _transports(self) -> Iterable[AsyncTransport]:
        return self._loops.values()
