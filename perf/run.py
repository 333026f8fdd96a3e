"""`invoke perf`: measures a served model against the same model in this process, and checks its answers meanwhile.

A run is a folder `<artifacts>/perf/<run>/`: settings.json, points.jsonl (the journal), summary.json, report.md,
report.html. It is written even if the run fails or is interrupted; `--resume` measures what is missing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import ServeError, SSDError
from build.files import ARTIFACTS, MODELS, relative, write_json
from perf import direct, environment
from perf.bench import Bench, load_pictures, start_bench
from perf.journal import Journal
from perf.load import Load, PerfError
from perf.mlperf import measure, peak, runs
from perf.ratio import TRANSPORTS, served_ratio, single_stream
from perf.report import BUSY, checked_answers, loadgen_results, report
from perf.settings import SETTINGS, Settings, check, open_run
from perf.statistics import aggregate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console
    from rich.progress import Progress

    from build.gate.datasets import Pictures
    from build.spec import Spec

BATCH = 8  # images per request of the served ratio of batches
_FIXED_S = 0.4  # of starting perf_analyzer, checking answers and looking at processes
Step = tuple[str, float, Callable[[], object]]  # its name, about how many seconds it takes, what it does


def perf(
    settings: Settings,
    *,
    resume: Path | None = None,
    artifacts: Path = ARTIFACTS,
    sources: Path = MODELS,
    console: Console | None = None,
) -> dict[str, Any]:
    """Publishes, serves, loads and reports, in one go.

    Args:
        settings: what to measure; those of the resumed run count where there is one.
        resume: folder (or its name) of a run that did not come to its end.
        artifacts: gets perf/<run>/ or mlperf/<run>/ and, in perf/repositories/, what is served.
        sources: where the models are.
        console: where to say what is done; None = standard output.

    Returns:
        What it wrote to summary.json: see docs/perf.md.

    Raises:
        PerfError: answers were wrong or missing, or not everything could be measured. The report is written all the
            same, and the message says where.
        SSDError: nothing could be measured.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from build.spec import load

    console = console or Console(highlight=False, soft_wrap=True)
    started = time.monotonic()
    if resume is None:
        check(settings, sources)
    folder, settings = open_run(settings, resume, artifacts)
    spec = load(sources / settings.model / "spec.toml")
    images, pictures = load_pictures(spec, settings, artifacts)
    facts = environment.capture()
    if facts["other_load"] > BUSY:
        console.print(f"other programs take {facts['other_load']:.0%} of the cores: the figures will say little")
    write_json(folder / SETTINGS, asdict(settings))
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    interrupted = False
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        run = _Run(folder, spec, settings, images, pictures, facts, artifacts, sources, bar)
        try:
            for precision in settings.precisions:
                run.measure(precision)
        except KeyboardInterrupt:
            interrupted = True
            run.problems.append("it was interrupted")
    summary = run.summary()
    write_json(folder / "summary.json", summary)
    told = report(summary)
    told.write(folder, "report")
    for line in told.verdict:
        console.print({True: "ok  ", False: "MISS", None: " -- "}[line.good], line.text, markup=False)
    reused = f", {run.journal.reused} measurements from before" if run.journal.reused else ""
    console.print(
        f"{relative(folder)}: report.html, report.md, summary.json ({time.monotonic() - started:.0f} s{reused})"
    )
    if interrupted:
        console.print(f"go on with: invoke perf --resume {relative(folder)}")
        raise KeyboardInterrupt
    _require(summary, folder)
    return summary


