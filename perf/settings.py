"""What a run was asked for, and the folder that keeps it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import contract
from build.errors import OptionError
from build.files import write_json
from perf import environment
from perf.load import PerfError
from perf.mlperf.runs import SCENARIOS
from perf.ratio import TRANSPORTS

if TYPE_CHECKING:
    from perf.bench import Bench


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
    searches: bool  # the highest rate, batches in process, the peers
    scenarios: tuple[str, ...]  # of LoadGen
    scenario_seconds: float


QUICK = Size(3, 0.6, 3, 0.6, 1, (1, 2, 4, 8), (1, 4, 16), (0.5, 0.8), False, False, ("single-stream",), 2.0)
FULL = Size(
    7,
    1.0,
    7,
    1.5,
    3,
    (1, 2, 3, 4, 6, 8, 16),
    (1, 2, 4, 8, 16, 32, 64),
    (0.3, 0.5, 0.7, 0.8, 0.9, 0.95),
    True,
    True,
    tuple(SCENARIOS),
    10.0,
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
        scenarios: of LoadGen; where there are some, nothing else is measured (`invoke mlperf`).
        seconds, accuracy, transport: as for `perf.mlperf.measure`.
        find_peak: search the server scenario's highest rate under the rules' bound and under the model's own.
    """

    model: str = "shapes"
    precisions: tuple[str, ...] = ("fp32",)
    quick: bool = False
    slo_ms: float = 0.0
    tune: bool = False
    images: str = ""
    scenarios: tuple[str, ...] = ()
    seconds: float = 20.0
    accuracy: bool = False
    find_peak: bool = False
    transport: str = "shm"

    @property
    def task(self) -> str:
        """The task that they are of, which is the folder of its runs."""
        return "mlperf" if self.scenarios else "perf"

    @property
    def size(self) -> Size:
        """How much is measured."""
        return QUICK if self.quick else FULL


def check(settings: Settings, sources: Path) -> None:
    """Raises OptionError where settings make no sense."""
    known = sorted(contract.PRECISIONS)
    wrong = [name for name in settings.precisions if name not in known]
    if wrong or not settings.precisions:
        raise OptionError(f"precision is {', '.join(wrong) or 'empty'}", fix=f"choose from {', '.join(known)}")
    if settings.tune and len(settings.precisions) > 1:
        raise OptionError(
            f"one [serving] section cannot be tuned for {' and '.join(settings.precisions)}", fix="name one precision"
        )
    if settings.transport not in TRANSPORTS:
        raise OptionError(f"transport is {settings.transport!r}", fix=f"choose from {', '.join(TRANSPORTS)}")
    unknown = [name for name in settings.scenarios if name not in SCENARIOS]
    if unknown:
        raise OptionError(f"there is no scenario {unknown[0]!r}", fix=f"choose from {', '.join(SCENARIOS)}, all")
    if not 0 < settings.seconds < 86400:
        raise OptionError(f"seconds is {settings.seconds!r}, but must be a number greater than 0")
    if settings.slo_ms < 0:
        raise OptionError(f"the bound on the p99 is {settings.slo_ms:g} ms, but must be greater than 0")
    if not (sources / settings.model / "spec.toml").is_file():
        models = ", ".join(sorted(path.parent.name for path in sources.glob("*/spec.toml")))
        raise OptionError(f"there is no model {settings.model!r}", fix=f"there are {models}")


def run_folder(run: Path, artifacts: Path) -> Path:
    """A run by its folder, or by the folder's name."""
    return run if run.is_dir() else artifacts / "perf" / run


def open_run(settings: Settings, resume: Path | None, artifacts: Path) -> tuple[Path, Settings, dict[str, Any]]:
    """The run's folder, its settings, and the facts about the machine that it began with.

    Raises:
        PerfError: the resumed run is none, or began on another machine or with other versions.
    """
    facts = {"environment": environment.capture()}
    if resume is None:
        return artifacts / settings.task / time.strftime("%Y-%m-%dT%H-%M-%S"), settings, {**facts, "published": {}}
    try:
        kept = json.loads((resume / "settings.json").read_text())
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in kept["settings"].items()
        }
        settings = Settings(**values)
        before, now = kept["environment"], facts["environment"]
        if "tritonserver" in before["versions"]:  # known once it runs: `same_model`
            now["versions"]["tritonserver"] = before["versions"]["tritonserver"]
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


def keep(folder: Path, settings: Settings, facts: dict[str, Any]) -> None:
    """Writes settings and facts into the run's folder."""
    write_json(folder / "settings.json", {"settings": asdict(settings), **facts})


def same_model(facts: dict[str, Any], bench: Bench) -> None:
    """Notes which model is served by which server.

    Raises:
        PerfError: the run began with another model or server.
    """
    versions, published = facts["environment"]["versions"], facts["published"]
    version, manifest = bench.server.version, bench.config.manifest_sha256
    changed = []
    if versions.setdefault("tritonserver", version) != version:
        changed.append(f"tritonserver {versions['tritonserver']}, but this one is {version}")
    if published.setdefault(bench.precision, manifest) != manifest:
        changed.append(f"another {bench.precision} model than the one that is published now")
    if changed:
        raise PerfError(
            f"this run began with {' and '.join(changed)}",
            why="its figures and new ones would not be of one kind",
            fix="start a new run",
        )
