"""Published models whose backend is spoilt: what a load run has to notice."""

from __future__ import annotations

import json
from pathlib import Path

from build.files import sha256

# Appended to a published model.py: what ONNX Runtime answers is spoilt, or comes late.
SPOILT = """

import time


class _Spoilt:
    def __init__(self, session):
        self.session = session
        self.known = {{}}  # answers by pictures: the model's own time, and a busy machine's part in it, shall not count

    def run(self, names, feeds):
        key = hash(b"".join(array.tobytes() for array in feeds.values()))
        arrays = self.known[key] = self.known.get(key) or self.session.run(names, feeds)
        {fault}
        return arrays


class TritonPythonModel(TritonPythonModel):
    def initialize(self, args):
        super().initialize(args)
        self._session = _Spoilt(self._session)
"""

SWAP = "arrays = [array[[1, 0, *range(2, len(array))]] if len(array) > 1 else array for array in arrays]"


def spoil(model: Path, fault: str) -> None:
    """Puts `fault` into the backend of every version in a published model's folder; as if it was published so."""
    for path in model.glob("*/model.py"):
        path.write_text(path.read_text() + SPOILT.format(fault=fault))
        manifest = path.with_name("manifest.json")
        before, facts = sha256(manifest), json.loads(manifest.read_bytes())
        facts["files"][path.name] = sha256(path)
        manifest.write_text(json.dumps(facts))
        for config in model.rglob("config.pbtxt"):
            config.write_text(config.read_text().replace(before, sha256(manifest)))
