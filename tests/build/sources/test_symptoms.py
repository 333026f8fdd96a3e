"""Values that contradict a reading; what the user states is not questioned (test_foreign.py has whole files)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from build.errors import ImportModelError
from build.sources.foreign import Wishes
from tests.build.sources.checks import imported
from tests.build.sources.test_foreign import opaque


def test_what_the_user_states_is_not_questioned(tmp_path: Path) -> None:
    layout = opaque(boxes="corners", scores="softmax")
    with pytest.raises(ImportModelError):
        imported(layout, tmp_path)
    layout.wishes = Wishes(boxes_are="deltas")
    with pytest.raises(ImportModelError, match="probabilities already"):
        imported(layout, tmp_path)
    layout.wishes = Wishes(boxes_are="deltas", scores_are="logits")
    assert imported(layout, tmp_path).adapted.anchors is not None


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    layout = opaque()
    constants = {item.name: item for item in layout.model.graph.initializer}
    name = next(name for name in constants if name.startswith("cls_b"))
    size = constants[name].dims[0]
    constants[name].raw_data = np.full(size, np.inf, np.float32).tobytes()
    with pytest.raises(ImportModelError, match="not finite on noise"):
        imported(layout, tmp_path)
