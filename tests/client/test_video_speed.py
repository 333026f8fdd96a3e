"""How fast `ssd-client video` is with the real `shapes`: `pytest -m long -s tests/client/test_video_speed.py`."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from build.serve import TritonServer
from models.shapes.scenes import scene

pytestmark = [pytest.mark.triton, pytest.mark.long, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[2]
SECONDS, RATE, WANTED = 10, 30, 1.3  # times real time


def test_a_film_of_720_lines(pyav: Path, shapes: TritonServer, tmp_path: Path) -> None:
    from tests.client import films

    scenes = [np.asarray(scene("held_out", index).image.resize((1280, 720))) for index in range(15)]
    films.write(
        tmp_path / "in.mp4", [scenes[index // 10 % 15] for index in range(SECONDS * RATE)], rate=RATE, audio="aac"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(pyav), str(ROOT / "client")])}
    command = [sys.executable, "-m", "ssd_client", "video", "in.mp4", "--out", "out.mp4", "--shared-memory"]
    command += ["--url", shapes.grpc_url, "--model", "shapes"]

    def spent() -> tuple[float, float, float]:
        children, server = resource.getrusage(resource.RUSAGE_CHILDREN), psutil.Process(shapes.pid).cpu_times()
        return time.monotonic(), children.ru_utime + children.ru_stime, server.user + server.system

    runs = []
    for _ in range(3):
        before = spent()
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        runs.append([after - begun for after, begun in zip(spent(), before, strict=True)])
        assert done.returncode == 0, done.stderr
        wall, own, server = runs[-1]
        print(
            f"\n{SECONDS} s of film: {wall:.1f} s ({SECONDS / wall:.2f} times real time); processor time: command "
            f"{own:.1f} s, server {server:.1f} s"
        )
    assert len(films.read(tmp_path / "out.mp4")["times"]) == SECONDS * RATE
    # A machine that others use, too, takes longer; what it takes on two cores of its own follows from what it spent.
    assert min(min(wall, (own + server) / 2 + 1) for wall, own, server in runs) <= SECONDS / WANTED
