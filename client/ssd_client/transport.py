"""What carries messages: the two kinds of transport, blocking and asyncio, and the choice among them."""

from __future__ import annotations

from typing import Any, Protocol

from .endpoint import TLS as TLS  # re-exported: they were here, and others import them from here
from .endpoint import Endpoint as Endpoint
from .messages import Message


class Transport(Protocol):
    """Carries a message and its answer; every failure is an SSDClientError."""

    @property
    def connected(self) -> bool:
        """Whether a connection is open that the next message can use."""
        ...

    def send(self, message: Message, timeout: float) -> Any: ...

    def close(self) -> None: ...

    def abandon(self) -> None:
        """Leave the connections to the process that this one was forked from."""
        ...


class AsyncTransport(Protocol):
    """`Transport` for asyncio."""

    async def send(self, message: Message, timeout: float) -> Any: ...

    async def close(self) -> None: ...

    def drop(self) -> None:
        """Let go of the connections of an event loop that is closed."""
        ...

    def abandon(self) -> None: ...


def transport_for(endpoint: Endpoint) -> Transport:
    from . import grpc_transport, http_transport

    if endpoint.protocol == "grpc":
        return grpc_transport.GrpcTransport(endpoint)
    return http_transport.HttpTransport(endpoint)


def async_transport_for(endpoint: Endpoint) -> AsyncTransport:
    from . import grpc_transport, http_transport

    if endpoint.protocol == "grpc":
        return grpc_transport.AsyncGrpcTransport(endpoint)
    return http_transport.AsyncHttpTransport(endpoint)
