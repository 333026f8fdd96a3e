"""The same model in this process: the baseline of everything that is served.

    with beside(server, "shapes", images, config) as direct:
        direct.throughput(1.0)  # images per second of n clients
        direct.latency(1.0)  # {"p50", "p90", "p99"}: milliseconds of a single stream

No network and no copies: the engine that serves, ONNX Runtime or OpenVINO, on the very file that is served, with as
many threads in all as the server's instances have, split into sessions the best way; or TensorRT on the very plan
(never run on a GPU so far).
"""

from __future__ import annotations

import contextlib
import json
import queue
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import contract
from build.errors import ServeError
from build.publish import backend, openvino, repository
from build.session import runner

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from ssd_client.config import ModelConfig

    from build.serve import TritonServer

CLIENTS = 4
FEWEST = 20  # runs behind a percentile
REQUESTS, TRIAL_S = 24, 0.3  # behind a throughput that is compared, at least
CLEARLY = 1.05  # times faster than the server's split another must be to be taken instead

Feed = dict[str, "NDArray[np.generic]"]
Runner = Callable[[Feed], Any]  # one request, answered


class Direct:
    """A model in this process that answers as many requests at once as it has runners.

    Args:
        runners: each answers one request at a time; requests find the one that is idle.
        feeds: requests to send in turn, all of one batch size.
        threads: of each runner; for the record.
        clients: how many threads send requests.
    """

    def __init__(
        self, runners: Sequence[Runner], feeds: Sequence[Feed], *, threads: int = 1, clients: int = CLIENTS
    ) -> None:
        self.sessions, self.threads, self.clients = len(runners), threads, clients
        self.single = runners[0]  # what `latency` measures
        self.batch_size = len(next(iter(feeds[0].values())))
        self._feeds = feeds
        self._idle: queue.SimpleQueue[Runner] = queue.SimpleQueue()
        for run in runners:
            run(feeds[0])
            self._idle.put(run)

    def __str__(self) -> str:
        return f"{self.sessions} x {self.threads}"

    def throughput(self, seconds: float) -> float:
        """Images per second over `seconds`."""
        started = time.perf_counter()
        deadline = started + seconds

        def client(number: int) -> int:
            done = 0
            while time.perf_counter() < deadline:
                run = self._idle.get()
                try:
                    run(self._feeds[(number + done) % len(self._feeds)])
                finally:
                    self._idle.put(run)
                done += 1
            return done

        with ThreadPoolExecutor(self.clients) as pool:
            requests = sum(pool.map(client, range(self.clients)))
        return requests * self.batch_size / (time.perf_counter() - started)

    def latency(self, seconds: float) -> dict[str, float]:
        """Milliseconds of one request after another, with nothing else on the way: {p50, p90, p99}."""
        import numpy as np

        times: list[float] = []
        deadline = time.perf_counter() + seconds
        while len(times) < FEWEST or time.perf_counter() < deadline:
            begun = time.perf_counter()
            self.single(self._feeds[len(times) % len(self._feeds)])
            times.append((time.perf_counter() - begun) * 1000)
        return {f"p{percent}": float(np.percentile(times, percent)) for percent in (50, 90, 99)}


@contextlib.contextmanager
def beside(
    server: TritonServer, model: str, images: Sequence[NDArray[np.uint8]], config: ModelConfig, *, batch_size: int = 1
) -> Iterator[Direct]:
    """What a server serves, in this process, with the server's number of threads or of plans at once.

    Args:
        server: a running one.
        model: name of the model.
        images: UINT8 [H,W,3], at the model's input size.
        config: the model's, for its thresholds.
        batch_size: images of a request.

    Raises:
        ServeError: the served version has no model.onnx or model.plan here.
        EngineError: the plan cannot run here.
    """
    requests = feeds(images, thresholds(config), batch_size)
    triton = server.model_config(model)
    instances, threads = split(triton)
    with contextlib.ExitStack() as closing:
        path = served_file(server, model)
        if path.suffix == ".onnx":
            yield fastest(path, requests, instances, threads)
        else:
            from build.tensorrt.plan import Plan
            from build.tensorrt.plugins import PLUGIN

            _, manifest = repository.served(server.repository, model)
            graphs = bool(triton.get("optimization", {}).get("cuda", {}).get("graphs"))
            plans = [Plan(path, manifest["engine"], plugin=PLUGIN, cuda_graphs=graphs) for _ in range(instances)]
            yield Direct([closing.enter_context(plan) for plan in plans], requests)


