"""The steps that run published plans, on stand-ins of TensorRT and CUDA: what they find, and what they raise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from perf.gpu import steps
from perf.gpu.steps import Published, StepError, Work

Runner = Callable[[dict[str, Any]], dict[str, Any]]


class StandIn:
    """A plan that answers with `run`."""

    max_batch = 4

    def __init__(self, run: Runner) -> None:
        self.run = run

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.run(inputs)

    def benchmark(self, inputs: dict[str, Any], seconds: float) -> Any:
        return SimpleNamespace(as_dict=lambda: {"batch": len(inputs["images"]), "seconds": seconds})

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def sums(inputs: dict[str, Any]) -> dict[str, Any]:
    """What a right plan gives."""
    return {"sums": inputs["images"].sum(1, dtype=np.int32)}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Work]:
    """Work with one plan; other runners for batches and for CUDA graphs."""

    def make(run: Runner = sums, replayed: Runner | None = None) -> Work:
        class Plan(Published):
            def open(self, *, cuda_graphs: bool = False) -> Any:
                return StandIn(replayed if cuda_graphs and replayed else run)

            def feeds(self, work: Work, batch: int) -> dict[str, Any]:
                return {"images": np.arange(batch * 3, dtype=np.uint8).reshape(batch, 3)}

        monkeypatch.setattr(steps, "published", lambda work: [Plan("fp16", None, Path("x"), {})])  # type: ignore[arg-type]
        return Work("shapes", tmp_path)

    return make


def test_rows(work: Callable[..., Work]) -> None:
    assert steps.rows(work()) == {"fp16": {"largest batch": 4, "differences": []}}

    def cross_talk(inputs: dict[str, Any]) -> dict[str, Any]:
        return {"sums": sums(inputs)["sums"] + (len(inputs["images"]) == 2)}

    with pytest.raises(StepError, match="depends on its batch: fp16, batch 2: sums"):
        steps.rows(work(cross_talk))


def test_graphs(work: Callable[..., Work]) -> None:
    assert steps.graphs(work()) == {"fp16": {"1": "the same bits in 4 runs", "4": "the same bits in 4 runs"}}
    with pytest.raises(StepError, match="a CUDA graph gives something else: fp16, batch 1: sums"):
        steps.graphs(work(replayed=lambda inputs: {"sums": sums(inputs)["sums"] + 1}))


def test_benchmark_times_each_batch_with_and_without_graphs(work: Callable[..., Work]) -> None:
    told = steps.benchmark(work())
    assert [row["batch"] for row in told["fp16"]] == [1, 4, 1, 4]


def test_steps_without_a_plan_have_nothing_to_do(tmp_path: Path) -> None:
    assert list(steps.published(Work("shapes", tmp_path))) == []
