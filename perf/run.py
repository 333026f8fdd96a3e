"""`invoke perf`: measures a served model against the same model in this process, and checks its answers meanwhile.

A run is a folder `<artifacts>/perf/<run>/`: settings.json, points.jsonl (the journal), summary.json, report.md,
report.html. It is written even if the run fails or is interrupted; `--resume` measures what is missing.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import OptionError, ServeError, SSDError
from build.files import ARTIFACTS, MODELS, write_json
from perf import direct, report, slo
from perf.bench import Bench, load_pictures, start_bench
from perf.journal import Journal
from perf.load import Load, PerfError
from perf.mlperf import measure, runs
from perf.progress import Bar
from perf.ratio import TRANSPORTS, served_ratio, single_stream
from perf.sections import loadgen_results
from perf.settings import Settings, Size, check, keep, open_run, run_folder, same_model
from perf.statistics import aggregate, saturation, summed_answers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console

    from build.gate.datasets import Pictures
    from build.spec import Spec

_MARKS = {True: "ok  ", False: "MISS", None: " -- "}
BATCH = 8  # images per request of the served ratio of batches


@dataclass
class _Results:
    """What was measured so far: records by series and load, everything else by its place in the summary."""

    records: dict[str, dict[tuple[str, Load], list[dict[str, Any]]]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, series: str, bench: Bench, load: Load, record: dict[str, Any]) -> None:
        self.records.setdefault(series, {}).setdefault((bench.precision, load), []).append(record)

    def of(self, precision: str) -> dict[str, Any]:
        """What the summary says of a precision."""
        entry: dict[str, Any] = self.summary.setdefault("precisions", {}).setdefault(precision, {})
        return entry

    def rows(self, series: str) -> list[dict[str, Any]]:
        return [aggregate(records, precision) for (precision, _), records in self.records.get(series, {}).items()]


@dataclass(frozen=True)
class _Step:
    name: str
    seconds: float  # about, for the progress bar
    work: Callable[[], object]


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
        artifacts: gets perf/<run>/ and, in perf/repositories/, what is served.
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

    from build.spec import load

    console = console or Console(highlight=False, soft_wrap=True)
    started = time.monotonic()
    if resume is None:
        check(settings, sources)
    else:
        resume = run_folder(resume, artifacts)
    folder, settings, facts = open_run(settings, resume, artifacts)
    spec = load(sources / settings.model / "spec.toml")
    images, pictures = load_pictures(spec, settings, artifacts)
    busy = facts["environment"]["other_load"]
    if busy > report.BUSY:
        console.print(f"other programs take {busy:.0%} of this machine's cores: the figures will say little")
    keep(folder, settings, facts)
    results, interrupted = _Results(), False
    with Bar(console) as bar:
        journal = Journal(folder / "points.jsonl", bar.measuring)
        context = _Context(
            folder, spec, settings, images, pictures, journal, results, facts, artifacts, sources, bar, console
        )
        try:
            for precision in settings.precisions:
                _measure(context, precision)
            if not (settings.tune or settings.scenarios):
                bar.begin("in process", 5.0)
                _step(context, _Step("SSDNMS alone", 4.0, lambda: _ssd_nms(context)))
        except KeyboardInterrupt:
            interrupted = True
            results.problems.append("it was interrupted")
    summary = _summary(folder.name, settings, facts, results)
    _write(folder, summary)
    for line in report.verdict(summary):
        console.print(f"{_MARKS[line.good]} {line.text}", markup=False)
    reused = f", {journal.reused} measurements from before" if journal.reused else ""
    console.print(f"{short(folder)}: report.html, report.md, summary.json ({time.monotonic() - started:.0f} s{reused})")
    if interrupted:
        console.print(f"go on with: invoke perf --resume {short(folder)}")
        raise KeyboardInterrupt
    _require(summary, folder)
    return summary


def compare_runs(runs: Sequence[str], artifacts: Path = ARTIFACTS, console: Console | None = None) -> None:
    """Says whether the second run is faster than the first; writes compare.md and .html into the second's folder.

    Args:
        runs: two of them, each its folder or the folder's name.
        artifacts: where runs are.
        console: where to say it; None = standard output.

    Raises:
        OptionError: not two runs.
        CompareError: they cannot be compared.
    """
    from rich.console import Console

    from perf import compare

    console = console or Console(highlight=False, soft_wrap=True)
    if len(runs) != 2:
        raise OptionError(f"{len(runs)} runs to compare", fix="name two: invoke perf --compare RUN_A,RUN_B")
    folders = [run_folder(Path(run), artifacts) for run in runs]
    result = compare.compare(*folders)
    console.print("\n".join(line.text for line in compare.lines(result)), markup=False)
    for row in result["rows"]:
        if row["verdict"] in ("slower", "faster"):
            console.print(f"{row['verdict']}: {row['what']}: {row['ratio']:.3f}", markup=False)
    for path in compare.write(folders[1], result):
        console.print(short(path), markup=False)


# -- one precision -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Context:
    folder: Path
    spec: Spec
    settings: Settings
    images: Sequence[NDArray[np.uint8]]
    pictures: Pictures
    journal: Journal
    results: _Results
    facts: dict[str, Any]
    artifacts: Path
    sources: Path
    bar: Bar
    console: Console


def _measure(context: _Context, precision: str) -> None:
    """Everything that needs a server of one precision; what goes wrong is noted and ends no more than it must."""
    settings, bar = context.settings, context.bar
    model = context.spec.model.name
    try:
        bar.begin(f"{precision}: publishing", None)
        repository = publish(context.spec, precision, context.artifacts, context.sources)
        if settings.tune:
            bar.end()
            _tune(context, repository)
            return
        with start_bench(repository, model, context.images, context.journal, late_ms=settings.slo_ms or None) as bench:
            same_model(context.facts, bench)
            keep(context.folder, settings, context.facts)
            with contextlib.ExitStack() as closing:
                if settings.scenarios:
                    steps = list(_loadgen(context, bench))
                else:
                    raw = closing.enter_context(direct.beside(bench.server, model, bench.images, bench.config))
                    steps = list(_steps(context, bench, raw))
                bar.begin(precision, sum(step.seconds for step in steps))
                for step in steps:
                    if not _step(context, step):
                        bench.server.check_alive()
    except SSDError as error:
        _note(context, precision, error)


def _step(context: _Context, step: _Step) -> bool:
    """Does one step; a failure is noted, and the next one has its chance."""
    try:
        step.work()
    except SSDError as error:
        _note(context, step.name, error)
        return False
    finally:
        context.bar.done(step.seconds)
    return True


def _note(context: _Context, what: str, error: SSDError) -> None:
    problem = error.what.splitlines()[0]
    if isinstance(error, ServeError) and any(problem in known for known in context.results.problems):
        return  # the step that found the server gone has said it
    context.console.print(f"{what}: {error}", markup=False)
    context.results.problems.append(f"{what}: {problem}")


def _steps(context: _Context, bench: Bench, raw: direct.Direct) -> Iterator[_Step]:
    settings, results = context.settings, context.results
    size = settings.size
    base = TRANSPORTS["shm"]
    fixed = 0.4  # of starting perf_analyzer, checking answers and sampling

    def sweep(series: str, loads: Sequence[Load], seconds: float) -> _Step:
        def work() -> None:
            for repeat in range(size.repeats):
                for load in loads:
                    try:
                        record = bench.point(series, load, seconds=seconds, repeat=repeat)
                    except PerfError as error:  # of this load; a server that is gone is a ServeError
                        _note(context, f"{series}, {load}", error)
                    else:
                        results.add(series, bench, load, record)

        return _Step(series, size.repeats * len(loads) * (seconds + fixed), work)

    yield _Step(
        "served against in process", size.rounds * 6.5 * size.ratio_seconds, lambda: _ratio(bench, raw, size, results)
    )
    yield _Step(
        "single stream", size.single_rounds * 2.5 * size.ratio_seconds, lambda: _single(bench, raw, size, results)
    )
    yield sweep("concurrency", [replace(base, concurrency=n) for n in size.concurrency], size.seconds)
    most = bench.config.max_batch_size
    batches = [replace(base, concurrency=2, batch_size=n) for n in size.batch if n <= most]
    yield sweep("batch", batches, size.seconds)
    if size.protocols:
        transports = [
            Load(concurrency=direct.CLIENTS, protocol=protocol, shared_memory=memory)
            for protocol in ("http", "grpc", "stream")
            for memory in (None, "system", *(("cuda",) if bench.config.runtime == "tensorrt" else ()))
        ]
        yield sweep("protocol", transports, size.seconds)

    def rates() -> None:
        # What 4 clients got: of the ratio's rounds, as everything else that hangs on it.
        measured = results.of(bench.precision).get("served_ips")
        if measured is None:
            raise PerfError("no rates without the throughput to take shares of", why="it could not be measured")
        capacity = measured["shm"]
        arrivals = ("poisson",) if settings.quick else ("constant", "poisson")
        loads = [
            replace(base, concurrency=None, rate=float(f"{share * capacity:.3g}"), arrivals=kind)  # type: ignore[arg-type]
            for kind in arrivals
            for share in size.rates
        ]
        sweep("rate", loads, size.seconds).work()

    yield _Step("rate", size.repeats * 2 * len(size.rates) * (size.seconds + fixed), rates)
    if size.searches:
        yield _Step(
            "served against in process, batches", size.rounds * 7, lambda: _ratio_of_batches(bench, size, results)
        )
    if size.searches or settings.slo_ms:
        yield _Step("highest rate under the bound", 60, lambda: _slo(bench, settings, results))
    yield from _loadgen(context, bench)


def _ratio(bench: Bench, raw: direct.Direct, size: Size, results: _Results) -> None:
    into = results.of(bench.precision)
    into["backend"] = bench.server.model_config(bench.model)["backend"]
    into |= served_ratio(bench, raw, rounds=size.rounds, seconds=size.ratio_seconds)


def _ratio_of_batches(bench: Bench, size: Size, results: _Results) -> None:
    batch = min(BATCH, bench.config.max_batch_size)
    with direct.beside(bench.server, bench.model, bench.images, bench.config, batch_size=batch) as raw:
        ratio = served_ratio(bench, raw, rounds=size.rounds, seconds=size.ratio_seconds)
    results.of(bench.precision)["batches"] = {"batch_size": batch, **ratio}


def _single(bench: Bench, raw: direct.Direct, size: Size, results: _Results) -> None:
    single = single_stream(bench, raw, rounds=size.single_rounds, seconds=size.ratio_seconds)
    results.of(bench.precision)["single_stream"] = single


def _slo(bench: Bench, settings: Settings, results: _Results) -> None:
    load = replace(TRANSPORTS["shm"], concurrency=None)
    seconds = settings.size.seconds if settings.size.searches else 1.5
    bound = settings.slo_ms or slo.default_bound(slo.single_stream(bench, seconds=seconds, load=load)["p50"])
    tolerance = 0.05 if settings.size.searches else 0.1
    search = slo.find_rate(bench, bound, seconds=seconds, tolerance=tolerance, load=load)
    results.summary.setdefault("slo", search)


def _loadgen(context: _Context, bench: Bench) -> Iterator[_Step]:
    """LoadGen's scenarios, and the highest rate where it was asked for."""
    settings, results = context.settings, context.results
    names, seconds = settings.size.scenarios, settings.size.scenario_seconds
    floor: dict[str, float] = {}
    if settings.scenarios:
        names, seconds = settings.scenarios, settings.seconds
    ready: list[measure.Stage] = []
    folder = context.folder / "loadgen" / bench.precision

    def stage() -> measure.Stage:
        if not ready:
            known = results.of(bench.precision)
            if "single_stream" in known and "direct_ips" in known:
                ips = known.get("batches", known)["direct_ips"]
                floor.update({f"{p}_ms": v for p, v in known["single_stream"]["direct_ms"].items()})
                floor["images_per_second"] = ips
            ready.append(measure.stage(bench, context.pictures, settings.transport, floor))
        return ready[0]

    def run(name: str) -> None:
        how: dict[str, Any] = {"seconds": seconds, "accuracy": settings.accuracy, "analyzer_s": min(3.0, seconds / 4)}
        key = {"series": f"LoadGen, {name}", "precision": bench.precision, **how, "transport": settings.transport}
        result = context.journal.measure(key, lambda: measure.measure(stage(), name, folder / name, **how))
        results.summary.setdefault("mlperf", {}).setdefault(bench.precision, {})[name] = result
        context.console.print(f"{bench.precision}, {measure.told(result)}", markup=False)

    def peak() -> None:
        for bound in (runs.BOUND_MS, stage().own_bound_ms):
            key = {"series": "highest rate by LoadGen", "precision": bench.precision, "bound_ms": bound}
            work = functools.partial(measure.find_peak, stage(), folder / "peak", bound, seconds=seconds)
            found = context.journal.measure({**key, "seconds": seconds}, work)
            results.summary.setdefault("peak", {}).setdefault(bench.precision, []).append(found)
            rate = f"{found['rate']:g} queries/s" if found["rate"] else found["note"]
            context.console.print(f"{bench.precision}, p99 within {bound:g} ms: {rate}", markup=False)

    for name in names:
        yield _Step(f"LoadGen, {name}", 1.6 * seconds, functools.partial(run, name))
    if settings.find_peak:
        yield _Step("highest rate by LoadGen", 16 * seconds, peak)


