"""The messages of gRPC and HTTP, and the connections that carry them, blocking and asyncio.

A codec turns what the client wants into a `Message` and an answer into values, without any I/O; a transport only
carries messages. The gRPC messages and stubs are tritonclient's; HTTP is KServe v2 with Triton's binary tensors, over
connections that belong to no thread, unlike those of tritonclient's gevent client.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import re
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from .config import ModelConfig
from .exceptions import (
    InferenceError,
    InvalidInputError,
    ModelNotFoundError,
    ModelNotReadyError,
    RequestTimeoutError,
    ServerUnavailableError,
    SharedMemoryError,
    SSDClientError,
)

DEFAULT_PORTS = {"grpc": 8001, "http": 8000}
_DTYPES = {"UINT8": np.uint8, "INT32": np.int32, "FP32": np.float32}
_DATATYPES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_GRPC_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # By default a channel does not look again for a second and more after a refused connection, and fails what it is
    # given meanwhile; pauses are the retries' business.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 100),
]


@dataclass(frozen=True)
class TLS:
    """Encrypt, and check the server's certificate.

    Attributes:
        root_certificates: PEM file with the authorities to trust; None = the system's.
        certificate_chain: PEM file with this client's own certificate, where the server asks for one.
        private_key: PEM file with the key of `certificate_chain`.
    """

    root_certificates: str | Path | None = None
    certificate_chain: str | Path | None = None
    private_key: str | Path | None = None

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """The contents of (root_certificates, private_key, certificate_chain).

        Raises:
            InvalidInputError: a file cannot be read.
        """
        paths = (self.root_certificates, self.private_key, self.certificate_chain)
        try:
            root, key, chain = (Path(path).read_bytes() if path is not None else None for path in paths)
        except OSError as error:
            raise InvalidInputError(f"cannot read the TLS file {error.filename}: {error.strerror}") from None
        return root, key, chain

    def context(self) -> ssl.SSLContext:
        """For HTTPS.

        Raises:
            InvalidInputError: a file cannot be read or is not PEM.
        """
        self.read()
        try:
            context = ssl.create_default_context(cafile=self.root_certificates)
            if self.certificate_chain is not None:
                context.load_cert_chain(self.certificate_chain, self.private_key)
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"the TLS files {self} cannot be used: {error}", fix="give PEM files") from None
        return context


@dataclass(frozen=True)
class Endpoint:
    """Where the model is.

    Attributes:
        url: `host:port`.
        protocol: `grpc` or `http`.
        model: the model's name.
        tls: None = not encrypted.
    """

    url: str
    protocol: str
    model: str
    tls: TLS | None = None

    @classmethod
    def parse(cls, url: str, protocol: str, model: str, tls: TLS | None) -> Endpoint:
        """Check the arguments and fill in the default port.

        Raises:
            InvalidInputError: one of them is wrong.
        """
        if protocol not in DEFAULT_PORTS:
            raise InvalidInputError(f"protocol is {protocol!r}", fix="give 'grpc' or 'http'")
        if not isinstance(model, str) or not model:
            raise InvalidInputError(f"model is {model!r}", fix="give the name of a model on the server")
        match = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+)(?::(\d{1,5}))?", url)
        if match is None or not 0 < int(match[2] or DEFAULT_PORTS[protocol]) < 65536:
            raise InvalidInputError(
                f"url is {url!r}",
                fix=f"give host:port without a scheme, such as localhost:{DEFAULT_PORTS[protocol]}; TLS: ssl=TLS()",
            )
        return cls(f"{match[1]}:{match[2] or DEFAULT_PORTS[protocol]}", protocol, model, tls)

    def __str__(self) -> str:
        return f"{self.url} ({self.protocol}{', TLS' if self.tls else ''})"

    def unavailable(self, reason: str) -> ServerUnavailableError:
        return ServerUnavailableError(
            f"no server answers at {self}: {reason}",
            why="it is not running, just went away, cannot take requests now, or listens on another port or protocol",
            fix="start it, or check url, protocol (gRPC usually 8001, HTTP 8000) and ssl",
        )

    def timed_out(self, seconds: float) -> RequestTimeoutError:
        return RequestTimeoutError(
            f"no answer from {self} within {seconds:.3g} s",
            why="the server is overloaded, or something between here and there drops packets",
            fix="raise timeout, send smaller batches or fewer requests at once",
        )

    def refused(self, code: str, reason: str) -> SSDClientError:
        """The error for an answer that is one; `code` is gRPC's name of it."""
        if "has no available versions" in reason:
            return ModelNotReadyError(
                f"the server at {self} has no version of model {self.model!r} ready: {reason}",
                why="it is being loaded, or did not load",
                fix="wait a moment, and look at the server's log",
            )
        if code in ("UNAVAILABLE", "CANCELLED"):
            return self.unavailable(reason)
        if "shared memory region" in reason:
            return SharedMemoryError(
                f"the server at {self} does not take shared memory: {reason}",
                why="it runs on another machine, in a container with a /dev/shm of its own, as another user, "
                "or it is Triton 2.68 or newer and was started without --allow-client-shm=true",
                fix="start it accordingly (docker run --ipc=host), or use shared_memory=None",
            )
        if code == "NOT_FOUND":
            return ModelNotFoundError(
                f"the server at {self} does not have model {self.model!r}: {reason}",
                why="the name is wrong, or the model was not published or did not load",
                fix=f"look at the server's log, or ask it: POST {self.url}/v2/repository/index (HTTP port)",
            )
        if code == "INVALID_ARGUMENT":
            return InvalidInputError(
                f"the server at {self} refused the request to model {self.model!r}: {reason}",
                why="the model was replaced by one with another input since its configuration was read",
                fix="read it again: model_config(refresh=True)",
            )
        return InferenceError(
            f"the server at {self} failed on model {self.model!r} ({code}): {reason}", fix="look at the server's log"
        )


