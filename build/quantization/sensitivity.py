"""Which Convs do not bear INT8 or FP8, and the few to leave out so that the accuracy gate passes."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from build import files
from build import spec as specs
from build.gate import datasets
from build.gate.verify import before_suppression
from build.graph.attach import attach, before_nms
from build.quantization import noise
from build.quantization.candidates import Quantiser
from build.quantization.judgement import Judged, Judgement
from build.session import runner
from build.spec import Spec

if TYPE_CHECKING:
    import onnx
    from rich.console import Console
    from rich.table import Table

    from build.gate.matching import Candidates

# The largest share of the Convs that can be quantised; beyond that another precision is the better answer. An INT8
# network pays for each Conv left out with conversions. In FP8 it still runs on tensor cores, in FP16.
MOST_LEFT_OUT = {"int8": 0.1, "fp8": 0.5}
PICTURES = 4  # of the calibration's, for the ranking


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        layers: noise in what is detected, in dB below 1, when this Conv alone is quantised; the worst first.
        exclude_nodes: the Convs that are left out of those that can be quantised.
        best: the judgement with these left out; None where the budget ended before.
        verdict: one sentence: whether it passes, and what became of spec.toml.
        spec: the spec with them.
        done: False where the budget ended the search.
    """

    layers: Mapping[str, float]
    exclude_nodes: tuple[str, ...]
    best: Judged | None
    verdict: str
    spec: Spec
    done: bool = True

    @property
    def passes(self) -> bool:
        """Whether the gate passes with these left out."""
        return self.best is not None and self.best.passes


def search(
    spec: Spec,
    artifacts: Path,
    *,
    precision: str = "int8",
    judgement: Judgement | None = None,
    start: Judged | None = None,
    quantiser: Quantiser | None = None,
    budget: float = 0.0,
    write: bool = True,
    console: Console | None = None,
) -> Found:
    """The few Convs to leave unquantised so that the gate passes, by a search that is judged exactly as a build is.

    1. Judge what the spec asks for, with every calibrator that it allows; go on with the best of them.
    2. Quantise each Conv alone and measure the noise in boxes and scores where something is detected. Rank by it.
    3. If 1. failed: leave out the 1, 2, 3, 5, 8 … worst until it passes, at most MOST_LEFT_OUT.
    4. Take those back in that were not needed, the least noisy first. Try the other calibrators with the rest.

    Args:
        spec: the model; what it excludes is left out in any case.
        artifacts: `audit/sensitivity.json` in it keeps what was measured: an interrupted search goes on where it ended.
        precision: int8 or fp8.
        judgement: FP32's, where it is there already.
        start: the best of step 1, likewise.
        quantiser: what made it, likewise.
        budget: seconds after which to stop; 0 = none.
        write: whether a set that passes is written to the spec.
        console: for progress, table and verdict.

    Raises:
        SSDError: nothing to judge on, or no such graph.
    """
    from rich.console import Console

    show = console or Console(highlight=False)
    until = time.monotonic() + budget if budget else float("inf")
    judgement = judgement or Judgement(spec, artifacts, show)
    quantiser = quantiser or Quantiser(spec, precision, artifacts, show)
    if start is None:
        every = [judgement.of(quantiser.candidate(calibrator)) for calibrator in quantiser.calibrators]
        start = max(every, key=lambda result: result.share)
    most = max(1, int(MOST_LEFT_OUT[precision] * len(quantiser.convs)))
    show.print(judgement.sentence(start), markup=False)
    measured = _Measured(artifacts / "audit" / "sensitivity.json", start, judgement)
    base = tuple(name for name in quantiser.convs if name in spec.quantization.excluded(precision))
    layers: dict[str, float] = {}
    try:
        layers = _ranked(spec, quantiser, start.candidate.calibrator, artifacts, measured, until, show)
        trial = _Trials(quantiser, judgement, start, base, until)
        best = trial.fewest([name for name in layers if name not in base], most)
    except TimeoutError:
        verdict = f"{spec.model.name}: the budget of {budget:g} s is used up; run it again to go on ({measured.file})"
        show.print(verdict, markup=False)
        return Found(layers, base, None, verdict, spec, done=False)
    left = tuple(name for name in quantiser.convs if name not in best.candidate.quantised)
    if left != base:  # the next build tries every calibrator with these, so it must come to the same figure
        others = [calibrator for calibrator in quantiser.calibrators if calibrator != best.candidate.calibrator]
        every = [best, *(judgement.of(quantiser.candidate(calibrator, left)) for calibrator in others)]
        best = max(every, key=lambda result: result.share)
    _print_whole(show, _table(spec, layers, left))
    chosen, verdict = spec, judgement.sentence(best)
    if not best.passes:
        limit = f"no more than {MOST_LEFT_OUT[precision]:.0%} of the convolutions that can be quantised"
        verdict += f"; nothing was changed: {limit} are left out"
    elif set(left) == set(base):
        verdict += "; spec.toml stays as it is"
    elif write:
        key = spec.quantization.exclude_key(precision)
        elsewhere = () if key == "exclude_nodes" else spec.quantization.exclude_nodes
        specs.edit(spec.path, {f"quantization.{key}": tuple(name for name in left if name not in elsewhere)})
        chosen = specs.load(spec.path)
        verdict += f"; {spec.path} names them in {key}"
    show.print(verdict, markup=False)
    return Found(layers, left, best, verdict, chosen)