# -- without a server of its own ---------------------------------------------------------------------------------------


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


def _tune(context: _Context, repository: Path) -> None:
    from perf.tune import tune

    settings = context.settings
    context.results.summary["tune"] = tune(
        context.spec,
        repository,
        context.images,
        context.journal,
        bound_ms=settings.slo_ms or None,
        traffic=TRANSPORTS["shm"],
        seconds=0.5 if settings.quick else 1.0,
        console=context.console,
    )


def _ssd_nms(context: _Context) -> None:
    from perf import ssd_nms

    context.results.summary["ssd_nms"] = context.journal.measure({"series": "SSDNMS alone"}, ssd_nms.measure)


# -- the result --------------------------------------------------------------------------------------------------------


def _summary(run: str, settings: Settings, facts: dict[str, Any], results: _Results) -> dict[str, Any]:
    series = {name: results.rows(name) for name in results.records}
    rows = [row for rows in series.values() for row in rows]
    precisions = results.summary.get("precisions", {})
    first = precisions.get(settings.precisions[0], {})
    return {
        "run": run,
        "model": settings.model,
        "quick": settings.quick,
        "complete": not results.problems,
        "problems": results.problems,
        "environment": facts["environment"],
        "settings": asdict(settings),
        "served_ratio": first.get("served_ratio", {}),
        "precisions": precisions,
        "answers": summed_answers([row["answers"] for row in rows if row["answers"]]),
        "series": series,
        "saturation": {name: saturation(series[name]) for name in ("concurrency", "batch") if series.get(name)},
        **{name: results.summary.get(name) for name in ("mlperf", "peak", "ssd_nms", "slo", "tune")},
    }


