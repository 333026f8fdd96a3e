"""gRPC channels with tritonclient's stubs, blocking and asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import threading
from typing import Any

from .config import MAX_ANSWER
from .endpoint import Endpoint
from .exceptions import SSDClientError
from .messages import Message

_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", MAX_ANSWER),
    # By default a channel does not look again for a second and more after a refused connection, and fails what it is
    # given meanwhile; pauses are the retries' business.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 100),
    # By default channels with equal settings share connections, also with those of the process before a fork.
    ("grpc.use_local_subchannel_pool", 1),
]


_LONGEST_PAUSE = 5.0  # seconds for which a fork waits for requests, and a request for a fork


class _Gate:
    """Keeps requests out of gRPC while this process forks.

    gRPC survives a fork, but not one in the middle of another thread's request: the child then hangs now and then.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside, self._forking = 0, False

    def enter(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: not self._forking, _LONGEST_PAUSE)
            self._inside += 1

    def leave(self) -> None:
        with self._condition:
            self._inside -= 1
            self._condition.notify_all()

    def close(self) -> None:
        """Before a fork: let nothing in, and wait for what is inside, but not for ever."""
        with self._condition:
            self._forking = True
            self._condition.wait_for(lambda: self._inside == 0, _LONGEST_PAUSE)

    def open(self) -> None:
        with self._condition:
            self._forking = False
            self._condition.notify_all()


_gate = _Gate()
# In the child nobody else is inside, and another thread may have held the lock.
os.register_at_fork(before=_gate.close, after_in_parent=_gate.open, after_in_child=_gate.__init__)  # type: ignore[misc]


class GrpcTransport:
    """A gRPC channel. Safe from several threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        import grpc  # type: ignore[import-untyped]
        from tritonclient.grpc import service_pb2_grpc

        self._endpoint, self._error = endpoint, grpc.RpcError
        self._metadata = endpoint.headers or None
        self._channel = _channel(grpc, endpoint)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self.connected = False  # as far as the last message tells

    def send(self, message: Message, timeout: float) -> Any:
        _gate.enter()
        try:
            answer = getattr(self._stub, message.target)(message.body, timeout=timeout, metadata=self._metadata)
            self.connected = True
            return answer
        except self._error as error:
            raise self._failed(error, timeout) from None
        except ValueError as error:  # the channel was closed meanwhile
            raise self._endpoint.unavailable(str(error)) from None
        finally:
            _gate.leave()

    def begin(self, message: Message, timeout: float) -> Any:
        """Send the message; the result is gRPC's future of its answer."""
        _gate.enter()
        try:
            call = getattr(self._stub, message.target).future(message.body, timeout=timeout, metadata=self._metadata)
            call.add_done_callback(lambda _: _gate.leave())
            return call
        except ValueError as error:  # the channel was closed meanwhile
            _gate.leave()
            raise self._endpoint.unavailable(str(error)) from None

    def result(self, call: Any, timeout: float) -> Any:
        """The answer of a call that is done."""
        try:
            return call.result()
        except self._error as error:
            raise self._failed(error, timeout) from None

    def _failed(self, error: Any, timeout: float) -> SSDClientError:
        code, details = error.code().name, error.details() or error.code().name
        self.connected = code != "UNAVAILABLE"
        if code == "DEADLINE_EXCEEDED":
            return self._endpoint.timed_out(timeout)
        if code == "RESOURCE_EXHAUSTED" and "larger than max" in details:
            return self._endpoint.broken(details)
        return self._endpoint.refused(code, details)

    def close(self) -> None:
        self._channel.close()

    def abandon(self) -> None:
        """Never delete the channel: that would end the connection of the process that this one was forked from."""
        for each in (self._channel, self._stub):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))


class AsyncGrpcTransport:
    """The same for asyncio.

    grpc.aio keeps a thread inside of gRPC, so gRPC does not survive a fork; and its channels belong to one event loop.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._inner = GrpcTransport(endpoint)

    async def send(self, message: Message, timeout: float) -> Any:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def finish() -> None:
            if not done.done():
                done.set_result(None)

        def tell(_call: Any) -> None:  # in a thread of gRPC
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(finish)

        call = self._inner.begin(message, timeout)
        call.add_done_callback(tell)
        try:
            await done
        except asyncio.CancelledError:
            call.cancel()
            raise
        return self._inner.result(call, timeout)

    async def close(self) -> None:
        self._inner.close()

    def drop(self) -> None:
        self._inner.close()

    def abandon(self) -> None:
        self._inner.abandon()


def _channel(grpc: Any, endpoint: Endpoint) -> Any:
    options = [*_OPTIONS, ("grpc.enable_http_proxy", int(endpoint.proxy is not None))]
    target = endpoint.addresses[0]
    if endpoint.is_balanced:
        options.append(("grpc.lb_policy_name", "round_robin"))
    if len(endpoint.addresses) > 1:
        target = _target(endpoint)
        host = endpoint.addresses[0].rpartition(":")[0]
        options += [("grpc.default_authority", endpoint.addresses[0]), ("grpc.ssl_target_name_override", host)]
    if endpoint.tls is None:
        return grpc.insecure_channel(target, options=options)
    root, key, chain = endpoint.tls.read()
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(root, key, chain), options=options)


def _target(endpoint: Endpoint) -> str:
    """gRPC's form of several addresses, which takes numbers only: names are resolved here, each to its first number."""
    found = []
    for address in endpoint.addresses:
        host, _, port = address.rpartition(":")
        try:
            family, *_, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise endpoint.unavailable(f"{address}: {error.strerror or error}") from None
        found.append((family, str(place[0]), port))
    if all(family == socket.AF_INET for family, _, _ in found):
        return "ipv4:" + ",".join(f"{number}:{port}" for _, number, port in found)
    mapped = ((number if family == socket.AF_INET6 else f"::ffff:{number}", port) for family, number, port in found)
    return "ipv6:" + ",".join(f"[{number}]:{port}" for number, port in mapped)
