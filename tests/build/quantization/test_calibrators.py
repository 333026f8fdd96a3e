"""Where the calibrators clip: against definitions, against ONNX Runtime's calibrator and against NVIDIA's."""

from __future__ import annotations

import ast
import warnings
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from build.errors import QuantizeError
from build.quantization import calibration
from tests.optional import optional


def histogram(*parts: np.ndarray) -> calibration.Histogram:
    found = calibration.Histogram(np.zeros(calibration.BINS, np.int64))
    for part in parts:
        found.add(part.astype(np.float32))
    return found


def test_histogram_does_not_depend_on_the_order_of_what_comes() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(0, scale, 5000) for scale in (0.01, 1.0, 30.0, 0.2)]
    forward, backward, whole = histogram(*parts), histogram(*parts[::-1]), histogram(np.concatenate(parts))
    for other in (backward, whole):
        assert (forward.counts == other.counts).all()
        assert (forward.end, forward.largest) == (other.end, other.largest)
    assert forward.counts.sum() == 20000
    assert forward.negative
    assert not histogram(np.abs(parts[0])).negative


def test_clipping_of_known_distributions() -> None:
    rng = np.random.default_rng(1)
    values = np.abs(rng.normal(0, 1, 200_000))
    normal, tail = histogram(values), histogram(values, np.full(20, 50.0))
    assert normal.clip("minmax", 99.0) == pytest.approx(values.max())
    assert tail.clip("minmax", 99.0) == 50.0
    # The bin's right edge: at most one bin above numpy's own quantile.
    assert normal.clip("percentile", 99.0) == pytest.approx(np.percentile(values, 99.0), abs=2 * normal.end / 4096)
    assert tail.clip("percentile", 99.9) == pytest.approx(np.percentile(values, 99.9), abs=0.1)
    # Twenty outliers of 200,000 are not worth twelve times coarser steps for the rest.
    assert 2.0 < tail.clip("entropy", 99.0) < 8.0
    assert histogram(np.zeros(10)).clip("entropy", 99.0) == 0.0


def test_entropy_finds_the_least_divergence_of_all_choices() -> None:
    """Against the definition, written plainly: every candidate's divergence, one bin and one level at a time."""
    rng = np.random.default_rng(2)
    # As behind a Relu: mostly zeros.
    counts = histogram(np.maximum(rng.laplace(-1, 1, 60_000), 0)).counts

    def divergence(bins: int) -> float:
        values = counts.astype(float)
        values[0] = values[1]
        reference = values[:bins].copy()
        reference[-1] += values[bins:].sum()
        quantised = np.zeros(bins)
        for level in range(128):
            inside = [i for i in range(bins) if i * 128 // bins == level and reference[i] > 0]
            for i in inside:
                quantised[i] = sum(values[j] for j in inside) / len(inside)
        if (quantised[reference > 0] == 0).any():
            return float("inf")
        p, q = reference / reference.sum(), quantised / quantised.sum()
        return float(sum(p[i] * np.log(p[i] / q[i]) for i in np.flatnonzero(reference)))

    last = int(np.flatnonzero(counts)[-1]) + 1
    choices = sorted({*range(128, last, 8), last})[::12]
    found = calibration._entropy(counts)
    assert divergence(found) <= min(map(divergence, choices)) + 1e-9


def class_logits(rng: np.random.Generator) -> list[np.ndarray]:
    """As of a head: nearly all values in a narrow lump far from zero (background), few at other places."""
    return [rng.normal(-9, 0.8, 40_000), rng.normal(3, 2, 60)]


DISTRIBUTIONS = pytest.mark.parametrize(
    "parts",
    [
        lambda rng: [rng.normal(0, 1, 50_000)],
        lambda rng: [rng.laplace(0, 1, 50_000)],
        lambda rng: [rng.normal(0, 1, 50_000), [7.0]],  # bins without values between most and the largest
        lambda rng: [[7.25] * 5_000, [9.5]],
        class_logits,
    ],
    ids=["normal", "laplace", "outlier", "two_values", "class_logits"],
)


@DISTRIBUTIONS
def test_entropy_clips_as_onnxruntime_s_own_calibrator(parts: Callable[[np.random.Generator], list[Any]]) -> None:
    from onnxruntime.quantization.calibrate import HistogramCollector

    found = histogram(*(np.asarray(part) for part in parts(np.random.default_rng(3))))
    # Its histogram has both signs, and our 4,096 bins a side would take it minutes: 512.
    counts = found.counts.reshape(-1, 8).sum(1)
    edges = np.linspace(-found.end, found.end, 2 * len(counts) + 2)
    both = np.concatenate([counts[::-1], [0], counts]).astype(np.int64)
    collector = HistogramCollector("entropy", True, 0, 128, 99.9, "same")
    _, theirs = collector.get_entropy_threshold(
        (both, edges, np.float64(-found.largest), np.float64(found.largest)), 255
    )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = found.clip("entropy", 99.9)
    assert theirs / 1.35 <= ours <= theirs * 1.35


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_model_that_overflows_cannot_be_calibrated(bad: float) -> None:
    with pytest.raises(QuantizeError, match="infinite or not a number"):
        histogram(np.array([1.0, bad]))


@pytest.mark.long
@DISTRIBUTIONS
def test_entropy_clips_as_nvidia_s_modelopt(parts: Callable[[np.random.Generator], list[Any]]) -> None:
    """Its function alone is run, out of its file: the package itself would bring torch and CUDA."""
    values = [np.asarray(part) for part in parts(np.random.default_rng(3))]
    if len(np.unique(np.concatenate(values))) == 2:
        pytest.skip("NVIDIA's function divides 0 by 0 where all of what it keeps is in one bin")
    file = optional("modelopt") / "modelopt" / "torch" / "quantization" / "calib" / "histogram.py"
    (function,) = (
        node
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "_compute_amax_entropy"
    )

    def entropy(p: np.ndarray, q: np.ndarray) -> float:
        """As scipy.stats: the Kullback-Leibler divergence of both, normalised."""
        p, q = p / p.sum(), q / q.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.where(p > 0, p * np.log(p / q), 0.0).sum())

    space: dict[str, Any] = {"np": np, "Counter": Counter, "entropy": entropy}
    space["torch"] = SimpleNamespace(tensor=float)
    exec(compile(ast.Module([function], []), str(file), "exec"), space)
    found = histogram(*values)
    counts = found.counts.reshape(-1, 4).sum(1)  # theirs takes a minute for 4,096 bins
    edges = np.linspace(0, found.end, len(counts) + 1)
    theirs = min(space["_compute_amax_entropy"](counts, edges, 8, False, stride=4), found.largest)
    ours = min(calibration._entropy(counts) * found.end / len(counts), found.largest)
    assert theirs / 1.1 <= ours <= theirs * 1.1
