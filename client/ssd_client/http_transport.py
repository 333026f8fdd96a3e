"""HTTP connections: http.client for the blocking transport, aiohttp for asyncio.

The connections belong to no thread, unlike those of tritonclient's gevent client. A deadline holds for a whole request,
however slowly its answer comes, and no answer is read beyond `MAX_ANSWER`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ctypes
import http.client
import io
import socket
import threading
import time
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from .config import MAX_ANSWER
from .endpoint import Endpoint
from .messages import HEADER_SIZE, HttpAnswer, Message, http_answer

_PART = 1 << 20  # bytes read at once


class HttpTransport:
    """Kept-alive connections, one per request in flight. Safe from several threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._address = endpoint.addresses[0]
        self._context = endpoint.tls.context() if endpoint.tls else None
        self._headers = dict(endpoint.headers)
        self._root = ""  # before the path: a proxy wants the whole URL
        self._proxy = urlsplit(endpoint.proxy) if endpoint.proxy else None
        if self._proxy is not None and self._context is None:
            self._root = f"http://{self._address}"
            self._headers.update(_proxy_headers(self._proxy))
        self._idle: list[Any] = []  # of http.client, with a `_Link` for a socket
        self._lock = threading.Lock()

    @property
    def connected(self) -> bool:
        return bool(self._idle)

    def send(self, message: Message, timeout: float) -> HttpAnswer:
        deadline = time.monotonic() + timeout
        method, _, path = message.target.partition(" ")
        with self._lock:
            connection = self._idle.pop() if self._idle else self._connection()
        try:
            if connection.sock is None:
                connection.timeout = timeout
                connection.connect()
                link: Any = connection.sock
                connection.sock = _Link(link)
            connection.sock.deadline = deadline
            connection.request(method, self._root + path, message.body, {**self._headers, **message.headers})
            response = connection.getresponse()
            body = self._read(response)
        except TimeoutError:
            connection.close()
            raise self._endpoint.timed_out(timeout) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            connection.close()
            self.close()  # those that wait are as old as the server that is gone
            raise self._endpoint.unavailable(str(error) or type(error).__name__) from None
        except BaseException:
            connection.close()
            raise
        if not response.will_close:
            with self._lock:
                self._idle.append(connection)
        return http_answer(self._endpoint, response.status, response.getheader(HEADER_SIZE), body)

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def abandon(self) -> None:
        """Closing a socket here leaves it open in the process that this one was forked from."""
        self._lock = threading.Lock()  # another thread may have held it
        self.close()

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        parts, size = [], 0
        if (response.length or 0) > MAX_ANSWER:
            raise _too_large(self._endpoint)
        while part := response.read1(_PART):
            parts.append(part)
            size += len(part)
            if size > MAX_ANSWER:
                raise _too_large(self._endpoint)
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
        response.close()
        return b"".join(parts)

    def _connection(self) -> Any:
        host, port = self._address, None
        if self._proxy is not None:
            host, port = str(self._proxy.hostname), self._proxy.port or 80
        if self._context is None:
            return http.client.HTTPConnection(host, port)
        connection = http.client.HTTPSConnection(host, port, context=self._context)
        if self._proxy is not None:
            target, _, port_there = self._address.rpartition(":")
            connection.set_tunnel(target.strip("[]"), int(port_there), _proxy_headers(self._proxy))
        return connection


class _Link(io.RawIOBase):
    """A connected socket for http.client, on which nothing waits beyond the request's deadline.

    A socket's own timeout starts again with every byte that comes.
    """

    def __init__(self, link: socket.socket) -> None:
        self._link, self.deadline = link, 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._link.settimeout(self._left())
        return self._link.recv_into(buffer)

    def sendall(self, data: bytes) -> None:
        self._link.settimeout(self._left())
        self._link.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        """What http.client reads an answer from; closing it leaves the connection open."""
        return io.BufferedReader(_Reading(self), 1 << 16)

    def close(self) -> None:
        self._link.close()
        super().close()

    def _left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class _Reading(io.RawIOBase):
    """One answer's view on a link."""

    def __init__(self, link: _Link) -> None:
        self._link = link

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._link.readinto(buffer)


class AsyncHttpTransport:
    """An aiohttp session of the running event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        import aiohttp

        self._endpoint, self._aiohttp = endpoint, aiohttp
        self._base = f"{'https' if endpoint.tls else 'http'}://{endpoint.addresses[0]}"
        context = endpoint.tls.context() if endpoint.tls else True
        self._connector = aiohttp.TCPConnector(limit=0, ssl=context)
        # An answer that was compressed may be a few bytes that fill the memory.
        headers = {"Accept-Encoding": "identity", **dict(endpoint.headers)}
        self._session = aiohttp.ClientSession(connector=self._connector, headers=headers, auto_decompress=False)

    async def send(self, message: Message, timeout: float) -> HttpAnswer:
        from yarl import URL

        method, _, path = message.target.partition(" ")
        try:
            async with self._session.request(
                method,
                URL(self._base + path, encoded=True),
                data=message.body,
                headers=message.headers,
                timeout=self._aiohttp.ClientTimeout(total=timeout),
                allow_redirects=False,
                proxy=self._endpoint.proxy,
            ) as response:
                body = await self._read(response)
        except (asyncio.TimeoutError, TimeoutError):  # two types before Python 3.11
            raise self._endpoint.timed_out(timeout) from None
        except (self._aiohttp.ClientError, OSError, ValueError) as error:
            raise self._endpoint.unavailable(str(error) or type(error).__name__) from None
        return http_answer(self._endpoint, response.status, response.headers.get(HEADER_SIZE), body)

    async def _read(self, response: Any) -> bytes:
        parts, size = [], response.content_length or 0
        if size > MAX_ANSWER:
            response.close()
            raise _too_large(self._endpoint)
        size = 0
        async for part in response.content.iter_any():
            parts.append(part)
            size += len(part)
            if size > MAX_ANSWER:
                response.close()
                raise _too_large(self._endpoint)
        return b"".join(parts)

    async def close(self) -> None:
        await self._session.close()

    def drop(self) -> None:
        self._session.detach()
        with contextlib.suppress(Exception):  # it is done at once: there is no loop any more to await it in
            self._connector.close().send(None)

    def abandon(self) -> None:
        """Touch nothing: the loop's list of sockets is shared with the process that this one was forked from."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._session))


def _too_large(endpoint: Endpoint) -> Exception:
    return endpoint.broken(f"it is larger than the limit of {MAX_ANSWER / 1e6:.0f} MB")


def _proxy_headers(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    secret = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"}
