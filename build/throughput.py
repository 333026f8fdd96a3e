"""What a user gets of each engine: real servers on candidates that are not published yet, loaded in turn."""

from __future__ import annotations

import contextlib
import http.client
import os
import statistics
import tempfile
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from build.contract import Target
from build.errors import RuntimeUnavailableError, ServeError, SSDError
from build.publish import backend, openvino, repository
from build.publish.config import instances_and_threads
from build.publish.engines import Choice
from build.serve import TritonServer, http_inputs
from build.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROUNDS, SECONDS = 13, 0.15  # of load on each server in turn: short, for other work on the machine disturbs both
PICTURES = 8
_PATIENCE = 60  # seconds for an answer
_LEAST = 0.1  # of the processors that others can have left to us

Request = tuple[bytes, Mapping[str, str]]  # body, headers


def compare(
    spec: Spec,
    target: Target,
    images: NDArray[np.uint8],
    paths: Mapping[str, Path],
    backends: Path = backend.BACKENDS,
) -> Choice:
    """The engines, the faster first: each serves its file as it would be published, to clients with pixels over HTTP.

    Args:
        spec: the model.
        target: what it is built for.
        images: UINT8 [n,H,W,3], n >= 1, sent one by one in turn.
        paths: the ONNX file of each engine; if it is one, it only has to load.
        backends: the folder of this project's backends.

    Returns:
        The choice; an engine that cannot serve its file is left out, with the reason in `why`. ONNX Runtime stays, for
        the gate to say more, if none can.
    """
    requests = [_request(spec, images[at : at + 1]) for at in range(len(images))]
    instances, _ = instances_and_threads(spec, target.runtime)
    clients = 2 * instances  # as many requests wait as run
    rates: dict[str, list[float]] = {engine: [] for engine in paths}
    faults = []

    def drop(engine: str, error: SSDError) -> None:
        del rates[engine]
        faults.append(f"{engine} does not serve this file: {error.what.splitlines()[0]}")

    with contextlib.ExitStack() as stack:
        servers = {}
        for engine, path in paths.items():
            try:
                servers[engine] = _start(stack, spec, target, engine, path, backends)
            except (RuntimeUnavailableError, ServeError) as error:
                drop(engine, error)
        for turn in range(-1, ROUNDS):  # the first one warms them up
            for engine in tuple(rates) if len(rates) > 1 else ():
                try:
                    rate = _load(servers[engine], spec.model.name, requests, clients, SECONDS)
                except ServeError as error:
                    drop(engine, error)
                else:
                    rates[engine] += [rate] if turn >= 0 else []
    if len(rates) < 2:
        return Choice(tuple(rates) or (openvino.OTHER,), "; ".join(faults))
    medians = {engine: statistics.median(values) for engine, values in rates.items()}
    told = ", ".join(f"{engine} {rate:.0f}" for engine, rate in medians.items())
    why = f"images/s served to {clients} clients, medians of {ROUNDS} rounds in turn: {told}"
    return Choice.of(medians[openvino.NAME] / medians[openvino.OTHER], why, served_ips=medians)


def _start(
    stack: contextlib.ExitStack, spec: Spec, target: Target, engine: str, path: Path, backends: Path
) -> TritonServer:
    """A server on a repository of its own with nothing but one candidate."""
    served_by = backend.prepare(spec.serving.backend, backends, engine)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ssd-throughput-"))) / "models"
    repository.publish(spec, path, folder, target, served_by=served_by)
    server = TritonServer(folder, backends=backends)
    stack.callback(server.stop, timeout=0)
    server.start()
    return server


def _request(spec: Spec, image: NDArray[np.uint8]) -> Request:
    from tritonclient import http as client

    inputs = http_inputs(spec.nms.feeds(image), {tensor.name: tensor.triton for tensor in spec.inputs})
    body, header = client.InferenceServerClient.generate_request_body(inputs)
    return body, {"Inference-Header-Content-Length": str(header)}


def _load(server: TritonServer, model: str, requests: Sequence[Request], clients: int, seconds: float) -> float:
    """Answers per second; each client sends its next request when it has the last one's answer.

    The share of the processors that other programs had is left out of the time: on a busy machine, the figure is that
    of an idle one as far as that can be told, and two figures can be compared although the others did more meanwhile.

    Raises:
        ServeError: the server does not answer, or answers with an error.
    """
    path = f"/v2/models/{urllib.parse.quote(model, safe='')}/infer"
    before, begun = _others(server.pid), time.perf_counter()

    def client(number: int) -> int:
        asked = done = 0
        with contextlib.closing(http.client.HTTPConnection(server.http_url, timeout=_PATIENCE)) as connection:
            while not asked or time.perf_counter() < begun + seconds:
                body, headers = requests[(number + asked) % len(requests)]
                asked += 1
                connection.request("POST", path, body, dict(headers))
                answer = connection.getresponse()
                content = answer.read()
                if answer.status == http.client.OK:
                    done += 1
                elif answer.status != http.client.SERVICE_UNAVAILABLE:  # the spec's queue may be short
                    told = content[:200].decode(errors="replace")
                    raise ServeError(f"it answers with status {answer.status}: {told}")
        return done

    with ThreadPoolExecutor(clients) as pool:
        try:
            answered = sum(pool.map(client, range(clients)))
        except (OSError, http.client.HTTPException) as error:
            server.check()
            raise ServeError(f"it does not answer: {error}") from None
    if not answered:
        raise ServeError("it refused every request")
    passed = time.perf_counter() - begun
    ours = 1 - (_others(server.pid) - before) / passed
    return answered / (passed * min(max(ours, _LEAST), 1.0))


def _others(server: int) -> float:
    """Seconds that programs other than this one and the server had so far, on the processors that both may use.

    As a mean of these processors. The kernel counts it in steps of 10 ms.
    """
    import psutil

    usable = os.sched_getaffinity(0)
    busy = 0.0
    for number, times in enumerate(psutil.cpu_times(percpu=True)):
        busy += sum(times[:9]) - times.idle - times.iowait - times.guest if number in usable else 0.0
    own = (psutil.Process(), psutil.Process(server))
    return (busy - sum(sum(process.cpu_times()[:2]) for process in own)) / len(usable)
