"""How long a plan's runs take, summed up as trtexec does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Summary:
    """Milliseconds over many runs, as trtexec sums them up."""

    min: float
    mean: float
    median: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """Of at least one sample; percentiles and median by trtexec's rule.

        Raises:
            ValueError: there is none.
        """
        if not samples:
            raise ValueError("there are no samples")
        ordered, count = sorted(samples), len(samples)

        def percentile(percent: int) -> float:
            return ordered[max(count - 1 - (100 - percent) * count // 100, 0)]

        middle = count // 2
        median = ordered[middle] if count % 2 else (ordered[middle - 1] + ordered[middle]) / 2
        return cls(ordered[0], math.fsum(ordered) / count, median, percentile(90), percentile(99), ordered[-1])


@dataclass(frozen=True)
class Run:
    """One run, in milliseconds: copies and compute by CUDA events, the enqueue on the host's clock."""

    h2d: float
    compute: float
    d2h: float
    enqueue: float


@dataclass(frozen=True)
class Timing:
    """A benchmark's outcome.

    Attributes:
        batch, runs: images of a run, and how many runs were counted.
        cuda_graph: whether runs were replayed from a CUDA graph.
        throughput: runs per second, one after another, copies included.
        latency: of a run: both copies and the compute between them.
        compute, h2d, d2h, enqueue: its parts.
    """

    batch: int
    runs: int
    cuda_graph: bool
    throughput: float
    latency: Summary
    compute: Summary
    h2d: Summary
    d2h: Summary
    enqueue: Summary

    @classmethod
    def of(cls, runs: Sequence[Run], batch: int, seconds: float, cuda_graph: bool = False) -> Timing:
        """Of runs that took so many seconds of the host's clock."""
        parts = {key: Summary.of([getattr(run, key) for run in runs]) for key in ("compute", "h2d", "d2h", "enqueue")}
        latency = Summary.of([run.h2d + run.compute + run.d2h for run in runs])
        return cls(batch, len(runs), cuda_graph, len(runs) / seconds, latency, **parts)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            f"throughput {self.throughput:.1f} runs/s, {self.throughput * self.batch:.1f} images/s "
            f"(batch {self.batch}, {self.runs} runs{', CUDA graph' if self.cuda_graph else ''})",
            f"{'ms':<12}" + "".join(f"{item.name:>10}" for item in dataclasses.fields(Summary)),
        ]
        for label in ("latency", "compute", "h2d", "d2h", "enqueue"):
            lines.append(f"{label:<12}" + "".join(f"{v:>10.4f}" for v in dataclasses.astuple(getattr(self, label))))
        return "\n".join(lines)


def profile_rows(times: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """The layers' times in the JSON that trtexec --exportProfile writes.

    Args:
        times: layer → its milliseconds in each run, in the engine's order.
    """
    total = math.fsum(math.fsum(samples) for samples in times.values())
    rows: list[dict[str, Any]] = [{"count": max(map(len, times.values()), default=0)}]
    for name, samples in times.items():
        spent = math.fsum(samples)
        rows.append(
            {
                "name": name,
                "timeMs": spent,
                "averageMs": spent / len(samples),
                "medianMs": Summary.of(samples).median,
                "percentage": 100 * spent / total if total else 0.0,
            }
        )
    return rows
