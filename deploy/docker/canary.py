#!/usr/bin/env python3
"""Asks a tritonserver for one real inference per model. Needs Python 3.9's standard library only.

Triton's health endpoints stay green when a model's instance has died or hangs; this does not.

    canary.py http://localhost:8000                        once: exit status 0 or 1
    canary.py http://localhost:8000 --listen 8005          answers probes, 200 or 503:
                                                           GET /healthz by an inference, for a kubelet
                                                           GET /readyz by Triton's own readiness, for a balancer

A full queue counts as alive: a busy server must not leave the balancer. After SIGTERM, probes get 404 until the server
is gone: balancers stop sending while the server still answers.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_SIZES = {"UINT8": 1, "INT32": 4, "FP32": 4}  # bytes per element of the inputs that this project's models have
# Of the models around a picture input (build/publish/picture.py): the parameter that marks them, and what they take.
_PART, _PICTURE = "picture_of", b"P6 1 1 255\n\0\0\0"
_BUSY = ("maximum queue size", "Exceeds maximum queue", "queue is full", "overloaded")


def _ask(url: str, seconds: float, data: bytes | None = None, headers: dict[str, str] | None = None) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is beside this program
    with opener.open(urllib.request.Request(url, data, headers or {}), timeout=seconds) as answer:
        return json.loads(answer.read() or "null")


def models(server: str, seconds: float) -> list[str]:
    """The models that are loaded, as the server's statistics list them."""
    return [entry["name"] for entry in _ask(f"{server}/v2/models/stats", seconds)["model_stats"]]


def infer(server: str, model: str, seconds: float) -> str:
    """Sends a black picture; why that failed, or empty where an answer came."""
    config = _ask(f"{server}/v2/models/{model}/config", seconds)
    batch = [1] if config.get("max_batch_size", 0) > 0 else []
    is_part = _PART in config.get("parameters", {})
    if is_part and "ensemble_scheduling" not in config:
        return ""  # a step around a model: the ensemble of both asks it
    inputs, body = [], b""
    for entry in config["input"]:
        kind = entry["data_type"].removeprefix("TYPE_")
        if is_part:
            shape, content = [1, len(_PICTURE)], _PICTURE
        else:
            shape = batch + [max(1, int(size)) for size in entry["dims"]]
            if kind not in _SIZES:
                return f"{model}: its input {entry['name']} is {kind}, which no model of this project takes"
            content = bytes(_SIZES[kind] * math.prod(shape))
        inputs.append(
            {"name": entry["name"], "datatype": kind, "shape": shape, "parameters": {"binary_data_size": len(content)}}
        )
        body += content
    # Not num_detections: the backend's metric of detections counts the images of requests that ask for it. The boxes
    # come from the last step around a picture input.
    names = ["detection_boxes"]
    head = json.dumps({"inputs": inputs, "outputs": [{"name": name} for name in names]}).encode()
    try:
        answer = _ask(
            f"{server}/v2/models/{model}/infer",
            seconds,
            head + body,
            {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"},
        )
    except urllib.error.HTTPError as error:
        reason = error.read().decode(errors="replace")
        return "" if any(word in reason for word in _BUSY) else f"{model}: HTTP {error.code}: {reason[:300]}"
    missing = set(names) - {output.get("name") for output in answer.get("outputs", [])}
    return f"{model}: the answer has no {', '.join(sorted(missing))}" if missing else ""


def check(server: str, seconds: float) -> str:
    """Why a request for detections fails; empty where every model answers."""
    try:
        names = models(server, seconds)
        if not names:
            return "no model is loaded"
        return "; ".join(filter(None, (infer(server, name, seconds) for name in names)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{server}: {error}"


def ready(server: str, seconds: float) -> str:
    """Why the server says that it is not ready; empty where it is."""
    try:
        _ask(f"{server}/v2/health/ready", seconds)
    except (OSError, ValueError) as error:
        return f"{server}: {error}"
    return ""


def listen(server: str, seconds: float, port: int) -> None:
    """Answers probes until it is ended and the server is gone."""
    looks = {"/healthz": check, "/readyz": ready}
    ending = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            look = looks.get(self.path)
            if look is None or ending.is_set():
                status, text = 404, "ending" if look else "not found"
            else:
                fault = look(server, seconds)
                status, text = (503, fault) if fault else (200, "ok")
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: Any) -> None:
            """Probes come every few seconds; only failures are worth a line."""

    class Probes(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exc_info()[1], ConnectionError):  # some balancers reset a probe that is answered
                super().handle_error(request, client_address)

    def leave() -> None:
        while not ready(server, seconds):
            time.sleep(0.5)
        probes.shutdown()

    def end(number: int, frame: object) -> None:
        ending.set()
        threading.Thread(target=leave, daemon=True).start()

    probes = Probes(("", port), Handler)
    signal.signal(signal.SIGTERM, end)
    probes.serve_forever()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("server", help="such as http://localhost:8000")
    parser.add_argument("--seconds", type=float, default=10.0, help="that one answer may take")
    parser.add_argument("--listen", type=int, default=0, metavar="PORT", help="answer probes there")
    given = parser.parse_args()
    if given.listen:
        listen(given.server.rstrip("/"), given.seconds, given.listen)
    fault = check(given.server.rstrip("/"), given.seconds)
    print(fault or "ok", file=sys.stderr if fault else sys.stdout)
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
