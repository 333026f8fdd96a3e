"""3,000 pictures with the real `shapes`: on this machine and on two nodes of Ray, beside the plain client, in one run.

`pytest -m long -s tests/client/test_batch_many.py`
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from build.serve import TritonServer
from models.shapes.scenes import scene
from tests.optional import optional

pytestmark = [pytest.mark.triton, pytest.mark.long, pytest.mark.timeout(1500)]
ROOT = Path(__file__).resolve().parents[2]
COUNT, DRAWN = 3000, 300

_PLAIN = """
import sys, time
from pathlib import Path
from ssd_client import SSDClient
paths = sorted(Path(sys.argv[2]).iterdir())
with SSDClient(sys.argv[1], model="shapes", max_in_flight=4) as client:
    client.detect(paths[:8])
    begun = time.monotonic()
    found = [client.detect(paths[start:start + 500]) for start in range(0, len(paths), 500)]
    print(len(paths) / (time.monotonic() - begun), sum(map(len, (each for part in found for each in part))))
"""
_ROWS = """
import daft, json, sys
columns = ("path", "width", "height", "boxes", "scores", "labels", "error", "model", "manifest_sha256")
print(json.dumps(daft.read_parquet(sys.argv[1] + "/*.parquet").sort("path").select(*columns).to_pydict()))
"""


def test_equal_rows_and_how_fast(shapes: TritonServer, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(COUNT):
        path = folder / f"{index:04}.jpg"
        if index < DRAWN:
            scene("held_out", index).image.save(path, "JPEG", quality=90)
        else:
            shutil.copy(folder / f"{index % DRAWN:04}.jpg", path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(optional("batch")), str(ROOT / "client")])}
    url = shapes.grpc_url

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done

    def plain() -> tuple[float, int]:
        rate, found = run("-c", _PLAIN, url, "in").stdout.split()
        return float(rate), int(found)

    def rate_of(done: subprocess.CompletedProcess[str]) -> float:
        match = re.search(rf"{COUNT} of {COUNT} pictures, 0 errors, ([\d.]+)/s", done.stderr)
        assert match, done.stderr
        return float(match[1])

    options = ("in", "--url", url, "--model", "shapes", "--chunk", str(COUNT))
    before = plain()
    local = rate_of(run("-m", "ssd_client", "batch", *options, "--out", "local"))
    after = plain()
    on_ray = rate_of(run(str(Path(__file__).with_name("ray_batch.py")), *options, "--out", "ray"))
    beside = (before[0] + after[0]) / 2
    print(
        f"\n{COUNT} pictures: plain client {before[0]:.1f} and {after[0]:.1f}/s, batch {local:.1f}/s "
        f"({local / beside:.2f}), on two nodes of Ray with their start {on_ray:.1f}/s"
    )
    rows = json.loads(run("-c", _ROWS, "local").stdout)
    assert rows == json.loads(run("-c", _ROWS, "ray").stdout)
    assert rows["path"] == [str(folder / f"{index:04}.jpg") for index in range(COUNT)]
    assert sum(len(scores) for scores in rows["scores"]) == before[1] == after[1]
    assert local / beside >= 0.85
