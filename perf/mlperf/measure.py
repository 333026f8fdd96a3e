"""A scenario with everything that belongs to its figure: perf_analyzer's beside it, the floor in process, LoadGen's own
cost, checked answers, and on request the accuracy run and the highest rate.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perf import direct
from perf.analyzer import write_input
from perf.load import Load, PerfError
from perf.mlperf import answers, runs
from perf.mlperf.runs import SCENARIOS, Pace, Served
from perf.ratio import TRANSPORTS
from perf.slo import default_bound, highest

if TYPE_CHECKING:
    from build.gate.datasets import Pictures
    from perf.bench import Bench

# The figure that a scenario is about.
FIGURES = {
    "single-stream": "p90_ms",
    "multi-stream": "p99_ms",
    "server": "p99_ms",
    "offline": "samples_per_second",
}
TOLERANCE = 0.05  # of the highest rate


@dataclass(frozen=True)
class Stage:
    """A running server and what every scenario on it needs.

    Attributes:
        bench: for perf_analyzer, with the score threshold that LoadGen's requests have.
        served: for LoadGen.
        pictures: the labelled ones.
        reference: what the served file answers in this process.
        pace: of the server.
        floor: of the served file in this process: {p50_ms, p90_ms, p99_ms} of one picture after another, and
            images_per_second of 4 clients with the batches of the offline scenario.
    """

    bench: Bench
    served: Served
    pictures: Pictures
    reference: answers.Reference
    pace: Pace
    floor: Mapping[str, float]

    @property
    def own_bound_ms(self) -> float:
        """A bound on the p99 that fits this model better than the rules' one: 4 × the latency of a request alone."""
        return default_bound(self.pace.latency_ms)


def stage(bench: Bench, pictures: Pictures, transport: str = "shm", floor: Mapping[str, float] | None = None) -> Stage:
    """What LoadGen needs to drive a running server.

    Args:
        bench: of the server.
        pictures: in the order of their ground truth, where they have one.
        transport: one of `perf.ratio.TRANSPORTS`.
        floor: as for `Stage`; None = measured.
    """
    load = TRANSPORTS[transport]
    url = bench.server.http_url if load.protocol == "http" else bench.server.grpc_url
    served = Served(url, bench.config, pictures.paths, load.protocol, load.shared_memory)
    values = direct.thresholds(bench.config, served.score_threshold)
    data = write_input(bench.data.with_name("mlperf.json"), bench.images, values)
    reference = answers.Reference(served, direct.served_version(bench.server, bench.model))
    speed = runs.pace(served)
    return Stage(replace(bench, data=data), served, pictures, reference, speed, floor or measured_floor(bench))


def measured_floor(bench: Bench, seconds: float = 2.0) -> dict[str, float]:
    """What `Stage.floor` says."""
    batch = min(SCENARIOS["offline"].batch, bench.config.max_batch_size)
    with direct.beside(bench.server, bench.model, bench.images, bench.config) as raw:
        alone = raw.latency(seconds)
    with direct.beside(bench.server, bench.model, bench.images, bench.config, batch_size=batch) as raw:
        images_per_second = raw.throughput(seconds)
    return {**{f"{name}_ms": value for name, value in alone.items()}, "images_per_second": images_per_second}


def measure(
    stage: Stage,
    scenario: str,
    folder: Path,
    *,
    seconds: float,
    accuracy: bool = False,
    analyzer_s: float = 2.0,
) -> dict[str, Any]:
    """One scenario.

    Args:
        stage: the running server.
        scenario: one of SCENARIOS.
        folder: gets LoadGen's logs, each run's in a folder of its own: performance, null, accuracy.
        seconds: of LoadGen's run, at least.
        accuracy: run LoadGen's accuracy mode as well.
        analyzer_s: seconds of perf_analyzer, before and after LoadGen.

    Returns:
        As `runs.run`, and `metric`; `value`, the figure that the scenario is about; `wrong` (answers); `own_bound_ms`
        and whether it was held (`held_own_bound`, server alone); `beside` {perf_analyzer, in_process, ratio: the
        value over in_process}; `null`, the figures of the null system; `accuracy` {map, map50, images, compared,
        different}, where it was asked for.

    Raises:
        KeyboardInterrupt: the child has ended.
    """
    before = _analyzer(stage, scenario, analyzer_s, 0)
    settings: dict[str, Any] = {"seconds": seconds, "pace": stage.pace}
    result = runs.run(stage.served, scenario, folder / "performance", **settings)
    after = _analyzer(stage, scenario, analyzer_s, 1)
    null = runs.run(stage.served, scenario, folder / "null", **{**settings, "seconds": 1.0}, null=True)
    problems = check_answers(stage, folder / "performance", result)
    name = FIGURES[scenario]
    value = result["figures"].get(name)
    floor = _floor(stage, scenario)
    known = [each for each in (before, after) if each is not None]
    result |= {
        "metric": SCENARIOS[scenario].metric,
        "value": value,
        "beside": {
            "perf_analyzer": statistics.mean(known) if known else None,
            "in_process": floor,
            "ratio": value / floor if value and floor else None,
        },
        "null": null["figures"],
    }
    if scenario == "server":
        result["own_bound_ms"] = stage.own_bound_ms
        result["held_own_bound"] = bool(value and value <= stage.own_bound_ms)
    if accuracy:
        result["accuracy"], more = _accuracy(stage, scenario, folder, settings)
        problems += more
    result["problems"] = [*result["problems"], *problems]
    result["valid"] = not result["problems"]
    return result


