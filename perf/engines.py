"""`invoke perf-engines`: models, precisions and engines of the CPU side by side, served and in this process.

Every combination has a tritonserver of its own. All run at once, and the load goes to one after the other within each
round: whatever else the machine does affects all of them alike.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.contract import BASELINE
from build.errors import OptionError, RuntimeUnavailableError, VerifyError
from build.files import ARTIFACTS, MODELS, relative, write_json
from build.reports import cpu
from perf.bench import Bench, load_pictures, start_bench
from perf.direct import Direct, beside
from perf.journal import Journal
from perf.ratio import TRANSPORTS
from perf.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class Variant:
    """A model in a precision on an engine."""

    model: str
    precision: str
    engine: str

    def __str__(self) -> str:
        return f"{self.model} {self.precision} {self.engine}"


def side_by_side(
    models: Sequence[str],
    *,
    precisions: Sequence[str],
    engines: Sequence[str],
    clients: int,
    rounds: int,
    seconds: float,
    artifacts: Path = ARTIFACTS,
    sources: Path = MODELS,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Publishes every combination, apart from what is published for serving, and measures all in turn.

    Args:
        models: folders of `sources`.
        precisions: of contract.PRECISIONS; what an engine does not have here, or fails its gate, is said and left out.
        engines: onnxruntime, openvino.
        clients: that send requests at once, with shared memory.
        rounds: how often each is measured; medians count.
        seconds: of each measurement.
        artifacts: gets perf/engines.json; in perf/repositories/ is what is served.
        sources: where the models are.
        console: for the table; None = standard output.

    Returns:
        A row for each combination: `model`, `precision`, `engine`, `served_ips` and `direct_ips` (medians, images/s),
        `served_direct` (the median of the rounds' quotients), `gain` (served, over the FP32 engine with the highest
        median, the median of the rounds' quotients; None without FP32), and the rounds behind them.

    Raises:
        OptionError: nothing is left to measure.
        SSDError: a model cannot be published, served or loaded.
    """
    from rich.console import Console

    show = console or Console(highlight=False, soft_wrap=True)
    if clients < 1 or rounds < 1 or seconds <= 0:
        raise OptionError("clients and rounds must be at least 1, seconds more than 0")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ssd-engines-")))
        running: dict[Variant, tuple[Bench, Direct]] = {}
        for variant in itertools.starmap(Variant, itertools.product(models, precisions, engines)):
            show.print(f"{variant}: published, served and run in this process", markup=False)
            try:
                running[variant] = _start(variant, stack, Journal(folder / f"{variant}.jsonl"), artifacts, sources)
            except (OptionError, RuntimeUnavailableError, VerifyError) as error:
                show.print(f"{variant}: left out: {error.what}", markup=False)
        if not running:
            raise OptionError("no engine here has any of these precisions", fix="name others: --precision fp32,int8")
        rows = _measure(running, clients, rounds, seconds, show)
    _compare(rows)
    target = artifacts / "perf" / "engines.json"
    about = {"cpu": cpu.int8(), "clients": clients, "rounds": rounds, "seconds": seconds}
    write_json(target, {**about, "rows": rows})
    show.print(_table(rows, f"{clients} clients, shared memory, medians of {rounds} rounds in turn ({about['cpu']})"))
    show.print(f"written: {relative(target)}", markup=False)
    return rows


def _start(
    variant: Variant, stack: contextlib.ExitStack, journal: Journal, artifacts: Path, sources: Path
) -> tuple[Bench, Direct]:
    """A server of its own with a variant, and the same file in this process."""
    from rich.console import Console

    from build import pipeline
    from build.gate.accuracy import mean_average_precision
    from build.spec import load

    repository = artifacts / "perf" / "repositories" / f"{variant.precision}-{variant.engine}" / variant.model
    repository.mkdir(parents=True, exist_ok=True)
    pipeline.build_engines(
        [variant.model],
        "onnxruntime",
        variant.precision,
        repository=repository,
        sources=sources,
        artifacts=artifacts,
        judge=mean_average_precision,
        serving_engine=variant.engine,
        console=Console(quiet=True),
    )
    images, _ = load_pictures(load(sources / variant.model), Settings(variant.model), artifacts)
    bench = stack.enter_context(start_bench(repository, variant.model, images, journal))
    direct = stack.enter_context(beside(bench.server, variant.model, bench.images, bench.config))
    return bench, direct


def _measure(
    running: Mapping[Variant, tuple[Bench, Direct]], clients: int, rounds: int, seconds: float, show: Console
) -> list[dict[str, Any]]:
    load = replace(TRANSPORTS["shm"], concurrency=clients)
    served: dict[Variant, list[float]] = {variant: [] for variant in running}
    direct: dict[Variant, list[float]] = {variant: [] for variant in running}
    for number in range(rounds):
        show.print(f"round {number + 1} of {rounds}", markup=False)
        for variant, (bench, raw) in running.items():
            before = raw.throughput(seconds / 2)
            point = bench.point("engines", load, seconds=seconds, repeat=number)["point"]
            served[variant].append(point["throughput"])
            direct[variant].append((before + raw.throughput(seconds / 2)) / 2)
    return [
        {
            "model": variant.model,
            "precision": variant.precision,
            "engine": variant.engine,
            "served_ips": statistics.median(served[variant]),
            "direct_ips": statistics.median(direct[variant]),
            "served_direct": statistics.median(a / b for a, b in zip(served[variant], direct[variant], strict=True)),
            "served_rounds": served[variant],
            "direct_rounds": direct[variant],
        }
        for variant in running
    ]


def _compare(rows: Sequence[dict[str, Any]]) -> None:
    """Sets each row's gain over the fastest FP32 of its model."""
    for row in rows:
        baselines = [other for other in rows if (other["model"], other["precision"]) == (row["model"], BASELINE)]
        best = max(baselines, key=lambda other: other["served_ips"], default=None)
        gains = [a / b for a, b in zip(row["served_rounds"], best["served_rounds"], strict=True)] if best else []
        row["gain"] = statistics.median(gains) if gains else None


def _table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    from rich.table import Table

    table = Table(title=title)
    table.add_column("images/s", overflow="fold")
    for column in ("served", "of FP32's best", "in process", "served / that"):
        table.add_column(column, justify="right")
    for row in rows:
        gain = "" if row["gain"] is None else f"{row['gain']:.2f}"
        figures = (f"{row['served_ips']:.0f}", gain, f"{row['direct_ips']:.0f}", f"{row['served_direct']:.3f}")
        table.add_row(str(Variant(row["model"], row["precision"], row["engine"])), *figures)
    return table
