"""The graphs of a precision: one, or one per calibrator where activations are calibrated."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from build.contract import CALIBRATORS, PRECISIONS, Precision
from build.gate import datasets
from build.graph import precision
from build.graph.attach import attach, load_source
from build.graph.precision import runnable
from build.quantization import correction, equalisation, qdq, rounding
from build.quantization.calibration import calibrate
from build.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray
    from rich.console import Console


@dataclass(frozen=True)
class Candidate:
    """A graph to be judged.

    Attributes:
        precision: of contract.PRECISIONS.
        calibrator: how its activations are clipped; empty where nothing is calibrated.
        source: the typed source model.
        graph: the served graph as TensorRT gets it.
        runs: the served graph as ONNX Runtime runs it here: INT8 in a form of its own, BF16 widened to FP32, any other
            as it is.
        quantised: names of the quantised Convs.
        left: names of the others, each with the reason; both are empty where nothing is quantised.
    """

    precision: str
    calibrator: str
    source: onnx.ModelProto
    graph: onnx.ModelProto
    runs: onnx.ModelProto
    quantised: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For tables and files."""
        return f"{self.precision} {self.calibrator}".strip()

    @property
    def kind(self) -> Precision:
        """The row of contract.PRECISIONS."""
        return PRECISIONS[self.precision]


def candidates(
    spec: Spec,
    name: str,
    artifacts: Path,
    *,
    calibrators: Sequence[str] = (),
    exclude: Collection[str] | None = None,
    console: Console | None = None,
) -> list[Candidate]:
    """The graphs of a precision.

    Args:
        spec: the spec.
        name: of contract.PRECISIONS.
        artifacts: the artifacts' folder, where calibrations are kept.
        calibrators: which to try; empty = the spec's, of which `auto` is all.
        exclude: Convs to leave unquantised; None = the spec's.
        console: for progress.

    Raises:
        SSDError: no such graph can be made.
    """
    kind = PRECISIONS[name]
    source = load_source(spec)
    if not kind.typed:
        graph = attach(spec, source)
        return [Candidate(name, "", source, graph, graph)]
    if not kind.quantised:
        typed = precision.half(qdq.fold(source), name)
        graph = attach(spec, typed)
        return [Candidate(name, "", typed, graph, runnable(graph, name))]
    quantiser = Quantiser(spec, name, artifacts, console)
    return quantiser.candidates(calibrators, exclude)


class Quantiser:
    """Makes the quantised graphs of a model; what they share is measured once.

    Args:
        spec: the spec.
        name: a quantised precision.
        artifacts: the artifacts' folder, where calibrations are kept.
        console: for progress.

    Attributes:
        calibrators: those that the spec asks for.
        folded: the folded FP32 source; for INT8 with equalised channels. FP8 has the same relative error at any range.
        calibration: what its activations look like.
        convs: the names of the Convs that can be quantised, in the order of the graph.

    Raises:
        SSDError: the model cannot be calibrated.
    """

    def __init__(self, spec: Spec, name: str, artifacts: Path, console: Console | None = None) -> None:
        settings = spec.quantization
        self.calibrators = CALIBRATORS if settings.calibrator == "auto" else (settings.calibrator,)
        self._spec, self._name = spec, name
        self.folded = qdq.fold(load_source(spec))
        self.convs = tuple(conv.name for conv in qdq.quantisable(self.folded, name))
        self._pictures = datasets.calibration(spec, artifacts / "datasets")
        if name == "int8":
            self.folded = equalisation.equalised(spec, self.folded, self._pictures)
        self._weights = rounding.rounded(spec, self.folded, self._pictures, name)
        file = "calibration-equalised" if name == "int8" else "calibration"
        self.calibration = calibrate(spec, self.folded, artifacts, console, name=file)
        self._clips: dict[str, Mapping[str, float]] = {}
        self._errors: dict[str, Mapping[str, NDArray[np.float32]]] = {}

    def candidates(self, calibrators: Sequence[str] = (), exclude: Collection[str] | None = None) -> list[Candidate]:
        """One graph for each calibrator; arguments as for the function `candidates`."""
        return [self.candidate(calibrator, exclude) for calibrator in calibrators or self.calibrators]

    def candidate(self, calibrator: str, exclude: Collection[str] | None = None) -> Candidate:
        """One graph.

        Args:
            calibrator: how activations are clipped.
            exclude: Convs to leave unquantised; None = the spec's.

        Raises:
            QuantizeError: an excluded name is no Conv.
        """
        spec = self._spec
        placed = self.placed(calibrator, exclude)
        graph = attach(spec, placed.model)
        runs = runnable(graph, self._name)
        if self._name == "int8":
            runs = qdq.for_onnxruntime(attach(spec, self.placed(calibrator, exclude, kernels=True).model))
        return Candidate(self._name, calibrator, placed.model, graph, runs, placed.nodes, placed.left)

    def placed(self, calibrator: str, exclude: Collection[str] | None = None, *, kernels: bool = False) -> qdq.Placed:
        """The quantised source alone; arguments as for `candidate` and `qdq.quantize`."""
        settings = self._spec.quantization
        if calibrator not in self._clips:
            self._clips[calibrator] = self.calibration.clips(calibrator, settings.percentile)
        clips = self._clips[calibrator]
        if calibrator not in self._errors:
            everything = qdq.quantize(self.folded, clips, kind=self._name, weights=self._weights)
            self._errors[calibrator] = correction.mean_errors(self._spec, self.folded, everything, self._pictures)
        errors = self._errors[calibrator]
        left = settings.excluded(self._name) if exclude is None else exclude
        placed = qdq.quantize(
            self.folded, clips, kind=self._name, exclude=left, kernels=kernels, errors=errors, weights=self._weights
        )
        return placed if settings.rest == "fp32" else replace(placed, model=precision.half(placed.model, "fp16"))


def all_calibrators(name: str) -> tuple[str, ...]:
    """The calibrators that a precision can be made with."""
    return CALIBRATORS if PRECISIONS[name].quantised else ()
