"""Checks SSDNMS on this machine's GPU against the reference, then measures it.

Needs numpy and cuda-python; nvcc and a C++ compiler, or built libraries; for its peers torch and TensorRT.

    python plugins/bench/bench.py --out result.json            builds, checks, sanitizes, measures (a few minutes)
    python plugins/bench/bench.py --only check --core build/libssd_nms_core.so

    python plugins/bench/bench.py --within 60                  each part ends after a minute, the least telling left out

Times are CUDA events around a graph of many calls on different inputs, together larger than the L2 cache; the median of
the replays. Beside each: the bytes of inputs and outputs, once, over the copy bandwidth that this GPU reached; and
EfficientNMS_TRT on the same inputs, where TensorRT is there (efficient_nms.py says what that needs).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch_peer
from calls import SOURCE, Call, Inputs, build, load
from device import Array, Gpu, Host
from efficient_nms import CUT, Peer
from params import Settings
from scenes import GRIDS, adversarial, candidates, scene

if TYPE_CHECKING:
    from build.tensorrt.cuda import Cuda

FEWEST_SETS, L2_TIMES, REPLAYS = 4, 4, 25
TARGET = ("SSD300-COCO", np.float16, 0.05)  # what is measured first
SANITIZER_LIMIT = 240  # seconds for one tool


#
# Checks
#


def same_bits(a: Array, b: Array) -> bool:
    """Every NaN is like every other: the CPU's and the GPU's have different bits."""
    equal = a.view(np.int32) == b.view(np.int32)
    return bool((equal | (np.isnan(a) & np.isnan(b))).all())


def differences(got: list[Array], want: list[Array]) -> str:
    names = ("number", "boxes", "scores", "labels")
    return ", ".join(name for name, a, b in zip(names, got, want, strict=True) if not same_bits(a, b))


def expected(reference: Any, settings: Settings, inputs: Inputs) -> list[Array]:
    """What the reference gives, its rows on all of the CPU's cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(lambda row: Call(reference, settings, row, Host()).result(), inputs.rows()))
    return [np.concatenate(outputs) for outputs in zip(*rows, strict=True)]


def check(reference: Any, core: Any, device: Gpu | Host, count: int, within: float = math.inf) -> dict[str, Any]:
    """Bits of the core against bits of the reference; repeats, rows and graphs against themselves.

    Args:
        reference, core: the libraries.
        device: where the core runs.
        count: of the small cases.
        within: seconds after which the real sizes that are left, the largest, are left out.
    """
    end = time.monotonic() + within
    failures: list[str] = []
    done: dict[str, int] = {"cases": 0, "repeats": 0, "rows": 0, "graph replays": 0, "real sizes": 0}

    def compare(what: str, name: str, got: list[Array], want: list[Array]) -> None:
        done[what] += 1
        different = differences(got, want)
        if different:
            failures.append(f"{what}: {name}: {different} differ")

    detections = 0
    for index in range(count):
        name, settings, inputs = adversarial(index)
        want = expected(reference, settings, inputs)
        detections += int(want[0].sum())
        compare("cases", name, Call(core, settings, inputs, device).result(), want)

    small = count < 100
    settings = Settings(score_threshold=0.01)
    inputs = scene("SSD-MobileNet", 2 if small else 16, np.float16, 5)
    first = Call(core, settings, inputs, device).result()
    for fill in range(3 if small else 20):
        again = Call(core, settings, inputs, device)
        again.workspace.fill(fill * 13 % 256)
        compare("repeats", str(fill), again.result(), first)
    for row, given in enumerate(inputs.rows()):
        alone = Call(core, settings, given, device).result()
        compare("rows", str(row), alone, [output[row : row + 1] for output in first])

    if isinstance(device, Gpu):
        static = Call(core, settings, inputs, device)
        with device.graph(static.launch) as graph:
            for seed in range(3 if small else 10):
                fresh = scene("SSD-MobileNet", len(inputs.logits), np.float16, 100 + seed)
                static.given[0].write(fresh.deltas)
                static.given[1].write(fresh.logits)
                device.replay(graph)
                compare("graph replays", str(seed), static.read(), expected(reference, settings, fresh))

    left_out = 0
    for model, batch, dtype, kind, threshold in real_sizes(small):
        if time.monotonic() > end:
            left_out += 1
            continue
        settings = Settings(score_threshold=threshold, max_detections=200, topk_per_class=400 if batch == 2 else 0)
        inputs = scene(model, batch, dtype, batch, kind)
        want = expected(reference, settings, inputs)
        name = f"{model} B={batch} {np.dtype(dtype)} {kind} {threshold}"
        compare("real sizes", name, Call(core, settings, inputs, device).result(), want)
    told = {"compared": done, "detections in cases": detections, "left out, for want of time": left_out}
    return told | {"failures": failures[:20], "failed": len(failures)}


