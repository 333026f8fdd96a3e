"""Checks SSDNMS on this machine's GPU against the reference, then measures it. Needs nvcc, a C++ compiler and torch.

    python plugins/bench/bench.py --out result.json            builds, checks, sanitizes, measures (a few minutes)
    python plugins/bench/bench.py --only check --core build/libssd_nms_core.so

Times are CUDA events around a graph of many calls on different inputs, together larger than the L2 cache; the median of
the replays. Beside each: the bytes of inputs and outputs, once, over the copy bandwidth that this GPU reached; and
EfficientNMS_TRT on the same inputs, where TensorRT is there (efficient_nms.py says what that needs).
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from calls import SOURCE, Call, Inputs, build, load
from efficient_nms import CUT, Peer
from params import Settings
from scenes import GRIDS, adversarial, scene

FEWEST_SETS, L2_TIMES, REPLAYS = 4, 4, 25


#
# Checks
#


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Every NaN is like every other: the CPU's and the GPU's have different bits."""
    equal = a.view(torch.int32) == b.view(torch.int32)
    return bool((equal | (a.isnan() & b.isnan())).all())


def differences(got: list[torch.Tensor], want: list[torch.Tensor]) -> str:
    names = ("number", "boxes", "scores", "labels")
    return ", ".join(name for name, a, b in zip(names, got, want, strict=True) if not same_bits(a, b))