def check_answers(stage: Stage, folder: Path, result: dict[str, Any]) -> list[str]:
    """Compares every answer of a run with the served file's, and notes in the result how many are wrong."""
    wrong = stage.reference.wrong(folder)
    result["wrong"] = len(wrong)
    return [answers.sentence(wrong, result["answered"])] if wrong else []


def _accuracy(
    stage: Stage, scenario: str, folder: Path, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """LoadGen's accuracy mode: mAP, and whether answers are those of the performance run; and what is wrong with it."""
    run = runs.run(stage.served, scenario, folder / "accuracy", mode="AccuracyOnly", **settings)
    problems = [f"accuracy mode: {problem}" for problem in run["problems"]]
    if problems:
        return {}, problems
    judged = answers.evaluate(folder / "accuracy", stage.pictures)
    same = answers.same_in_both(folder / "performance", folder / "accuracy")
    if same["different"]:
        problems.append(f"{len(same['different'])} of {same['compared']} answers differ from those of accuracy mode")
    return {"map": judged.map, "map50": judged.map50, "images": judged.images, **same}, problems


def _floor(stage: Stage, scenario: str) -> float:
    """What the scenario's figure could be at best, by the same file in this process."""
    if scenario == "single-stream":
        return stage.floor["p90_ms"]
    if scenario == "multi-stream":
        return 1000 * runs.SAMPLES_PER_QUERY / stage.floor["images_per_second"]
    return stage.floor["p99_ms"] if scenario == "server" else stage.floor["images_per_second"]


def _analyzer(stage: Stage, scenario: str, seconds: float, repeat: int) -> float | None:
    """The same figure by perf_analyzer; None where it gives none."""
    base = Load(protocol=stage.served.protocol, shared_memory=stage.served.shared_memory)  # type: ignore[arg-type]
    how = SCENARIOS[scenario]
    batch = min(how.batch, stage.bench.config.max_batch_size)
    if scenario == "server":
        rate = runs.settings_of(scenario, stage.pace, seconds)[0]["server_target_qps"]
        load = replace(base, concurrency=None, rate=rate, arrivals="poisson")
    else:
        load = replace(base, concurrency=4 if scenario == "offline" else 1, batch_size=batch)
    try:
        how_long: dict[str, Any] = {"seconds": seconds, "repeat": repeat, "check": False, "retries": 0}
        point = stage.bench.point(f"beside LoadGen, {scenario}", load, **how_long)["point"]
    except PerfError:
        return None
    return float(point["throughput"] if scenario == "offline" else point["latency_ms"][FIGURES[scenario][:3]])


def told(result: Mapping[str, Any]) -> str:
    """A scenario's result in a few lines, for a terminal."""
    name, value = result["scenario"], result["value"]
    figure = "no figure" if value is None else f"{value:.4g} {'samples/s' if name == 'offline' else 'ms'}"
    if name == "server":
        figure = f"{result['figures']['rate']:g} queries/s, p99 {figure}"
    checked = f"{result['answered']} answers checked, {result['wrong']} wrong, {result['failed']} missing"
    lines = [f"{name}: {'VALID' if result['valid'] else 'NOT VALID'}, {figure} ({result['metric']}); {checked}"]
    lines += [f"  {problem}" for problem in result["problems"]]
    if judged := result.get("accuracy"):
        said = f"mAP@[.5:.95] {judged['map']:.4f} on {judged['images']} pictures"
        lines.append(f"  accuracy mode: {said}; {judged['compared']} answers compared with those of performance mode")
    return "\n".join(lines)


# -- the highest rate --------------------------------------------------------------------------------------------------


def find_peak(stage: Stage, folder: Path, bound_ms: float, *, seconds: float) -> dict[str, Any]:
    """The highest rate of the server scenario that LoadGen calls VALID under a bound, by binary search.

    LoadGen's own FindPeakPerformance was tried beside it: docs/perf.md, "LoadGen".

    Args:
        stage: the running server.
        folder: gets the logs, a folder for each probe.
        bound_ms: of the p99.
        seconds: of each probe, at least.

    Returns:
        `bound_ms`; `rate`, None where even the lowest was not held; `note`; `probes` [{rate, valid, p99_ms, problems}].
    """
    probes: list[dict[str, Any]] = []

    def held(rate: float) -> bool:
        logs = folder / f"{bound_ms:g}-ms-{len(probes)}"
        run = runs.run(
            stage.served,
            "server",
            logs,
            seconds=seconds,
            pace=stage.pace,
            bound_ms=bound_ms,
            rate=rate,
        )
        problems = run["problems"] + check_answers(stage, logs, run)
        p99 = run["figures"].get("p99_ms")
        probes.append({"rate": rate, "valid": not problems, "p99_ms": p99, "problems": problems})
        return not problems

    most = stage.pace.images_per_second
    rate, capped = highest(held, 0.2 * most, most, TOLERANCE)
    note = "it may be higher: no rate was lost" if capped else "" if rate else "not even the lowest rate was held"
    return {"bound_ms": bound_ms, "rate": rate, "note": note, "probes": probes}
