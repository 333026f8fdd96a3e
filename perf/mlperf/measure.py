"""A scenario with everything that belongs to its figure: perf_analyzer's beside it, the floor in process, LoadGen's own
cost, checked answers, and on request the accuracy run.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perf import direct
from perf.analyzer import write_input
from perf.journal import Journal
from perf.load import Load, PerfError
from perf.mlperf import answers, runs
from perf.mlperf.child import Served
from perf.mlperf.runs import SCENARIOS, Pace
from perf.ratio import TRANSPORTS
from perf.served_accuracy import curve_threshold

if TYPE_CHECKING:
    from build.gate.datasets import Pictures
    from perf.bench import Bench


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
            samples_per_second of 4 clients with the batches of the offline scenario.
    """

    bench: Bench
    served: Served
    pictures: Pictures
    reference: answers.Reference
    pace: Pace
    floor: Mapping[str, float]


def stage(bench: Bench, pictures: Pictures, transport: str = "shm", floor: Mapping[str, float] | None = None) -> Stage:
    """What LoadGen needs to drive a running server.

    Args:
        bench: of the server.
        pictures: in the order of their ground truth, where they have one.
        transport: one of `perf.ratio.TRANSPORTS`.
        floor: as for `Stage`; None = measured.
    """
    load, config = TRANSPORTS[transport], bench.config
    how = {"protocol": load.protocol, "shared_memory": load.shared_memory}
    served = Served.of(config, bench.url(load.protocol), pictures.paths, curve_threshold(config), **how)
    values = direct.thresholds(config, served.score_threshold)
    data = write_input(bench.data.with_name("mlperf.json"), bench.images, values)
    path = direct.served_file(bench.server, bench.model)
    reference = answers.Reference(path, config, served.pictures, served.score_threshold)
    floor = floor or measured_floor(bench)
    return Stage(replace(bench, data=data), served, pictures, reference, runs.pace(served), floor)


def measured_floor(bench: Bench, seconds: float = 2.0) -> dict[str, float]:
    """What `Stage.floor` says."""
    batch = min(SCENARIOS["offline"].batch, bench.config.max_batch_size)
    with direct.beside(bench.server, bench.model, bench.images, bench.config) as raw:
        alone = {f"{name}_ms": value for name, value in raw.latency(seconds).items()}
    with direct.beside(bench.server, bench.model, bench.images, bench.config, batch_size=batch) as raw:
        return {**alone, "samples_per_second": raw.throughput(seconds)}


def measure(stage: Stage, scenario: str, folder: Path, *, seconds: float, accuracy: bool = False) -> dict[str, Any]:
    """One scenario, with perf_analyzer before and after it.

    Args:
        stage: the running server.
        scenario: one of SCENARIOS.
        folder: gets LoadGen's logs, each run's in a folder of its own: performance, null, accuracy.
        seconds: of LoadGen's run, at least.
        accuracy: run LoadGen's accuracy mode as well.

    Returns:
        As `runs.run`, and `metric`; `value`, the figure that the scenario is about; `wrong` (answers); `beside`
        {perf_analyzer, in_process, ratio: the value over in_process}; `null`, the figures of the null system;
        `accuracy` {map, map50, images, compared, different}, where it was asked for.

    Raises:
        KeyboardInterrupt: the child has ended.
    """
    how, settings = SCENARIOS[scenario], {"seconds": seconds, "pace": stage.pace}
    before = _analyzer(stage, scenario, min(3.0, seconds / 4))
    result = runs.run(stage.served, scenario, folder / "performance", **settings)  # type: ignore[arg-type]
    after = _analyzer(stage, scenario, min(3.0, seconds / 4))
    null = runs.run(stage.served, scenario, folder / "null", seconds=1.0, pace=stage.pace, null=True)
    problems = result["problems"] + stage.reference.check(folder / "performance", result)
    value, floor = result["figures"].get(how.figure), stage.floor.get(how.figure)
    if scenario == "multi-stream":  # the floor of a single picture's p99 is not that of 8
        floor = 1000 * runs.SAMPLES_PER_QUERY / stage.floor["samples_per_second"]
    known = [each for each in (before, after) if each is not None]
    result |= {
        "metric": how.metric,
        "value": value,
        "beside": {
            "perf_analyzer": statistics.mean(known) if known else None,
            "in_process": floor,
            "ratio": value / floor if value and floor else None,
        },
        "null": null["figures"],
    }
    if accuracy:
        run = runs.run(stage.served, scenario, folder / "accuracy", mode="AccuracyOnly", **settings)  # type: ignore[arg-type]
        problems += [f"accuracy mode: {problem}" for problem in run["problems"]]
        if not run["problems"]:
            judged = answers.evaluate(folder / "accuracy", stage.pictures)
            same = answers.same_in_both(folder / "performance", folder / "accuracy")
            result["accuracy"] = {"map": judged.map, "map50": judged.map50, "images": judged.images, **same}
            if same["different"]:
                count = len(same["different"])
                problems.append(f"{count} of {same['compared']} answers differ from those of accuracy mode")
    return {**result, "problems": problems, "valid": not problems}


def _analyzer(stage: Stage, scenario: str, seconds: float) -> float | None:
    """The same figure by perf_analyzer; None where it gives none."""
    how = SCENARIOS[scenario]
    load = Load(protocol=stage.served.protocol, shared_memory=stage.served.shared_memory)  # type: ignore[arg-type]
    if scenario == "server":
        rate = runs.settings_of(scenario, stage.pace, seconds)[0]["server_target_qps"]
        load = replace(load, rate=rate)
    else:
        batch = min(how.batch, stage.bench.config.max_batch_size)
        load = replace(load, concurrency=4 if scenario == "offline" else 1, batch_size=batch)
    try:  # not from the run's journal: a scenario that is measured again has both programs in the same minutes
        record = replace(stage.bench, journal=Journal()).point(scenario, load, seconds=seconds)
    except PerfError:
        return None
    point = record["point"]
    return float(point["throughput"] if scenario == "offline" else point["latency_ms"][how.figure.removesuffix("_ms")])


def said(result: Mapping[str, Any]) -> str:
    """A scenario's result in half a line."""
    name, value = result["scenario"], result["value"]
    figure = "no figure" if value is None else f"{value:.3g} {'samples/s' if name == 'offline' else 'ms'}"
    rate = f"{result['figures']['rate']:.3g} queries/s with p99 " if name == "server" else ""
    return f"{name} {rate}{figure}{'' if result['valid'] else ', NOT VALID'}"


def told(result: Mapping[str, Any]) -> str:
    """A scenario's result in a few lines, for a terminal."""
    checked = f"{result['answered']} answers checked, {result['wrong']} wrong, {result['failed']} missing"
    lines = [f"{said(result)} ({result['metric']}): {'VALID' if result['valid'] else 'see below'}; {checked}"]
    lines += [f"  {problem}" for problem in result["problems"]]
    if judged := result.get("accuracy"):
        same = f"{judged['compared']} answers compared with those of performance mode"
        lines.append(f"  accuracy mode: mAP@[.5:.95] {judged['map']:.4f} on {judged['images']} pictures; {same}")
    return "\n".join(lines)
