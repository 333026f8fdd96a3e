"""The search on simulated servers whose best setting is known, and a real search."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ssd_client.preprocess import input_array

from build.contract import Target
from build.errors import ServeError
from build.publish import backend
from build.publish import repository as store
from build.publish.config import config
from build.spec import edit, load
from models.shapes.scenes import scene
from perf import tune as tuning
from perf.bench import Bench, start_bench
from perf.journal import Journal
from perf.load import Load, PerfError
from perf.tune import Candidate, candidates, decide, measurements, search, tune
from tests.build import tiny_model

SHAPES = Path(__file__).parents[2] / "models" / "shapes"
PYTHON = backend.look("python")
PRESENT, BEST = Candidate(2, 1), Candidate(4, 1, True, 500)
GRID = [
    Candidate(instances, threads, batching, delay)
    for instances in (1, 2, 3, 4)
    for threads in (1, 2)
    for batching, delay in ((False, 0), (True, 0), (True, 500), (True, 2000))
]


class Simulation:
    """Servers of which BEST answers most within 20 ms; with two threads it would be faster, but beyond the bound."""

    def __init__(self, noise: float = 0.0, seed: int = 0) -> None:
        self.random, self.noise = random.Random(seed), noise
        self.calls: list[tuple[Candidate, int, int, float]] = []

    def truth(self, candidate: Candidate) -> tuple[float, float]:
        throughput = 300.0 + 60 * candidate.instances + 40 * candidate.threads
        throughput += {0: 20, 500: 80, 2000: 40}[candidate.queue_delay_us] if candidate.dynamic_batching else 0
        p99_ms = 8 + 1.5 * candidate.instances + candidate.queue_delay_us / 1000 + (20 if candidate.threads > 1 else 0)
        return throughput, p99_ms

    def __call__(self, candidate: Candidate, rung: int, repeat: int, seconds: float) -> tuple[float, float]:
        self.calls.append((candidate, rung, repeat, seconds))
        spread = self.noise / math.sqrt(seconds)
        throughput, p99_ms = self.truth(candidate)
        return (
            throughput * math.exp(self.random.gauss(0, spread)),
            p99_ms * math.exp(self.random.gauss(0, 3 * spread)),
        )


def candidate_of(repository: Path) -> Candidate:
    """What the one model of a repository is set up as."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    (config,) = repository.glob("*/config.pbtxt")
    return Candidate.of_config(text_format.Parse(config.read_text(), ModelConfig()))


def test_the_best_setting_wins() -> None:
    simulation = Simulation()
    tried = search(PRESENT, GRID, simulation, 20, 1.0)
    winner, better, why = decide(tried, 20)
    assert (winner.candidate, better) == (BEST, True)
    assert why == "from 2 x 1 to 4 x 1, batching, delay 500 us: 460 to 660 images/s"
    assert tried[0].candidate == PRESENT
    assert [entry.rung for entry in tried[1:]] == sorted((entry.rung for entry in tried[1:]), reverse=True)
    others = len(GRID) - 1
    assert len(simulation.calls) == measurements(others) == (31 + 16 + 8 + 4 + 4) + 3 * 3
    # The final: the two best and the present setting, three times, in turn, at the longest time.
    final = [candidate for candidate, rung, _, _ in simulation.calls if rung == tried[0].rung]
    assert len(final) == 9
    assert final[0] == final[5] == final[6] == PRESENT
    assert {(rung, seconds) for _, rung, _, seconds in simulation.calls} == {(n, 2.0**n) for n in range(5)}


@pytest.mark.parametrize("seed", range(20))
def test_noise_costs_little(seed: int) -> None:
    simulation = Simulation(noise=0.05, seed=seed)
    winner, better, _ = decide(search(PRESENT, GRID, simulation, 20, 1.0), 20)
    throughput, p99_ms = simulation.truth(winner.candidate)
    assert better
    assert p99_ms <= 20
    assert throughput >= 0.93 * simulation.truth(BEST)[0]


def test_none_holds_the_bound() -> None:
    winner, better, why = decide(search(PRESENT, GRID, Simulation(), 5, 1.0), 5)
    assert winner.candidate == Candidate(1, 1)  # the lowest p99
    assert not better
    assert why.startswith("no setting holds p99 <= 5 ms; the nearest: from 2 x 1 to 1 x 1")


def test_a_present_setting_beyond_the_bound_gives_way_to_a_slower_one_within() -> None:
    winner, better, why = decide(search(Candidate(4, 2), [Candidate(1, 1)], Simulation(), 20, 1.0), 20)
    assert (winner.candidate, better) == (Candidate(1, 1), True)
    assert why == "from 4 x 2 to 1 x 1: 34.0 to 9.5 ms (p99)"