@dataclass
class _Run:
    """A run while it measures: what it was asked for, and what was measured so far."""

    folder: Path
    spec: Spec
    settings: Settings
    images: Sequence[NDArray[np.uint8]]
    pictures: Pictures
    facts: dict[str, Any]
    artifacts: Path
    sources: Path
    bar: Progress
    records: dict[str, dict[tuple[str, Load], list[dict[str, Any]]]] = field(default_factory=dict)  # by series
    results: dict[str, Any] = field(default_factory=lambda: {"precisions": {}, "mlperf": {}, "peak": {}})
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.task = self.bar.add_task("", total=None)
        where = {name: self.facts[name] for name in ("cpu", "cores_allowed", "gpus", "versions")}
        self.journal = Journal(self.folder / "points.jsonl", self._measuring, where)

    def measure(self, precision: str) -> None:
        """Everything that needs a server of one precision; what goes wrong is noted and ends no more than it must."""
        settings, model = self.settings, self.spec.model.name
        self.bar.reset(self.task, description=f"{precision}: publishing", total=None)
        try:
            repository = publish(self.spec, precision, self.artifacts, self.sources)
            with start_bench(repository, model, self.images, self.journal) as bench, contextlib.ExitStack() as closing:
                self.facts["versions"]["tritonserver"] = bench.server.version
                results = self.results["precisions"].setdefault(precision, {})
                steps: list[Step] = []
                if not settings.scenarios:
                    raw = closing.enter_context(direct.beside(bench.server, model, bench.images, bench.config))
                    steps += self._perf_steps(bench, raw, results)
                steps += self._loadgen_steps(bench, results)
                self.bar.reset(self.task, total=sum(seconds for _, seconds, _ in steps))
                for name, seconds, work in steps:
                    try:
                        work()
                    except SSDError as error:  # the next step has its chance, if the server lives
                        self._note(name, error)
                        bench.server.check_alive()
                    self.bar.advance(self.task, seconds)
        except SSDError as error:
            self._note(precision, error)

    def summary(self) -> dict[str, Any]:
        """What is written to summary.json."""
        series = {
            name: [aggregate(records, precision) for (precision, _), records in loads.items()]
            for name, loads in self.records.items()
        }
        precisions = self.results["precisions"]
        return {
            "run": self.folder.name,
            "model": self.settings.model,
            "quick": self.settings.quick,
            "complete": not self.problems,
            "problems": self.problems,
            "environment": self.facts,
            "settings": asdict(self.settings),
            "served_ratio": precisions.get(self.settings.precisions[0], {}).get("served_ratio", {}),
            "answers": checked_answers(self.results),
            "series": series,
            **self.results,
        }

    def _measuring(self, key: Mapping[str, Any]) -> None:
        load = f", {Load(**key['load'])}" if "load" in key else ""
        self.bar.update(self.task, description=f"{key['precision']}: {key['series']}{load}")

    def _note(self, what: str, error: SSDError) -> None:
        problem = error.what.splitlines()[0]
        if isinstance(error, ServeError) and any(problem in known for known in self.problems):
            return  # the step that found the server gone has said it
        self.bar.console.print(f"{what}: {error}", markup=False)
        self.problems.append(f"{what}: {problem}")

    # -- what is measured ----------------------------------------------------------------------------------------------

    def _perf_steps(self, bench: Bench, raw: direct.Direct, results: dict[str, Any]) -> Iterator[Step]:
        size, base = self.settings.size, TRANSPORTS["shm"]
        results["backend"] = bench.server.model_config(bench.model)["backend"]

        def ratio() -> None:
            results.update(served_ratio(bench, raw, rounds=size.rounds, seconds=size.ratio_seconds))

        def single() -> None:
            results["single_stream"] = single_stream(bench, raw, rounds=size.rounds, seconds=size.ratio_seconds)

        def batches() -> None:
            batch = min(BATCH, bench.config.max_batch_size)
            with direct.beside(bench.server, bench.model, bench.images, bench.config, batch_size=batch) as raw:
                results["batches"] = served_ratio(bench, raw, rounds=size.rounds, seconds=size.ratio_seconds)

        def rates() -> None:
            if "served_ips" not in results:
                raise PerfError("no rates without the throughput of 4 clients", why="it could not be measured")
            shares = [share * results["served_ips"]["shm"] for share in size.rates]
            loads = [replace(base, rate=float(f"{rate:.3g}")) for rate in shares]
            self._sweep(bench, "rate", loads)

        yield "served against in process", 6.5 * size.rounds * size.ratio_seconds, ratio
        yield "single stream", 2.5 * size.rounds * size.ratio_seconds, single
        loads = {
            "concurrency": [replace(base, concurrency=clients) for clients in size.concurrency],
            "batch": [
                replace(base, concurrency=2, batch_size=count)
                for count in size.batch
                if count <= bench.config.max_batch_size
            ],
            "protocol": [
                Load(concurrency=direct.CLIENTS, protocol=protocol, shared_memory=memory)
                for protocol in (("http", "grpc", "stream") if size.whole else ())
                for memory in (None, "system", *(("cuda",) if bench.config.runtime == "tensorrt" else ()))
            ],
        }
        for series, several in loads.items():
            if several:
                seconds = size.repeats * len(several) * (size.seconds + _FIXED_S)
                yield series, seconds, partial(self._sweep, bench, series, several)
        yield "rate", size.repeats * len(size.rates) * (size.seconds + _FIXED_S), rates
        if size.whole:
            yield "served against in process, batches", 7.0 * size.rounds, batches

    def _sweep(self, bench: Bench, series: str, loads: Sequence[Load]) -> None:
        size, records = self.settings.size, self.records.setdefault(series, {})
        for repeat in range(size.repeats):
            for load in loads:
                try:
                    record = bench.point(series, load, seconds=size.seconds, repeat=repeat)
                except PerfError as error:  # of this load; a server that is gone is a ServeError
                    self._note(f"{series}, {load}", error)
                else:
                    records.setdefault((bench.precision, load), []).append(record)

    def _loadgen_steps(self, bench: Bench, results: dict[str, Any]) -> Iterator[Step]:
        """LoadGen's scenarios, and the highest rate where it was asked for."""
        settings, size, precision = self.settings, self.settings.size, bench.precision
        names = settings.scenarios or size.scenarios
        seconds = settings.seconds if settings.scenarios else size.scenario_seconds
        folder = self.folder / "loadgen" / precision
        ready: list[measure.Stage] = []

        def stage() -> measure.Stage:
            """Made when it is needed first: it measures the pace, and the floor where that is not known yet."""
            if not ready:
                floor = None
                if "single_stream" in results and "direct_ips" in results:
                    floor = {f"{name}_ms": value for name, value in results["single_stream"]["direct_ms"].items()}
                    floor["samples_per_second"] = results.get("batches", results)["direct_ips"]
                ready.append(measure.stage(bench, self.pictures, settings.transport, floor))
            return ready[0]

        def run(name: str) -> None:
            how: dict[str, Any] = {"seconds": seconds, "accuracy": settings.accuracy}
            key = bench.key(f"LoadGen, {name}", **how, transport=settings.transport)
            # A run that is not valid is measured again when the whole is resumed.
            result = self.journal.measure(
                key, lambda: measure.measure(stage(), name, folder / name, **how), lambda result: bool(result["valid"])
            )
            self.results["mlperf"].setdefault(precision, {})[name] = result
            self.bar.console.print(f"{precision}, {measure.told(result)}", markup=False)

        def search(bound: float) -> None:
            key = bench.key("highest rate", bound_ms=bound, seconds=seconds)
            result = self.journal.measure(key, lambda: peak.find_peak(stage(), folder / "peak", bound, seconds=seconds))
            self.results["peak"].setdefault(precision, []).append(result)
            said = f"{precision}, p99 within {result['bound_ms']:g} ms: {result['rate']:g} queries/s"
            self.bar.console.print(said, markup=False)

        for name in names:
            yield f"LoadGen, {name}", 1.6 * seconds + 5, partial(run, name)
        bounds = [settings.slo_ms] if settings.slo_ms or (size.whole and not settings.scenarios) else []
        if settings.find_peak:
            bounds = [runs.BOUND_MS, 0.0]
        for bound in bounds:  # 0: the model's own
            yield "highest rate", 8 * max(10.0, seconds), partial(search, bound)


