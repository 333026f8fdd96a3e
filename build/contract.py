"""Every name, type, shape, default and range that more than one place needs.

- the served tensors (docs/design.md, "The served model") and the parameters' version;
- `Nms`: the attributes of SSDNMS;
- `PRECISIONS`: which precisions there are, for which runtime, and what their graph is made from;
- `Target`: the runtime, precision and calibration that a model is built for.

tests/build/test_contract.py holds the tables of docs/, the plugin's C header and the tasks' help against this file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from build.errors import OptionError
from build.tables import INT32_MAX, Floats4, Table, WrongValueError, key

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VERSION = "1"  # of the served tensors and parameters; a client refuses one that it does not know

# -- tensors -----------------------------------------------------------------------------------------------------------

IMAGES = "images"
HEADS = ("box_deltas", "class_logits")
ANCHORS = "anchors"
NMS_INPUTS = (*HEADS, ANCHORS)
THRESHOLDS = ("score_threshold", "iou_threshold")
OUTPUTS = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")

_TRITON = {"uint8": "UINT8", "float32": "FP32", "int32": "INT32"}
_TENSORRT = {"uint8": "UINT8", "float32": "FLOAT", "int32": "INT32"}


@dataclass(frozen=True)
class Tensor:
    """An input or output of the served model.

    Attributes:
        name: its name.
        dtype: NumPy's name of its type.
        shape: of one image, without the batch, which is always the first dimension.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def triton(self) -> str:
        """Triton's name of its type."""
        return _TRITON[self.dtype]

    @property
    def tensorrt(self) -> str:
        """TensorRT's name of its type."""
        return _TENSORRT[self.dtype]


def inputs(height: int, width: int, runtime_thresholds: bool) -> tuple[Tensor, ...]:
    """The served model's inputs."""
    images = Tensor(IMAGES, "uint8", (height, width, 3))
    return (images, *(Tensor(name, "float32", (1,)) for name in THRESHOLDS if runtime_thresholds))


def outputs(max_detections: int) -> tuple[Tensor, ...]:
    """The served model's outputs, in order."""
    most = max_detections
    dtypes = ("int32", "float32", "float32", "int32")
    shapes = ((1,), (most, 4), (most,), (most,))
    return tuple(Tensor(*facts) for facts in zip(OUTPUTS, dtypes, shapes, strict=True))


# -- SSDNMS ------------------------------------------------------------------------------------------------------------

OP_TYPE, DOMAIN, OP_VERSION = "SSDNMS", "ssd", 1
BOX_CODINGS, DECODED = ("center_size", "corner"), "decoded"


@dataclass(frozen=True)
class Nms(Table):
    """The attributes of the SSDNMS node (docs/design.md), and whether the thresholds are inputs, too."""

    score_threshold: float = key(0.05, low=0, high=1)
    iou_threshold: float = key(0.45, low=0, high=1)
    max_detections: int = key(100, low=1, high=INT32_MAX)
    topk_per_class: int = key(0, low=0, high=INT32_MAX)
    background_class: int = key(0, low=-1, high=INT32_MAX)
    score_activation: str = key("softmax", choices=("softmax", "sigmoid", "none"))
    box_coding: str = key("center_size", choices=BOX_CODINGS)
    box_scales: Floats4 = key((10.0, 10.0, 5.0, 5.0), above=0)  # noqa: RUF009
    clip_boxes: bool = key(True)
    class_agnostic: bool = key(False)
    lowest_score_threshold: float = key(0.01, low=0, high=1)
    runtime_thresholds: bool = key(False)

    def attributes(self) -> dict[str, Any]:
        """The node's attributes by name, in the table's order; booleans are 0 and 1."""
        values = {name: getattr(self, name) for name in ATTRIBUTES}
        return {name: int(value) if isinstance(value, bool) else value for name, value in values.items()}

    def thresholds(self, count: int, scores: NDArray[Any] | float | None = None) -> dict[str, NDArray[np.float32]]:
        """The threshold inputs for `count` images: FP32 [count,1] each; none where the thresholds are no inputs.

        Args:
            count: how many images.
            scores: score thresholds, one for all or [count]; None = the model's own.
        """
        import numpy as np

        if not self.runtime_thresholds:
            return {}
        values = (self.score_threshold if scores is None else scores, self.iou_threshold)
        return {
            name: np.array(np.broadcast_to(np.asarray(value, np.float32), count)).reshape(count, 1)
            for name, value in zip(THRESHOLDS, values, strict=True)
        }

    def feeds(self, images: NDArray[np.uint8], scores: NDArray[Any] | float | None = None) -> dict[str, NDArray[Any]]:
        """The served model's inputs for images UINT8 [n,H,W,3]; `scores` as for `thresholds`."""
        return {IMAGES: images, **self.thresholds(len(images), scores)}


