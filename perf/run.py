"""`invoke perf`: what a served model can do, against the same model in this process, with every answer's truth watched.

A run is a folder `<artifacts>/perf/<run>/`: settings.json, points.jsonl (the journal), summary.json, report.md,
report.html. It is written whatever happens on the way; `--resume` goes on where it ended.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import contract
from build.errors import DataError, OptionError, ServeError, SSDError
from perf import direct, report, scenarios
from perf.analyzer import Load, PerfError
from perf.bench import PICTURES, Bench, bench
from perf.journal import Journal
from perf.statistics import aggregate, saturation, summed_answers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console
    from rich.progress import TaskID

    from build.spec import Spec

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = direct.CLIENTS
# The ways into the server that the served ratio is given for. With shared memory the requests go over HTTP, which costs
# client and server less than gRPC's.
WAYS = {
    "shm": Load(concurrency=CLIENTS, protocol="http", shared_memory="system"),
    "grpc": Load(concurrency=CLIENTS, protocol="grpc"),
    "http": Load(concurrency=CLIENTS, protocol="http"),
}
_MARKS = {True: "ok  ", False: "MISS", None: " -- "}
BATCH = 8  # images per request of the served ratio of batches


@dataclass(frozen=True)
class Size:
    """How much a run measures: repeats and seconds of each kind of point."""

    rounds: int
    ratio_seconds: float
    single_rounds: int
    seconds: float
    repeats: int
    concurrency: tuple[int, ...]
    batch: tuple[int, ...]
    rates: tuple[float, ...]  # of the throughput that 4 clients got
    protocols: bool
    searches: bool  # MLPerf's scenarios and the peers


QUICK = Size(3, 0.6, 3, 0.6, 1, (1, 2, 4, 8), (1, 4, 16), (0.5, 0.8), protocols=False, searches=False)
FULL = Size(
    7,
    1.0,
    7,
    1.5,
    3,
    (1, 2, 3, 4, 6, 8, 16),
    (1, 2, 4, 8, 16, 32, 64),
    (0.3, 0.5, 0.7, 0.8, 0.9, 0.95),
    protocols=True,
    searches=True,
)


@dataclass(frozen=True)
class Settings:
    """What a run was asked for.

    Attributes:
        model: folder of models/.
        precisions: to measure, in turn; the first is what the summary's `served_ratio` is of.
        quick: the short run.
        slo_ms: bound on the p99 for which the highest rate is searched; 0 = 4 × the single stream's p50 in a full run,
            no search in a quick one.
        tune: search the best [serving] section instead of measuring the present one.
        images: folder of pictures to send; empty = the model's own held-out ones.
    """

    model: str = "shapes"
    precisions: tuple[str, ...] = ("fp32",)
    quick: bool = False
    slo_ms: float = 0.0
    tune: bool = False
    images: str = ""

    @property
    def size(self) -> Size:
        """How much is measured."""
        return QUICK if self.quick else FULL


@dataclass
class _Found:
    """What was measured so far: records by series and load, everything else by its place in the summary."""

    records: dict[str, dict[tuple[str, Load], list[dict[str, Any]]]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, series: str, one: Bench, load: Load, record: dict[str, Any]) -> None:
        self.records.setdefault(series, {}).setdefault((one.precision, load), []).append(record)

    def of(self, precision: str) -> dict[str, Any]:
        """What the summary says of a precision."""
        found: dict[str, Any] = self.summary.setdefault("precisions", {}).setdefault(precision, {})
        return found

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
    artifacts: Path = ROOT / "artifacts",
    sources: Path = ROOT / "models",
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

    say = console or Console(highlight=False, soft_wrap=True)
    started = time.monotonic()
    if resume is None:
        _check(settings, sources)
    else:
        resume = _run_folder(resume, artifacts)
    folder, settings, facts = _open(settings, resume, artifacts)
    spec = load(sources / settings.model / "spec.toml")
    images = _images(spec, settings, artifacts)
    busy = facts["environment"]["other_load"]
    if busy > report.BUSY:
        say.print(f"other programs take {busy:.0%} of this machine's cores: the figures will say little")
    _keep(folder, settings, facts)
    found, interrupted = _Found(), False
    with _Bar(say) as bar:
        journal = Journal(folder / "points.jsonl", bar.measuring)
        context = _Context(folder, spec, settings, images, journal, found, facts, artifacts, sources, bar, say)
        try:
            for precision in settings.precisions:
                _measure(context, precision)
            if not settings.tune:
                bar.begin("in process", 45.0 if settings.size.searches else 5.0)
                if settings.size.searches:
                    _step(context, _Step("peers", 40.0, lambda: _peers(context)))
                _step(context, _Step("SSDNMS alone", 4.0, lambda: _ssd_nms(context)))
        except KeyboardInterrupt:
            interrupted = True
            found.problems.append("it was interrupted")
    summary = _summary(folder.name, settings, facts, found)
    _write(folder, summary)
    for line in report.verdict(summary):
        say.print(f"{_MARKS[line.good]} {line.text}", markup=False)
    reused = f", {journal.reused} measurements from before" if journal.reused else ""
    say.print(f"{short(folder)}: report.html, report.md, summary.json ({time.monotonic() - started:.0f} s{reused})")
    if interrupted:
        say.print(f"go on with: invoke perf --resume {short(folder)}")
        raise KeyboardInterrupt
    _require(summary, folder)
    return summary


def compare_runs(runs: Sequence[str], artifacts: Path = ROOT / "artifacts", console: Console | None = None) -> None:
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

    say = console or Console(highlight=False, soft_wrap=True)
    if len(runs) != 2:
        raise OptionError(f"{len(runs)} runs to compare", fix="name two: invoke perf --compare RUN_A,RUN_B")
    folders = [_run_folder(Path(run), artifacts) for run in runs]
    result = compare.compare(*folders)
    say.print(compare.table(result))
    for path in compare.write(folders[1], result):
        say.print(short(path), markup=False)


# -- one precision -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Context:
    folder: Path
    spec: Spec
    settings: Settings
    images: Sequence[NDArray[np.uint8]]
    journal: Journal
    found: _Found
    facts: dict[str, Any]
    artifacts: Path
    sources: Path
    bar: _Bar
    say: Console


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
        with bench(repository, model, context.images, context.journal, late_ms=settings.slo_ms or None) as one:
            _same_model(context.facts, one)
            _keep(context.folder, settings, context.facts)
            with direct.beside(one.server, model, one.images, one.config) as raw:
                steps = list(_steps(context, one, raw))
                bar.begin(precision, sum(step.seconds for step in steps))
                for step in steps:
                    if not _step(context, step):
                        one.server.check_alive()
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
    if isinstance(error, ServeError) and any(problem in known for known in context.found.problems):
        return  # the step that found the server gone has said it
    context.say.print(f"{what}: {error}", markup=False)
    context.found.problems.append(f"{what}: {problem}")


def _steps(context: _Context, one: Bench, raw: direct.Direct) -> Iterator[_Step]:
    settings, found = context.settings, context.found
    size = settings.size
    base = WAYS["shm"]
    fixed = 0.4  # of starting perf_analyzer, checking answers and sampling

    def sweep(series: str, loads: Sequence[Load], seconds: float) -> _Step:
        def work() -> None:
            for repeat in range(size.repeats):
                for load in loads:
                    try:
                        record = one.point(series, load, seconds=seconds, repeat=repeat)
                    except PerfError as error:  # of this load; a server that is gone is a ServeError
                        _note(context, f"{series}, {load}", error)
                    else:
                        found.add(series, one, load, record)

        return _Step(series, size.repeats * len(loads) * (seconds + fixed), work)

    yield _Step(
        "served against in process", size.rounds * 6.5 * size.ratio_seconds, lambda: _ratio(one, raw, size, found)
    )
    yield _Step("single stream", size.single_rounds * 2.5 * size.ratio_seconds, lambda: _single(one, raw, size, found))
    yield sweep("concurrency", [replace(base, concurrency=n) for n in size.concurrency], size.seconds)
    most = one.config.max_batch_size
    batches = [replace(base, concurrency=2, batch_size=n) for n in size.batch if n <= most]
    yield sweep("batch", batches, size.seconds)
    if size.protocols:
        ways = [
            Load(concurrency=CLIENTS, protocol=protocol, shared_memory=memory)
            for protocol in ("http", "grpc", "stream")
            for memory in (None, "system", *(("cuda",) if one.config.runtime == "tensorrt" else ()))
        ]
        yield sweep("protocol", ways, size.seconds)

    def rates() -> None:
        # What 4 clients got: of the ratio's rounds, as everything else that hangs on it.
        measured = found.of(one.precision).get("served_ips")
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
        yield _Step("served against in process, batches", size.rounds * 7, lambda: _ratio_of_batches(one, size, found))
        yield _Step("MLPerf's scenarios", 90, lambda: _scenarios(one, settings, found))
    elif settings.slo_ms:
        yield _Step("highest rate under the bound", 40, lambda: _slo(one, settings, found))


def _ratio(one: Bench, raw: direct.Direct, size: Size, found: _Found) -> None:
    into = found.of(one.precision)
    into["backend"] = one.server.model_config(one.model)["backend"]
    into |= served_ratio(one, raw, rounds=size.rounds, seconds=size.ratio_seconds)


def served_ratio(one: Bench, raw: direct.Direct, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Served throughput by each way in, divided by that of the same model in this process, in turn within each round.

    Every served run lies between two direct ones, so that whatever else the machine does meets both sides alike.

    Args:
        one: the served side.
        raw: the direct side; its batch size is that of the requests.
        rounds: how many; the medians count.
        seconds: of each run.

    Returns:
        `served_ratio` {shm, grpc, http}, `ratio_rounds` {way: each round's}, `served_ips` and `direct_ips`, the medians
        behind it in images/s, `direct_rounds`, `direct_threads`: the fastest split of the threads into sessions.
    """
    batch = raw.batch_size
    key = {"series": "ratio", "precision": one.precision, "batch_size": batch, "seconds": seconds}
    ratios: dict[str, list[float]] = {way: [] for way in WAYS}
    served: dict[str, list[float]] = {way: [] for way in WAYS}

    def in_process(number: int) -> float:
        measured = one.journal.measure(
            {**key, "direct": number}, lambda: {"throughput": raw.throughput(seconds), "threads": str(raw)}
        )
        return float(measured["throughput"])

    between = [in_process(0)]
    for repeat in range(rounds):
        for way, load in WAYS.items():
            full = replace(load, batch_size=batch)
            # Unchecked: the client that checks would take its share of the very cores that are compared. The same load
            # is checked in the sweep over concurrency.
            record = one.point("ratio", full, seconds=seconds, repeat=repeat, check=False, retries=0)
            served[way].append(record["point"]["throughput"])
            between.append(in_process(len(between)))
            ratios[way].append(served[way][-1] / statistics.mean(between[-2:]))
    return {
        "served_ratio": {way: statistics.median(values) for way, values in ratios.items()},
        "ratio_rounds": ratios,
        "served_ips": {way: statistics.median(values) for way, values in served.items()},
        "direct_ips": statistics.median(between),
        "direct_rounds": between,
        "direct_threads": str(raw),
    }


