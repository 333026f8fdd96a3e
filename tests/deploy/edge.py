"""What one client can do to a tritonserver 2.51, and the proxy that stops it (docs/security.md)."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from build.serve import TritonServer

CONFIG = Path(__file__).resolve().parents[2] / "deploy" / "edge" / "haproxy.cfg"


@dataclass(frozen=True)
class Edge:
    """Ports of a proxy on this machine."""

    http: int
    grpc: int


@contextmanager
def haproxy(server: TritonServer) -> Iterator[Edge]:
    """HAProxy with deploy/edge/haproxy.cfg in front of a server."""
    program = shutil.which("haproxy") or "/usr/sbin/haproxy"
    with closing(socket.socket()) as one, closing(socket.socket()) as two:
        for probe in (one, two):
            probe.bind(("127.0.0.1", 0))
        edge = Edge(one.getsockname()[1], two.getsockname()[1])
    environment = {
        **os.environ,
        "EDGE_HTTP": f"127.0.0.1:{edge.http}",
        "EDGE_GRPC": f"127.0.0.1:{edge.grpc}",
        "TRITON_HTTP": server.http_url,
        "TRITON_GRPC": server.grpc_url,
    }
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([program, "-db", "-f", str(CONFIG)], env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 10
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", edge.http), timeout=1):
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(log.read().decode())
                time.sleep(0.05)
            yield edge
        finally:
            process.terminate()
            process.wait()


def send(port: int, head: str, *body: bytes, wait: float = 10.0) -> str:
    """Sends a request over HTTP; returns the first line of the answer, empty where the connection just ended."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(head.encode() + b"\r\n\r\n")
            for part in body:
                connection.sendall(part)
        with contextlib.suppress(OSError):
            return connection.recv(4096).split(b"\r\n")[0].decode()
    return ""


def nested_json(port: int) -> str:
    """400 kB of brackets where a request's JSON is expected."""
    data = b'{"inputs":' + b"[" * 400_000
    return send(port, f"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}", data)


def tiny_chunks(port: int, count: int = 6_000_000) -> str:
    """A body in chunks of one byte."""
    head = "POST /v2/models/tiny/infer HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked"
    block = b"1\r\na\r\n" * 10_000
    return send(port, head, *[block] * (count // 10_000), b"0\r\n\r\n", wait=60)


def gzip_bomb(port: int, megabytes: int = 128) -> str:
    """A thousandth of that many megabytes, which unpacks to all of them."""
    data = gzip.compress(b"\0" * (megabytes << 20), 9)
    head = "POST /v2/models/tiny/infer HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip\r\nContent-Length: "
    return send(port, f"{head}{len(data)}\r\nInference-Header-Content-Length: 10", data, wait=60)


def truncated_shared_memory(port: int) -> str:
    """Shared memory that is cut after the server mapped it, then named as an input."""
    name = f"ssd-edge-{os.getpid()}"
    path = Path("/dev/shm") / name
    path.write_bytes(b"\0" * (4 << 20))
    try:
        body = json.dumps({"key": f"/{name}", "offset": 0, "byte_size": 4 << 20}).encode()
        path_of = "/v2/systemsharedmemory/region/edge/register"
        first = send(port, f"POST {path_of} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}", body)
        os.truncate(path, 0)
        tensors = [("images", "UINT8", [1, 8, 8, 3], 192), ("score_threshold", "FP32", [1, 1], 4)]
        tensors.append(("iou_threshold", "FP32", [1, 1], 4))
        inputs = []
        for tensor, kind, shape, size in tensors:
            place = {"shared_memory_region": "edge", "shared_memory_byte_size": size, "shared_memory_offset": 1 << 20}
            inputs.append({"name": tensor, "datatype": kind, "shape": shape, "parameters": place})
        body = json.dumps({"inputs": inputs}).encode()
        send(port, f"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}", body)
        return first
    finally:
        path.unlink(missing_ok=True)


ATTACKS: dict[str, tuple[Callable[[int], str], str]] = {
    "nested JSON": (nested_json, "413"),
    "one-byte chunks": (tiny_chunks, "411"),
    "gzip bomb": (gzip_bomb, "415"),
    "truncated shared memory": (truncated_shared_memory, "403"),
}