@dataclass(frozen=True)
class SpecNms(Nms):
    """[nms] of a spec: the same, but `box_coding` can also be `decoded`: boxes that no anchors move."""

    box_coding: str = key("center_size", choices=(*BOX_CODINGS, DECODED))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.needs_anchors and self.box_scales != Nms.box_scales:
            problem = f"is {list(self.box_scales)}, but must be left out: decoded boxes are not divided by anything"
            raise WrongValueError("box_scales", problem)
        if self.score_threshold < self.lowest_score_threshold:
            problem = (
                f"is {self.score_threshold:g}, but lowest_score_threshold is {self.lowest_score_threshold:g}, so it "
                "would act as that; raise the first or lower the second"
            )
            raise WrongValueError("score_threshold", problem)

    @property
    def needs_anchors(self) -> bool:
        """Whether the model's boxes are deltas of anchors."""
        return self.box_coding != DECODED

    def attributes(self) -> dict[str, Any]:
        """The node's attributes; decoded boxes are corner deltas of anchors that are all 0 (build/graph/attach.py)."""
        values = super().attributes()
        return values if self.needs_anchors else {**values, "box_coding": "corner", "box_scales": (1.0, 1.0, 1.0, 1.0)}


def lowest_for(score_threshold: float) -> float:
    """The `lowest_score_threshold` for a model of this score threshold: the usual one, if that is not above it."""
    return min(Nms.lowest_score_threshold, score_threshold)


ATTRIBUTES = tuple(item.name for item in dataclasses.fields(Nms) if item.name != "runtime_thresholds")

# -- precisions --------------------------------------------------------------------------------------------------------

RUNTIMES = ("onnxruntime", "tensorrt")
CALIBRATIONS = ("explicit", "implicit")
CALIBRATORS = ("minmax", "entropy", "percentile")  # how an activation is clipped


@dataclass(frozen=True)
class Precision:
    """A precision that a model can be built in.

    Attributes:
        name: its name.
        runtimes: those that can run it.
        derived: how its graph comes from the source model: `source` (it is the source's own graph; TF32 is a choice
            of the engine build), `half` (every float is cast) or `quantised` (Q/DQ pairs on calibrated activations).
        widened: ONNX Runtime has no CPU kernels for its graph, so the gate compares with the same graph in FP32 with
            every result rounded (build/graph/precision.py: widened).
        literal: ONNX Runtime's optimisations give wrong answers for its graph: it runs as it is written.
        opset: the lowest version of the standard operators that have its type; 0 = any.
    """

    name: str
    runtimes: tuple[str, ...]
    derived: str
    widened: bool = False
    literal: bool = False
    opset: int = 0

    @property
    def typed(self) -> bool:
        """Whether its graph differs from the source's, so that its accuracy must be measured."""
        return self.derived != "source"

    @property
    def quantised(self) -> bool:
        """Whether its activations are calibrated."""
        return self.derived == "quantised"


PRECISIONS: Mapping[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("fp32", RUNTIMES, "source"),
        Precision("tf32", ("tensorrt",), "source"),
        Precision("fp16", RUNTIMES, "half"),
        Precision("bf16", RUNTIMES, "half", widened=True, opset=22),
        Precision("int8", RUNTIMES, "quantised"),
        Precision("fp8", ("tensorrt",), "quantised", literal=True, opset=19),
    )
}
BASELINE = "fp32"  # what every accuracy is compared with


def precisions_of(runtime: str) -> tuple[str, ...]:
    """The precisions that a runtime can run."""
    return tuple(name for name, precision in PRECISIONS.items() if runtime in precision.runtimes)


@dataclass(frozen=True)
class Target:
    """What a model is built for.

    Attributes:
        runtime: onnxruntime or tensorrt.
        precision: of PRECISIONS.
        calibration: who chooses the scales of a quantised precision: `explicit` (the graph has Q/DQ pairs) or
            `implicit` (TensorRT up to 10 calibrates INT8 by itself).

    Raises:
        OptionError: there is no such runtime, precision or calibration, or they do not go together.
    """

    runtime: str
    precision: str = BASELINE
    calibration: str = "explicit"

    def __post_init__(self) -> None:
        _require("runtime", self.runtime, RUNTIMES)
        _require("calibration", self.calibration, CALIBRATIONS)
        if self.precision not in precisions_of(self.runtime):
            known = ", ".join(precisions_of(self.runtime))
            raise OptionError(
                f"precision is {self.precision!r}, but the runtime {self.runtime} has {known} only",
                fix="build one of these"
                + (", or add --runtime tensorrt" if self.precision in precisions_of("tensorrt") else ""),
            )
        if self.implicit and (self.runtime, self.precision) != ("tensorrt", "int8"):
            raise OptionError(
                f"calibration is 'implicit', but this would build {self.precision} for {self.runtime}",
                why="only TensorRT calibrates by itself, and only INT8",
                fix="add --runtime tensorrt --precision int8, or leave --calibration implicit out",
            )

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Target:
        """What a published version was built for, from its manifest.

        Raises:
            OptionError: it was built for something that this version does not know.
        """
        calibration = manifest.get("calibration", {}).get("way", "explicit")
        return cls(manifest["runtime"], manifest["precision"], calibration)

    @property
    def implicit(self) -> bool:
        """Whether TensorRT calibrates by itself."""
        return self.calibration == "implicit"

    @property
    def kind(self) -> Precision:
        """The row of PRECISIONS."""
        return PRECISIONS[self.precision]

    @property
    def typed(self) -> bool:
        """Whether the runtime gets a graph of its own, and not the source's."""
        return self.kind.typed and not self.implicit

    def __str__(self) -> str:
        return f"{self.precision}, {self.runtime}" + (", implicit calibration" if self.implicit else "")


def _require(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"{what} is {value!r}, but must be one of {', '.join(known)}")
