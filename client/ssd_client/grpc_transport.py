"""gRPC channels with tritonclient's stubs, blocking and asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import os
import socket
import threading
import time
from typing import Any, NamedTuple

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


_CAREFUL = 10.0  # seconds after a deadline
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


class _Lane(NamedTuple):
    """A channel and its stub: to all addresses, or to `address` alone."""

    channel: Any
    stub: Any
    address: str = ""


class GrpcTransport:
    """A gRPC channel. Safe from several threads.

    With several addresses it is gRPC's round robin, which knows dead servers and not those that hang. So for some
    seconds after a deadline the addresses are asked one by one, those last that let a deadline pass.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        import grpc  # type: ignore[import-untyped]

        self._endpoint, self._error = endpoint, grpc.RpcError
        self._metadata = endpoint.headers or None
        self._all = _lane(endpoint)
        self._each: dict[str, _Lane] = {}
        self._slow: dict[str, float] = {}  # address -> when it is trusted again
        self._careful_until, self._turn = 0.0, 0
        self._lock = threading.Lock()
        self.connected = False  # as far as the last message tells

    def send(self, message: Message, timeout: float) -> Any:
        lane = self._pick()
        _gate.enter()
        try:
            answer = getattr(lane.stub, message.target)(message.body, timeout=timeout, metadata=self._metadata)
            self.connected = True
            return answer
        except self._error as error:
            raise self._failed(error, timeout, lane) from None
        except ValueError as error:  # the channel was closed meanwhile
            raise self._endpoint.unavailable(str(error)) from None
        finally:
            _gate.leave()

    def begin(self, message: Message, timeout: float) -> tuple[Any, _Lane]:
        """Send the message; gRPC's future of its answer, and the lane for `result`."""
        lane = self._pick()
        _gate.enter()
        try:
            call = getattr(lane.stub, message.target).future(message.body, timeout=timeout, metadata=self._metadata)
            call.add_done_callback(lambda _: _gate.leave())
            return call, lane
        except ValueError as error:  # the channel was closed meanwhile
            _gate.leave()
            raise self._endpoint.unavailable(str(error)) from None

    def result(self, call: Any, lane: _Lane, timeout: float) -> Any:
        """The answer of a call that is done."""
        try:
            return call.result()
        except self._error as error:
            raise self._failed(error, timeout, lane) from None

    def close(self) -> None:
        for lane in (self._all, *self._each.values()):
            lane.channel.close()

    def abandon(self) -> None:
        """Never delete a channel: that would end the connection of the process that this one was forked from."""
        for lane in (self._all, *self._each.values()):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(lane))

    def _pick(self) -> _Lane:
        addresses = self._endpoint.addresses
        if len(addresses) == 1 or time.monotonic() >= self._careful_until:
            return self._all
        with self._lock:
            self._turn += 1
            first, now = self._turn % len(addresses), time.monotonic()
            in_turn = addresses[first:] + addresses[:first]
            address = min(in_turn, key=lambda each: max(self._slow.get(each, now), now))
            if address not in self._each:
                self._each[address] = _lane(dataclasses.replace(self._endpoint, addresses=(address,)), address)
            return self._each[address]

    def _failed(self, error: Any, timeout: float, lane: _Lane) -> SSDClientError:
        code, details = error.code().name, error.details() or error.code().name
        self.connected = code != "UNAVAILABLE"
        if code == "DEADLINE_EXCEEDED" or (code == "UNAVAILABLE" and lane.address):
            self._careful_until = self._slow[lane.address] = time.monotonic() + _CAREFUL
        if "all addresses" in details and lane is self._all and len(self._endpoint.addresses) > 1:
            with contextlib.suppress(SSDClientError):  # their names may mean other numbers by now
                self._all = _lane(self._endpoint)
        if code == "DEADLINE_EXCEEDED":
            return self._endpoint.timed_out(timeout)
        if code == "RESOURCE_EXHAUSTED" and "larger than max" in details:
            return self._endpoint.broken(details)
        return self._endpoint.refused(code, details)


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

        call, lane = self._inner.begin(message, timeout)
        call.add_done_callback(tell)
        try:
            await done
        except asyncio.CancelledError:
            call.cancel()
            raise
        return self._inner.result(call, lane, timeout)

    async def close(self) -> None:
        self._inner.close()

    def drop(self) -> None:
        self._inner.close()

    def abandon(self) -> None:
        self._inner.abandon()


def _lane(endpoint: Endpoint, address: str = "") -> _Lane:
    import grpc
    from tritonclient.grpc import service_pb2_grpc

    options = [*_OPTIONS, ("grpc.enable_http_proxy", int(endpoint.proxy is not None))]
    target = endpoint.addresses[0]
    if endpoint.is_balanced:
        options.append(("grpc.lb_policy_name", "round_robin"))
    if len(endpoint.addresses) > 1:
        target = _target(endpoint)
        host = endpoint.addresses[0].rpartition(":")[0]
        options += [("grpc.default_authority", endpoint.addresses[0]), ("grpc.ssl_target_name_override", host)]
    if endpoint.tls is None:
        channel = grpc.insecure_channel(target, options=options)
    else:
        root, key, chain = endpoint.tls.read()
        channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(root, key, chain), options=options)
    return _Lane(channel, service_pb2_grpc.GRPCInferenceServiceStub(channel), address)


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
