"""Both clients against a real Triton server, over both protocols, with and without shared memory."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import inspect
import io
import json
import math
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import ssd_client
from numpy.typing import NDArray
from PIL import Image
from ssd_client import (
    TLS,
    AsyncSSDClient,
    ImageError,
    InferenceError,
    InvalidInputError,
    ModelConfigError,
    ModelNotFoundError,
    RequestTimeoutError,
    ServerUnavailableError,
    SharedMemoryError,
    SSDClient,
    SSDClientError,
)
from ssd_client.preprocess import input_array
from ssd_client.shared_memory import Region

from build.serve import TritonServer
from tests.client import fake_model
from tests.client.conftest import (
    CLIENTS,
    HEIGHT,
    PARAMETERS,
    WIDTH,
    listening,
    order,
    scene,
    server_on,
    server_regions,
    url_of,
)

pytestmark = pytest.mark.triton

PROTOCOLS = ("grpc", "http")
TRANSPORTS = [(protocol, memory) for protocol in PROTOCOLS for memory in (None, "system")]
T = TypeVar("T")
ROOT = Path(ssd_client.__file__).parent.parent


def own_regions() -> list[str]:
    """Names that stay in /dev/shm; those of other clients on this machine are there for milliseconds."""
    deadline = time.monotonic() + 2
    while names := [path.name for path in Path("/dev/shm").glob("ssd_client_*")]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return names


@pytest.fixture(autouse=True)
def _nothing_left_behind(server: TritonServer) -> Iterator[None]:
    yield
    gc.collect()
    assert own_regions() == []
    assert server_regions(server) == []


@contextlib.contextmanager
def every_client(urls: dict[str, str], **options: Any) -> Iterator[dict[str, Any]]:
    """A client of each type for each transport, by name."""
    with contextlib.ExitStack() as stack:
        yield {
            f"{client_type.__name__}-{protocol}-{memory}": stack.enter_context(
                client_type(urls[protocol], model="fake", protocol=protocol, shared_memory=memory, **options)
            )
            for client_type in CLIENTS
            for protocol, memory in TRANSPORTS
        }


def urls_of(server: TritonServer) -> dict[str, str]:
    return {protocol: url_of(server, protocol) for protocol in PROTOCOLS}


def eventually(call: Callable[[], T], attempts: int = 50) -> T:
    """The result of `call` by a client whose timeout a busy machine may exceed."""
    for _ in range(attempts):
        with contextlib.suppress(RequestTimeoutError):
            return call()
    return call()


@pytest.fixture(params=CLIENTS, ids=["sync", "asyncio"])
def client_type(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=TRANSPORTS, ids=lambda transport: f"{transport[0]}-{transport[1]}")
def client(request: pytest.FixtureRequest, server: TritonServer, client_type: Any) -> Iterator[SSDClient]:
    protocol, memory = request.param
    with client_type(
        url_of(server, protocol), model="fake", protocol=protocol, shared_memory=memory, timeout=10
    ) as client:
        yield client


@pytest.fixture
def offline(client_type: Any) -> Iterator[tuple[Any, list[bytes]]]:
    """A client whose server knows the configuration only, and the requests that reached that server."""
    with configuration_server() as (url, requests):
        client = client_type(url, model="fake", protocol="http", retries=0)
        with client:
            client.model_config()
            yield client, requests


@contextlib.contextmanager
def configuration_server() -> Iterator[tuple[str, list[bytes]]]:
    """Answers every HTTP request with the fake model's configuration, and closes the connection."""
    requests: list[bytes] = []
    parameters = {key: {"string_value": value} for key, value in PARAMETERS.items()}
    body = json.dumps({"name": "fake", "max_batch_size": 8, "parameters": parameters}).encode()

    def handle(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            requests.append(connection.recv(1 << 16).partition(b"\r\n")[0])
            connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    with listening(handle) as port:
        yield f"127.0.0.1:{port}", requests


def expected(images: NDArray[np.uint8], score: float = 0.25, iou: float = 0.45) -> dict[str, NDArray[Any]]:
    """What the fake model answers, worked out here."""
    outputs = {
        "num_detections": np.zeros((len(images), 1), np.int32),
        "detection_boxes": np.zeros((len(images), 10, 4), np.float32),
        "detection_scores": np.zeros((len(images), 10), np.float32),
        "detection_classes": np.full((len(images), 10), -1, np.int32),
    }
    for row, image in enumerate(images):
        patches = [f for f in fake_model.find(image, np.float32(iou)) if f[0] > np.float32(score)]
        for k, (value, index, box) in enumerate(sorted(patches, key=lambda f: -f[0])):
            outputs["detection_scores"][row, k], outputs["detection_classes"][row, k] = value, index
            outputs["detection_boxes"][row, k] = box
        outputs["num_detections"][row] = len(patches)
    return outputs


def assert_same_bits(got: dict[str, NDArray[Any]], wanted: dict[str, NDArray[Any]]) -> None:
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype
        assert got[name].shape == array.shape
        assert got[name].tobytes() == array.tobytes(), name


def noise(batch: int, seed: int = 0) -> NDArray[np.uint8]:
    images = np.random.default_rng(seed).integers(0, 256, (batch, HEIGHT, WIDTH, 3), dtype=np.uint8)
    images[:, 0, 0] = 0
    return images


# -- what comes back ---------------------------------------------------------------------------------------------------


def test_infer_is_bit_exact(client: SSDClient) -> None:
    for batch in (1, 3, 8):
        images = noise(batch)
        assert_same_bits(client.infer(images), expected(images))
        assert_same_bits(client.infer(images[:, ::-1]), expected(images[:, ::-1]))  # not contiguous


def test_infer_alternating_batches_share_one_region(client: SSDClient, server: TritonServer) -> None:
    for batch in (1, 8, 3, 8, 1, 2):
        images = noise(batch, batch)
        assert_same_bits(client.infer(images), expected(images))
    assert len(server_regions(server)) <= 1


def test_thresholds_of_every_row_arrive(client: SSDClient) -> None:
    images = noise(3)
    images[:, 5:20, 5:20] = (255, 0, 0)
    score = np.array([[0.1], [0.7], [0.95]], np.float32)
    iou = np.array([[0.3], [0.8], [1.0]], np.float32)
    outputs = client.infer(images, score, iou)
    for row in range(3):
        wanted = expected(images[row : row + 1], score[row, 0], iou[row, 0])
        assert_same_bits({name: array[row : row + 1] for name, array in outputs.items()}, wanted)


def test_detect_answers_in_pixels_of_the_picture(client: SSDClient) -> None:
    detections = client.detect(scene(1000, 500))
    assert detections.labels == ("red", "blue", "checksum")
    assert detections.class_ids.tolist() == [0, 1, 2]
    assert detections.scores.tolist() == pytest.approx([0.9, 0.6, 0.45])
    assert detections.image_size == (1000, 500)
    pixel = 1.5 * max(1000 / WIDTH, 500 / HEIGHT)
    assert np.abs(detections.boxes[0] - [200, 100, 400, 300]).max() < pixel
    assert np.abs(detections.boxes[1] - [600, 200, 900, 400]).max() < pixel


def test_detect_sends_what_preprocess_makes(client: SSDClient) -> None:
    picture = scene(333, 77)
    array, placement = input_array(picture, client.model_config().preprocessing)
    outputs = expected(array[None])
    number = int(outputs["num_detections"][0, 0])
    detections = client.detect(picture)
    assert detections.boxes.tobytes() == placement.to_image(outputs["detection_boxes"][0, :number]).tobytes()
    assert detections.scores.tobytes() == outputs["detection_scores"][0, :number].tobytes()


def test_detect_after_exif_orientation(client: SSDClient, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    Image.fromarray(scene(400, 200)).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    detections = client.detect(path)
    assert detections.image_size == (400, 200)
    assert np.abs(detections.boxes[0] - [80, 40, 160, 120]).max() < 10
    assert detections.draw().size == (400, 200)


def test_lists_of_any_length_keep_their_order(client: SSDClient) -> None:
    pictures = [scene(100 + 10 * k, 60 + 3 * k) for k in range(37)]
    singles = [client.detect(picture) for picture in pictures[:3]]
    for count in (0, 1, 7, 8, 9, 37):
        results = client.detect(pictures[:count])
        assert isinstance(results, list)
        assert [each.image_size for each in results] == [(100 + 10 * k, 60 + 3 * k) for k in range(count)]
        for single, each in zip(singles, results, strict=False):
            assert each.boxes.tobytes() == single.boxes.tobytes()


def test_detect_thresholds(client: SSDClient) -> None:
    assert client.detect(scene(), score_threshold=0.5).labels == ("red", "blue")
    assert client.detect(scene(), score_threshold=0.7, iou_threshold=1.0).labels == ("checksum", "red")
    assert len(client.detect(scene(), score_threshold=1)) == 0
    assert [len(detections) for detections in client.detect([scene()] * 9, score_threshold=0)] == [3] * 9


def test_open_files(client: SSDClient, tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    Image.fromarray(scene(300, 150)).save(path)
    wanted = client.detect(path).boxes.tobytes()
    memory = io.BytesIO(path.read_bytes())
    with path.open("rb") as file, path.open("rb") as other:
        (again, first) = client.detect([file, memory])
        assert client.detect(other).boxes.tobytes() == wanted
    assert first.boxes.tobytes() == again.boxes.tobytes() == wanted
    assert first.draw().tobytes() == client.detect(path).draw().tobytes()
    for wrong, message in ((io.StringIO("text"), "gives str, not bytes"), (file, "cannot be read: .*closed file")):
        with pytest.raises(ImageError, match=message):
            client.detect(wrong)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="is empty"):
        client.detect(memory)


@pytest.mark.parametrize(("protocol", "memory"), TRANSPORTS)
def test_one_client_in_several_event_loops(server: TritonServer, protocol: Any, memory: Any) -> None:
    """One after the other, and two at once in two threads."""
    client = AsyncSSDClient(url_of(server, protocol), model="fake", protocol=protocol, shared_memory=memory)
    picture = scene()

    async def count(times: int) -> list[int]:
        return [len(await client.detect(picture)) for _ in range(times)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # a loop that was closed leaves its sockets to Python
        assert asyncio.run(count(2)) == [3, 3]
        assert asyncio.run(count(2)) == [3, 3]
        with ThreadPoolExecutor(2) as threads:
            assert list(threads.map(lambda _: asyncio.run(count(5)), range(2))) == [[3] * 5] * 2
        asyncio.run(client.close())
    with pytest.raises(SSDClientError, match="closed"):
        asyncio.run(count(1))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_letterbox_bgr_and_built_in_thresholds(server: TritonServer, protocol: Any, client_type: Any) -> None:
    with client_type(url_of(server, protocol), model="letterbox", protocol=protocol) as client:
        detections = client.detect(scene(1000, 250))
        assert detections.labels == ("red", "blue", "checksum")
        assert np.abs(detections.boxes[0] - [200, 50, 400, 150]).max() < 1.5 * 1000 / WIDTH
        assert client.detect(scene(), score_threshold=0.7).labels == ("red",)
        assert len(client.detect(scene(), score_threshold=0.25, iou_threshold=0.45)) == 3
        for options in ({"score_threshold": 0.1}, {"iou_threshold": 0.5}):
            with pytest.raises(InvalidInputError, match=r"0\.25 and 0\.45 built in"):
                client.detect(scene(), **options)
        with pytest.raises(InvalidInputError, match="nan"):
            client.detect(scene(), score_threshold=math.nan)
        with pytest.raises(InvalidInputError, match="built in"):
            client.infer(noise(1), 0.5)
        assert client.infer(noise(1))["num_detections"].shape == (1, 1)


# -- bad input ---------------------------------------------------------------------------------------------------------


CONFIG_ONLY = [b"GET /v2/models/fake/config HTTP/1.1"]


def test_wrong_tensors_never_leave(offline: tuple[Any, list[bytes]]) -> None:
    client, requests = offline
    bad: list[Any] = [
        noise(1).astype(np.float32),
        noise(1)[0],
        noise(1)[:, :, :-1],
        np.zeros((1, 3, HEIGHT, WIDTH), np.uint8),
        noise(1).tolist(),
        None,
    ]
    for images in bad:
        with pytest.raises(InvalidInputError, match=r"takes uint8\[batch, 48, 64, 3\]"):
            client.infer(images)
    with pytest.raises(InvalidInputError, match="0 images, model 'fake' takes 1 to 8"):
        client.infer(noise(0))
    with pytest.raises(InvalidInputError, match="9 images, model 'fake' takes 1 to 8"):
        client.infer(noise(9))
    assert requests == CONFIG_ONLY


@pytest.mark.parametrize("name", ["score_threshold", "iou_threshold"])
def test_wrong_thresholds_never_leave(offline: tuple[Any, list[bytes]], name: str) -> None:
    client, requests = offline
    for value in (-0.1, 1.1, math.nan, math.inf, "0.5", [0.5], True, np.zeros((2, 1), np.float32)):
        with pytest.raises(InvalidInputError, match=name):
            client.detect(scene(), **{name: value})
        with pytest.raises(InvalidInputError, match=name):
            client.infer(noise(1), **{name: value})
    assert requests == CONFIG_ONLY


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_pictures_never_leave(offline: tuple[Any, list[bytes]], tmp_path: Path) -> None:
    client, requests = offline
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    with pytest.raises(ImageError, match=r"100\.0 megapixels"):
        client.detect(tmp_path / "huge.png")
    with pytest.raises(ImageError, match="holds floating-point values"):
        client.detect(noise(1)[0].astype(np.float32))
    assert requests == CONFIG_ONLY


def test_a_bad_picture_is_named_and_the_client_goes_on(client: SSDClient, tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ImageError, match=r"^\S*empty\.jpg is not a picture"):
        client.detect(tmp_path / "empty.jpg")
    with pytest.raises(ImageError, match=r"picture 17 of the list: \S*empty\.jpg is not a picture"):
        client.detect([*[scene()] * 17, tmp_path / "empty.jpg", *[scene()] * 10])
    with pytest.raises(InvalidInputError, match="9 images"):
        client.infer(noise(9))
    with pytest.raises(InvalidInputError, match="score_threshold"):
        client.detect(scene(), score_threshold=math.nan)
    assert len(client.detect(scene())) == 3
    assert client.infer(noise(1))["num_detections"].shape == (1, 1)


def test_an_error_of_the_model(client: SSDClient) -> None:
    with pytest.raises(InferenceError, match="the picture asked for an error"):
        client.infer(order(fake_model.RAISE))
    assert client.infer(noise(1))["num_detections"].shape == (1, 1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"protocol": "rest"}, "rest"),
        ({"url": "ftp://localhost:8000"}, "ftp://localhost:8000"),
        ({"url": "localhost:99999"}, "99999"),
        ({"url": ""}, "url"),
        ({"model": ""}, "model"),
        ({"shared_memory": "cuda"}, "cuda"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": math.nan}, "timeout"),
        ({"timeout": "3"}, "timeout is '3'"),
        ({"try_timeout": 0}, "try_timeout is 0"),
        ({"retries": -1}, "retries"),
        ({"retries": 1.5}, "retries is 1.5"),
        ({"ssl": True}, "ssl is True"),
        ({"headers": "a: b"}, "headers is of type str"),
        ({"max_in_flight": 0}, "max_in_flight"),
    ],
)
def test_wrong_arguments(client_type: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInputError, match=named):
        client_type(**{"url": "localhost", "model": "fake", **options})


# -- models and servers that are not there -----------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_models_that_cannot_be_used(server: TritonServer, protocol: Any, client_type: Any) -> None:
    for model, error, text in (
        ("nope", ModelNotFoundError, "does not have model 'nope'"),
        ("a b/ü", ModelNotFoundError, "does not have model 'a b/ü'"),
        ("bare", ModelConfigError, "'bare' has no parameter 'contract'"),
        ("future", ModelConfigError, "contract '2', this client knows '1'"),
    ):
        with client_type(url_of(server, protocol), model=model, protocol=protocol) as client:
            for call in (client.model_config, lambda: client.detect(scene()), lambda: client.infer(noise(1))):
                with pytest.raises(error, match=text):
                    call()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_server_down(protocol: Any, client_type: Any) -> None:
    started = time.monotonic()
    answer = pytest.raises(ServerUnavailableError, match=r"no server answers at 127\.0\.0\.1:1")
    with (
        client_type("127.0.0.1:1", model="fake", protocol=protocol, retries=2) as client,
        answer as caught,
    ):
        client.detect(scene())
    assert isinstance(caught.value, ConnectionError)
    assert 0.1 < time.monotonic() - started < 20, "two short pauses, no deadline"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_other_protocols_port(server: TritonServer, protocol: Any, client_type: Any) -> None:
    other = "http" if protocol == "grpc" else "grpc"
    answer = pytest.raises(SSDClientError, match=r"what to do: .*(protocol|port|timeout)")
    with client_type(url_of(server, other), model="fake", protocol=protocol, retries=0, timeout=5) as client, answer:
        client.detect(scene())


def test_deadline(server: TritonServer) -> None:
    with every_client(urls_of(server), timeout=0.4) as clients:
        for name, client in clients.items():
            eventually(client.model_config)
            started = time.monotonic()
            with pytest.raises(RequestTimeoutError, match=r"no answer .* within 0\.4 s") as caught:
                client.infer(order(fake_model.SLEEP, 6))
            assert time.monotonic() - started > 0.3, name
            assert isinstance(caught.value, TimeoutError)
            images = noise(1)
            assert_same_bits(eventually(lambda client=client, images=images: client.infer(images)), expected(images))


# -- a server that goes away and comes back ----------------------------------------------------------------------------


def test_killed_in_mid_request_and_started_again(repository: Path) -> None:
    """Every client at once: few retries give an error, many bridge the restart, and all of them recover."""
    images = noise(2)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(16) as threads:
        with server_on(repository) as first:
            urls = urls_of(first)
            clients = stack.enter_context(every_client(urls, retries=1))
            patient = stack.enter_context(every_client(urls, retries=20, timeout=60))
            for client in (*clients.values(), *patient.values()):
                assert_same_bits(client.infer(images), expected(images))
            slow = [threads.submit(client.infer, order(fake_model.SLEEP, 100)) for client in clients.values()]
            time.sleep(1)
            # In good order the server would wait for idle connections.
            os.killpg(first.pid, signal.SIGKILL)
            for future in slow:
                with pytest.raises(ServerUnavailableError, match="no server answers"):
                    future.result()
            for client in clients.values():
                with pytest.raises(ServerUnavailableError):
                    client.infer(images)
        bridging = [threads.submit(client.infer, images) for client in patient.values()]
        ports = {f"{protocol}_port": int(url.rsplit(":", 1)[1]) for protocol, url in urls.items()}
        with server_on(repository, **ports):
            for future in bridging:
                assert_same_bits(future.result(), expected(images))
            for client in clients.values():
                assert_same_bits(client.infer(images), expected(images))
                assert len(client.detect([scene()] * 9)) == 9
            stack.close()


# -- shared memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_regions_are_reused_and_nameless(server: TritonServer, protocol: Any, client_type: Any) -> None:
    with client_type(url_of(server, protocol), model="fake", protocol=protocol, shared_memory="system") as client:
        client.infer(noise(4))
        regions = server_regions(server)
        assert len(regions) == 1
        assert own_regions() == [], "nothing to leave behind, whatever happens"
        for _ in range(5):
            client.infer(noise(3))
        assert server_regions(server) == regions
    assert server_regions(server) == []


def test_close_waits_for_an_abandoned_request(server: TritonServer, client_type: Any) -> None:
    with client_type(server.grpc_url, model="fake", shared_memory="system", timeout=0.3) as client:
        eventually(client.model_config)
        with pytest.raises(RequestTimeoutError):
            client.infer(order(fake_model.SLEEP, 8))
    assert server_regions(server) == []


def test_no_room(server: TritonServer, client_type: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with client_type(server.grpc_url, model="fake", shared_memory="system") as client:
        client.model_config()
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(SharedMemoryError, match=r"No space left on device(.|\n)*shm-size"):
            client.infer(noise(1))
        monkeypatch.undo()
        assert client.infer(noise(1))["num_detections"].shape == (1, 1)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_that_cannot_open_the_region(
    server: TritonServer, protocol: Any, client_type: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from another machine or container: the name is not there for the server."""
    original = Region.__init__

    def hidden(self: Region, byte_size: int) -> None:
        original(self, byte_size)
        self.hide()

    monkeypatch.setattr(Region, "__init__", hidden)
    refusal = pytest.raises(SharedMemoryError, match=r"Unable to open shared memory region(.|\n)*allow-client-shm=true")
    with (
        client_type(url_of(server, protocol), model="fake", protocol=protocol, shared_memory="system") as client,
        refusal,
    ):
        client.infer(noise(1))


@pytest.mark.parametrize("ending", ["pass", "del client", "os.fork()"])
@pytest.mark.parametrize("kind", ["SSDClient", "AsyncSSDClient"])
def test_a_client_that_nobody_closes(server: TritonServer, kind: str, ending: str) -> None:
    """The blocking client uses its open connection once more; that of asyncio cannot, as its loop has ended."""
    call = (
        "client.infer(images)"
        if kind == "SSDClient"
        else "asyncio.new_event_loop().run_until_complete(client.infer(images))"
    )
    code = f"""
        import asyncio, os, numpy as np
        from ssd_client import SSDClient, AsyncSSDClient
        images = np.zeros((2, {HEIGHT}, {WIDTH}, 3), np.uint8)
        client = {kind}("{server.http_url}", protocol="http", model="fake", shared_memory="system")
        {call}
        print("done", flush=True)
        {ending}
    """
    done = subprocess.run(
        [sys.executable, "-W", "default::ResourceWarning", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "done\n", done.stderr
    assert f"ResourceWarning: the client of {server.http_url} (http) was never closed" in done.stderr
    assert "Exception ignored" not in done.stderr
    assert own_regions() == []
    if kind == "AsyncSSDClient":
        forget_regions(server, 1)
    assert server_regions(server) == []


def forget_regions(server: TritonServer, count: int) -> None:
    """A server keeps its mapping of a region until it is told otherwise."""
    from tritonclient import http

    assert len(server_regions(server)) == count
    with http.InferenceServerClient(server.http_url) as cleaner:
        cleaner.unregister_system_shared_memory()


def collect(monkeypatch: pytest.MonkeyPatch, make: Callable[[], object]) -> None:
    """Make a client and drop it; its finaliser has to warn, and to raise nothing."""
    raised: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
        gc.collect()
    assert any("was never closed" in str(warning.message) for warning in caught)
    assert raised == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_finaliser_needs_no_tls_files(protocol: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = TLS(tmp_path / "vanished.pem")
    collect(monkeypatch, lambda: AsyncSSDClient("localhost", model="m", protocol=protocol, ssl=tls) and None)


def test_a_finaliser_opens_no_connection(client_type: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server takes a region and closes the connection: telling it to let go would need a new one."""
    with configuration_server() as (url, requests):

        def make() -> None:
            client = client_type(url, model="fake", protocol="http", shared_memory="system", retries=0)
            with pytest.raises(InferenceError):
                client.infer(noise(1))

        collect(monkeypatch, make)
        time.sleep(0.2)
    assert [request.split()[0] for request in requests] == [b"GET", b"GET", b"POST", b"POST"], (
        "configuration, regions of killed clients, region, images"
    )
    assert own_regions() == []


# -- many at once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("protocol", "memory"), TRANSPORTS)
def test_one_client_for_many_threads(server: TritonServer, protocol: Any, memory: Any) -> None:
    wrong: list[object] = []

    def work(client: SSDClient, seed: int) -> None:
        try:
            for k in range(25):
                images = noise(1 + (seed + k) % 3, 100 * seed + k)
                assert_same_bits(client.infer(images), expected(images))
        except BaseException as error:
            wrong.append(error)

    with SSDClient(url_of(server, protocol), model="fake", protocol=protocol, shared_memory=memory) as client:
        threads = [threading.Thread(target=work, args=(client, seed)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert len(server_regions(server)) <= 6


@pytest.mark.parametrize(("protocol", "memory"), TRANSPORTS)
def test_many_tasks_and_cancelled_ones(server: TritonServer, protocol: Any, memory: Any) -> None:
    async def go() -> None:
        async with AsyncSSDClient(
            url_of(server, protocol), model="fake", protocol=protocol, shared_memory=memory
        ) as client:

            async def work(seed: int) -> None:
                images = noise(1 + seed % 3, seed)
                assert_same_bits(await client.infer(images), expected(images))

            await asyncio.gather(*(work(seed) for seed in range(40)))
            slow = asyncio.ensure_future(client.infer(order(fake_model.SLEEP, 5)))
            await asyncio.sleep(0.1)
            slow.cancel()
            with pytest.raises(asyncio.CancelledError):
                await slow
            many = asyncio.ensure_future(client.detect([scene(2000, 1000)] * 40))
            await asyncio.sleep(0.1)
            many.cancel()
            with pytest.raises(asyncio.CancelledError):
                await many
            await asyncio.gather(*(work(seed) for seed in range(40, 60)))

    asyncio.run(go())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_requests_overlap(server: TritonServer, protocol: Any, client_type: Any) -> None:
    """Two pictures in two requests on two instances, against both in one request: half the time, if nobody disturbs."""
    slow = order(fake_model.SLEEP, 3)[0]

    def seconds(max_in_flight: int) -> float:
        with client_type(
            url_of(server, protocol), model="fake", protocol=protocol, max_in_flight=max_in_flight
        ) as client:
            client.model_config()
            started = time.monotonic()
            client.detect([slow, slow])
            return time.monotonic() - started

    assert any(seconds(2) < 0.75 * seconds(1) for _ in range(5))


def test_closing(client_type: Any, server: TritonServer) -> None:
    client = client_type(server.grpc_url, model="fake")
    client.detect(scene())
    client.close()
    client.close()
    with pytest.raises(SSDClientError, match="closed"):
        client.detect(scene())


@pytest.mark.parametrize("client_type", [SSDClient, AsyncSSDClient])
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda client: pickle.loads(pickle.dumps(client))])
def test_a_copy_has_all_settings(client_type: Any, again: Callable[[Any], Any]) -> None:
    """Each differs from its default, so that one that is left out is noticed."""
    settings: dict[str, Any] = {
        "url": "https://localhost/v1",
        "model": "m",
        "protocol": "http",
        "shared_memory": "system",
        "timeout": 7.0,
        "retries": 5,
        "ssl": TLS(),
        "max_in_flight": 2,
        "max_pixels": 1000,
        "headers": {"authorization": "Bearer x"},
        "try_timeout": 3.0,
    }
    assert set(settings) == set(inspect.signature(client_type).parameters)
    first = client_type(**settings)
    second = again(first)
    for name in ("_timeout", "_retries", "max_in_flight", "_max_pixels", "_try_timeout", "_shared"):
        assert getattr(second._session, name) == getattr(first._session, name)
    assert second._session.endpoint == first._session.endpoint
    assert second._settings == settings
    for client in (first, second):
        closed = client.close()
        if closed is not None:
            asyncio.run(closed)


def test_a_pickled_client_answers_in_a_spawned_process(server: TritonServer) -> None:
    with SSDClient(server.grpc_url, model="fake", shared_memory="system") as client:
        here = client.detect(scene())
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            there = pool.submit(client.detect, scene()).result()
    assert np.array_equal(here.boxes, there.boxes)
    assert len(here.boxes)


def test_both_clients_have_the_same_interface() -> None:
    def public(kind: type) -> dict[str, inspect.Signature]:
        names = [name for name in vars(kind) if not name.startswith("_")]
        return {name: inspect.signature(getattr(kind, name)) for name in [*names, "__init__"]}

    assert public(SSDClient) == public(AsyncSSDClient)


def test_config_can_be_read_again(client: SSDClient) -> None:
    first = client.model_config()
    assert client.model_config() is first
    assert client.model_config(refresh=True) == first
    assert client.model_config() is not first
