"""The messages of gRPC and HTTP: a codec turns what the client wants into a `Message`, and an answer into values.

There is no I/O here. The gRPC messages are tritonclient's; HTTP is KServe v2 with Triton's binary tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from .answers import Answer, Tensor
from .config import ModelConfig
from .endpoint import Endpoint

_DATATYPES = {np.dtype(np.uint8): "UINT8", np.dtype(np.float32): "FP32"}
HEADER_SIZE = "Inference-Header-Content-Length"
_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    407: "UNAUTHENTICATED",
    429: "UNAVAILABLE",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
}


@dataclass(frozen=True)
class Input:
    """An input tensor: `data`, or what lies in a shared memory region.

    Attributes:
        name: of the tensor.
        data: UINT8 or FP32.
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
    """Messages to the server and answers from it, for one protocol.

    The readers raise whatever a wrong answer makes them raise: `answers.checked` calls them.
    """

    def config(self, version: str = "") -> Message: ...

    def read_config(self, answer: Any) -> ModelConfig: ...

    def infer(self, inputs: Sequence[Input], seconds: float) -> Message:
        """A request that the server drops if it is still in the queue after `seconds`, where its queue allows that.

        Triton does not notice that an HTTP client has gone.
        """
        ...

    def read_answer(self, answer: Any) -> Answer: ...

    def register(self, name: str, key: str, byte_size: int) -> Message: ...

    def unregister(self, name: str) -> Message: ...

    def regions(self) -> Message: ...

    def read_regions(self, answer: Any) -> list[str]: ...


def codec_for(endpoint: Endpoint) -> Codec:
    return GrpcCodec(endpoint) if endpoint.protocol == "grpc" else HttpCodec(endpoint)


class GrpcCodec:
    """tritonclient's protobuf messages."""

    def __init__(self, endpoint: Endpoint) -> None:
        from tritonclient.grpc import service_pb2

        self._endpoint, self._pb = endpoint, service_pb2

    def config(self, version: str = "") -> Message:
        return Message("ModelConfig", self._pb.ModelConfigRequest(name=self._endpoint.model, version=version), {})

    def read_config(self, answer: Any) -> ModelConfig:
        config = answer.config
        parameters = {key: value.string_value for key, value in config.parameters.items()}
        versions = list(config.version_policy.specific.versions)
        return ModelConfig.from_triton(config.name, config.max_batch_size, parameters, _only(versions))

    def infer(self, inputs: Sequence[Input], seconds: float) -> Message:
        request = self._pb.ModelInferRequest(model_name=self._endpoint.model)
        request.parameters["timeout"].int64_param = _microseconds(seconds)
        for each in inputs:
            tensor = request.inputs.add(name=each.name, datatype=_DATATYPES[each.data.dtype], shape=each.data.shape)
            if each.region is None:
                request.raw_input_contents.append(each.data.tobytes())
            else:
                tensor.parameters["shared_memory_region"].string_param = each.region
                tensor.parameters["shared_memory_byte_size"].int64_param = each.data.nbytes
        return Message("ModelInfer", request, {})

    def read_answer(self, answer: Any) -> Answer:
        pairs = zip(answer.outputs, answer.raw_output_contents, strict=True)
        tensors = [Tensor(each.name, each.datatype, each.shape, content) for each, content in pairs]
        return Answer(answer.model_version, tensors)

    def register(self, name: str, key: str, byte_size: int) -> Message:
        body = self._pb.SystemSharedMemoryRegisterRequest(name=name, key=key, byte_size=byte_size)
        return Message("SystemSharedMemoryRegister", body, {})

    def unregister(self, name: str) -> Message:
        return Message("SystemSharedMemoryUnregister", self._pb.SystemSharedMemoryUnregisterRequest(name=name), {})

    def regions(self) -> Message:
        return Message("SystemSharedMemoryStatus", self._pb.SystemSharedMemoryStatusRequest(), {})

    def read_regions(self, answer: Any) -> list[str]:
        return list(answer.regions)


@dataclass(frozen=True)
class HttpAnswer:
    """A successful answer: how much of the body is JSON (None = all), and the body."""

    json_size: int | None
    body: bytes


