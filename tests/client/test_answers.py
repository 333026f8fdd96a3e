"""What a server can say wrongly: always an SSDClientError, in bounded time and memory, over every transport."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from ssd_client import InferenceError, ModelConfig, RequestTimeoutError, SSDClientError
from ssd_client.answers import Answer, Tensor, checked, outputs
from ssd_client.config import MAX_ANSWER
from ssd_client.endpoint import Endpoint
from tritonclient.grpc import service_pb2

from tests.client.conftest import CLIENTS, HEIGHT, PARAMETERS, WIDTH, config_proto, listening

ENDPOINT = Endpoint.parse("localhost", None, "fake", None)
CONFIG = ModelConfig.from_triton("fake", 8, PARAMETERS)
K = CONFIG.max_detections
IMAGES = np.zeros((1, HEIGHT, WIDTH, 3), np.uint8)


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    """A right answer for one picture with two detections."""
    found = {
        "num_detections": np.full((1, 1), 2, np.int32),
        "detection_boxes": np.zeros((1, K, 4), np.float32),
        "detection_scores": np.zeros((1, K), np.float32),
        "detection_classes": np.full((1, K), -1, np.int32),
    }
    found["detection_boxes"][0, :2] = [[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.9, 0.9]]
    found["detection_scores"][0, :2] = [0.9, 0.5]
    found["detection_classes"][0, :2] = [2, 0]
    return found


def tensors(**changed: Any) -> list[Tensor]:
    """The right answer with other arrays."""
    names = {"int32": "INT32", "float32": "FP32", "float64": "FP64", "int64": "INT64"}
    return [
        Tensor(name, names[str(array.dtype)], array.shape, array.tobytes())
        for name, array in {**arrays(), **changed}.items()
    ]


def with_value(name: str, place: tuple[int, ...], value: float) -> list[Tensor]:
    array = arrays()[name]
    array[place] = value
    return tensors(**{name: array})


def test_a_right_answer() -> None:
    read = outputs(ENDPOINT, CONFIG, 1, Answer("1", tensors()))
    for name, array in arrays().items():
        assert read[name].tobytes() == array.tobytes()
        assert not read[name].flags.writeable


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (with_value("detection_boxes", (0, 1, 2), np.nan), "boxes that are not finite"),
        (with_value("detection_boxes", (0, 0, 0), -np.inf), "boxes that are not finite"),
        (with_value("detection_scores", (0, 0), np.nan), "scores that are not finite"),
        (with_value("detection_scores", (0, 0), np.inf), "scores that are not finite"),
        (with_value("detection_scores", (0, 0), 0.1), "not in falling order"),
        (with_value("detection_classes", (0, 1), 3), "it has 3 labels"),
        (with_value("detection_classes", (0, 1), -1), "it has 3 labels"),
        (with_value("num_detections", (0, 0), K + 1), f"room for {K}"),
        (with_value("num_detections", (0, 0), -1), f"room for {K}"),
        (tensors(detection_boxes=arrays()["detection_boxes"].astype(np.int32)), "its configuration promises"),
        (tensors(detection_scores=arrays()["detection_scores"].astype(np.float64)), "its configuration promises"),
        (tensors(detection_boxes=arrays()["detection_boxes"].repeat(2, 0)), "its configuration promises"),
        (tensors(detection_boxes=arrays()["detection_boxes"][..., 0]), "its configuration promises"),
        (tensors()[:3], "its configuration promises"),
        ([*tensors(), tensors()[0]], "its configuration promises"),
        ([], "its configuration promises"),
        ([replace(tensors()[0], shape=[-1, -1]), *tensors()[1:]], "its configuration promises"),
        ([replace(tensors()[0], shape=[10**400] * 1000), *tensors()[1:]], "its configuration promises"),
        ([replace(tensors()[0], content=b"\0" * 3), *tensors()[1:]], "in 3 bytes"),
    ],
)
def test_wrong_answers(said: list[Tensor], complaint: str) -> None:
    with pytest.raises(InferenceError, match=complaint) as caught:
        outputs(ENDPOINT, CONFIG, 1, Answer("1", said))
    assert len(str(caught.value)) < 2500


@pytest.mark.parametrize(
    "error", [RecursionError(), ValueError("x" * 10**6), OverflowError(), MemoryError(), KeyError("a"), TypeError()]
)
def test_what_a_reader_raises(error: Exception) -> None:
    def read(_: object) -> None:
        raise error

    with pytest.raises(InferenceError, match=rf"makes no sense: {type(error).__name__}") as caught:
        checked(ENDPOINT, read, b"")
    assert len(str(caught.value)) < 2000


# -- servers that answer with bytes of the test's choice ---------------------------------------------------------------


def http_config() -> bytes:
    parameters = {key: {"string_value": value} for key, value in PARAMETERS.items()}
    policy = {"specific": {"versions": [1]}}
    config = {"name": "fake", "max_batch_size": 8, "parameters": parameters, "version_policy": policy}
    return json.dumps(config).encode()


def http_outputs() -> tuple[bytes, bytes]:
    """JSON and tensors of the right answer."""
    said = []
    for t in tensors():
        place = {"binary_data_size": len(t.content)}
        said.append({"name": t.name, "datatype": t.datatype, "shape": list(t.shape), "parameters": place})
    head = json.dumps({"model_name": "fake", "model_version": "1", "outputs": said}).encode()
    return head, b"".join(bytes(t.content) for t in tensors())


def grpc_config() -> bytes:
    proto = config_proto("fake", PARAMETERS)
    proto.version_policy.specific.versions.append(1)
    return bytes(service_pb2.ModelConfigResponse(config=proto).SerializeToString())


def grpc_outputs() -> bytes:
    answer = service_pb2.ModelInferResponse(model_name="fake", model_version="1")
    for tensor in tensors():
        answer.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        answer.raw_output_contents.append(bytes(tensor.content))
    return bytes(answer.SerializeToString())


@contextlib.contextmanager
def http_server(answer: Callable[[bool], bytes]) -> Iterator[str]:
    """Sends `answer(whether it is an inference)` for every request, with its status line, and hangs up."""

    def handle(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            request = connection.recv(1 << 16)
            while b"\r\n\r\n" not in request:
                request += connection.recv(1 << 16)
            head, _, body = request.partition(b"\r\n\r\n")
            length = int((head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]) or 0)
            while len(body) < length:
                body += connection.recv(1 << 16)
            connection.sendall(answer(head.startswith(b"POST")))

    with listening(handle) as port:
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def grpc_server(answer: Callable[[bool], bytes]) -> Iterator[str]:
    """The same for gRPC: any bytes as a message."""

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            inference = details.method.endswith("ModelInfer")
            return grpc.unary_unary_rpc_method_handler(lambda *_: answer(inference))

    options = [("grpc.max_send_message_length", -1)]
    running = grpc.server(ThreadPoolExecutor(4), handlers=[Handler()], options=options)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        running.stop(0)


def http_reply(body: bytes, head: int | None = None) -> bytes:
    size = b"" if head is None else b"Inference-Header-Content-Length: %d\r\n" % head
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\n%sContent-Length: %d\r\n\r\n" % (size, len(body)) + body


def damaged(content: bytes, dice: random.Random) -> bytes:
    """Bytes flipped, cut, doubled, put elsewhere; numbers of the text made large, negative or something else."""
    data = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 8))):
        kind, place = dice.randrange(6), dice.randrange(len(data) + 1)
        other = dice.randrange(len(data) + 1)
        if kind == 0 and data:
            data[place % len(data)] = dice.randrange(256)
        elif kind == 1:
            del data[min(place, other) : max(place, other)]
        elif kind == 2:
            data[place:place] = data[other : other + dice.randrange(200)]
        elif kind == 3:
            data[place:place] = dice.choice((b"[" * 5000, b"\0" * 50, b"\xff" * 20, b'{"a":' * 3000, b"NaN", b"-1"))
        elif kind == 4:
            numbers = [k for k, byte in enumerate(data) if chr(byte).isdigit()]
            if numbers:
                at = dice.choice(numbers)
                data[at : at + 1] = dice.choice((b"9" * 5000, b"-7", b"1e999", b"null", b'"x"', b"1.5", b"[]"))
        else:
            data[place : place + 4] = np.float32(dice.choice((np.nan, np.inf, -1e30, 1e-45))).tobytes()
    return bytes(data)


def fuzz(protocol: str, client_type: Any, rounds: int, seed: int) -> tuple[int, int]:
    """Rounds of a damaged configuration or answer: how many were refused, and how many taken for right."""
    dice = random.Random(seed)
    head, content = http_outputs()
    refused = accepted = 0
    state: dict[str, bytes] = {}
    serve = http_server if protocol == "http" else grpc_server
    with serve(lambda inference: state["infer" if inference else "config"]) as url:
        for _ in range(rounds):
            if protocol == "http":
                state = {"config": http_reply(http_config()), "infer": http_reply(head + content, len(head))}
                part = dice.randrange(4)
                if part == 0:
                    state["config"] = http_reply(damaged(http_config(), dice))
                elif part == 1:
                    state["infer"] = damaged(state["infer"], dice)  # status line and headers, too
                elif part == 2:
                    broken = damaged(head, dice)
                    state["infer"] = http_reply(broken + content, len(broken))
                else:
                    state["infer"] = http_reply(head + damaged(content, dice), len(head))
            else:
                state = {"config": grpc_config(), "infer": grpc_outputs()}
                which = dice.choice(("config", "infer", "infer"))
                state[which] = damaged(state[which], dice)
            with client_type(url, model="fake", protocol=protocol, retries=0, timeout=2) as client:
                try:
                    answer = client.infer(IMAGES)
                except SSDClientError:
                    refused += 1
                    continue
            number = int(answer["num_detections"][0, 0])
            assert 0 <= number <= K
            assert np.isfinite(answer["detection_boxes"][0, :number]).all()
            assert np.isfinite(answer["detection_scores"][0, :number]).all()
            accepted += 1
    return refused, accepted


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("client_type", CLIENTS, ids=["sync", "asyncio"])
def test_damaged_answers(client_type: Any, protocol: str) -> None:
    refused, accepted = fuzz(protocol, client_type, 250, seed=1)
    assert refused > 80, "the damage reaches the client"
    assert refused + accepted == 250


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 12))
@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("client_type", CLIENTS, ids=["sync", "asyncio"])
def test_many_damaged_answers(client_type: Any, protocol: str, seed: int) -> None:
    assert sum(fuzz(protocol, client_type, 2000, seed)) == 2000


# -- size and time -----------------------------------------------------------------------------------------------------


def endless(chunked: bool) -> Callable[[socket.socket], None]:
    """Answers with a body that does not end, as fast as it is read."""

    def handle(connection: socket.socket) -> None:
        part = b"\0" * (1 << 20)
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            if chunked:
                connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            else:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000000\r\n\r\n")
            while True:
                connection.sendall(b"100000\r\n" + part + b"\r\n" if chunked else part)

    return handle


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("client_type", CLIENTS, ids=["sync", "asyncio"])
def test_an_endless_answer(client_type: Any, chunked: bool) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (
        listening(endless(chunked)) as port,
        client_type(f"127.0.0.1:{port}", model="m", protocol="http", retries=0) as client,
        pytest.raises(InferenceError, match="larger than the limit of 67 MB"),
    ):
        client.model_config()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 4 * MAX_ANSWER


@pytest.mark.parametrize("header", ["Content-Length", "Inference-Header-Content-Length"])
@pytest.mark.parametrize(
    "number", ["9" * 19, "9" * 400, "9" * 5000, "-1", "1e999", "0x10", "", "٣"], ids=lambda text: f"{ascii(text)[:9]}"
)
@pytest.mark.parametrize("client_type", CLIENTS, ids=["sync", "asyncio"])
def test_a_header_with_an_absurd_number(client_type: Any, number: str, header: str) -> None:
    head, content = http_outputs()
    wrong = f"HTTP/1.1 200 OK\r\nConnection: close\r\n{header}: {number}\r\n\r\n".encode() + head + content
    with (
        http_server(lambda inference: wrong if inference else http_reply(http_config())) as url,
        client_type(url, model="fake", protocol="http", retries=0, timeout=5) as client,
        pytest.raises(SSDClientError),
    ):
        client.infer(IMAGES)


@pytest.mark.parametrize("client_type", CLIENTS, ids=["sync", "asyncio"])
def test_a_large_message(client_type: Any) -> None:
    large = b"\x12" + b"\xff\xff\xff\x7f"[:4] + b"\0" * (MAX_ANSWER + 1000)
    with (
        grpc_server(lambda _: large) as url,
        client_type(url, model="m", retries=3) as client,
        pytest.raises(InferenceError, match=r"makes no sense: .*larger than max"),
    ):
        client.model_config()


@pytest.mark.parametrize("where", ["status", "headers", "body", "chunks"])
@pytest.mark.parametrize("client_type", CLIENTS, ids=["sync", "asyncio"])
def test_a_deadline_holds_while_an_answer_drips(client_type: Any, where: str) -> None:
    starts = {
        "status": b"HTTP/1.1 200 O",
        "headers": b"HTTP/1.1 200 OK\r\nX: ",
        "body": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
        "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    }

    def handle(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(starts[where])
            while True:
                connection.sendall(b"1\r\nx\r\n" if where == "chunks" else b"1")
                time.sleep(0.05)

    with listening(handle) as port:
        client = client_type(f"127.0.0.1:{port}", model="m", protocol="http", timeout=0.5, retries=0)
        started = time.monotonic()
        with client, pytest.raises(RequestTimeoutError):
            client.model_config()
        assert 0.4 < time.monotonic() - started < 1.5
