"""ONNX Runtime's own profile of a model: which kernels ran, on what, and for how long."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import GraphError
from build.session import session

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray


def profile(
    model: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]], runs: int, *, seconds: float = 0.0, **options: Any
) -> list[dict[str, Any]]:
    """The events of a profile, as ONNX Runtime writes them: `dur` and `ts` in microseconds.

    Args:
        model: the graph.
        feeds: its inputs by name.
        runs: how often it runs at least.
        seconds: how long it runs at least.
        options: as for `build.session.session`.

    Raises:
        GraphError: ONNX Runtime cannot run the graph.
    """
    with tempfile.TemporaryDirectory(prefix="ssd-profile-") as folder:
        profiled = session(model, profile=Path(folder) / "profile", **options)
        until, calls = time.perf_counter() + seconds, 0
        try:
            while calls < runs or time.perf_counter() < until:
                profiled.run(None, feeds)
                calls += 1
        except Exception as error:  # ONNX Runtime's own exceptions have no common type
            raise GraphError(f"ONNX Runtime cannot run the model: {error}") from error
        events: list[dict[str, Any]] = json.loads(Path(profiled.end_profiling()).read_text())
    return events