def test_the_present_setting_is_the_best() -> None:
    tried = search(BEST, GRID, Simulation(), 20, 1.0)
    why = "the present setting (4 x 1, batching, delay 500 us) is the best of 32"
    assert decide(tried, 20) == (tried[0], False, why)


@pytest.mark.parametrize("seed", range(10))
def test_a_difference_within_the_noise_is_none(seed: int) -> None:
    """Ten settings that are all the same: whichever looks best must not replace the present one."""
    noise = random.Random(seed)
    same = [Candidate(number) for number in range(1, 11)]
    tried = search(same[0], same, lambda *_: (500 * math.exp(noise.gauss(0, 0.05)), 9.0), 20, 1.0)
    assert not decide(tried, 20)[1]


def test_what_fails_leaves_and_the_search_goes_on() -> None:
    def measure(candidate: Candidate, rung: int, repeat: int, seconds: float) -> tuple[float, float]:
        if candidate == BEST or (candidate.instances == 1 and rung == 1):
            raise ServeError("tritonserver is gone")
        return Simulation().truth(candidate)

    tried = search(PRESENT, GRID, measure, 20, 1.0)
    failed = {entry.candidate for entry in tried if entry.failed}
    assert BEST in failed
    assert all(entry.failed == "tritonserver is gone" for entry in tried if entry.failed)
    assert decide(tried, 20)[0].candidate == Candidate(4, 1, True, 2000)
    row = next(entry for entry in tried if entry.candidate == BEST).as_dict(20)
    assert (row["throughput"], row["p99_ms"], row["held"]) == (None, None, False)


def test_nothing_but_the_present_setting_works() -> None:
    def measure(candidate: Candidate, rung: int, repeat: int, seconds: float) -> tuple[float, float]:
        if candidate != PRESENT:
            raise ServeError("no")
        return 100.0, 9.0

    assert decide(search(PRESENT, GRID, measure, 20, 1.0), 20)[1] is False


def test_a_present_setting_that_fails_ends_the_search_at_once() -> None:
    def measure(candidate: Candidate, rung: int, repeat: int, seconds: float) -> tuple[float, float]:
        raise ServeError("no tritonserver on PATH")

    with pytest.raises(ServeError, match="no tritonserver"):
        search(PRESENT, GRID, measure, 20, 1.0)


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 16, 64])
def test_candidates_make_sense(cores: int) -> None:
    grid = candidates(cores)
    assert Candidate(cores, 1) in grid
    assert Candidate(1, cores, True, 500) in grid
    assert len(grid) == len(set(grid)) <= 160
    for candidate in grid:
        assert candidate.threads <= cores
        assert cores / 2 <= candidate.instances * candidate.threads <= 2 * cores
        assert candidate.dynamic_batching or not candidate.queue_delay_us
    plans = candidates(cores, "tensorrt")
    assert {candidate.threads for candidate in plans} == {1}
    assert {candidate.instances for candidate in plans} == {1, 2, 3, 4}


def test_two_cores() -> None:
    assert sorted({(candidate.instances, candidate.threads) for candidate in candidates(2)}) == [
        (1, 1),
        (1, 2),
        (2, 1),
        (2, 2),
        (3, 1),
        (4, 1),
    ]


# -- config.pbtxt ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
def test_spec_and_config_say_the_same(tmp_path: Path, runtime: str) -> None:
    """What a winner writes to spec.toml makes the very config.pbtxt that was measured, whatever was there before."""
    file = tiny_model.write(tmp_path / "tiny")
    original = file.read_text()
    present = Candidate.of_config(config(load(file), 1, Target(runtime), "", PYTHON))
    for candidate in candidates(2, runtime):
        file.write_text(original)
        changes = tuning._changes(load(file), present, candidate, runtime)
        edit(file, {f"serving.{key}": value for key, value in changes.items()})
        assert Candidate.of_config(config(load(file), 1, Target(runtime), "", PYTHON)) == candidate


def test_what_is_as_it_was_stays_open(tmp_path: Path) -> None:
    spec = load(tiny_model.write(tmp_path / "tiny"))  # instances and threads are 0: of any machine's cores
    assert tuning._changes(spec, PRESENT, Candidate(2, 1, True, 500), "onnxruntime") == {
        "dynamic_batching": "on",
        "queue_delay_us": 500,
    }
    assert tuning._changes(spec, PRESENT, Candidate(2, 2), "onnxruntime") == {"instances": 2, "threads": 2}
    assert tuning._changes(spec, Candidate(1, 1, True), Candidate(2, 1, True), "tensorrt") == {"instances": 2}


