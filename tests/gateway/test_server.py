"""The gateway's processes: signals, workers that die, command lines that are wrong, and callers that mean harm."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from ssd_gateway.cli import is_loopback, main

from build.serve import TritonServer
from tests.client.conftest import order
from tests.client.fake_model import SLEEP
from tests.gateway.conftest import PICTURE, Running, encoded, form, gateway

pytestmark = pytest.mark.triton
ROOT = Path(__file__).resolve().parents[2]


def test_stops_after_what_is_in_hand(fake_server: TritonServer, tmp_path: Path) -> None:
    with gateway(fake_server.grpc_url, tmp_path, "--model", "fake") as started:
        statuses: list[int] = []
        idle = socket.create_connection(("127.0.0.1", int(started.address.split(":")[1])))
        slow = encoded(order(SLEEP, 10)[0])
        asking = threading.Thread(target=lambda: statuses.append(started.detect(slow).status))
        asking.start()
        time.sleep(0.4)
        begun = time.monotonic()
        started.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        with pytest.raises(OSError):  # noqa: PT011 - refused or reset
            started.ask("/healthz")
        asking.join()
        assert statuses == [200]
        assert started.process.wait(10) == 0
        assert time.monotonic() - begun < 8, "an idle connection held it open"
        idle.close()


def test_workers_share_one_address_and_are_replaced(fake_server: TritonServer, tmp_path: Path) -> None:
    def workers() -> list[psutil.Process]:
        return psutil.Process(started.process.pid).children()

    def asked() -> float:
        lines = started.ask("/metrics").body.decode().splitlines()
        counted = 'ssd_gateway_requests_total{method="POST",route="/detect",status="200"}'
        return sum(float(line.split()[-1]) for line in lines if line.startswith(counted))

    with gateway(fake_server.grpc_url, tmp_path, "--model", "fake", "--workers", "2") as started:
        threads = [threading.Thread(target=started.detect, args=(PICTURE,)) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert asked() == 12  # of both, whichever answers
        first, second = workers()
        first.kill()
        deadline = time.monotonic() + 15
        while len(workers()) < 2 or first in workers():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert [started.detect(PICTURE).status for _ in range(6)] == [200] * 6
        assert asked() == 18
        children = workers()
        assert second in children
        assert f"worker {first.pid} ended with -9; starting another" in started.log.read_text()
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--triton", "localhost:80010"], "url is 'localhost:80010'"),
        (["--header", "Bearer"], "has no colon"),
        (["--timeout", "0"], "timeout is 0.0"),
        (["--max-pixels", "0"], "max_pixels is 0"),
        (["--workers", "0"], "workers is 0"),
        (["--port", "99999"], "--port is '99999'"),
        (["--port", "-1"], "--port is '-1'"),
        (["--port", "http"], "--port is 'http'"),
        (["--port", "1", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1, port 1"),
        (["--host", "no.such.name.invalid"], "cannot listen on no.such.name.invalid"),
        (["--token-file", "/nothing"], "No such file"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_a_wrong_command_line_is_explained(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_loopback() -> None:
    names = ("localhost", "127.0.0.1", "127.8.0.1", "::1", "0.0.0.0", "::", "192.168.0.1", "example.com")
    assert [is_loopback(name) for name in names] == [True] * 4 + [False] * 4


def hostile(rng: random.Random) -> bytes:
    """A request, or what pretends to be one, as bytes on the wire."""
    flat = encoded([[[0, 0, 0]] * rng.randint(1, 9)])
    bodies = (
        PICTURE,
        PICTURE[: rng.randrange(len(PICTURE))],
        bytes(rng.randrange(256) for _ in range(rng.randint(0, 400))),
        bytearray(PICTURE[:100]) + rng.randbytes(50) + PICTURE[150:],
        flat,
        b"GIF89a\xff\xff\xff\xff\x00\x00\x00;",  # 65535 x 65535
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\x02\x00\x00\x00" + bytes(40),
        b"BM" + rng.randbytes(60),
        b"II*\x00" + rng.randbytes(200),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        form(('name="a"; filename="b"', rng.randbytes(30)))[0],
    )
    body = rng.choice(bodies)
    kinds = ("image/png", "image/jpeg", "text/html", "application/octet-stream", "multipart/form-data; boundary=limit")

    def mostly(usual: str, *odd: str) -> str:
        return usual if rng.random() < 0.85 else rng.choice(odd)

    paths = ("/", "/info", "/../../etc/passwd", "/detect?model=%00", "/%ff", "*", "//x")
    queries = ("?score_threshold=1e999", "?model=" + "x" * 100, "?model=" + "x" * 9000, "?a=1&a=2")
    lengths = ("-1", "99999999999999", f"{len(body) + 9}", f"{len(body)}\r\nTransfer-Encoding: chunked", "")
    others = (
        "Content-Encoding: gzip",
        "Transfer-Encoding: chunked",
        f"X: {'y' * 20_000}",
        "Upgrade: h2c",
        "\x00: \xff",
    )
    lines = [
        mostly("POST", "GET", "PUT", "DELETE", "OPTIONS", "BREW", "")
        + f" {mostly('/detect', *paths)}{mostly('', *queries)} "
        + mostly("HTTP/1.1", "HTTP/1.0", "HTTP/9.9", ""),
        mostly("Host: localhost", "Host: evil.example", "Host: [", ""),
        f"Content-Type: {rng.choice(kinds)}",
        f"Content-Length: {mostly(str(len(body)), *lengths)}",
        mostly("", *others),
    ]
    head = "\r\n".join(line for line in lines if line).encode("latin-1")
    cut = rng.random()
    return head[: rng.randrange(len(head))] if cut < 0.05 else head + b"\r\n\r\n" + body


ALLOWED = {200, 400, 403, 404, 405, 408, 411, 413, 415, 417, 422, 429, 502, 504}


def attack(running: Running, count: int, seed: int, seen: Counter[int]) -> None:
    host, port = running.address.split(":")
    rng = random.Random(seed)
    for _ in range(count):
        with (
            contextlib.suppress(ConnectionError, TimeoutError),  # it may close while we still send
            socket.create_connection((host, int(port)), timeout=15) as connection,
        ):
            connection.sendall(hostile(rng))
            if rng.random() < 0.1:
                continue  # gone before the answer
            if rng.random() < 0.97:
                connection.settimeout(0.2)  # it may wait for more, and we do not for its answer
            answer = connection.recv(1000)
            seen[int(answer.split(b" ")[1]) if answer.startswith(b"HTTP/1.") else 0] += 1


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_withstands_hostile_requests(running: Running, count: int) -> None:
    seen: Counter[int] = Counter()
    for _ in range(30):
        running.detect(PICTURE)
    attack(running, count // 4, 0, seen)  # Pillow's decoders are loaded by now
    before = running.memory
    threads = [threading.Thread(target=attack, args=(running, count // 4, seed, seen)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    grown = running.memory - before
    print(dict(seen), f"memory grew by {grown / 2**20:.1f} MiB from {before / 2**20:.0f}")
    assert running.process.poll() is None
    assert running.detect(PICTURE).status == 200
    assert set(seen) - {0} <= ALLOWED, seen
    assert seen.total() - seen[0] > count * 0.5
    assert len(seen) > 8
    assert grown < 20 * 2**20
    time.sleep(0.2)
    metrics = running.ask("/metrics").body.decode()
    assert "ssd_gateway_pictures_in_hand 0.0" in metrics
    assert len(metrics) < 40_000, "names that callers choose became names of metrics"
    assert "Traceback" not in running.log.read_text()


def test_says_which_package_is_missing(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from ssd_gateway.cli import main; sys.exit(main(['--port', '0']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "client", capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "./client[gateway]" in done.stderr
