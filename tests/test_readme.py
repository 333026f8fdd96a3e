"""Runs the README's code blocks as they stand, against a real server; one that cannot run here says so above itself."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from invoke.collection import Collection

import tasks
from build.serve import TritonServer
from models.shapes.scenes import scene
from tests.docs_blocks import Block, blocks

ROOT = Path(__file__).parent.parent


def test_only_these_blocks_do_not_run() -> None:
    assert [block.text.splitlines()[0].split()[:2] for block in blocks(ROOT / "README.md") if block.note] == [
        ["./invoke", "test"],
        ["./invoke", "serve"],
        ["./invoke", "page"],
        ["curl", "-F"],
        ["./invoke", "import-model"],
        ["./invoke", "import-model"],
        ["docker", "run"],
    ]


def test_the_list_of_tasks_is_whole() -> None:
    section = (ROOT / "README.md").read_text().split("\n## All tasks\n")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `([a-z-]+)` \|", section, re.M)
    assert sorted(listed) == sorted(Collection.from_module(tasks).task_names)


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [b for b in blocks(ROOT / "README.md") if not b.note], ids=lambda block: block.text.splitlines()[0][:40]
)
def test_block_runs(block: Block, triton_server: TritonServer, tmp_path: Path) -> None:
    scene("held_out", 0).image.save(tmp_path / "picture.jpg", quality=95)
    started = time.time()
    text = block.text.replace("localhost:8001", triton_server.grpc_url)
    if block.language == "python":
        command, folder = [sys.executable, "-c", text], tmp_path
    else:
        command, folder = (
            [
                "sh",
                "-euc",
                text.replace("picture.jpg", str(tmp_path / "picture.jpg")).replace(
                    "detected", str(tmp_path / "detected")
                ),
            ],
            ROOT,
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    if block.text == "./invoke demo\n":
        for name in ("detections.png", "summary.json"):
            assert (ROOT / "artifacts" / "demo" / name).stat().st_mtime > started
    if block.language == "python":
        assert (tmp_path / "picture-detections.png").stat().st_size > 0
        assert done.stdout.strip(), "no detection in a scene that has objects"
