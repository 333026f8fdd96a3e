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
import functools
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from efficient_nms import CUT, Peer

SOURCE = Path(__file__).resolve().parent.parent / "ssd_nms"
HOST_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-shared"]
FEWEST_SETS, L2_TIMES, REPLAYS = 4, 4, 25


@dataclass(frozen=True)
class Settings:
    """SsdNmsParams, in its order."""

    score_threshold: float = 0.05
    iou_threshold: float = 0.45
    max_detections: int = 100
    topk_per_class: int = 0
    background_class: int = 0
    score_activation: int = 0
    box_coding: int = 0
    box_scales: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    clip_boxes: int = 1
    class_agnostic: int = 0


class Params(ctypes.Structure):
    """SsdNmsParams."""

    _fields_ = (
        ("score_threshold", ctypes.c_float),
        ("iou_threshold", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("max_detections", "topk_per_class", "background_class")),
        *((name, ctypes.c_int32) for name in ("score_activation", "box_coding")),
        ("box_scales", ctypes.c_float * 4),
        *((name, ctypes.c_int32) for name in ("clip_boxes", "class_agnostic")),
    )


@dataclass
class Inputs:
    """Tensors of one call."""

    deltas: torch.Tensor
    logits: torch.Tensor
    anchors: torch.Tensor
    score_thresholds: torch.Tensor | None = None
    iou_thresholds: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor | None]:
        return [self.deltas, self.logits, self.anchors, self.score_thresholds, self.iou_thresholds]

    def to(self, device: str) -> Inputs:
        return Inputs(*(None if tensor is None else tensor.to(device) for tensor in self.tensors()))  # type: ignore[arg-type]

    def row(self, index: int) -> Inputs:
        rows = [None if t is None else t[index : index + 1].clone() for t in self.tensors()]
        rows[2] = self.anchors
        return Inputs(*rows)  # type: ignore[arg-type]