def publish(spec: Spec, precision: str, artifacts: Path, sources: Path = MODELS) -> Path:
    """A repository with the model in this precision, apart from what is published for serving; kept between runs."""
    from rich.console import Console

    from build import pipeline
    from build.gate.accuracy import mean_average_precision

    repository = artifacts / "perf" / "repositories" / precision
    repository.mkdir(parents=True, exist_ok=True)
    pipeline.build_engines(
        [spec.model.name],
        precision=precision,
        repository=repository,
        sources=sources,
        artifacts=artifacts,
        judge=mean_average_precision,
        console=Console(quiet=True),
    )
    return repository


def _require(summary: dict[str, Any], folder: Path) -> None:
    """Raises where answers were wrong or missing, or something could not be measured."""
    where = relative(folder)
    # A busy machine makes LoadGen call a run INVALID: that fails a run of LoadGen alone. Other faults fail any run.
    invalid = [
        f"{precision}, {result['scenario']}: {problem}"
        for precision, result in loadgen_results(summary)
        if summary["settings"]["scenarios"] or result["wrong"] or result["failed"] or result["exit_code"] != 0
        for problem in result["problems"]
    ]
    if invalid:
        raise PerfError(
            "not every run of LoadGen is valid: " + "; ".join(invalid),
            fix=f"see LoadGen's logs in {where}/loadgen/; measure these again: invoke perf --resume {where}",
        )
    if not summary["complete"]:
        raise PerfError(
            "not everything was measured: " + "; ".join(summary["problems"]),
            fix=f"what was measured is in {where}/report.html; go on with: invoke perf --resume {where}",
        )