def _ratio_of_batches(one: Bench, size: Size, found: _Found) -> None:
    batch = min(BATCH, one.config.max_batch_size)
    with direct.beside(one.server, one.model, one.images, one.config, batch_size=batch) as raw:
        ratio = served_ratio(one, raw, rounds=size.rounds, seconds=size.ratio_seconds)
    found.of(one.precision)["batches"] = {"batch_size": batch, **ratio}


def _single(one: Bench, raw: direct.Direct, size: Size, found: _Found) -> None:
    single = single_stream(one, raw, rounds=size.single_rounds, seconds=size.ratio_seconds)
    found.of(one.precision)["single_stream"] = single


def single_stream(one: Bench, raw: direct.Direct, *, rounds: int, seconds: float) -> dict[str, Any]:
    """What serving adds to one client's latency, with shared memory: both sides in turn within each round.

    Returns:
        `served_ms` and `direct_ms` {p50, p90, p99}: medians of the rounds; `overhead_ms`: median of the rounds'
        differences of the p50, each against the two direct runs around it; `overhead_rounds`.
    """
    key = {"series": "single stream", "precision": one.precision, "seconds": seconds}
    alone = replace(WAYS["shm"], concurrency=1)

    def in_process(number: int) -> dict[str, Any]:
        return one.journal.measure({**key, "direct": number}, lambda: raw.latency(seconds))

    between = [in_process(0)]
    served, overhead = [], []
    for repeat in range(rounds):
        record = one.point("single stream", alone, seconds=seconds, repeat=repeat, check=False, retries=0)
        served.append(record["point"]["latency_ms"])
        between.append(in_process(repeat + 1))
        overhead.append(served[-1]["p50"] - statistics.mean(run["p50"] for run in between[-2:]))
    medians = {
        side: {name: statistics.median(run[name] for run in runs) for name in ("p50", "p90", "p99")}
        for side, runs in (("served_ms", served), ("direct_ms", between))
    }
    return {**medians, "overhead_ms": statistics.median(overhead), "overhead_rounds": overhead}


