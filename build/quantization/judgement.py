"""How much of FP32's mAP a graph keeps on the held-out pictures: one judgement for build, audit and sensitivity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from build import contract
from build.gate import datasets
from build.gate.scoring import Score, detector, score
from build.gate.verify import share_kept
from build.quantization import qdq
from build.quantization.candidates import Candidate, candidates
from build.session import runner
from build.spec import Spec

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Judged:
    """A candidate with its result.

    Attributes:
        candidate: the graph.
        score: of the worse of its forms.
        forms: the mAP of each form: `as written` is the graph that TensorRT gets, each Q/DQ pair computed for itself;
            `onnxruntime` what a CPU serves.
        share: of FP32's mAP that the worse form keeps.
        passes: whether that is what the spec's gate asks for.
    """

    candidate: Candidate
    score: Score
    forms: dict[str, float]
    share: float
    passes: bool


class Judgement:
    """FP32's mAP on a spec's held-out pictures, and other graphs' against it.

    Args:
        spec: the model.
        artifacts: where generated pictures are kept.
        console: for progress.

    Attributes:
        pictures: the held-out pictures.
        baseline: FP32's result.

    Raises:
        SSDError: nothing to judge on, or FP32 itself detects nothing of what is labelled.
    """

    def __init__(self, spec: Spec, artifacts: Path, console: Console | None = None) -> None:
        self._spec, self._console = spec, console
        self.pictures = datasets.held_out(spec, artifacts / "datasets")
        self.baseline = self.of_forms(candidates(spec, contract.BASELINE, artifacts)[0])[0]
        share_kept(spec, self.baseline.accuracy.map, self.baseline.accuracy.map)

    def of(self, candidate: Candidate) -> Judged:
        """The judgement of a candidate."""
        worse, forms = self.of_forms(candidate)
        share = share_kept(self._spec, worse.accuracy.map, self.baseline.accuracy.map)
        return Judged(candidate, worse, forms, share, share >= self._spec.quantization.gate)

    def of_forms(self, candidate: Candidate) -> tuple[Score, dict[str, float]]:
        """The worse of a candidate's forms, and the mAP of each."""
        detectors = {}
        if candidate.kind.quantised:
            detectors["as written"] = detector(self._spec, runner(candidate.graph, literal=True))
        if not candidate.kind.literal:
            detectors["onnxruntime"] = detector(self._spec, runner(candidate.runs))
        scores = {
            form: score(self.pictures, detect, f"{candidate.name} {form}: mAP on held-out pictures", self._console)
            for form, detect in detectors.items()
        }
        worse = min(scores.values(), key=lambda result: result.accuracy.map)
        return worse, {form: result.accuracy.map for form, result in scores.items()}

    def sentence(self, result: Judged) -> str:
        """What build, audit and sensitivity say about it."""
        convs = len(qdq.convs(result.candidate.source))
        left = result.candidate.left
        without = sum(reason == qdq.NO_KERNEL for reason in left.values())
        why = f" ({without} of them because TensorRT has no fast FP8 kernels for them)" if without else ""
        rest = self._spec.quantization.rest.upper()
        rest = f" with {len(left)} of {convs} convolutions left in {rest}{why}" if left else ""
        own = ", labelled by FP32's own detections" if self.pictures.labelled_by else ""
        return (
            f"{self._spec.model.name}: {result.candidate.name}{rest} keeps {result.share:.2%} of FP32's mAP on "
            f"{len(self.pictures)} held-out pictures{own} ({result.score.accuracy.map:.4f} of "
            f"{self.baseline.accuracy.map:.4f}; the gate asks for {self._spec.quantization.gate:.2%}): "
            f"{'passes' if result.passes else 'fails'}"
        )