@dataclass
class Call:
    """One library, settings and inputs, with outputs and workspace of their own."""

    library: ctypes.CDLL
    settings: Settings
    inputs: Inputs
    workspace: torch.Tensor | None = None
    outputs: tuple[torch.Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        inputs, settings = self.inputs, self.settings
        batch, anchors, classes = inputs.logits.shape
        flags = [
            inputs.deltas.dtype == torch.float16,
            inputs.logits.dtype == torch.float16,
            inputs.score_thresholds is not None,
            inputs.iou_thresholds is not None,
        ]
        values = {**settings.__dict__, "box_scales": (ctypes.c_float * 4)(*settings.box_scales)}
        self.params = Params(**values)
        self.shape = (ctypes.c_int32 * 7)(batch, anchors, classes, *map(int, flags))
        most, device = settings.max_detections, inputs.logits.device
        self.outputs = (
            torch.full((batch, 1), -7, dtype=torch.int32, device=device),
            torch.full((batch, most, 4), -7.0, device=device),
            torch.full((batch, most), -7.0, device=device),
            torch.full((batch, most), -7, dtype=torch.int32, device=device),
        )
        size = self.library.ssdNmsWorkspaceSize(ctypes.byref(self.params), self.shape)
        if self.workspace is None:
            self.workspace = torch.full((max(size, 16),), 0xA5, dtype=torch.uint8, device=device)
        pointers = [None if t is None else t.data_ptr() for t in (*inputs.tensors(), *self.outputs)]
        self.tensors = (ctypes.c_void_p * 9)(*pointers)

    def launch(self, stream: int = 0) -> None:
        """Enqueues it."""
        assert self.workspace is not None
        status = self.library.ssdNmsLaunch(
            ctypes.byref(self.params),
            self.shape,
            self.tensors,
            ctypes.c_void_p(self.workspace.data_ptr()),
            ctypes.c_size_t(self.workspace.numel()),
            ctypes.c_void_p(stream),
        )
        if status != 0:
            raise RuntimeError(f"ssdNmsLaunch: {self.library.ssdNmsStatusString(status).decode()}")

    def result(self) -> list[torch.Tensor]:
        """Launches, waits, and gives the outputs on the CPU."""
        cuda = self.inputs.logits.is_cuda
        self.launch(torch.cuda.current_stream().cuda_stream if cuda else 0)
        if cuda:
            torch.cuda.synchronize()
        return [output.cpu().clone() for output in self.outputs]


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.ssdNmsStatusString.restype = ctypes.c_char_p
    library.ssdNmsWorkspaceSize.restype = ctypes.c_size_t
    return library


def build(folder: Path) -> tuple[Path, Path]:
    """Compiles reference and core as plugins/CMakeLists.txt does, the core for this GPU."""
    reference, core = folder / "libssd_nms_reference.so", folder / "libssd_nms_core.so"
    checks = str(SOURCE / "checks.cpp")
    compiler = os.environ.get("CXX", "c++")
    subprocess.run(
        [compiler, *HOST_FLAGS, checks, str(SOURCE / "reference" / "reference.cpp"), "-o", str(reference)], check=True
    )
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        flags = ["-std=c++17", "-O3", "-fmad=false", f"-arch=sm_{major}{minor}", "-lineinfo", "-shared"]
        host = "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off"
        subprocess.run([nvcc, *flags, host, checks, str(SOURCE / "kernels.cu"), "-o", str(core)], check=True)
    return reference, core


#
# Inputs
#

GRIDS = {
    "SSD300-COCO": ((38, 4), (19, 6), (10, 6), (5, 6), (3, 4), (1, 4)),
    "SSD-MobileNet": ((19, 3), (10, 6), (5, 6), (3, 6), (2, 6), (1, 6)),
}
CLASSES = {"SSD300-COCO": 81, "SSD-MobileNet": 91}


@functools.cache
def grid_anchors(model: str, device: str) -> torch.Tensor:
    """FP32 [N,4]: centres on the grids of the model's feature maps, sizes and shapes as SSD has them."""
    rows = []
    for level, (cells, count) in enumerate(GRIDS[model]):
        size = 0.1 + 0.8 * level / (len(GRIDS[model]) - 1)
        for y, x, k in itertools.product(range(cells), range(cells), range(count)):
            ratio = (1.0, 2.0, 0.5, 3.0, 1 / 3, 1.0)[k]
            scale = size * (1.15 if k == 5 else 1.0)
            rows.append(((x + 0.5) / cells, (y + 0.5) / cells, scale * ratio**0.5, scale / ratio**0.5))
    return torch.tensor(rows, device=device)


def scene(model: str, batch: int, dtype: torch.dtype, device: str, seed: int, kind: str = "scene") -> Inputs:
    """What a trained detector gives for images with eight objects; `noise`: what an untrained one gives."""
    random = torch.Generator(device).manual_seed(seed)
    anchors, classes = grid_anchors(model, device), CLASSES[model]
    count = len(anchors)
    logits = torch.randn(batch, count, classes, generator=random, device=device)
    deltas = torch.randn(batch, count, 4, generator=random, device=device)
    if kind == "scene":
        logits, deltas = logits * 0.7, deltas * 0.5
        logits[..., 0] += 8
        centre = torch.rand(batch, 8, 2, generator=random, device=device) * 0.6 + 0.2
        size = torch.rand(batch, 8, 2, generator=random, device=device) * 0.4 + 0.1
        labels = torch.randint(1, classes, (batch, 8), generator=random, device=device)
        low, high = anchors[:, :2] - anchors[:, 2:] / 2, anchors[:, :2] + anchors[:, 2:] / 2
        for index in range(8):
            c, s = centre[:, None, index], size[:, None, index]
            overlap = (torch.minimum(high, c + s / 2) - torch.maximum(low, c - s / 2)).clamp(min=0).prod(-1)
            iou = overlap / (anchors[:, 2:].prod(-1) + s.prod(-1) - overlap)
            near = ((iou - 0.35) / 0.3).clamp(0, 1)
            logits[..., 0] -= 7 * near
            logits.scatter_add_(2, labels[:, index, None, None].expand(batch, count, 1), (6 * near)[..., None])
            target = torch.cat([(c - anchors[:, :2]) / anchors[:, 2:] * 10, (s / anchors[:, 2:]).log() * 5], -1)
            deltas = torch.where(near[..., None] > 0, target + deltas, deltas)
    return Inputs(deltas.to(dtype).contiguous(), logits.to(dtype).contiguous(), anchors)


def adversarial(index: int) -> tuple[str, Settings, Inputs]:
    """One of many small cases: sizes, types, settings and peculiarities at random."""
    random = torch.Generator().manual_seed(index)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=random))]

    kind = ("random", "background", "ties", "equal", "narrow", "not finite", "one box")[index % 7]
    batch, count, classes = pick(1, 2, 3, 8, 128), pick(1, 63, 64, 65, 300, 900), pick(2, 3, 21, 81, 91, 400)
    if batch * count * classes > 2_000_000:
        batch = 2
    activation = pick(0, 0, 1, 2)
    dtype = pick(torch.float16, torch.float32)
    settings = Settings(
        score_threshold=pick(0.0, 0.01, 0.05, 0.3, 0.5),
        iou_threshold=pick(0.0, 0.3, 0.45, 0.7, 1.0),
        max_detections=pick(1, 10, 100, 200, 512, 513, 3000),
        topk_per_class=pick(0, 0, 1, 40, 400),
        background_class=pick(-1, 0, 0, classes - 1),
        score_activation=activation,
        box_coding=pick(0, 1),
        box_scales=pick((10.0, 10.0, 5.0, 5.0), (3.0, 1.0, 7.0, 1.3)),
        clip_boxes=pick(0, 1),
        class_agnostic=pick(0, 0, 1),
    )
    logits = torch.randn(batch, count, classes, generator=random) * 2
    deltas = torch.randn(batch, count, 4, generator=random)
    anchors = torch.cat(
        [torch.rand(count, 2, generator=random), torch.rand(count, 2, generator=random) * 0.3 + 0.05], 1
    )
    if kind == "background":
        logits[..., max(settings.background_class, 0)] += 6
    elif kind == "ties":
        logits = (logits * 0.2).round()
    elif kind == "equal":
        logits[:] = 0.5
    elif kind == "narrow":
        logits = 0.5 + logits * 1e-6
    elif kind == "not finite":
        strange = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e38, -1e38])
        for tensor in (logits, deltas):
            hit = torch.rand(tensor.shape, generator=random) < 0.02
            tensor[hit] = strange[torch.randint(5, (int(hit.sum()),), generator=random)]
    elif kind == "one box":
        deltas[:], anchors[:] = 0, anchors[0].clone()
    inputs = Inputs(deltas.to(dtype), logits.to(pick(dtype, dtype, torch.float32)), anchors)
    if pick(False, True):
        inputs.score_thresholds = torch.rand(batch, 1, generator=random)
    if pick(False, True):
        inputs.iou_thresholds = torch.rand(batch, 1, generator=random)
    return f"{index} {kind} B={batch} N={count} C={classes} {dtype}", settings, inputs


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
        one = Call(core, settings, first)
        calls = [one]
        calls += [
            Call(core, settings, scene(model, batch, dtype, "cuda", seed, kind), workspace=one.workspace)
            for seed in range(1, sets)
        ]
        median, fastest = timed(captured(calls), sets)
        outputs_bytes = sum(tensor.numel() * tensor.element_size() for tensor in one.outputs)
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
        row |= beside(peer.measure((model, batch, dtype, kind), given, settings, REPLAYS), median, one, candidates)
        rows.append(row)
        print(json.dumps(row), flush=True)
        del calls, one, first, given
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