def test_a_variant_is_the_published_model_set_up_otherwise(tiny: tuple[Path, Path]) -> None:
    file, published = tiny
    with tuning.variant(load(file), published, PRESENT) as repository:  # as it is: nothing but the comment is missing
        was, now = (folder / "tiny" / "config.pbtxt" for folder in (published, repository))
        assert was.read_text().split("\n", 1)[1] == now.read_text()
    with tuning.variant(load(file), published, Candidate(3, 2, True, 500)) as repository:
        version = store.served_version(repository, "tiny")
        for held in (published / "tiny" / str(version)).iterdir():
            if held.name != "config.pbtxt":  # the server compares that one with the one above
                assert held.samefile(repository / "tiny" / str(version) / held.name)
        assert candidate_of(repository) == Candidate(3, 2, True, 500)
    assert [path.name for path in published.parent.iterdir() if path.name.startswith(".published-")] == []
    assert store.served(published, "tiny")


# -- the whole, on simulated servers -----------------------------------------------------------------------------------


class FakeServers:
    """In place of `perf.bench.start_bench`: simulated servers, set up as the repository's config.pbtxt says."""

    def __init__(self) -> None:
        self.simulation, self.started = Simulation(noise=0.01), list[Candidate]()
        self.broken: dict[Candidate, BaseException] = {}
        self.wrong: set[Candidate] = set()
        self.flaky: set[Candidate] = set()  # perf_analyzer gives up once

    @contextmanager
    def __call__(self, repository: Path, model: str, images: Any, journal: Journal) -> Iterator[Any]:
        candidate = candidate_of(repository)
        self.started.append(candidate)
        if candidate in self.broken:
            raise self.broken[candidate]

        def point(series: str, traffic: Load, *, seconds: float, check: bool = True, **key: Any) -> dict[str, Any]:
            if candidate in self.flaky:
                self.flaky.remove(candidate)
                raise PerfError("perf_analyzer gave no figures")
            throughput, p99_ms = self.simulation(candidate, 0, 0, seconds)
            latency = {"p50": p99_ms / 2.1, "p90": p99_ms, "p99": p99_ms}
            wrong = ["picture 3: box 0 is off by 0.21"] * (candidate in self.wrong)
            answers = {"checked": 20, "wrong": len(wrong), "dropped": 0, "late": 0, "examples": wrong}
            return {
                "point": {"throughput": throughput, "latency_ms": latency, "requests": 99, "errors": 0},
                "answers": answers if check else None,
            }

        yield SimpleNamespace(point=point)


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path]:
    """spec.toml of a tiny model, and a repository that it is published to."""
    file = tiny_model.write(tmp_path / "tiny")
    edit(file, {"serving.instances": PRESENT.instances, "serving.threads": PRESENT.threads})
    spec = load(file)
    store.publish(spec, spec.onnx_path, tmp_path / "published", Target("onnxruntime"), served_by=PYTHON)
    return file, tmp_path / "published"


OTHERS = [Candidate(instances, threads) for instances in (1, 3, 4) for threads in (1, 2)]