def _scenarios(one: Bench, settings: Settings, found: _Found) -> None:
    load = replace(WAYS["shm"], concurrency=None)
    into = found.summary.setdefault("scenarios", {}).setdefault(one.precision, {})
    seconds = settings.size.seconds
    into["single_stream"] = scenarios.single_stream(one, seconds=seconds, load=load)
    into["offline"] = scenarios.offline(one, seconds=seconds, load=load)
    into["server"] = scenarios.server(one, settings.slo_ms or None, seconds=seconds, load=load)
    same = {"bound_ms": into["server"]["bound_ms"], "rate": into["server"]["queries_per_second"]}
    found.summary.setdefault("slo", {**same, "probes": into["server"]["probes"]})


def _slo(one: Bench, settings: Settings, found: _Found) -> None:
    load = replace(WAYS["shm"], concurrency=None)
    found.summary.setdefault("slo", scenarios.find_rate(one, settings.slo_ms, seconds=1.5, tolerance=0.1, load=load))


# -- without a server of its own ---------------------------------------------------------------------------------------


def publish(spec: Spec, precision: str, artifacts: Path, sources: Path = ROOT / "models") -> Path:
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
    context.found.summary["tune"] = tune(
        context.spec,
        repository,
        context.images,
        context.journal,
        bound_ms=settings.slo_ms or None,
        traffic=WAYS["shm"],
        seconds=0.5 if settings.quick else 1.0,
        console=context.say,
    )