def real_sizes(small: bool) -> Iterator[tuple[str, int, Any, str, float]]:
    """Model, batch, type, kind of input and threshold of the large comparisons, the largest batches last."""
    for batch in (1, 2) if small else (1, 2, 7, 32, 128):
        for model, dtype, kind in itertools.product(GRIDS, (np.float16, np.float32), ("scene", "noise")):
            if small and (kind == "noise" or model == "SSD300-COCO"):
                continue
            for threshold in (0.05,) if small or batch > 7 else (0.01, 0.05, 0.5):
                yield model, batch, dtype, kind, threshold


def sanitize(core: Path, reference: Path) -> dict[str, Any]:
    """compute-sanitizer's tools over the small checks, every allocation one of its own."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"not run": "compute-sanitizer is not installed"}
    told: dict[str, Any] = {}
    for name in ("memcheck", "racecheck", "synccheck"):
        command = [tool, "--tool", name, "--error-exitcode", "9"]
        check_only = ["--only", "check", "--small", "--core", str(core), "--reference", str(reference)]
        try:
            run = subprocess.run(
                [*command, sys.executable, __file__, *check_only],
                capture_output=True,
                text=True,
                timeout=SANITIZER_LIMIT,
                check=False,
            )
            summary = [line for line in run.stdout.splitlines() if "SUMMARY" in line or "rror" in line]
            told[name] = f"exit {run.returncode}: {' | '.join(summary[-3:]) or run.stderr[-300:]}"
        except subprocess.TimeoutExpired:
            told[name] = f"not finished after {SANITIZER_LIMIT} s"
    return told


#
# Measurements
#


def time_of(gpu: Gpu, calls: list[Call]) -> tuple[float, float]:
    """Median and smallest microseconds of one call in a graph of all of them."""
    calls[0].result()  # loads the module

    def launch() -> None:
        for call in calls:
            call.launch()

    with gpu.graph(launch) as graph:
        return gpu.timed(graph, len(calls), REPLAYS)


def jobs(quick: bool) -> list[tuple[str, int, Any, float, str]]:
    """Model, batch, type, threshold and kind of input of every row, the most telling ones first."""
    model, dtype, threshold = TARGET
    first = [(model, batch, dtype, threshold, "scene") for batch in (1, 8, 64)]
    first += [(model, batch, dtype, threshold, "noise") for batch in (1, 64)]
    rest = [
        (model, batch, dtype, threshold, "scene")
        for threshold in (0.05, 0.01, 0.5)
        for batch in (1, 64, 8, 32, 128)
        for model, dtype in itertools.product(GRIDS, (np.float16, np.float32))
    ]
    return first if quick else first + [job for job in rest if job not in first]


def measure(core: Any, gpu: Gpu, peer: Peer, quick: bool = False, within: float = math.inf) -> dict[str, Any]:
    """The rows of the table; `quick`: the first few alone; no row is begun `within` seconds after the start."""
    end, left_out = time.monotonic() + within, 0
    bandwidth = gpu.copy_bandwidth()
    rows = []
    for model, batch, dtype, threshold, kind in jobs(quick):
        if time.monotonic() > end:
            left_out += 1
            continue
        settings = Settings(score_threshold=threshold)
        first = scene(model, batch, dtype, 0, kind)
        sets = max(FEWEST_SETS, -(-L2_TIMES * gpu.l2_bytes // (first.deltas.nbytes + first.logits.nbytes)))
        ours = Call(core, settings, first, gpu)
        calls = [ours]
        calls += [
            Call(core, settings, scene(model, batch, dtype, seed, kind), gpu, workspace=ours.workspace)
            for seed in range(1, sets)
        ]
        median, fastest = time_of(gpu, calls)
        total = sum(array.nbytes for array in first.arrays()[:3] if array is not None)
        total += sum(block.nbytes for block in ours.blocks)
        passing = candidates(first, threshold)
        row = {
            "model": model,
            "batch": batch,
            "type": str(np.dtype(dtype)),
            "threshold": threshold,
            "inputs": kind,
            "candidates per image": round(passing, 1),
            "input sets": sets,
            "us": round(median, 2),
            "us, fastest": round(fastest, 2),
            "us, one call alone": round(time_of(gpu, calls[:1])[0], 2),
            "MB": round(total / 1e6, 2),
            "us, bytes floor": round(total / bandwidth * 1e6, 2),
            "times the floor": round(median / (total / bandwidth * 1e6), 2),
        }
        if dtype == np.float16 and threshold == 0.05:
            other = torch_peer.measure(settings, first)
            row["us, torchvision"] = round(other, 1) if isinstance(other, float) else other
        given = [call.inputs for call in calls]
        key = (model, batch, str(np.dtype(dtype)), kind)
        row |= beside(peer.measure(key, given, settings, REPLAYS), median, ours, passing)
        rows.append(row)
        print(json.dumps(row), flush=True)
        del calls, ours, first, given
    return {
        "copy bandwidth, GB/s": round(bandwidth / 1e9),
        "rows": rows,
        "left out, for want of time": left_out,
        "EfficientNMS_TRT": peer.summary(),
    }


def beside(told: dict[str, Any] | str, us: float, ours: Call, passing: float) -> dict[str, Any]:
    """The row's part about EfficientNMS_TRT: its figures and the ratio, or why there are none."""
    if isinstance(told, str):
        return {"us, EfficientNMS_TRT": told}
    details = told | {"detections per image, ours, first set": round(float(ours.read()[0].mean()), 1)}
    if passing > CUT:
        details["cut"] = f"takes {CUT} of {passing:.0f} candidates: not the same work"
    return {
        "us, EfficientNMS_TRT": told["us"],
        "ours / EfficientNMS_TRT": round(us / told["us"], 3),
        "EfficientNMS_TRT": details,
    }


