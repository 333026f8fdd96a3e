"""Bias correction: what rounding shifts a Conv by on average is measured, and gone when it is taken off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from build.gate import datasets
from build.quantization import correction, qdq
from build.spec import load
from tests.build import pictures, tiny_model
from tests.build.quantization.operators import clips_of, network
from tests.build.quantization.test_equalisation import planes


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_mean_error_is_gone(kind: str, tmp_path: Path) -> None:
    source = qdq.fold(network("relu", "bottleneck", channels=24))
    path = tiny_model.write(tmp_path / "tiny", source)
    pictures.write(tmp_path / "tiny" / "pictures", 12, tiny_model.LABELS)
    path.write_text(f'{path.read_text()}\n[data]\ncalibration = "pictures"\n')
    spec = load(path)
    seen = datasets.calibration(spec, tmp_path)
    clips = clips_of(source, planes(spec, np.concatenate(list(datasets.arrays(seen, spec.input, 8)))))
    before = correction.mean_errors(spec, source, qdq.quantize(source, clips, kind=kind), seen)
    assert set(before) == {conv.name for conv in qdq.quantisable(source, kind)}
    corrected = qdq.quantize(source, clips, kind=kind, errors=before)
    after = correction.mean_errors(spec, source, corrected, seen)
    for name, error in before.items():
        assert np.abs(error).max() > 1e-4, "there was nothing to correct"
        assert np.abs(after[name]).max() < 1e-2 * np.abs(error).max()
