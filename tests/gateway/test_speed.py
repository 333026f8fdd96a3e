"""What the gateway costs beside the client, in turn in one run: `pytest -m long -s tests/gateway/test_speed.py`."""

from __future__ import annotations

import http.client
import io
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from PIL import Image
from ssd_client import SSDClient

from build.serve import TritonServer
from models.shapes.scenes import scene
from tests.gateway.conftest import Running, gateway

pytestmark = [pytest.mark.triton, pytest.mark.long, pytest.mark.timeout(600)]
ROUNDS, SECONDS, CALLERS = 5, 2.0, (1, 4, 8)


def photograph() -> bytes:
    """A JPEG file of 640 x 480 pixels."""
    stream = io.BytesIO()
    scene("held_out", 0).image.resize((640, 480), Image.Resampling.BILINEAR).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def load(make: Callable[[], Callable[[], int]], callers: int) -> tuple[float, float]:
    """Milliseconds of a request (median) and requests a second of so many callers."""
    times: list[float] = []
    end = time.perf_counter() + SECONDS

    def call() -> None:
        ask = make()
        ask()
        while time.perf_counter() < end:
            begun = time.perf_counter()
            ask()
            times.append(time.perf_counter() - begun)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 1000 * statistics.median(times), len(times) / (time.perf_counter() - begun)


def test_what_the_gateway_costs(triton_server: TritonServer, tmp_path: Path) -> None:
    picture = photograph()

    def web(running: Running) -> Callable[[], Callable[[], int]]:
        def make() -> Callable[[], int]:
            connection = http.client.HTTPConnection(running.address)

            def ask() -> int:
                connection.request("POST", "/detect?score_threshold=0.5", picture, {"Content-Type": "image/jpeg"})
                answer = connection.getresponse()
                body = answer.read()
                assert answer.status == 200, body
                return len(json.loads(body)["detections"])

            return ask

        return make

    options = ("--model", "shapes", "--shared-memory")
    with (
        SSDClient(triton_server.grpc_url, model="shapes", shared_memory="system") as client,
        gateway(triton_server.grpc_url, tmp_path, *options) as one,
        gateway(triton_server.grpc_url, tmp_path, *options, "--workers", "2") as two,
    ):
        kinds = {"client": lambda: lambda: len(client.detect(picture, score_threshold=0.5))}
        kinds |= {"gateway, 1 worker": web(one), "gateway, 2 workers": web(two)}
        assert len({make()() for make in kinds.values()}) == 1, "they do not find the same"
        seen: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for number in range(ROUNDS + 1):
            for callers in CALLERS:
                for name, make in kinds.items():
                    figures = load(make, callers)
                    if number:  # the first round warms up
                        seen.setdefault((name, callers), []).append(figures)
        children = psutil.Process(two.process.pid).children()
        print(
            f"\nmemory of the gateway: {one.memory >> 20} MiB, of two workers "
            f"{sum(child.memory_info().rss for child in children) >> 20} MiB"
        )
    for (name, callers), rounds in seen.items():
        latency, rate = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{name:20} {callers} callers: {latency:6.1f} ms p50 {rate:6.1f} requests/s")

    def paired(name: str, callers: int, value: Callable[[tuple[float, float], tuple[float, float]], float]) -> float:
        pairs = zip(seen["client", callers], seen[name, callers], strict=True)
        return statistics.median(value(client, web) for client, web in pairs)

    added = paired("gateway, 1 worker", 1, lambda client, web: web[0] - client[0])
    ratios = {
        (name, callers): paired(name, callers, lambda client, web: web[1] / client[1])
        for name in list(kinds)[1:]
        for callers in CALLERS[1:]
    }
    print(f"added to one caller's p50: {added:.2f} ms; throughput compared with the client's: ", ratios)
    assert added <= 4
    assert ratios["gateway, 1 worker", 4] >= 0.85