def check(reference: ctypes.CDLL, core: ctypes.CDLL, device: str, count: int) -> dict[str, Any]:
    """Bits of the core against bits of the reference; repeats, rows and graphs against themselves."""
    failures: list[str] = []
    done: dict[str, int] = {"cases": 0, "real sizes": 0, "repeats": 0, "rows": 0, "graph replays": 0}

    def compare(what: str, name: str, got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
        done[what] += 1
        different = differences(got, want)
        if different:
            failures.append(f"{what}: {name}: {different} differ")

    detections = 0
    for index in range(count):
        name, settings, inputs = adversarial(index)
        want = Call(reference, settings, inputs).result()
        detections += int(want[0].sum())
        compare("cases", name, Call(core, settings, inputs.to(device)).result(), want)

    small = count < 100
    batches = (1, 2) if small else (1, 2, 7, 32, 128)
    for model, batch, dtype, kind in itertools.product(
        GRIDS, batches, (torch.float16, torch.float32), ("scene", "noise")
    ):
        if small and (kind == "noise" or model == "SSD300-COCO"):
            continue
        for threshold in (0.05,) if small or batch > 7 else (0.01, 0.05, 0.5):
            settings = Settings(score_threshold=threshold, max_detections=200, topk_per_class=400 if batch == 2 else 0)
            inputs = scene(model, batch, dtype, "cpu", batch, kind)
            want = Call(reference, settings, inputs).result()
            name = f"{model} B={batch} {dtype} {kind} {threshold}"
            compare("real sizes", name, Call(core, settings, inputs.to(device)).result(), want)

    settings = Settings(score_threshold=0.01)
    inputs = scene("SSD-MobileNet", 2 if small else 16, torch.float16, "cpu", 5).to(device)
    first = Call(core, settings, inputs).result()
    for fill in range(3 if small else 20):
        again = Call(core, settings, inputs)
        assert again.workspace is not None
        again.workspace.fill_(fill * 13 % 256)
        compare("repeats", str(fill), again.result(), first)
    for row in range(len(inputs.logits)):
        alone = Call(core, settings, inputs.row(row)).result()
        compare("rows", str(row), alone, [output[row : row + 1] for output in first])

    if device == "cuda":
        static = Call(core, settings, inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static.launch(torch.cuda.current_stream().cuda_stream)
        for seed in range(3 if small else 10):
            fresh = scene("SSD-MobileNet", len(inputs.logits), torch.float16, "cpu", 100 + seed)
            static.inputs.logits.copy_(fresh.logits)
            static.inputs.deltas.copy_(fresh.deltas)
            graph.replay()
            torch.cuda.synchronize()
            got = [output.cpu() for output in static.outputs]
            compare("graph replays", str(seed), got, Call(reference, settings, fresh).result())
    return {"compared": done, "detections in cases": detections, "failures": failures[:20], "failed": len(failures)}


def sanitize(core: Path, reference: Path) -> dict[str, Any]:
    """compute-sanitizer's tools over the small checks, every allocation one of its own."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"not run": "compute-sanitizer is not installed"}
    told: dict[str, Any] = {}
    for name in ("memcheck", "racecheck", "synccheck"):
        command = [tool, "--tool", name, "--error-exitcode", "9"]
        if name != "memcheck":  # torch's own kernels are not what is checked
            command += ["--kernel-regex", "kns=ssd_nms"]
        check_only = ["--only", "check", "--small", "--core", str(core), "--reference", str(reference)]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            run = subprocess.run(
                [*command, sys.executable, __file__, *check_only],
                capture_output=True,
                text=True,
                env=environment,
                timeout=120,
                check=False,
            )
            summary = [line for line in run.stdout.splitlines() if "SUMMARY" in line or "rror" in line]
            told[name] = f"exit {run.returncode}: {' | '.join(summary[-3:]) or run.stderr[-300:]}"
        except subprocess.TimeoutExpired:
            told[name] = "not finished after 120 s"
    return told


#
# Measurements
#


def timed(graph: torch.cuda.CUDAGraph, calls: int) -> tuple[float, float]:
    """Median and smallest microseconds of one call."""
    times = []
    for _ in range(3):
        graph.replay()
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return statistics.median(times), min(times)


def captured(calls: list[Call]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    calls[0].result()  # loads the module
    with torch.cuda.graph(graph):
        for call in calls:
            call.launch(torch.cuda.current_stream().cuda_stream)
    return graph


def copy_bandwidth() -> float:
    """Bytes read and written in a second by a copy of 2 GiB on the device."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    graph = torch.cuda.CUDAGraph()
    target.copy_(source)
    with torch.cuda.graph(graph):
        target.copy_(source)
    return 2 * source.numel() / (timed(graph, 1)[0] * 1e-6)


def torchvision_time(settings: Settings, inputs: Inputs) -> float | str:
    """Microseconds of softmax, decode and torchvision's batched_nms for the same inputs, on the host's clock."""
    try:
        from torchvision.ops import batched_nms
    except Exception as error:
        return f"torchvision cannot be imported: {error}"[:200]

    def run() -> None:
        scores = inputs.logits.float().softmax(-1)[..., 1:]
        d, a = inputs.deltas.float(), inputs.anchors
        centre = d[..., :2] / 10 * a[:, 2:] + a[:, :2]
        size = (d[..., 2:] / 5).exp() * a[:, 2:]
        boxes = torch.cat([centre - size / 2, centre + size / 2], -1).clamp(0, 1)
        for row_scores, row_boxes in zip(scores, boxes, strict=True):
            anchor, label = (row_scores > settings.score_threshold).nonzero(as_tuple=True)
            chosen, score = row_boxes[anchor], row_scores[anchor, label]
            keep = batched_nms(chosen, score, label, settings.iou_threshold)[: settings.max_detections]
            chosen[keep], score[keep], label[keep]

    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[2:])


def measure(core: ctypes.CDLL, peer: Peer) -> dict[str, Any]:
    """All the rows of the table."""
    bandwidth = copy_bandwidth()
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    rows = []
    jobs = [
        (model, batch, dtype, threshold, "scene")
        for model in GRIDS
        for dtype in (torch.float16, torch.float32)
        for batch in (1, 8, 32, 64, 128)
        for threshold in (0.01, 0.05, 0.5)
    ]
    jobs += [("SSD300-COCO", batch, torch.float16, 0.05, "noise") for batch in (1, 64)]
    for model, batch, dtype, threshold, kind in jobs:
        settings = Settings(score_threshold=threshold)
        first = scene(model, batch, dtype, "cuda", 0, kind)
        inputs_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (first.deltas, first.logits))
        sets = max(FEWEST_SETS, -(-L2_TIMES * cache // inputs_bytes))
        ours = Call(core, settings, first)
        calls = [ours]
        calls += [
            Call(core, settings, scene(model, batch, dtype, "cuda", seed, kind), workspace=ours.workspace)
            for seed in range(1, sets)
        ]
        median, fastest = timed(captured(calls), sets)
        outputs_bytes = sum(tensor.numel() * tensor.element_size() for tensor in ours.outputs)
        total = inputs_bytes + outputs_bytes + first.anchors.numel() * 4
        candidates = (first.logits.float().softmax(-1)[..., 1:] > threshold).sum().item() / batch
        row = {
            "model": model,
            "batch": batch,
            "type": str(dtype).removeprefix("torch."),
            "threshold": threshold,
            "inputs": kind,
            "candidates per image": round(candidates, 1),
            "input sets": sets,
            "us": round(median, 2),
            "us, fastest": round(fastest, 2),
            "us, one call alone": round(timed(captured(calls[:1]), 1)[0], 2),
            "MB": round(total / 1e6, 2),
            "us, bytes floor": round(total / bandwidth * 1e6, 2),
            "times the floor": round(median / (total / bandwidth * 1e6), 2),
        }
        if dtype == torch.float16 and threshold == 0.05:
            other = torchvision_time(settings, first)
            row["us, torchvision"] = round(other, 1) if isinstance(other, float) else other
        given = [call.inputs for call in calls]
        row |= beside(peer.measure((model, batch, dtype, kind), given, settings, REPLAYS), median, ours, candidates)
        rows.append(row)
        print(json.dumps(row), flush=True)
        del calls, ours, first, given
    return {
        "copy bandwidth, GB/s": round(bandwidth / 1e9),
        "rows": rows,
        "EfficientNMS_TRT": peer.summary(),
    }


def beside(told: dict[str, Any] | str, us: float, ours: Call, candidates: float) -> dict[str, Any]:
    """The row's part about EfficientNMS_TRT: its figures and the ratio, or why there are none."""
    if isinstance(told, str):
        return {"us, EfficientNMS_TRT": told}
    details = told | {"detections per image, ours, first set": round(float(ours.outputs[0].float().mean()), 1)}
    if candidates > CUT:
        details["cut"] = f"takes {CUT} of {candidates:.0f} candidates: not the same work"
    return {
        "us, EfficientNMS_TRT": told["us"],
        "ours / EfficientNMS_TRT": round(us / told["us"], 3),
        "EfficientNMS_TRT": details,
    }


def environment() -> dict[str, Any]:
    def told(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            return "not there"

    got: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    got["nvcc"] = told("nvcc", "--version").splitlines()[-1:]
    got["source"] = told("git", "-C", str(SOURCE), "describe", "--always", "--dirty")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        got |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
        got["l2 bytes"] = properties.L2_cache_size
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


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--only", choices=("check", "sanitize", "measure"), help="one part instead of all")
    parser.add_argument("--small", action="store_true", help="few and small checks, for the sanitizer")
    parser.add_argument("--core", type=Path, help="a built libssd_nms_core.so, not to compile it again")
    parser.add_argument("--reference", type=Path, help="a built libssd_nms_reference.so, likewise")
    parser.add_argument("--device", default="cuda", help="cpu: checks alone, for a --core that runs on the CPU")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no NVIDIA GPU", file=sys.stderr)
        return 2
    parts = [arguments.only] if arguments.only else ["check", "measure", "sanitize"]
    result: dict[str, Any] = {"environment": environment()}
    with tempfile.TemporaryDirectory() as folder:
        reference, core = arguments.reference, arguments.core
        if reference is None or core is None:
            built = build(Path(folder))
            reference, core = reference or built[0], core or built[1]
        for part in parts:  # what is done is written, whatever comes after
            start = time.perf_counter()
            if part == "check":
                result[part] = check(load(reference), load(core), arguments.device, 12 if arguments.small else 400)
            elif part == "measure":
                with Peer(Path(folder) / "inputs") as peer:
                    result[part] = measure(load(core), peer)
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