def test_tune(tiny: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    file, published = tiny
    servers, journal, before = FakeServers(), Journal(), file.read_text()
    run = {"others": OTHERS, "bound_ms": 20, "traffic": Load(concurrency=2)}
    looked = tune(load(file), published, [], journal, serving=servers, **run, write=False)
    assert file.read_text() == before
    assert not looked["written"]
    started = len(servers.started)
    assert started == measurements(len(OTHERS))
    result = tune(load(file), published, [], journal, serving=servers, **run)
    assert len(servers.started) == started  # all from the journal, and not a server was started
    assert {**result, "written": False} == looked
    assert result["written"]
    assert (result["winner"]["instances"], result["winner"]["threads"]) == (4, 1)
    assert result["before"] == result["candidates"][0]
    assert result["gain"] == result["winner"]["throughput"] / result["before"]["throughput"] > 1.1
    assert json.loads(json.dumps(result)) == result
    assert file.read_text() == before.replace("instances = 2", "instances = 4") != before
    printed = capsys.readouterr().out
    assert "publish it: invoke build-engines" in printed


def test_tune_chooses_a_bound(tiny: tuple[Path, Path]) -> None:
    file, published = tiny
    result = tune(load(file), published, [], Journal(), serving=FakeServers(), others=OTHERS, write=False)
    assert result["bound_ms"] in (20, 25)


def test_wrong_answers_never_win(tiny: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    file, published = tiny
    servers = FakeServers()
    servers.wrong = {Candidate(4, 1)}
    result = tune(load(file), published, [], Journal(), serving=servers, others=OTHERS, bound_ms=20, write=False)
    assert result["winner"]["instances"] == 3
    failed = [row for row in result["candidates"] if row["failed"]]
    assert [(row["instances"], row["threads"]) for row in failed] == [(4, 1)]
    assert "box 0 is off by 0.21" in failed[0]["failed"]
    assert "4 x 1: under" in capsys.readouterr().out


def test_one_failure_of_perf_analyzer_costs_no_candidate(tiny: tuple[Path, Path]) -> None:
    file, published = tiny
    servers = FakeServers()
    servers.flaky = {PRESENT, Candidate(4, 1)}
    result = tune(load(file), published, [], Journal(), serving=servers, others=OTHERS, bound_ms=20, write=False)
    assert not servers.flaky
    assert not any(row["failed"] for row in result["candidates"])


def test_a_server_that_goes_away_leaves_the_search(tiny: tuple[Path, Path]) -> None:
    file, published = tiny
    servers = FakeServers()
    servers.broken = {Candidate(4, 1): ConnectionRefusedError("nobody listens"), Candidate(1, 1): ServeError("no")}
    result = tune(load(file), published, [], Journal(), serving=servers, others=OTHERS, bound_ms=20, write=False)
    assert result["winner"]["instances"] == 3
    assert {(row["instances"], row["threads"]) for row in result["candidates"] if row["failed"]} == {(4, 1), (1, 1)}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")])
def test_what_ends_the_search_leaves_spec_toml(tiny: tuple[Path, Path], error: BaseException) -> None:
    file, published = tiny
    servers, journal, before = FakeServers(), Journal(), file.read_text()
    servers.broken = {Candidate(4, 2): error}
    with pytest.raises(type(error)):
        tune(load(file), published, [], journal, serving=servers, others=OTHERS, bound_ms=20)
    assert file.read_text() == before
    assert {path.name for path in published.parent.iterdir() if path.is_dir()} == {"tiny", "published"}
    # Resumed: what was measured before is not measured again.
    servers.broken, before_resume = {}, len(servers.started)
    tune(load(file), published, [], journal, serving=servers, others=OTHERS, bound_ms=20)
    # Those before the one that broke are in the journal; that one is tried again.
    assert len(servers.started) - before_resume == measurements(len(OTHERS)) - (before_resume - 1)
    assert load(file).serving.instances == 4


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    folder = tmp_path / "shapes"
    shutil.copytree(SHAPES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "spec.toml"


@pytest.mark.triton
@pytest.mark.slow
def test_a_real_search(repository: Path, shapes: Path, tmp_path: Path) -> None:
    """Two cores' worth of instances against one, three times in turn, on a server for each."""
    images = [input_array(scene("held_out", index).image, load(shapes).input.preprocessing)[0] for index in range(4)]
    edit(shapes, {"serving.instances": 1, "serving.threads": 1})
    run: dict[str, Any] = {
        "others": [Candidate(2, 1)],
        "bound_ms": 2000,
        "traffic": Load(concurrency=4, protocol="http", shared_memory="system"),
        "seconds": 0.3,
        "write": False,
    }
    file = tmp_path / "points.jsonl"
    benches: dict[Candidate, Bench] = {}
    with ExitStack() as stack:

        def serving(repository: Path, *what: Any) -> AbstractContextManager[Bench]:
            candidate = candidate_of(repository)
            if candidate not in benches:
                benches[candidate] = stack.enter_context(start_bench(repository, *what))
            return nullcontext(dataclasses.replace(benches[candidate], journal=Journal()))  # measured anew

        result = tune(load(shapes), repository, images, Journal(file), serving=serving, **run)
    single, double = result["candidates"]
    assert (single["instances"], double["instances"]) == (1, 2)
    assert not single["failed"]
    assert not double["failed"]
    for row in (single, double):
        assert len(row["repeats"]) == 3
        assert 0 < row["p99_ms"] < 2000
        assert row["throughput"] > 0
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(entries) == 6
    checked = [entry["result"]["answers"] for entry in entries if entry["result"]["answers"]]
    assert len(checked) == 2
    assert all(answers["checked"] and not answers["wrong"] for answers in checked)
    journal = Journal(file)
    assert tune(load(shapes), repository, images, journal, **run) == result
    assert journal.reused == 6