@dataclass(frozen=True)
class Input:
    """An input tensor: `data`, or what lies in a shared memory region.

    Attributes:
        name: of the tensor.
        data: UINT8, INT32 or FP32.
        region: name of the region that holds `data`, from its first byte on.
    """

    name: str
    data: NDArray[Any]
    region: str | None = None


@dataclass(frozen=True)
class Message:
    """A request, ready to go.

    Attributes:
        target: gRPC's method name, or HTTP's method and path.
        body: a protobuf message, or bytes.
        headers: HTTP's.
    """

    target: str
    body: Any
    headers: Mapping[str, str]


class Codec(Protocol):
    """Messages to the server and answers from it, for one protocol."""

    def config(self) -> Message: ...

    def read_config(self, answer: Any) -> ModelConfig: ...

    def infer(self, inputs: Sequence[Input]) -> Message: ...

    def read_outputs(self, answer: Any) -> dict[str, NDArray[Any]]: ...

    def register(self, name: str, key: str, byte_size: int) -> Message: ...

    def unregister(self, name: str) -> Message: ...


class Transport(Protocol):
    """Carries a message and its answer; every failure is an SSDClientError."""

    @property
    def connected(self) -> bool:
        """Whether a connection is open that the next message can use."""
        ...

    def send(self, message: Message, timeout: float) -> Any: ...

    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """`Transport` for asyncio."""

    async def send(self, message: Message, timeout: float) -> Any: ...

    async def close(self) -> None: ...


def codec_for(endpoint: Endpoint) -> Codec:
    return GrpcCodec(endpoint) if endpoint.protocol == "grpc" else HttpCodec(endpoint)


def transport_for(endpoint: Endpoint) -> Transport:
    return GrpcTransport(endpoint) if endpoint.protocol == "grpc" else HttpTransport(endpoint)


def async_transport_for(endpoint: Endpoint) -> AsyncTransport:
    return AsyncGrpcTransport(endpoint) if endpoint.protocol == "grpc" else AsyncHttpTransport(endpoint)


# -- gRPC --------------------------------------------------------------------------------------------------------------


class GrpcCodec:
    """tritonclient's protobuf messages."""

    def __init__(self, endpoint: Endpoint) -> None:
        from tritonclient.grpc import service_pb2

        self._endpoint, self._pb = endpoint, service_pb2

    def config(self) -> Message:
        return Message("ModelConfig", self._pb.ModelConfigRequest(name=self._endpoint.model), {})

    def read_config(self, answer: Any) -> ModelConfig:
        config = answer.config
        parameters = {key: value.string_value for key, value in config.parameters.items()}
        return ModelConfig.from_triton(config.name, config.max_batch_size, parameters)

    def infer(self, inputs: Sequence[Input]) -> Message:
        request = self._pb.ModelInferRequest(model_name=self._endpoint.model)
        for each in inputs:
            tensor = request.inputs.add(name=each.name, datatype=_DATATYPES[each.data.dtype], shape=each.data.shape)
            if each.region is None:
                request.raw_input_contents.append(each.data.tobytes())
            else:
                tensor.parameters["shared_memory_region"].string_param = each.region
                tensor.parameters["shared_memory_byte_size"].int64_param = each.data.nbytes
        return Message("ModelInfer", request, {})

    def read_outputs(self, answer: Any) -> dict[str, NDArray[Any]]:
        if len(answer.outputs) != len(answer.raw_output_contents):
            raise _broken(self._endpoint, f"{len(answer.outputs)} outputs, {len(answer.raw_output_contents)} contents")
        return {
            output.name: _array(self._endpoint, output.name, output.datatype, output.shape, content)
            for output, content in zip(answer.outputs, answer.raw_output_contents, strict=True)
        }

    def register(self, name: str, key: str, byte_size: int) -> Message:
        body = self._pb.SystemSharedMemoryRegisterRequest(name=name, key=key, byte_size=byte_size)
        return Message("SystemSharedMemoryRegister", body, {})

    def unregister(self, name: str) -> Message:
        return Message("SystemSharedMemoryUnregister", self._pb.SystemSharedMemoryUnregisterRequest(name=name), {})


