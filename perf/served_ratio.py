"""How much of the raw speed is left when the same model is served: both measured in one run, in turn, so that whatever
else the machine does meets both sides alike.

Raw means ONNX Runtime in this process on the very file that is served, with as many threads in all as the server's
instances have, fed by as many client threads, no network and no copies: the best of the ways to split those threads.
"""

from __future__ import annotations

import itertools
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import ServeError
from perf.analyzer import Load, Point, run, write_input

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from ssd_client.config import ModelConfig
    from ssd_client.preprocess import ImageSource

    from build.serve import TritonServer

CLIENTS = 4
PICTURES = 16  # the load's variety; perf_analyzer sends them in turn


def measure(
    server: TritonServer, model: str, pictures: Sequence[ImageSource], *, quick: bool = False
) -> dict[str, Any]:
    """Latency of a single stream, throughput by concurrency, and the served share of the raw throughput.

    Args:
        server: running on this machine, with a model of runtime onnxruntime.
        model: name of the model.
        pictures: real ones; the first 16 make the load.
        quick: a shorter run with rougher figures.

    Returns:
        `latency_ms` {p50, p90, p99} of one client with shared memory; `throughput_ips` {concurrency: images/s} with
        shared memory; `served_ratio` {shm, grpc}: median over the rounds of served divided by raw at 4 clients, with
        pictures in shared memory (requests over HTTP, which cost client and server less than gRPC's) and with pictures
        sent by gRPC; `served_ips` and `raw_ips`, the medians behind it;
        `raw_threads`, the split of the threads that was the fastest raw; `other_load`, the share of the cores that
        other programs took just before: where it is not near 0, the figures say little.

    Raises:
        PerfError: perf_analyzer could not measure.
        ServeError: the model has no model.onnx to compare with.
    """
    from ssd_client import SSDClient
    from ssd_client.preprocess import input_array

    rounds, seconds = (2, 0.6) if quick else (4, 0.8)
    with SSDClient(server.grpc_url, model=model) as client:
        config = client.model_config()
    images = [input_array(picture, config)[0] for picture in pictures[:PICTURES]]
    path = server.repository / model / server.models[model] / "model.onnx"
    if not path.is_file():
        raise ServeError(f"{path} is not there", why=f"model {model} is served by {config.runtime}, not by onnxruntime")
    thresholds = _thresholds(config)
    busy = other_load()
    raw = fastest_raw(path, _feeds(images, thresholds), _threads(server, model))
    with tempfile.TemporaryDirectory(prefix="ssd-perf-") as folder:
        data = write_input(Path(folder) / "input.json", images, thresholds)

        def over_shm(concurrency: int) -> Point:
            load = Load(concurrency=concurrency, protocol="http", shared_memory="system")
            return run(server.http_url, model, data, load, seconds=seconds, retries=0)

        single, double = over_shm(1), over_shm(2)
        raw_ips, shm, grpc = [raw.throughput(seconds)], [], []
        for _ in range(rounds):
            shm.append(over_shm(CLIENTS).throughput)
            load = Load(concurrency=CLIENTS)
            grpc.append(run(server.grpc_url, model, data, load, seconds=seconds, retries=0).throughput)
            raw_ips.append(raw.throughput(seconds))
    # Each round's served runs lie between two raw ones.
    between = [(before + after) / 2 for before, after in itertools.pairwise(raw_ips)]
    return {
        "latency_ms": {name: single.latency_ms[name] for name in ("p50", "p90", "p99")},
        "throughput_ips": {"1": single.throughput, "2": double.throughput, str(CLIENTS): statistics.median(shm)},
        "served_ratio": {
            "shm": statistics.median(served / base for served, base in zip(shm, between, strict=True)),
            "grpc": statistics.median(served / base for served, base in zip(grpc, between, strict=True)),
        },
        "served_ips": {"shm": statistics.median(shm), "grpc": statistics.median(grpc)},
        "raw_ips": statistics.median(raw_ips),
        "raw_threads": f"{raw.sessions} x {raw.threads}",
        "other_load": busy,
    }


class Raw:
    """A model in this process: `sessions` ONNX Runtime sessions of `threads` threads each, fed by 4 client threads.

    Args:
        path: the ONNX file.
        feeds: requests to send in turn.
        sessions: how many requests run at once.
        threads: for each of them.
    """

    def __init__(
        self, path: Path, feeds: Sequence[dict[str, NDArray[np.generic]]], sessions: int, threads: int
    ) -> None:
        import onnxruntime

        self.sessions, self.threads, self._feeds = sessions, threads, feeds
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(sessions):
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            session.run(None, feeds[0])
            self._idle.put(session)

    def throughput(self, seconds: float) -> float:
        """Images per second over `seconds`."""
        done = [0] * CLIENTS
        started = time.perf_counter()
        deadline = started + seconds

        def client(number: int) -> None:
            while time.perf_counter() < deadline:
                session = self._idle.get()
                try:
                    session.run(None, self._feeds[(number + done[number]) % len(self._feeds)])
                finally:
                    self._idle.put(session)
                done[number] += 1

        clients = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        return sum(done) / (time.perf_counter() - started)


def fastest_raw(path: Path, feeds: Sequence[dict[str, NDArray[np.generic]]], threads: int) -> Raw:
    """The split of `threads` into sessions × threads that gets the most through: the opponent is given its best."""
    splits = [sessions for sessions in range(1, threads + 1) if threads % sessions == 0]
    candidates = [Raw(path, feeds, sessions, threads // sessions) for sessions in splits]
    for candidate in candidates:
        candidate.throughput(0.1)
    return max(candidates, key=lambda candidate: candidate.throughput(0.4))


def other_load(seconds: float = 0.5) -> float:
    """Share of all cores, 0..1, that is in use while this process waits."""
    import psutil

    return float(psutil.cpu_percent(interval=seconds)) / 100


def _threads(server: TritonServer, model: str) -> int:
    """Instances × threads of the served model."""
    config = server.model_config(model)
    instances = sum(int(group.get("count", 1)) for group in config["instance_group"])
    return instances * int(config["parameters"]["threads"]["string_value"])


def _thresholds(config: ModelConfig) -> dict[str, float]:
    if not config.runtime_thresholds:
        return {}
    return {"score_threshold": config.score_threshold, "iou_threshold": config.iou_threshold}


def _feeds(images: Sequence[NDArray[Any]], thresholds: dict[str, float]) -> list[dict[str, NDArray[np.generic]]]:
    import numpy as np

    extra = {name: np.full((1, 1), value, np.float32) for name, value in thresholds.items()}
    return [{"images": image[None], **extra} for image in images]