def served_file(server: TritonServer, model: str) -> Path:
    """The model.onnx or model.plan that a server serves.

    Raises:
        ServeError: the folder of the served version holds neither.
    """
    from build.publish.repository import MODEL_FILE

    folder = server.repository / model / server.models[model]
    for name in MODEL_FILE.values():
        if (folder / name).is_file():
            return folder / name
    raise ServeError(
        f"{folder} holds neither model.onnx nor model.plan",
        why="the server serves another folder, or the version was removed",
        fix="publish the model again: invoke build-engines",
    )


def engine_of(path: Path) -> str:
    """What serves a published model.onnx: onnxruntime or openvino; its manifest lies beside it."""
    manifest = path.with_name(repository.MANIFEST)
    served_by = backend.of(json.loads(manifest.read_bytes())) if manifest.is_file() else None
    return served_by.engine if served_by else openvino.OTHER


def sessions(path: Path, count: int, threads: int = 1) -> list[Runner]:
    """A published model.onnx in this process, in the engine that serves it: `count` requests at once.

    Raises:
        RuntimeUnavailableError: OpenVINO cannot run it here.
    """
    import onnx

    if engine_of(path) == openvino.NAME:
        precision = json.loads(path.with_name(repository.MANIFEST).read_bytes())["precision"]
        return list(openvino.runners(path, count, threads, openvino.hint(precision)))
    if threads == 1:  # ONNX Runtime's of one thread run in their callers' threads: one session serves them all
        return [runner(onnx.load(path), threads=1)] * count
    return [runner(onnx.load(path), threads=threads) for _ in range(count)]


def fastest(path: Path, requests: Sequence[Feed], instances: int, threads: int) -> Direct:
    """The split of all threads into sessions × threads with the highest throughput: the strongest baseline.

    Its `latency` is that of one session with `threads` threads: what one instance of the server has.

    Args:
        path: the ONNX file.
        requests: as `feeds` of Direct.
        instances: the server's.
        threads: of each instance.
    """
    total = instances * threads
    counts = [count for count in range(1, total + 1) if total % count == 0]
    splits = {n: Direct(sessions(path, n, total // n), requests, threads=total // n) for n in counts}
    rate = max(candidate.throughput(0.1) for candidate in splits.values())
    # Long enough for whole requests to tell, and in turn: one may meet a busy moment.
    seconds = max(TRIAL_S, REQUESTS * len(requests[0]["images"]) / rate)
    trials = [[candidate.throughput(seconds) for candidate in splits.values()] for _ in range(3)]
    medians = dict(zip(splits, map(statistics.median, zip(*trials, strict=True)), strict=True))
    # What differs by less than a busy moment does: the server's own split, or the choice would change from run to run.
    medians[instances] *= CLEARLY
    best = splits[max(medians, key=lambda count: medians[count])]
    best.single = splits[instances].single
    return best


def split(triton: Mapping[str, Any]) -> tuple[int, int]:
    """How many requests run at once, and on how many threads each, by a model's Triton configuration."""

    def parameter(name: str, default: int) -> int:
        return int(triton["parameters"].get(name, {}).get("string_value", default))

    instances = sum(int(group.get("count", 1)) for group in triton["instance_group"])
    return parameter("runners", instances), parameter("threads", 1)


def thresholds(config: ModelConfig, score_threshold: float | None = None) -> dict[str, float]:
    """The thresholds that a request must bring, the model's own unless given; {} where the model takes none."""
    if not config.runtime_thresholds:
        return {}
    values = {name: getattr(config, name) for name in contract.THRESHOLDS}
    return values if score_threshold is None else {**values, "score_threshold": score_threshold}


def feeds(
    images: Sequence[NDArray[np.uint8]], values: Mapping[str, float] | None = None, batch_size: int = 1
) -> list[Feed]:
    """Requests of `batch_size` images each, which together hold every image at least once.

    Args:
        images: UINT8 [H,W,3].
        values: inputs [B,1] with the same value for every image.
        batch_size: images of a request.
    """
    import numpy as np

    extra = {name: np.full((batch_size, 1), value, np.float32) for name, value in (values or {}).items()}
    return [
        {contract.IMAGES: np.stack([images[(first + i) % len(images)] for i in range(batch_size)]), **extra}
        for first in range(0, len(images), batch_size)
    ]
