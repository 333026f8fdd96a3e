"""What the gateway answers, as a process of its own in front of a real Triton server."""

from __future__ import annotations

import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ssd_client import SSDClient
from ssd_client.exceptions import ModelNotFoundError
from ssd_gateway import app, openapi
from ssd_gateway.models import Models
from ssd_gateway.problems import problem_of
from ssd_gateway.settings import Settings
from tritonclient.grpc import service_pb2

from build.serve import TritonServer
from tests.client.conftest import order, scene, self_signed, server_on, write_repository
from tests.client.fake_model import RAISE, SLEEP
from tests.gateway.conftest import MAX_BYTES, MAX_REQUESTS, PICTURE, READ_TIMEOUT, Running, encoded, form, gateway

pytestmark = pytest.mark.triton


def slow(tenths: int) -> bytes:
    return encoded(order(SLEEP, tenths)[0])


@pytest.mark.parametrize("model", ["fake", "letterbox"])
def test_answers_what_the_client_finds(running: Running, fake_server: TritonServer, model: str) -> None:
    with SSDClient(fake_server.grpc_url, model=model) as client:
        wanted = client.detect(PICTURE, score_threshold=0.3)
        config = client.model_config()
    assert len(wanted) >= 2
    body, kind = form(('name="note"', b"text"), ('name="any"; filename="a.png"', PICTURE))
    query = f"?score_threshold=0.3&model={model}"
    for answer in (
        running.detect(PICTURE, query),
        running.detect(PICTURE, query, kind="application/octet-stream"),
        running.detect(iter([PICTURE[:50], PICTURE[50:]]), query),  # chunked
        running.detect(body, query, kind),
    ):
        assert answer.status == 200, answer.body
        found = answer.json
        assert [d["box"] for d in found["detections"]] == wanted.boxes.tolist()
        assert [d["score"] for d in found["detections"]] == wanted.scores.tolist()
        assert [d["label"] for d in found["detections"]] == list(wanted.labels)
        assert [d["class_id"] for d in found["detections"]] == wanted.class_ids.tolist()
        assert found["image_size"] == [200, 100]
        assert (found["model"], found["version"], found["manifest_sha256"]) == (model, "1", config.manifest_sha256)
        timings = found["timings_ms"]
        assert timings.pop("total") == pytest.approx(sum(timings.values()), abs=0.01)


def test_thresholds_reach_the_model(running: Running) -> None:
    def scores(query: str) -> list[float]:
        return [d["score"] for d in running.detect(PICTURE, query).json["detections"]]

    assert scores("?score_threshold=0.7&iou_threshold=0.8") == pytest.approx([0.9, 0.8])
    assert scores("?score_threshold=0.5&iou_threshold=0") == pytest.approx([0.9, 0.6])


def test_draws(running: Running, fake_server: TritonServer) -> None:
    with SSDClient(fake_server.grpc_url, model="fake") as client:
        wanted = client.detect(PICTURE, score_threshold=0.5).draw()
    drawn = running.detect(PICTURE, "?score_threshold=0.5", Accept="image/png")
    assert drawn.headers["Content-Type"] == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(drawn.body))), np.asarray(wanted))
    jpeg = running.detect(PICTURE, "?score_threshold=0.5", Accept="image/jpeg;q=0.9")
    image = Image.open(io.BytesIO(jpeg.body))
    assert (image.format, image.size) == ("JPEG", (200, 100))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(wanted)).mean() < 6