def environment(device: Gpu | Host) -> dict[str, Any]:
    """What the figures are of."""

    def told(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            return "not there"

    got: dict[str, Any] = {"python": platform.python_version(), "numpy": np.__version__}
    got["nvcc"] = told("nvcc", "--version").splitlines()[-1:]
    got["source"] = told("git", "-C", str(SOURCE), "describe", "--always", "--dirty")
    if isinstance(device, Gpu):
        got |= {"gpu": device.facts.as_dict(), "multiprocessors": device.multiprocessors, "l2 bytes": device.l2_bytes}
        query = "driver_version,clocks.sm,clocks.mem,power.limit"
        got["nvidia-smi"] = told("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    return got


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    columns = ["model", "type", "batch", "threshold", "inputs", "candidates per image", "us", "us, one call alone"]
    columns += ["us, bytes floor", "times the floor", "us, torchvision"]
    columns += ["us, EfficientNMS_TRT", "ours / EfficientNMS_TRT"]
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    reasons: list[str] = []

    def cell(value: Any) -> str:
        text, _, reason = str(value).partition(": ")  # a reason stands below the table, once
        if reason and text == "not measured" and reason not in reasons:
            reasons.append(reason)
        return f"{text} ({reasons.index(reason) + 1})" if reason in reasons else str(value)

    lines += [" | ".join(cell(row.get(column, "")) for column in columns) for row in rows]
    notes = [f"({number}) {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*(f"| {line} |" for line in lines), *([""] if notes else []), *notes])


def main(argv: Sequence[str] | None = None, cuda: Cuda | None = None) -> int:
    """See the module.

    Args:
        argv: the arguments; None = the command line's.
        cuda: the calls of CUDA; None = those of cuda-python.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--only", choices=("check", "sanitize", "measure"), help="one part instead of all")
    parser.add_argument("--small", action="store_true", help="few and small checks, for the sanitizer")
    parser.add_argument("--quick", action="store_true", help="measure a few rows only")
    parser.add_argument("--within", type=float, default=math.inf, help="seconds for each of checks and measurements")
    parser.add_argument("--core", type=Path, help="a built libssd_nms_core.so, not to compile it again")
    parser.add_argument("--reference", type=Path, help="a built libssd_nms_reference.so, likewise")
    parser.add_argument("--device", default="cuda", help="cpu: checks alone, for a --core that runs on the CPU")
    arguments = parser.parse_args(argv)
    try:
        device = Gpu(cuda) if arguments.device == "cuda" else Host()
    except Exception as error:  # the project's, whose module is found at run time
        print(error, file=sys.stderr)
        return 2
    parts = [arguments.only] if arguments.only else ["check", "measure", "sanitize"]
    result: dict[str, Any] = {"environment": environment(device)}
    with tempfile.TemporaryDirectory() as folder:
        reference, core = arguments.reference, arguments.core
        if reference is None or core is None:
            built = build(Path(folder), device.facts.compute_capability if isinstance(device, Gpu) else "")
            reference, core = reference or built[0], core or built[1]
        for part in parts:  # what is done is written, whatever comes after
            start = time.perf_counter()
            if part == "check":
                result[part] = check(
                    load(reference), load(core), device, 12 if arguments.small else 400, arguments.within
                )
            elif part == "measure":
                if not isinstance(device, Gpu):
                    print("only a GPU is measured", file=sys.stderr)
                    return 2
                with Peer(Path(folder) / "inputs") as peer:
                    result[part] = measure(load(core), device, peer, arguments.quick, arguments.within)
                print(table(result[part]["rows"]))
            else:
                result[part] = sanitize(core, reference)
            result[part]["seconds"] = round(time.perf_counter() - start, 1)
            if part != "measure":
                print(json.dumps(result[part], indent=1), flush=True)
            if arguments.out:
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result.get("check", {}).get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
