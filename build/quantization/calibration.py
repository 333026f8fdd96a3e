"""What activations look like on calibration pictures: one pass, one histogram each, from which every calibrator reads.

A calibrator (minmax, entropy, percentile) reads an activation's clipping point off its histogram of absolute values.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from build import contract, files
from build.contract import CALIBRATORS
from build.errors import QuantizeError, RuntimeUnavailableError
from build.gate import datasets
from build.graph.attach import attach, before_nms
from build.quantization import qdq
from build.session import session
from build.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray
    from rich.console import Console

BINS = 4096
FEW_PICTURES = 100
_BATCH = 4  # every activation of a batch is in memory at once
_LEVELS = 128  # of a symmetric INT8 without its sign


@dataclass
class Histogram:
    """Absolute values of one activation: BINS bins from 0 to `end`, a power of two that grows with what comes in.

    Growing merges neighbouring bins, so that the result does not depend on the order of the pictures.

    Attributes:
        end: the last bin's right edge; 0 before the first value.
        counts: INT64 [BINS].
        largest: the largest absolute value, exactly.
        negative: whether there was a value below 0.
    """

    counts: NDArray[np.int64]
    end: float = 0.0
    largest: float = 0.0
    negative: bool = False

    def add(self, values: NDArray[np.float32]) -> None:
        """Counts an array of finite values.

        Raises:
            QuantizeError: one is infinite or not a number.
        """
        import numpy as np

        size = np.abs(values, dtype=np.float32).ravel()
        largest = float(size.max(initial=0.0))
        if not np.isfinite(largest):
            raise QuantizeError(
                "an activation is infinite or not a number on a calibration picture",
                why="the model overflows, or its weights are damaged",
                fix="see which with the audit of fp32; a quantised graph could only hide it",
            )
        self.negative |= bool(values.min(initial=0.0) < 0)
        self.largest = max(self.largest, largest)
        if largest == 0.0:
            self.counts[0] += size.size
            return
        if self.end == 0.0:
            self.end = float(2.0 ** np.ceil(np.log2(largest)))
        while self.end < largest:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts[:] = 0
            self.counts[: BINS // 2] = merged
            self.end *= 2
        places = np.minimum((size * np.float32(BINS / self.end)).astype(np.int32), BINS - 1)
        self.counts += np.bincount(places, minlength=BINS)

    def clip(self, calibrator: str, percentile: float) -> float:
        """Where this calibrator clips: the largest absolute value that is still represented; 0 if all values are."""
        if calibrator == "minmax" or self.largest == 0.0:
            return self.largest
        bins = _entropy(self.counts) if calibrator == "entropy" else _percentile(self.counts, percentile)
        return min(bins * self.end / BINS, self.largest)


def _percentile(counts: NDArray[np.int64], percentile: float) -> int:
    """The number of bins that hold at least `percentile` percent of all values."""
    import numpy as np

    below = np.cumsum(counts)
    return int(np.searchsorted(below, below[-1] * (percentile / 100.0), side="left")) + 1


def _entropy(counts: NDArray[np.int64]) -> int:
    """The number of bins whose clipped distribution loses least information when quantised (least KL divergence).

    Migacz, "8-bit inference with TensorRT" (GTC 2017). As in NVIDIA's own tools the first bin counts as much as the
    second: the zeros that a Relu makes are represented exactly whatever the clipping, and would drown the rest.

    What is clipped counts in the last bin, also if that bin was empty; otherwise clipping everything would be free. If
    nothing on the last level is kept to stand for it, the divergence is infinite.
    """
    import numpy as np

    values = counts.astype(np.float64)
    values[0] = values[1]
    last = int(np.flatnonzero(values)[-1]) + 1 if values.any() else 1
    if last <= _LEVELS:
        return last
    total = values.sum()
    best, best_bins = np.inf, last
    for bins in sorted({*range(_LEVELS, last, _LEVELS // 16), last}):
        kept = values[:bins]
        reference = kept.copy()
        reference[-1] += total - kept.sum()  # what is clipped comes to lie on the last level
        level = np.arange(bins) * _LEVELS // bins
        filled = reference > 0
        share = np.bincount(level, kept, _LEVELS) / np.maximum(np.bincount(level, filled, _LEVELS), 1)
        quantised = np.where(filled, share[level], 0.0)
        if (quantised[filled] == 0).any():
            continue
        p, q = reference[filled] / total, quantised[filled] / quantised.sum()
        divergence = float((p * np.log(p / q)).sum())
        if divergence < best:
            best, best_bins = divergence, bins
    return best_bins


@dataclass(frozen=True)
class Calibration:
    """The activations of one model on one set of pictures.

    Attributes:
        key: what they were measured on and with; another key makes another calibration.
        histograms: by the name of the activation.
        pictures: how many were read.
    """

    key: Mapping[str, str]
    histograms: Mapping[str, Histogram]
    pictures: int

    def clips(self, calibrator: str, percentile: float) -> dict[str, float]:
        """The clipping point of every activation."""
        return {name: histogram.clip(calibrator, percentile) for name, histogram in self.histograms.items()}


def calibrate(
    spec: Spec, source: onnx.ModelProto, cache: Path, console: Console | None = None, *, name: str = "calibration"
) -> Calibration:
    """Measures every activation that a quantised Conv can read or answer on the spec's calibration pictures.

    Args:
        spec: names the pictures.
        source: the folded source model.
        cache: a folder; `datasets` in it receives generated pictures, `<model>/<name>.npz` what was measured, which
            is read again as long as pictures, model and tools are the same.
        console: for the progress bar; None = standard error.
        name: of the file.

    Raises:
        DataError: there are no pictures, or too many of them cannot be read.
        QuantizeError: the model has no Conv, or cannot be run.
    """
    import numpy as np
    import onnx
    from rich.console import Console
    from rich.progress import Progress

    show = console or Console(stderr=True, soft_wrap=True)
    pictures = datasets.calibration(spec, cache / "datasets")
    if len(pictures) < FEW_PICTURES:
        show.print(
            f"warning: {pictures.name} holds {len(pictures)} pictures; with fewer than {FEW_PICTURES} the clipping is "
            "a guess, 500 are usual",
            markup=False,
        )
    names = _measured(source)
    if not names:
        raise QuantizeError(f"{spec.onnx_path}: has no Conv, so there is nothing to quantise")
    whole = before_nms(attach(spec, source))
    file = cache / spec.model.name / f"{name}.npz"
    key = _key(pictures, whole, names)
    try:
        return read_calibration(file, key)
    except QuantizeError as stale:
        if file.exists():
            show.print(f"{stale.what}: calibrating anew", markup=False)
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    runs = session(whole)
    histograms = {name: Histogram(np.zeros(BINS, np.int64)) for name in names}
    read = 0
    with Progress(console=show, transient=True, disable=not show.is_terminal) as progress:
        task = progress.add_task(f"calibrating {spec.model.name} on {len(pictures)} pictures", total=len(pictures))
        for batch in datasets.arrays(pictures, spec.input, _BATCH):
            for name, values in zip(names, runs.run(names, {contract.IMAGES: batch}), strict=True):
                histograms[name].add(values)
            read += len(batch)
            progress.update(task, completed=read)
    measured = Calibration(key, histograms, read)
    _write_calibration(file, measured)
    return measured


def _measured(source: onnx.ModelProto) -> list[str]:
    """What a pair can be put on: what a Conv reads, and its output or that of the Relu or ReLU6 behind it."""
    readers, constants = qdq.readers_of(source), qdq.constants_of(source)
    read = {qdq.served_name(source, conv.input[0]) for conv in qdq.convs(source)}
    return sorted(read | {qdq.behind(conv, readers, constants) for conv in qdq.convs(source)})


def read_calibration(path: Path, key: Mapping[str, str]) -> Calibration:
    """What `calibrate` wrote, if it was measured on and with exactly this.

    Raises:
        QuantizeError: it is missing, damaged or stale; names what differs.
    """
    import zipfile

    import numpy as np

    try:
        with zipfile.ZipFile(path) as parts:
            if damaged := parts.testzip():
                raise ValueError(f"{damaged} has changed since")
        with np.load(path, allow_pickle=False) as held:
            stored = json.loads(str(held["key"]))
            histograms = {
                name: Histogram(counts, float(end), float(largest), bool(negative))
                for name, counts, (end, largest, negative) in zip(
                    held["names"].tolist(), held["counts"], held["ranges"], strict=True
                )
            }
            pictures = int(held["pictures"])
    except Exception as error:  # of a damaged file: zlib.error, NotImplementedError, tokenize.TokenError and others
        raise QuantizeError(f"{path}: no readable calibration: {error}") from None
    differs = sorted(name for name in {*stored, *key} if stored.get(name) != key.get(name))
    if differs:
        raise QuantizeError(
            f"{path}: the calibration is stale: other {', '.join(differs)}",
            why="it was measured before that changed, and its ranges may clip what now matters",
            fix="calibrate again",
        )
    return Calibration(stored, histograms, pictures)


def _write_calibration(path: Path, calibration: Calibration) -> None:
    import numpy as np

    names = list(calibration.histograms)
    ranges = [
        (histogram.end, histogram.largest, float(histogram.negative)) for histogram in calibration.histograms.values()
    ]
    with files.replacing(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(
            file,
            key=json.dumps(dict(calibration.key)),
            names=np.array(names),
            counts=np.stack([histogram.counts for histogram in calibration.histograms.values()]),
            ranges=np.array(ranges),
            pictures=calibration.pictures,
        )


def _key(pictures: datasets.Pictures, whole: onnx.ModelProto, names: list[str]) -> dict[str, str]:
    """What a calibration depends on, by the names that a message about a stale one uses."""
    return {
        "pictures": pictures.digest(),
        "model": hashlib.sha256(whole.SerializeToString(deterministic=True)).hexdigest(),
        "activations": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        "method": f"absolute values in {BINS} bins",
        "onnxruntime": importlib.metadata.version("onnxruntime"),
    }


def write_scales(path: Path, calibration: Calibration, percentile: float) -> None:
    """The table of scales: per activation what was measured, and each calibrator's clipping point and INT8 scale."""
    import csv

    with files.replacing(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        columns = [f"{calibrator}_{what}" for calibrator in CALIBRATORS for what in ("clip", "scale")]
        table.writerow(["activation", "largest", "negative", *columns])
        for name, histogram in calibration.histograms.items():
            clips = [histogram.clip(calibrator, percentile) for calibrator in CALIBRATORS]
            values = [value for clip in clips for value in (clip, qdq.scale_of(clip, "int8"))]
            table.writerow([name, histogram.largest, histogram.negative, *values])


def draw_histograms(path: Path, calibration: Calibration, percentile: float) -> None:
    """A picture of every activation's histogram, with each calibrator's clipping point as a line.

    Raises:
        RuntimeUnavailableError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeUnavailableError(
            "drawing histograms needs the package matplotlib", fix="install it: pip install matplotlib"
        ) from None
    import numpy as np

    columns = 4
    rows = -(-len(calibration.histograms) // columns)
    figure = Figure(figsize=(4 * columns, 2.2 * rows), layout="constrained")
    colors = dict(zip(CALIBRATORS, ("tab:red", "tab:green", "tab:blue"), strict=True))
    for axes, (name, histogram) in zip(
        figure.subplots(rows, columns, squeeze=False).flat, calibration.histograms.items(), strict=False
    ):
        merged = histogram.counts.reshape(-1, 32).sum(1)
        axes.stairs(merged, np.linspace(0, histogram.end or 1.0, len(merged) + 1), fill=True, color="lightgrey")
        for calibrator, color in colors.items():
            axes.axvline(histogram.clip(calibrator, percentile), color=color, label=calibrator, linewidth=1)
        axes.set(yscale="log", xlim=(0, (histogram.largest or 1.0) * 1.02))
        axes.set_title(name if len(name) < 44 else f"...{name[-40:]}", fontsize=7)
        axes.tick_params(labelsize=6)
    figure.axes[0].legend(fontsize=6)
    for axes in figure.axes[len(calibration.histograms) :]:
        axes.set_visible(False)
    with files.replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=100)
