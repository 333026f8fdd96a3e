"""The fleet's simulation: against queueing theory, and against two real servers."""

from __future__ import annotations

import math
import queue
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton

from build import spec as specs
from build.contract import Target
from build.publish import backend
from build.publish import repository as store
from deploy.capacity import Fleet, arrivals, on_paper, servers_for, simulate
from models.shapes.scenes import scene
from tests.deploy.conftest import ROOT, Server, two_servers


def exponential(mean_ms: float, count: int = 20_000) -> list[float]:
    chance = random.Random(5)
    return [chance.expovariate(1 / mean_ms) for _ in range(count)]


def test_one_server_is_what_queueing_theory_says() -> None:
    """M/M/1: mean time in the queue ρ/(μ-λ); M/D/1: half of it (Pollaczek and Khinchine)."""
    fleet = Fleet(70, exponential(10), 1, seconds=1000)
    result = simulate(fleet)
    theory = 0.7 / (100 - 70) * 1000
    assert np.mean(result.queue_ms) == pytest.approx(theory, rel=0.1)
    assert np.mean(simulate(replace(fleet, service_ms=[10.0])).queue_ms) == pytest.approx(theory / 2, rel=0.1)


def test_several_workers_are_what_erlang_says() -> None:
    """M/M/c: Erlang's C formula."""
    servers, load = 4, 3.0
    top = load**servers / math.factorial(servers) * servers / (servers - load)
    waits = top / (sum(load**k / math.factorial(k) for k in range(servers)) + top)
    mean = waits * 10 / (servers - load)
    result = simulate(Fleet(300, exponential(10), 1, servers, seconds=500))
    assert np.mean(result.queue_ms) == pytest.approx(mean, rel=0.12)


@pytest.mark.parametrize("burst", [1.0, 1.5, 2.0])
def test_bursts_keep_the_mean_rate(burst: float) -> None:
    fleet = Fleet(50, [1.0], 1, burst=burst, burst_seconds=1, seconds=4000)
    assert len(list(arrivals(fleet, random.Random(3)))) == pytest.approx(200_000, rel=0.05)


def test_bursts_and_blind_balancing_cost_latency_and_servers_help() -> None:
    fleet = Fleet(150, [10.0], 2, seconds=120)
    plain, bursty = simulate(fleet), simulate(replace(fleet, burst=1.8))
    assert bursty.percentile(0.99) > 2 * plain.percentile(0.99)
    assert simulate(replace(fleet, balancer="random")).percentile(0.99) > plain.percentile(0.99)
    needed = servers_for(fleet, 30)
    assert simulate(replace(fleet, servers=needed)).percentile(0.99) <= 30
    assert simulate(replace(fleet, servers=needed - 1)).percentile(0.99) > 30
    with pytest.raises(ValueError, match="less than a request takes"):
        servers_for(fleet, 5)
    assert on_paper(1000, 13.5, 2) == 10


def test_an_autoscaler_is_late_and_ends_overload() -> None:
    fleet = Fleet(300, [10.0], 2, autoscale=True, start_seconds=20, seconds=240)
    fast = simulate(replace(fleet, start_seconds=1))
    late = simulate(fleet)
    assert late.servers >= 4
    assert np.mean(late.queue_ms[-3000:]) < 50
    assert max(late.queue_ms) > max(fast.queue_ms) > 20
    assert simulate(replace(fleet, autoscale=False)).servers == 2


# -- two real servers --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(repository: Path, backend_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Two servers with one instance of one thread each: a core for each."""
    folder = tmp_path_factory.mktemp("single")
    model = folder / "models" / "shapes"
    model.parent.mkdir()
    for path in (ROOT / "models" / "shapes").iterdir():
        if path.is_file():
            model.mkdir(exist_ok=True)
            (model / path.name).write_bytes(path.read_bytes())
    specs.edit(model / "spec.toml", {"serving.instances": 1, "serving.threads": 1})
    source, manifest = store.served(repository, "shapes")
    target = folder / "model_repository"
    facts = {"verified": manifest["verified"]}
    served_by = backend.prepare(backend.NATIVE)
    store.publish(specs.load(model), source / "model.onnx", target, Target("onnxruntime"), facts, served_by)
    with two_servers(target, backend_folder, folder) as servers:
        yield servers


def inputs() -> list[triton.InferInput]:
    arrays = {
        "images": np.asarray(scene("held_out", 0).image)[None],
        "score_threshold": np.full((1, 1), 0.25, np.float32),
        "iou_threshold": np.full((1, 1), 0.45, np.float32),
    }
    made = []
    for name, array in arrays.items():
        made.append(triton.InferInput(name, list(array.shape), "UINT8" if name == "images" else "FP32"))
        made[-1].set_data_from_numpy(array)
    return made


def measured(servers: list[Server], rate: float, seconds: float, seed: int) -> list[float]:
    """Latencies in ms, from the planned time of arrival, of Poisson arrivals given to the servers in turn."""
    clients = [triton.InferenceServerClient(server.grpc) for server in servers]
    request, done = inputs(), queue.Queue[float]()
    planned = list(arrivals(Fleet(rate, [1.0], 1, seconds=seconds), random.Random(seed)))
    begin = time.perf_counter() + 0.2
    for number, moment in enumerate(planned):
        time.sleep(max(0.0, begin + moment - time.perf_counter()))

        def answered(result: object, error: object, moment: float = moment) -> None:
            assert error is None
            done.put((time.perf_counter() - begin - moment) * 1000)

        clients[number % 2].async_infer("shapes", request, answered)
    latencies = [done.get(timeout=60) for _ in planned]
    for client in clients:
        client.close()
    return latencies


def service_times(servers: list[Server], count: int) -> list[float]:
    """Times in ms of requests on a server that has no other, while its neighbour works as hard: it takes CPU, too."""
    times: list[float] = []

    def ask(server: Server) -> None:
        with triton.InferenceServerClient(server.grpc) as client:
            request = inputs()
            for number in range(count + 10):
                started = time.perf_counter()
                client.infer("shapes", request)
                if number >= 10:
                    times.append((time.perf_counter() - started) * 1000)

    threads = [threading.Thread(target=ask, args=(server,)) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


@pytest.mark.triton
@pytest.mark.long
def test_the_simulation_agrees_with_two_real_servers(pair: list[Server]) -> None:
    """Needs a quiet machine: the service times must not change between measuring them and using them."""
    differences, swings = {}, []
    for share in (0.4, 0.6):
        before = service_times(pair, 150)
        rate = share * 2 * 1000 / float(np.mean(before))
        real = Fleet(rate, before, 2, balancer="roundrobin", seconds=25)
        latencies = np.asarray(measured(pair, rate, 25, seed=real.seed))
        after = service_times(pair, 150)
        swings.append(float(np.median(after) / np.median(before)))
        services = before + after
        simulated = simulate(replace(real, service_ms=services, seconds=250))
        for name, quantile in (("p50", 0.5), ("p99", 0.99)):
            seen = float(np.quantile(latencies, quantile))
            differences[f"{share:.0%} {name}"] = (seen, simulated.percentile(quantile))
    print({name: f"{seen:.1f} ms seen, {told:.1f} simulated" for name, (seen, told) in differences.items()})
    if any(abs(swing - 1) > 0.1 for swing in swings):
        pytest.skip(f"needs a quiet machine: the servers' own times changed by the factors {swings} meanwhile")
    assert all(abs(told / seen - 1) <= 0.2 for seen, told in differences.values()), differences