def _grpc_channel(grpc: Any, module: Any, endpoint: Endpoint) -> Any:
    """A channel of `module`, which is grpc or grpc.aio."""
    if endpoint.tls is None:
        return module.insecure_channel(endpoint.url, options=_GRPC_OPTIONS)
    root, key, chain = endpoint.tls.read()
    return module.secure_channel(endpoint.url, grpc.ssl_channel_credentials(root, key, chain), options=_GRPC_OPTIONS)


def _grpc_failure(endpoint: Endpoint, error: Any, timeout: float) -> SSDClientError:
    code = error.code().name
    return (
        endpoint.timed_out(timeout) if code == "DEADLINE_EXCEEDED" else endpoint.refused(code, error.details() or code)
    )


class GrpcTransport:
    """A gRPC channel. Safe from several threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        import grpc  # type: ignore[import-untyped]
        from tritonclient.grpc import service_pb2_grpc

        self._endpoint, self._error = endpoint, grpc.RpcError
        self._channel = _grpc_channel(grpc, grpc, endpoint)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self.connected = False  # as far as the last message tells

    def send(self, message: Message, timeout: float) -> Any:
        try:
            answer = getattr(self._stub, message.target)(message.body, timeout=timeout)
            self.connected = True
            return answer
        except self._error as error:
            self.connected = error.code().name != "UNAVAILABLE"
            raise _grpc_failure(self._endpoint, error, timeout) from None

    def close(self) -> None:
        self._channel.close()


class AsyncGrpcTransport:
    """A gRPC channel of the running event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        import grpc
        import grpc.aio  # type: ignore[import-untyped]
        from tritonclient.grpc import service_pb2_grpc

        self._endpoint, self._error = endpoint, grpc.RpcError
        self._channel = _grpc_channel(grpc, grpc.aio, endpoint)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def send(self, message: Message, timeout: float) -> Any:
        try:
            return await getattr(self._stub, message.target)(message.body, timeout=timeout)
        except self._error as error:
            raise _grpc_failure(self._endpoint, error, timeout) from None

    async def close(self) -> None:
        await self._channel.close()


# -- HTTP --------------------------------------------------------------------------------------------------------------

_HEADER_SIZE = "Inference-Header-Content-Length"
_CODES = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 502: "UNAVAILABLE", 503: "UNAVAILABLE"}


@dataclass(frozen=True)
class HttpAnswer:
    """A successful answer: how much of the body is JSON (None = all), and the body."""

    json_size: int | None
    body: bytes


