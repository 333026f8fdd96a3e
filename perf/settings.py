"""What a run was asked for, and the folder that keeps it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build import contract
from build.errors import OptionError
from perf.load import PerfError
from perf.mlperf.runs import SCENARIOS
from perf.ratio import TRANSPORTS

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
    rates: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)  # of the throughput that 4 clients got
    whole: bool = True  # protocols, the ratio of batches, and the highest rate even where no bound is named
    scenarios: tuple[str, ...] = tuple(SCENARIOS)  # of LoadGen
    scenario_seconds: float = 10.0


FULL = Size()
QUICK = Size(3, 0.6, 0.6, 1, (1, 2, 4, 8), (1, 4, 16), (0.5, 0.8), False, ("single-stream", "offline"), 2.0)


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


def open_run(settings: Settings, resume: Path | None, artifacts: Path) -> tuple[Path, Settings]:
    """The folder of a run and its settings; those of the resumed run count where there is one.

    Raises:
        PerfError: the resumed run is none.
    """
    if resume is None:
        return artifacts / ("mlperf" if settings.scenarios else "perf") / time.strftime("%Y-%m-%dT%H-%M-%S"), settings
    folder = run_folder(resume, artifacts)
    try:
        kept = json.loads((folder / SETTINGS).read_text())
        values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
        return folder, Settings(**values)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise PerfError(
            f"{resume} is no run that could be resumed: {error}",
            why=f"it holds no {SETTINGS} of this version",
            fix="name a folder below artifacts/perf, or start a new run",
        ) from None
