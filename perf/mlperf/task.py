"""`invoke mlperf`: LoadGen on the served model, each precision on a server of its own; writes artifacts/mlperf/<run>/."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import OptionError, SSDError
from build.files import ARTIFACTS, MODELS, write_json
from perf.load import PerfError
from perf.mlperf.runs import BOUND_MS, SCENARIOS
from perf.settings import Settings as PerfSettings
from perf.settings import check

if TYPE_CHECKING:
    from rich.console import Console

    from perf.mlperf.measure import Stage

UNOFFICIAL = "Unofficial: made with MLPerf's LoadGen, not submitted to MLCommons and not verified by it."


@dataclass(frozen=True)
class Settings:
    """What a run was asked for.

    Attributes:
        model: folder of models/.
        precisions: to measure, in turn.
        scenario: one of SCENARIOS, or all.
        seconds: of each of LoadGen's runs, at least.
        accuracy: accuracy mode as well.
        find_peak: search the server scenario's highest rate under the rules' bound and under the model's own.
        transport: how pictures reach the server: shm, grpc or http.
    """

    model: str = "shapes"
    precisions: tuple[str, ...] = ("fp32",)
    scenario: str = "all"
    seconds: float = 20.0
    accuracy: bool = False
    find_peak: bool = False
    transport: str = "shm"

    def names(self) -> list[str]:
        """The scenarios that were asked for.

        Raises:
            OptionError: a setting makes no sense.
        """
        from perf.ratio import TRANSPORTS

        known = {"scenario": (*SCENARIOS, "all"), "transport": tuple(TRANSPORTS)}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise OptionError(f"{name} is {getattr(self, name)!r}", fix=f"choose from {', '.join(choices)}")
        if not 0 < self.seconds < 86400:
            raise OptionError(f"seconds is {self.seconds!r}, but must be a number greater than 0")
        return list(SCENARIOS) if self.scenario == "all" else [self.scenario]


def mlperf(
    settings: Settings, *, artifacts: Path = ARTIFACTS, sources: Path = MODELS, console: Console | None = None
) -> dict[str, Any]:
    """Publishes, serves, lets LoadGen drive it, and reports.

    Args:
        settings: what to run.
        artifacts: gets mlperf/<run>/: summary.json, report.md, report.html and LoadGen's logs.
        sources: where the models are.
        console: where to say what is done; None = standard output.

    Returns:
        What it wrote to summary.json: run, model, environment, settings, `mlperf` {precision: {scenario: what
        `measure.measure` returns}}, `peak` {precision: [what `measure.find_peak` returns]}, complete, problems.

    Raises:
        PerfError: a scenario is not valid. The report is written all the same.
        KeyboardInterrupt: likewise; LoadGen's process has ended.
    """
    from rich.console import Console

    from perf import environment, report
    from perf.run import short

    console = console or Console(highlight=False, soft_wrap=True)
    names = settings.names()
    check(PerfSettings(settings.model, settings.precisions), sources)
    folder = artifacts / "mlperf" / time.strftime("%Y-%m-%dT%H-%M-%S")
    folder.mkdir(parents=True)
    summary: dict[str, Any] = {
        "run": folder.name,
        "model": settings.model,
        "environment": environment.capture(),
        "settings": asdict(settings),
        "mlperf": {},
        "peak": {},
        "problems": [],
    }
    console.print(UNOFFICIAL)
    try:
        for precision in settings.precisions:
            _precision(precision, settings, names, folder, summary, artifacts, sources, console)
    except KeyboardInterrupt:
        summary["problems"].append("it was interrupted")
        raise
    except SSDError as error:
        summary["problems"].append(error.what)
        raise
    finally:
        summary["complete"] = not summary["problems"]
        write_json(folder / "summary.json", summary)
        report.write(folder, summary)
        console.print(f"{short(folder)}: report.html, report.md, summary.json, LoadGen's logs")
    if summary["problems"]:
        raise PerfError(
            "not every run is valid: " + "; ".join(summary["problems"]), fix=f"see the logs in {short(folder)}"
        )
    return summary


def _precision(
    precision: str,
    settings: Settings,
    names: Sequence[str],
    folder: Path,
    summary: dict[str, Any],
    artifacts: Path,
    sources: Path,
    console: Console,
) -> None:
    from build.gate import datasets, verify
    from build.spec import load
    from perf.bench import PICTURES, start_bench
    from perf.journal import Journal
    from perf.mlperf.measure import find_peak, measure, stage
    from perf.run import publish

    spec = load(sources / settings.model / "spec.toml")
    repository = publish(spec, precision, artifacts, sources)
    pictures = datasets.held_out(spec, artifacts / "datasets")
    images, _ = verify.images_for(spec, artifacts / "datasets", PICTURES)
    results = summary["mlperf"].setdefault(precision, {})
    with start_bench(repository, settings.model, list(images), Journal()) as bench:
        summary["environment"]["versions"].setdefault("tritonserver", bench.server.version)
        with stage(bench, pictures, settings.transport) as ready:
            for name in names:
                with console.status(f"{precision}: {name}"):
                    results[name] = measure(
                        ready, name, folder / precision / name, seconds=settings.seconds, accuracy=settings.accuracy
                    )
                _say(precision, results[name], summary, console)
                bench.server.check_alive()
            if settings.find_peak:
                peaks = summary["peak"].setdefault(precision, [])
                for bound in (BOUND_MS, ready.own_bound_ms):
                    with console.status(f"{precision}: highest rate with p99 within {bound:g} ms"):
                        peaks.append(find_peak(ready, folder / precision / "peak", bound, seconds=settings.seconds))
                    found = peaks[-1]
                    rate = f"{found['rate']:g} queries/s" if found["rate"] else found["note"]
                    console.print(f"{precision}: p99 within {bound:g} ms: {rate}", markup=False)


def _say(precision: str, result: dict[str, Any], summary: dict[str, Any], console: Console) -> None:
    from perf.mlperf.answers import counts

    name, value = result["scenario"], result["value"]
    unit = "samples/s" if name == "offline" else "ms"
    figure = "no figure" if value is None else f"{value:.4g} {unit}"
    if name == "server":
        figure = f"{result['figures']['rate']:g} queries/s, p99 {figure}"
    verdict = "VALID" if result["valid"] else "NOT VALID"
    console.print(f"{precision}, {name}: {verdict}, {figure} ({result['metric']}); {counts(result)}", markup=False)
    for problem in result["problems"]:
        console.print(f"  {problem}", markup=False)
        summary["problems"].append(f"{precision}, {name}: {problem}")
    if result.get("accuracy"):
        judged = result["accuracy"]
        said = f"mAP@[.5:.95] {judged['map']:.4f} on {judged['images']} pictures"
        console.print(f"  accuracy mode: {said}; {judged['compared']} answers the same in both modes", markup=False)
