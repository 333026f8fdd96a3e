"""Gateways as processes of their own, in front of the fake detector of the client's tests or of the real `shapes`."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from PIL import Image

from build.serve import TritonServer
from tests.client.conftest import scene, server_on, write_repository

CLIENT = Path(__file__).resolve().parents[2] / "client"
MAX_BYTES, MAX_PIXELS, MAX_REQUESTS, TIMEOUT, READ_TIMEOUT = 300_000, 1_000_000, 4, 2.0, 1.5


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Running:
    """A gateway that runs.

    Attributes:
        address: `host:port`.
        process: its process.
        log: what it wrote to standard error.
    """

    address: str
    process: subprocess.Popen[str]
    log: Path

    def ask(self, path: str, body: Any = None, method: str = "", timeout: float = 30, **headers: str) -> Answer:
        """One request; underscores in the names of headers are dashes."""
        connection = http.client.HTTPConnection(self.address, timeout=timeout)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method or ("GET" if body is None else "POST"), path, body, named)
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    def detect(self, body: Any, query: str = "", kind: str = "image/png", **headers: str) -> Answer:
        return self.ask(f"/detect{query}", body, Content_Type=kind, **headers)

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)


@contextlib.contextmanager
def gateway(triton: str, folder: Path, *arguments: str, token: str = "") -> Iterator[Running]:
    """Starts one, and ends it with SIGTERM, after which it must be gone in time and without a traceback."""
    log = folder / f"gateway-{time.monotonic_ns()}.log"
    environment = {**os.environ, "PYTHONPATH": str(CLIENT), "SSD_GATEWAY_TOKEN": token, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "ssd_gateway", "--triton", triton, "--port", "0", *arguments]
    with log.open("w") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"http://\S+:\d+", line)
        assert match, (line, log.read_text())
        yield Running(urlsplit(match[0]).netloc.replace("localhost", "127.0.0.1"), process, log)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture(scope="session")
def fake_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The fake detector with and without run-time thresholds, and a model that is not this project's."""
    folder = write_repository(tmp_path_factory.mktemp("fakes") / "repository", "fake", "letterbox", "bare")
    with server_on(folder) as running:
        yield running


@pytest.fixture(scope="session")
def running(fake_server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway with small limits in front of it."""
    limits = {
        "--max-bytes": MAX_BYTES,
        "--max-pixels": MAX_PIXELS,
        "--max-requests": MAX_REQUESTS,
        "--timeout": TIMEOUT,
        "--read-timeout": READ_TIMEOUT,
        "--threads": 2,
    }
    arguments = [str(part) for pair in limits.items() for part in pair]
    with gateway(fake_server.grpc_url, tmp_path_factory.mktemp("gateway"), "--model", "fake", *arguments) as started:
        yield started


def encoded(pixels: Any, kind: str = "PNG", **options: Any) -> bytes:
    """A picture file."""
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(stream, kind, **options)
    return stream.getvalue()


PICTURE = encoded(scene())


def form(*parts: tuple[str, bytes], boundary: str = "limit") -> tuple[bytes, str]:
    """A multipart form and its content type; each part is what stands after `form-data; `, and the content."""
    body = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + content + b"\r\n"
        for head, content in parts
    )
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"