def _write(folder: Path, summary: dict[str, Any]) -> None:
    write_json(folder / "summary.json", summary)
    report.write(folder, summary)


def _require(summary: dict[str, Any], folder: Path) -> None:
    """Raises where answers were wrong or missing, or something could not be measured."""
    where = short(folder)
    answers = summary["answers"] or {}
    if answers.get("wrong") or answers.get("dropped"):
        raise PerfError(
            f"under load {answers['wrong']} of {answers['checked']} checked answers were wrong, {answers['dropped']} "
            "were missing: " + "; ".join(answers["examples"][:2]),
            why="the server mixes up rows, or its model is not the published one",
            fix=f"see {where}/report.html; invoke verify checks what is published",
        )
    # A busy machine makes LoadGen call a run INVALID: that fails a run of LoadGen alone.
    invalid = [
        f"{precision}, {result['scenario']}: {problem}"
        for precision, result in loadgen_results(summary)
        if summary["settings"]["scenarios"] or result["wrong"] or result["failed"]
        for problem in result["problems"]
    ]
    if invalid:
        raise PerfError(
            "not every run of LoadGen is valid: " + "; ".join(invalid),
            fix=f"LoadGen's logs are in {where}/loadgen/; on a busy machine, try again when it is idle",
        )
    if not summary["complete"]:
        raise PerfError(
            "not everything was measured: " + "; ".join(summary["problems"]),
            fix=f"what was measured is in {where}/report.html; go on with: invoke perf --resume {where}",
        )


def short(path: Path) -> str:
    """A path as somebody in the current folder would type it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
