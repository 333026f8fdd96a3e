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

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Size:
    """How much a run measures: repeats and seconds of each kind of point. The default is the full run."""

    rounds: int = 7
    ratio_seconds: float = 1.0
    seconds: float = 1.5
    repeats: int = 3
    concurrency: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 16)
    batch: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    arrivals: tuple[str, ...] = ("constant", "poisson")
    rates: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)  # of the throughput that 4 clients got
    whole: bool = True  # protocols, the ratio of batches, and the highest rate even where no bound is named
    scenarios: tuple[str, ...] = tuple(SCENARIOS)  # of LoadGen
    scenario_seconds: float = 10.0


FULL = Size()
QUICK = Size(
    3, 0.6, 0.6, 1, (1, 2, 4, 8), (1, 4, 16), ("poisson",), (0.5, 0.8), False, ("single-stream", "offline"), 2.0
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
        images: folder of pictures to send; empty = the model's own held-out ones.
        scenarios: of LoadGen; where there are some, nothing else is measured (`invoke mlperf`).
        seconds, accuracy: as for `perf.mlperf.measure`.
        find_peak: search the server scenario's highest rate under the rules' bound and under the model's own.
        transport: of LoadGen's pictures, one of `perf.ratio.TRANSPORTS`.
    """

    model: str = "shapes"
    precisions: tuple[str, ...] = ("fp32",)
    quick: bool = False
    slo_ms: float = 0.0
    images: str = ""
    scenarios: tuple[str, ...] = ()
    seconds: float = 20.0
    accuracy: bool = False
    find_peak: bool = False
    transport: str = "shm"

    @property
    def size(self) -> Size:
        """How much is measured."""
        return QUICK if self.quick else FULL


def check(settings: Settings, sources: Path) -> None:
    """Raises OptionError where settings make no sense."""
    choices = {
        "precision": (settings.precisions, contract.PRECISIONS),
        "transport": ((settings.transport,), TRANSPORTS),
        "scenario": (settings.scenarios, SCENARIOS),
    }
    for name, (given, known) in choices.items():
        for value in given:
            if value not in known:
                raise OptionError(f"{name} is {value!r}", fix=f"choose from {', '.join(known)}")
    if not settings.precisions:
        raise OptionError("no precision is named", fix=f"choose from {', '.join(contract.PRECISIONS)}")
    if not 0 < settings.seconds < 86400:
        raise OptionError(f"seconds is {settings.seconds!r}, but must be a number greater than 0")
    if not 0 <= settings.slo_ms < 86400e3:
        raise OptionError(f"the bound on the p99 is {settings.slo_ms:g} ms, but must be greater than 0")
    if settings.accuracy and settings.images:
        raise OptionError("accuracy needs labelled pictures", fix="leave out --images: held-out ones are taken then")
    if not (sources / settings.model / "spec.toml").is_file():
        models = ", ".join(sorted(path.parent.name for path in sources.glob("*/spec.toml")))
        raise OptionError(f"there is no model {settings.model!r}", fix=f"there are {models}")


def run_folder(run: Path, artifacts: Path) -> Path:
    """A run by its folder, or by the folder's name."""
    named = [run, artifacts / "perf" / run, artifacts / "mlperf" / run]
    return next((folder for folder in named if folder.is_dir()), run)


def open_run(settings: Settings, resume: Path | None, artifacts: Path) -> tuple[Path, Settings, dict[str, Any]]:
    """The run's folder, its settings, and the facts about the machine that it began with.

    Raises:
        PerfError: the resumed run is none, or began on another machine or with other versions.
    """
    now = environment.capture()
    if resume is None:
        folder = artifacts / ("mlperf" if settings.scenarios else "perf") / time.strftime("%Y-%m-%dT%H-%M-%S")
        return folder, settings, {"environment": now, "published": {}}
    try:
        kept = json.loads((resume / SETTINGS).read_text())
        values: Any = {
            name: tuple(value) if isinstance(value, list) else value for name, value in kept["settings"].items()
        }
        settings, before = Settings(**values), kept["environment"]
        # The server's version is known once it runs: `same_model`.
        now["versions"] |= {name: version for name, version in before["versions"].items() if name == "tritonserver"}
        names = [name for name in ("cpu", "cores_allowed", "gpus", "versions") if before[name] != now[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PerfError(
            f"{resume} is no run that could be resumed: {error}",
            why=f"it holds no {SETTINGS} of this version",
            fix="name a folder below artifacts/perf, or start a new run",
        ) from None
    if names:
        changed = "; ".join(f"{name}: {before[name]} then, {now[name]} now" for name in names)
        raise PerfError(
            f"{resume} cannot be resumed: {changed}",
            why="its figures and new ones would not be of one kind",
            fix="start a new run, and compare the two: invoke perf --compare RUN_A,RUN_B",
        )
    return resume, settings, {"environment": before, "published": kept["published"]}


def keep(folder: Path, settings: Settings, facts: dict[str, Any]) -> None:
    """Writes settings and facts into the run's folder."""
    write_json(folder / SETTINGS, {"settings": asdict(settings), **facts})


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
        why = "its figures and new ones would not be of one kind"
        raise PerfError(f"this run began with {' and '.join(changed)}", why=why, fix="start a new run")
