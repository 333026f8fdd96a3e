#!/opt/ssd/project/.venv/bin/python
"""Builds and checks TensorRT plans on this node's GPU, in a cache keyed by GPU and TensorRT. Never run on a GPU.

    build-plan --cache /cache --into /models [--precision fp16] [MODEL ...]

`--into`/current becomes a link to the repository in the cache. What is fresh there is not built again, and only a plan
that passes the gate is published; two pods of one node do not publish at the same time (the repository's lock).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

PROJECT = Path(os.environ.get("SSD_PROJECT", "/opt/ssd/project"))


def key(gpu: str, compute_capability: str, tensorrt: str) -> str:
    """The cache's folder for a GPU and a TensorRT: a plan of one is of no use to another."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", f"{gpu} sm{compute_capability} tensorrt{tensorrt}").strip("-").lower()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("models", nargs="*", help="folders of models/ (default: all)")
    given = parser.parse_args()
    sys.path[:0] = [str(PROJECT), str(PROJECT / "client")]
    from build import machine, pipeline
    from build.errors import SSDError
    from build.gate.accuracy import mean_average_precision

    gpu = machine.find_gpu(machine.Machine())
    if gpu is None:
        print("error: nvidia-smi shows no GPU\nwhat to do: give the container one (nvidia.com/gpu: 1)", file=sys.stderr)
        return 1
    folder = given.cache / key(gpu.name, gpu.compute_capability, machine.tensorrt_version())
    try:
        pipeline.build_engines(
            given.models or None,
            "tensorrt",
            given.precision,
            False,
            folder / "model_repository",
            artifacts=folder / "artifacts",
            judge=mean_average_precision,
        )
    except SSDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    link = given.into / ".current"
    link.unlink(missing_ok=True)
    link.symlink_to(folder / "model_repository")
    link.replace(given.into / "current")
    return 0


if __name__ == "__main__":
    sys.exit(main())