class HttpCodec:
    """JSON, with tensors as bytes behind it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint, self._model = endpoint, f"/v2/models/{quote(endpoint.model, safe='')}"

    def config(self) -> Message:
        return Message(f"GET {self._model}/config", b"", {})

    def read_config(self, answer: HttpAnswer) -> ModelConfig:
        config = self._json(answer.body)
        try:
            parameters = {key: str(value["string_value"]) for key, value in config.get("parameters", {}).items()}
            name, batch = str(config["name"]), int(config.get("max_batch_size", 0))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise _broken(self._endpoint, f"{answer.body[:200]!r} is not a model's configuration") from None
        return ModelConfig.from_triton(name, batch, parameters)

    def infer(self, inputs: Sequence[Input]) -> Message:
        tensors, contents = [], []
        for each in inputs:
            if each.region is None:
                contents.append(each.data.tobytes())
                place: dict[str, Any] = {"binary_data_size": each.data.nbytes}
            else:
                place = {"shared_memory_region": each.region, "shared_memory_byte_size": each.data.nbytes}
            datatype = _DATATYPES[each.data.dtype]
            tensors.append({"name": each.name, "shape": each.data.shape, "datatype": datatype, "parameters": place})
        head = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}}).encode()
        return Message(f"POST {self._model}/infer", b"".join([head, *contents]), {_HEADER_SIZE: str(len(head))})

    def read_outputs(self, answer: HttpAnswer) -> dict[str, NDArray[Any]]:
        offset = len(answer.body) if answer.json_size is None else answer.json_size
        outputs = {}
        try:
            for output in self._json(answer.body[:offset])["outputs"]:
                end = offset + output["parameters"]["binary_data_size"]
                content = memoryview(answer.body)[offset:end]
                outputs[output["name"]] = _array(
                    self._endpoint, output["name"], output["datatype"], output["shape"], content
                )
                offset = end
        except (KeyError, TypeError) as error:
            raise _broken(self._endpoint, f"{error!r} in {bytes(answer.body[:200])!r}") from None
        return outputs

    def register(self, name: str, key: str, byte_size: int) -> Message:
        body = json.dumps({"key": key, "offset": 0, "byte_size": byte_size}).encode()
        return Message(f"POST /v2/systemsharedmemory/region/{name}/register", body, {})

    def unregister(self, name: str) -> Message:
        return Message(f"POST /v2/systemsharedmemory/region/{name}/unregister", b"", {})

    def _json(self, text: bytes) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise _broken(self._endpoint, f"{text[:200]!r} is not a JSON object")
        return value


def _http_answer(endpoint: Endpoint, status: int, json_size: str | None, body: bytes) -> HttpAnswer:
    if status == 200:
        return HttpAnswer(int(json_size) if json_size is not None and json_size.isdigit() else None, body)
    text = body.decode(errors="replace")
    try:
        reason = str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        reason = text[:300] or "no explanation"
    raise endpoint.refused(_CODES.get(status, f"HTTP {status}"), reason)


class HttpTransport:
    """Kept-alive connections, one per request in flight. Safe from several threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._context = endpoint.tls.context() if endpoint.tls else None
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    @property
    def connected(self) -> bool:
        return bool(self._idle)

    def send(self, message: Message, timeout: float) -> HttpAnswer:
        deadline = time.monotonic() + timeout
        method, _, path = message.target.partition(" ")
        with self._lock:
            connection = self._idle.pop() if self._idle else self._connect()
        try:
            connection.timeout = timeout
            if connection.sock is None:
                connection.connect()
            link = connection.sock
            link.settimeout(_left(deadline))
            connection.request(method, path, message.body, dict(message.headers))
            link.settimeout(_left(deadline))
            response = connection.getresponse()
            parts = []
            while True:
                link.settimeout(_left(deadline))
                part = response.read1(1 << 20)
                if not part:
                    break
                parts.append(part)
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
            response.close()
        except TimeoutError:
            connection.close()
            raise self._endpoint.timed_out(timeout) from None
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            self.close()  # those that wait are as old as the server that is gone
            raise self._endpoint.unavailable(str(error) or type(error).__name__) from None
        except BaseException:
            connection.close()
            raise
        if not response.will_close:
            with self._lock:
                self._idle.append(connection)
        return _http_answer(self._endpoint, response.status, response.getheader(_HEADER_SIZE), b"".join(parts))

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        if self._context is None:
            return http.client.HTTPConnection(self._endpoint.url)
        return http.client.HTTPSConnection(self._endpoint.url, context=self._context)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class AsyncHttpTransport:
    """An aiohttp session of the running event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        import aiohttp

        self._endpoint, self._aiohttp = endpoint, aiohttp
        self._base = f"{'https' if endpoint.tls else 'http'}://{endpoint.url}"
        context = endpoint.tls.context() if endpoint.tls else True
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, ssl=context))

    async def send(self, message: Message, timeout: float) -> HttpAnswer:
        from yarl import URL

        method, _, path = message.target.partition(" ")
        limit = self._aiohttp.ClientTimeout(total=timeout)
        url = URL(self._base + path, encoded=True)
        try:
            async with self._session.request(
                method, url, data=message.body, headers=message.headers, timeout=limit, allow_redirects=False
            ) as response:
                body = await response.read()
        except (asyncio.TimeoutError, TimeoutError):  # two types before Python 3.11
            raise self._endpoint.timed_out(timeout) from None
        except (self._aiohttp.ClientError, OSError) as error:
            raise self._endpoint.unavailable(str(error) or type(error).__name__) from None
        return _http_answer(self._endpoint, response.status, response.headers.get(_HEADER_SIZE), body)

    async def close(self) -> None:
        await self._session.close()


# -- both --------------------------------------------------------------------------------------------------------------


def _broken(endpoint: Endpoint, what: str) -> InferenceError:
    return InferenceError(
        f"the answer from {endpoint} makes no sense: {what}",
        why="it is no Triton server, or the model breaks its own configuration",
        fix="check the url, and the server's log",
    )


def _array(
    endpoint: Endpoint, name: str, datatype: str, shape: Sequence[int], content: bytes | memoryview
) -> NDArray[Any]:
    """The tensor as a read-only view on the answer."""
    dtype = _DTYPES.get(datatype)
    shape = [int(size) for size in shape]
    if dtype is None or len(content) != math.prod(shape) * np.dtype(dtype).itemsize:
        raise _broken(endpoint, f"output {name!r} is {datatype}{shape} in {len(content)} bytes")
    return np.frombuffer(content, dtype).reshape(shape)