class HttpCodec:
    """JSON, with tensors as bytes behind it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._root = f"{endpoint.path}/v2"
        self._model = f"{self._root}/models/{quote(endpoint.model, safe='')}"

    def config(self, version: str = "") -> Message:
        which = f"/versions/{quote(version, safe='')}" if version else ""
        return Message(f"GET {self._model}{which}/config", b"", {})

    def read_config(self, answer: HttpAnswer) -> ModelConfig:
        config = _object(answer.body)
        parameters = {key: str(value["string_value"]) for key, value in config.get("parameters", {}).items()}
        versions = config.get("version_policy", {}).get("specific", {}).get("versions", [])
        batch = config.get("max_batch_size", 0)
        return ModelConfig.from_triton(str(config["name"]), int(batch), parameters, _only(versions))

    def infer(self, inputs: Sequence[Input], seconds: float) -> Message:
        tensors: list[dict[str, Any]] = []
        contents: list[Any] = []  # joined without another copy of them: an image is large
        for each in inputs:
            if each.region is None:
                contents.append(np.ascontiguousarray(each.data))
                place: dict[str, Any] = {"binary_data_size": each.data.nbytes}
            else:
                place = {"shared_memory_region": each.region, "shared_memory_byte_size": each.data.nbytes}
            datatype = _DATATYPES[each.data.dtype]
            tensors.append({"name": each.name, "shape": each.data.shape, "datatype": datatype, "parameters": place})
        parameters = {"binary_data_output": True, "timeout": _microseconds(seconds)}
        head = json.dumps({"inputs": tensors, "parameters": parameters}).encode()
        return Message(f"POST {self._model}/infer", b"".join([head, *contents]), {HEADER_SIZE: str(len(head))})

    def read_answer(self, answer: HttpAnswer) -> Answer:
        offset = len(answer.body) if answer.json_size is None else answer.json_size
        head = _object(answer.body[:offset])
        tensors = []
        for output in head["outputs"]:
            size = output["parameters"]["binary_data_size"]
            if not isinstance(size, int) or not 0 <= size <= len(answer.body) - offset:
                raise ValueError(f"output {output['name']!r} has {size!r:.50} bytes of {len(answer.body) - offset}")
            content = memoryview(answer.body)[offset : offset + size]
            tensors.append(Tensor(str(output["name"]), output["datatype"], output["shape"], content))
            offset += size
        return Answer(str(head.get("model_version", "")), tensors)

    def register(self, name: str, key: str, byte_size: int) -> Message:
        body = json.dumps({"key": key, "offset": 0, "byte_size": byte_size}).encode()
        return Message(f"POST {self._root}/systemsharedmemory/region/{name}/register", body, {})

    def unregister(self, name: str) -> Message:
        return Message(f"POST {self._root}/systemsharedmemory/region/{name}/unregister", b"", {})

    def regions(self) -> Message:
        return Message(f"GET {self._root}/systemsharedmemory/status", b"", {})

    def read_regions(self, answer: HttpAnswer) -> list[str]:
        return [str(region["name"]) for region in json.loads(answer.body)]


def http_answer(endpoint: Endpoint, status: int, json_size: str | None, body: bytes) -> HttpAnswer:
    """The answer of this status, headers and body.

    Raises:
        SSDClientError: the status is not 200.
    """
    if status == 200:
        is_size = json_size is not None and json_size.isascii() and json_size.isdigit() and len(json_size) < 20
        return HttpAnswer(int(json_size) if json_size is not None and is_size else None, body)
    text = body.decode(errors="replace")
    try:
        reason = str(json.loads(text)["error"])
    except Exception:  # not Triton's form
        reason = text[:300] or "no explanation"
    if status == 502:
        raise endpoint.unavailable(f"HTTP 502: {reason}")
    if status == 504:
        raise endpoint.timed_out_there(reason)
    raise endpoint.refused(_CODES.get(status, f"HTTP {status}"), reason)


def _object(text: bytes) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{text[:200]!r} is not a JSON object")
    return value


def _microseconds(seconds: float) -> int:
    """As Triton takes a request's timeout, which has 63 bits."""
    return int(min(seconds * 1e6, 2**62))


def _only(versions: Sequence[Any]) -> str:
    """The version that a configuration is about, if it says so; otherwise empty."""
    return str(versions[0]) if len(versions) == 1 else ""