JPEG = encoded(np.random.default_rng(1).integers(0, 256, (200, 200, 3), np.uint8), "JPEG")
BOMB = encoded(np.zeros((1100, 1000), np.uint8))  # 1.1 megapixels in under two kilobytes
BAD_FORM = b'--limit\r\nContent-Disposition: form-data; name="x"; filename="x"\r\n\r\nnever ends'
_FORM = "multipart/form-data; boundary=b"
HOSTILE: list[tuple[str, dict[str, Any], int, str]] = [
    ("threshold above 1", {"path": "/detect?score_threshold=2"}, 400, "score_threshold is '2'"),
    ("threshold NaN", {"path": "/detect?iou_threshold=nan"}, 400, "iou_threshold is 'nan'"),
    ("threshold no number", {"path": "/detect?score_threshold=x"}, 400, "score_threshold is 'x'"),
    ("misspelt option", {"path": "/detect?threshold=0.5"}, 400, "does not know threshold"),
    ("empty body", {"body": b""}, 400, "the body is empty"),
    ("form without a file", {"form": [('name="x"', b"y")]}, 400, "the form has no file"),
    ("form of very many fields", {"form": [('name="x"', b"y")] * 5000}, 400, "its first 100 parts are no files"),
    ("form with a long header", {"form": [('name="x"' + "x" * 20_000, b"y")]}, 400, "a header that is too long"),
    ("form with many headers", {"body": b"--b\r\n" + b"X: y\r\n" * 9000, "kind": _FORM}, 400, "form cannot be read"),
    ("form that is all preamble", {"body": b"x\r\n" * 90_000, "kind": _FORM}, 400, "the form has no file"),
    ("form of another alphabet", {"kind": "multipart/form-data; boundary=\xff"}, 400, "form cannot be read"),
    ("option given twice", {"path": "/detect?model=fake&model=letterbox"}, 400, "model is given more than once"),
    ("form that ends early", {"body": BAD_FORM, "kind": "multipart/form-data; boundary=limit"}, 400, ""),
    ("form without boundary", {"kind": "multipart/form-data"}, 400, "form cannot be read"),
    ("no such path", {"path": "/nothing"}, 404, "see /openapi.json"),
    ("no such model", {"path": "/detect?model=nothing"}, 404, "no model 'nothing'"),
    ("somebody else's model", {"path": "/detect?model=bare"}, 404, "obeys the contract"),
    ("a path as model", {"path": "/detect?model=../fake"}, 404, "no model '../fake'"),
    ("GET of /detect", {"method": "GET"}, 405, "Method Not Allowed"),
    ("form without length", {"body": iter([BAD_FORM]), "kind": "multipart/form-data; boundary=limit"}, 411, "length"),
    ("too many bytes", {"body": bytes(MAX_BYTES + 1)}, 413, f"more than {MAX_BYTES} bytes"),
    ("too many bytes, chunked", {"body": iter([bytes(100_000)] * 4)}, 413, f"more than {MAX_BYTES} bytes"),
    ("too many pixels", {"body": BOMB}, 413, "1000 x 1100 = 1.1 megapixels"),
    ("text", {"body": b"hello", "kind": "text/plain"}, 415, "'text/plain', not a picture"),
    ("text called a picture", {"body": b"hello"}, 415, "not a picture in any known format"),
    ("PostScript", {"body": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, 415, "not a picture"),
    ("compressed", {"headers": {"Content_Encoding": "gzip"}}, 415, "encoded as 'gzip'"),
    ("cut off", {"body": JPEG[: len(JPEG) // 2]}, 422, "damaged or was cut off"),
    ("threshold of a fixed model", {"path": "/detect?model=letterbox&score_threshold=0.1"}, 422, "built in"),
    ("page of another origin", {"headers": {"Origin": "http://example.com"}}, 403, "may not use this gateway"),
    ("embedded by another page", {"headers": {"Sec_Fetch_Site": "cross-site"}}, 403, "pages of others"),
    ("sandboxed page", {"headers": {"Origin": "null"}}, 403, "may not use this gateway"),
    ("another name", {"headers": {"Host": "example.com"}}, 403, "not called 'example.com'"),
    ("a name that is none", {"headers": {"Host": "["}}, 403, "not called ''"),
    ("no name", {"headers": {"Host": ""}}, 403, "not called ''"),
    ("model that fails", {"body": encoded(order(RAISE)[0])}, 502, "the picture asked for an error"),
    ("model that takes too long", {"body": slow(29)}, 504, "within 2 s"),
]


@pytest.mark.parametrize(("request_", "status", "words"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_says_what_is_wrong(running: Running, request_: dict[str, Any], status: int, words: str) -> None:
    body, kind = request_.get("body", PICTURE), request_.get("kind", "image/png")
    if "form" in request_:
        body, kind = form(*request_["form"])
    method = request_.get("method", "POST")
    headers = {"Content_Type": kind, **request_.get("headers", {})}
    answer = running.ask(request_.get("path", "/detect"), body, method, **headers)
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"].startswith("application/problem+json")
    problem = answer.json
    assert problem.keys() == {"type", "title", "status", "detail"}
    assert problem["status"] == status
    assert words in problem["detail"]
    if status in (404, 405):
        return
    described = openapi.describe(Settings())["paths"]["/detect"]["post"]["responses"]
    assert str(status) in described, "not in /openapi.json"


def test_more_than_it_takes_is_refused_at_once(running: Running) -> None:
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(running.detect(slow(8)).status)) for _ in range(MAX_REQUESTS)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    started = time.monotonic()
    refused = running.detect(PICTURE)
    assert time.monotonic() - started < 0.3
    assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
    assert running.ask("/healthz").status == 200
    for thread in threads:
        thread.join()
    assert answers == [200] * MAX_REQUESTS
    assert running.detect(PICTURE).status == 200


def test_what_does_not_come_is_not_waited_for(running: Running) -> None:
    host, port = running.address.split(":")
    head = f"POST /detect HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {len(PICTURE)}"
    sent = [b"", b"POST /detect HTTP/1.1\r\nHost: loc", f"{head}\r\n\r\n".encode() + PICTURE[:-1]]
    connections = [socket.create_connection((host, int(port)), timeout=10) for _ in sent]
    started = time.monotonic()
    for connection, part in zip(connections, sent, strict=True):
        connection.sendall(part)
    answers = [connection.recv(20) for connection in connections]
    assert READ_TIMEOUT - 0.2 < time.monotonic() - started < READ_TIMEOUT + 1
    assert answers == [b"", b"", b"HTTP/1.1 408 Request"]
    for connection in connections:
        connection.close()


def test_describes_itself(running: Running) -> None:
    described = running.ask("/openapi.json").json
    routes = {(r.method.lower(), r.resource.canonical) for r in app.Gateway(Settings()).app().router.routes()}
    assert {(method, path) for path, methods in described["paths"].items() for method in methods} == {
        route for route in routes if route[0] != "head"
    }
    for path, name in (("/info", "Info"), ("/healthz", "Health")):
        fits(running.ask(path).json, {"$ref": f"#/components/schemas/{name}"}, described)
    fits(running.detect(PICTURE).json, {"$ref": "#/components/schemas/Detections"}, described)
    fits(running.detect(b"hello").json, {"$ref": "#/components/schemas/Problem"}, described)
    assert [model["name"] for model in running.ask("/info").json["models"]] == ["fake", "letterbox"]


def fits(value: Any, schema: dict[str, Any], described: dict[str, Any]) -> None:
    """Whether a value is what a schema says, as far as this description uses JSON Schema."""
    while "$ref" in schema:
        schema = described["components"]["schemas"][schema["$ref"].split("/")[-1]]
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    assert isinstance(value, kinds[schema["type"]]), (value, schema)
    if schema["type"] == "object" and "properties" in schema:
        assert value.keys() == schema["properties"].keys()
        for name, part in value.items():
            fits(part, schema["properties"][name], described)
    if schema["type"] == "array":
        assert schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**9)
        for part in value:
            fits(part, schema["items"], described)


def test_counts(running: Running) -> None:
    def figure(name: str) -> float:
        match = re.search(rf"^{re.escape(name)} (\S+)$", running.ask("/metrics").body.decode(), re.M)
        return float(match[1]) if match else 0.0

    names = {
        'ssd_gateway_requests_total{method="POST",route="/detect",status="200"}': 2,
        'ssd_gateway_requests_total{method="POST",route="/detect",status="415"}': 1,
        'ssd_gateway_requests_total{method="GET",route="other",status="404"}': 1,
        'ssd_gateway_request_seconds_count{route="/detect"}': 3,
        'ssd_gateway_detections_per_picture_count{model="fake"}': 2,
        'ssd_gateway_detections_per_picture_sum{model="fake"}': 5,
        "ssd_gateway_pictures_in_hand": 0,
    }
    before = {name: figure(name) for name in names}
    running.detect(PICTURE, "?score_threshold=0.5&iou_threshold=0")
    running.detect(PICTURE, "?score_threshold=0.5&iou_threshold=1")
    running.detect(b"hello")
    running.ask("/wp-login.php")
    assert {name: figure(name) - before[name] for name in names} == names


def test_page_has_nothing_of_others_and_a_policy_that_says_so(running: Running) -> None:
    answer = running.ask("/")
    page, policy = answer.body.decode(), answer.headers["Content-Security-Policy"]
    assert policy == app.policy_of(page)
    assert "unsafe" not in policy
    assert len(re.findall("'sha256-", policy)) == 2
    assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w+", page)
    assert not re.findall(r"<[^>]+\s(?:style|on\w+)=", page.split("<script>")[0])
    for path in ("/", "/info", "/nothing"):
        assert running.ask(path).headers["X-Content-Type-Options"] == "nosniff"


@pytest.fixture
def nowhere(tmp_path: Path) -> Iterator[Running]:
    """A gateway with a token whose model server does not answer."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with gateway(f"127.0.0.1:{unused.getsockname()[1]}", tmp_path, token="s3cret-token") as started:
            yield started


def test_token_and_a_server_that_is_not_there(nowhere: Running) -> None:
    for path in ("/info", "/metrics"):
        refused = nowhere.ask(path, Authorization="Bearer s3cret-tokem")
        assert (refused.status, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert nowhere.detect(PICTURE).status == 401
    assert nowhere.ask("/").status == 200
    for answer in (
        nowhere.detect(PICTURE, Authorization="Bearer s3cret-token"),
        nowhere.ask("/info", Authorization="Bearer s3cret-token"),
        nowhere.ask("/healthz"),
    ):
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert "no server answers at 127.0.0.1" in answer.json["detail"]
    command = Path(f"/proc/{nowhere.process.pid}/cmdline").read_bytes()
    assert b"s3cret" not in command


def test_scene_of_the_client_is_json_too(running: Running) -> None:
    """A form's name and a file's name decide nothing, and JSON has no NaN."""
    body, kind = form(('name="\u00fc"; filename="../../etc/passwd"', encoded(scene(640, 480), "JPEG")))
    assert json.loads(running.detect(body, "", kind).body, parse_constant=pytest.fail)["image_size"] == [640, 480]


def test_a_server_with_tls_and_a_token_past_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of models, too, goes the way that the client's requests go; and each worker knows all of it."""
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:9")  # leads nowhere, and is not for this machine
    chain, key = self_signed(tmp_path)
    tls = ("--grpc-use-ssl=true", f"--grpc-server-cert={chain}", f"--grpc-server-key={key}")
    restricted = "--grpc-restricted-protocol=inference,model-repository,statistics:token=sesame"
    with server_on(write_repository(tmp_path / "repository", "fake"), *tls, restricted) as server:
        triton = f"https://localhost:{server.grpc_url.rpartition(':')[2]}"
        token = "--header=triton-grpc-protocol-token: sesame"
        with gateway(triton, tmp_path, f"--tls-ca={chain}", token, "--workers=2") as let_in:
            answer = let_in.detect(PICTURE)
            assert answer.status == 200, answer.body
            assert len(answer.json["detections"]) == 3
        with gateway(triton, tmp_path, f"--tls-ca={chain}") as refused:
            for answer in (refused.detect(PICTURE), refused.ask("/info"), refused.ask("/healthz")):
                assert answer.status == 502, answer.body
                assert "does not let this client in" in answer.json["detail"]


def test_a_model_that_is_being_loaded_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    index = service_pb2.RepositoryIndexResponse()
    index.models.add(name="new", version="1", state="LOADING")
    index.models.add(name="broken", version="1", state="UNAVAILABLE", reason="no such file")
    models = Models(Settings())
    monkeypatch.setattr(models, "_index", SimpleNamespace(send=lambda message, timeout: index))
    for name, words, status in (
        ("new", "LOADING", 503),
        ("broken", "no such file", 503),
        ("other", "has no model", 404),
    ):
        with pytest.raises(ModelNotFoundError, match=words) as caught:
            models.choose(name)
        assert problem_of(caught.value).status == status