class _Trials:
    """Judgements with some Convs left out; each set is judged once."""

    def __init__(
        self, quantiser: Quantiser, judgement: Judgement, start: Judged, base: Sequence[str], until: float
    ) -> None:
        self._quantiser, self._judgement, self._until = quantiser, judgement, until
        self._base, self._calibrator = tuple(base), start.candidate.calibrator
        self._known: dict[frozenset[str], Judged] = {frozenset(): start}

    def _without(self, more: Sequence[str]) -> Judged:
        key = frozenset(more)
        if key not in self._known:
            if time.monotonic() > self._until:
                raise TimeoutError
            candidate = self._quantiser.candidate(self._calibrator, (*self._base, *more))
            self._known[key] = self._judgement.of(candidate)
        return self._known[key]

    def fewest(self, ranked: Sequence[str], most: int) -> Judged:
        """The judgement with as few left out as make the gate pass; the best one where none does."""
        most = min(most - len(self._base), len(ranked))
        size, following = 0, 1
        while not self._without(ranked[:size]).passes and size < most:
            size, following = min(following, most), following + max(1, size)
        left = list(ranked[:size])
        if not self._without(left).passes:
            return max(self._known.values(), key=lambda result: result.share)
        for name in reversed(ranked[:size]):
            fewer = [other for other in left if other != name]
            if self._without(fewer).passes:
                left = fewer
        return self._without(left)


class _Measured:
    """The ranking's figures, in a file as long as graph and pictures are the same."""

    def __init__(self, file: Path, start: Judged, judgement: Judgement) -> None:
        self.file = file
        whole = hashlib.sha256(start.candidate.source.SerializeToString(deterministic=True))
        whole.update(f"{noise.METHOD} {judgement.pictures.digest()}".encode())
        self._key = whole.hexdigest()
        try:
            stored = json.loads(file.read_text(encoding="utf-8-sig"))
            self.values: dict[str, float] = dict(stored["noise_db"]) if stored["key"] == self._key else {}
        except (OSError, ValueError, KeyError, TypeError):
            self.values = {}

    def write(self) -> None:
        """Keeps what is there."""
        files.write_json(self.file, {"key": self._key, "noise_db": self.values})


def _ranked(
    spec: Spec,
    quantiser: Quantiser,
    calibrator: str,
    artifacts: Path,
    measured: _Measured,
    until: float,
    console: Console,
) -> dict[str, float]:
    """Noise in what is detected with one Conv quantised, by its name, the worst first."""
    from rich.progress import Progress

    few = datasets.calibration(spec, artifacts / "datasets").spread(PICTURES)
    pixels = [picture for batch in datasets.arrays(few, spec.input, 1) for picture in batch]

    def detected(source: onnx.ModelProto) -> list[Candidates]:
        return before_suppression(spec, runner(before_nms(attach(spec, source))), pixels)

    exact = detected(quantiser.folded)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("quantising each convolution alone", total=len(quantiser.convs))
        for name in quantiser.convs:
            if name not in measured.values:
                if time.monotonic() > until:
                    raise TimeoutError
                alone = quantiser.placed(calibrator, [other for other in quantiser.convs if other != name])
                measured.values[name] = noise.decibels(exact, detected(alone.model))
                measured.write()
            progress.advance(task)
    return dict(sorted(measured.values.items(), key=lambda item: item[1]))


def _table(spec: Spec, layers: Mapping[str, float], left: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=f"{spec.model.name}: each convolution quantised alone, the noisiest first")
    table.add_column("Conv", overflow="fold")
    table.add_column("noise in what is detected, dB below 1", justify="right")
    table.add_column("left out")
    for name, value in layers.items():
        table.add_row(name, f"{value:.1f}", "yes" if name in left else "")
    return table


def _print_whole(console: Console, table: Table) -> None:
    """Prints a table; in a file or a pipe each row is one line, as long as it must be."""
    if console.is_terminal:
        console.print(table)
        return
    from rich.console import Console

    wide = Console(width=1000, file=io.StringIO())
    wide.print(table)
    console.print(wide.file.getvalue(), markup=False, highlight=False, soft_wrap=True)  # type: ignore[attr-defined]