def _peers(context: _Context) -> None:
    from perf import peers

    context.found.summary["peers"] = peers.measure(context.spec, context.artifacts, context.journal)


def _ssd_nms(context: _Context) -> None:
    from perf import ssd_nms

    context.found.summary["ssd_nms"] = context.journal.measure({"series": "SSDNMS alone"}, ssd_nms.measure)


def _images(spec: Spec, settings: Settings, artifacts: Path) -> Sequence[NDArray[np.uint8]]:
    """Real pictures at the model's input size.

    Raises:
        DataError: there are none.
    """
    from ssd_client.preprocess import SUFFIXES

    from build.gate import datasets, verify

    if settings.images:
        paths = sorted(path for path in Path(settings.images).glob("*") if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise DataError(
                f"{settings.images} holds no pictures",
                why="there is no such folder, or nothing in it ends in " + ", ".join(SUFFIXES),
                fix="name a folder with some: invoke perf --images FOLDER",
            )
        return [datasets.load(path, spec.input)[0] for path in paths[:PICTURES]]
    images, pictures = verify.images_for(spec, artifacts / "datasets", PICTURES)
    if pictures is None:
        raise DataError(
            f"{spec.path}: [data] names no held-out pictures, so there is nothing real to send",
            fix="name a folder with some: invoke perf --images FOLDER",
        )
    return list(images)


# -- the folder of a run -----------------------------------------------------------------------------------------------


def _check(settings: Settings, sources: Path) -> None:
    """Raises OptionError where settings make no sense."""
    known = sorted(contract.PRECISIONS)
    wrong = [one for one in settings.precisions if one not in known]
    if wrong or not settings.precisions:
        raise OptionError(f"precision is {', '.join(wrong) or 'empty'}", fix=f"choose from {', '.join(known)}")
    if settings.tune and len(settings.precisions) > 1:
        raise OptionError(
            f"one [serving] section cannot be tuned for {' and '.join(settings.precisions)}", fix="name one precision"
        )
    if settings.slo_ms < 0:
        raise OptionError(f"the bound on the p99 is {settings.slo_ms:g} ms, but must be greater than 0")
    if not (sources / settings.model / "spec.toml").is_file():
        models = ", ".join(sorted(path.parent.name for path in sources.glob("*/spec.toml")))
        raise OptionError(f"there is no model {settings.model!r}", fix=f"there are {models}")


def _run_folder(run: Path, artifacts: Path) -> Path:
    """A run by its folder, or by the folder's name."""
    return run if run.is_dir() else artifacts / "perf" / run


def _open(settings: Settings, resume: Path | None, artifacts: Path) -> tuple[Path, Settings, dict[str, Any]]:
    """The run's folder, its settings, and the facts about the machine that it began with.

    Raises:
        PerfError: the resumed run is none, or began on another machine or with other versions.
    """
    from perf import environment

    facts = {"environment": environment.capture()}
    if resume is None:
        return artifacts / "perf" / time.strftime("%Y-%m-%dT%H-%M-%S"), settings, {**facts, "published": {}}
    try:
        kept = json.loads((resume / "settings.json").read_text())
        kept["settings"]["precisions"] = tuple(kept["settings"]["precisions"])
        settings = Settings(**kept["settings"])
        before, now = kept["environment"], facts["environment"]
        now["versions"] |= _server(before)  # known once it runs: `_same_model`
        changed = [
            f"{name}: {before[name]} then, {now[name]} now"
            for name in ("cpu", "cores_allowed", "gpus", "versions")
            if before[name] != now[name]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PerfError(
            f"{resume} is no run that could be resumed: {error}",
            why="it holds no settings.json of this version",
            fix="name a folder below artifacts/perf, or start a new run",
        ) from None
    if changed:
        raise PerfError(
            f"{resume} cannot be resumed: {'; '.join(changed)}",
            why="its figures and new ones would not be of one kind",
            fix="start a new run, and compare the two: invoke perf --compare RUN_A,RUN_B",
        )
    return resume, settings, {"environment": before, "published": kept["published"]}


def _keep(folder: Path, settings: Settings, facts: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"settings": asdict(settings), **facts}, indent=2) + "\n"
    (folder / "settings.json").write_text(text)


def _server(environment: Mapping[str, Any]) -> dict[str, str]:
    """The server's version, which is only known once it runs."""
    return {name: version for name, version in environment["versions"].items() if name == "tritonserver"}


def _same_model(facts: dict[str, Any], one: Bench) -> None:
    """Notes what is served by what, or raises where the run began with something else."""
    versions, published = facts["environment"]["versions"], facts["published"]
    version, manifest = one.server.version, one.config.manifest_sha256
    changed = []
    if versions.setdefault("tritonserver", version) != version:
        changed.append(f"tritonserver {versions['tritonserver']}, but this one is {version}")
    if published.setdefault(one.precision, manifest) != manifest:
        changed.append(f"another {one.precision} model than the one that is published now")
    if changed:
        raise PerfError(
            f"this run began with {' and '.join(changed)}",
            why="its figures and new ones would not be of one kind",
            fix="start a new run",
        )


def _summary(run: str, settings: Settings, facts: dict[str, Any], found: _Found) -> dict[str, Any]:
    series = {name: found.rows(name) for name in found.records}
    rows = [row for rows in series.values() for row in rows]
    precisions = found.summary.get("precisions", {})
    first = precisions.get(settings.precisions[0], {})
    return {
        "run": run,
        "model": settings.model,
        "quick": settings.quick,
        "complete": not found.problems,
        "problems": found.problems,
        "environment": facts["environment"],
        "settings": asdict(settings),
        "served_ratio": first.get("served_ratio", {}),
        "precisions": precisions,
        "answers": summed_answers([row["answers"] for row in rows if row["answers"]]),
        "series": series,
        "saturation": {name: saturation(series[name]) for name in ("concurrency", "batch") if series.get(name)},
        **{name: found.summary.get(name) for name in ("ssd_nms", "scenarios", "slo", "peers", "tune")},
    }


def _write(folder: Path, summary: dict[str, Any]) -> None:
    unfinished = folder / ".summary.json"
    unfinished.write_text(json.dumps(summary, indent=2) + "\n")
    unfinished.replace(folder / "summary.json")
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
    if not summary["complete"]:
        raise PerfError(
            "not everything was measured: " + "; ".join(summary["problems"]),
            fix=f"what was measured is in {where}/report.html; go on with: invoke perf --resume {where}",
        )


class _Bar:
    """A progress bar with the time left: steps by their estimated seconds, and every measurement as it begins."""

    def __init__(self, say: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=say, transient=True, disable=not say.is_terminal)
        self._task: TaskID | None = None
        self._name, self._completed = "", 0.0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self, name: str, seconds: float | None) -> None:
        """The next part of the run, of about so many seconds; None = nobody knows."""
        self.end()
        self._progress.start()
        self._name, self._completed = name, 0.0
        self._task = self._progress.add_task(name, total=seconds)

    def measuring(self, key: Mapping[str, Any]) -> None:
        """A measurement with this key begins."""
        if self._task is not None:
            load = f" {Load.from_dict(key['load'])}" if "load" in key else ""
            self._progress.update(self._task, description=f"{self._name}: {key.get('series', 'peers')}{load}")
            self._progress.advance(self._task, float(key.get("seconds", 0.0)))

    def done(self, seconds: float) -> None:
        """A step of so many seconds is over."""
        self._completed += seconds
        if self._task is not None:
            self._progress.update(self._task, completed=self._completed)

    def end(self) -> None:
        """Takes the bar away."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._progress.stop()
            self._task = None


def short(path: Path) -> str:
    """A path as somebody in the current folder would type it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
