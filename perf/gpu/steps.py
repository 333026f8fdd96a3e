"""The steps of the GPU check, in order of worth. Each is mostly a call of what the project has already.

A step runs in a process of its own (perf/gpu/child.py), so a crash of TensorRT or CUDA costs one step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.contract import precisions_of
from build.errors import SSDError

if TYPE_CHECKING:
    from build.spec import Spec
    from build.tensorrt.plan import Plan

BASE = ("gpu", "numpy", "cuda-python")
BENCH = (*BASE, "core")
PLANS = (*BASE, "tensorrt", "onnx", "onnxruntime", "plugin")
SERVED_PICTURES = 64
TARGETS_MODEL = ("SSD300-COCO", "float16", 0.05, "scene")


class StepError(SSDError):
    """A step came to its end, and what it looked at is not as it should be."""


@dataclass(frozen=True)
class Work:
    """What a step is given.

    Attributes:
        model: a folder of models/.
        folder: where it may write; its repositories are in it, one for each precision.
    """

    model: str
    folder: Path

    def repository(self, precision: str) -> Path:
        """Of the plans of one precision."""
        return self.folder / precision / "repository"


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name, about: for people.
        run: gives what its JSON holds; raises what is wrong.
        needs: of perf/gpu/needs.py.
        wants: the same, without which a part is left out.
        limit: seconds until it is given up.
    """

    name: str
    about: str
    run: Callable[[Work], dict[str, Any]]
    needs: tuple[str, ...]
    wants: tuple[str, ...] = ()
    limit: int = 900


# -- the plugin's core -------------------------------------------------------------------------------------------------


def plugin(work: Work) -> dict[str, Any]:
    """Builds what can be built, for every GPU as it is shipped; without nvcc, takes what was built before."""
    from build.tensorrt import plugins

    if plugins.find_nvcc() is None:
        info = plugins.plugin_info(plugins.PLUGIN) if plugins.PLUGIN.is_file() else None
        return {"built": "before", "missing": [], "plugin": info}
    built = plugins.build_plugins(bring=True)
    if built.stage == "reference":
        raise StepError("nothing for the GPU was built", why="; ".join(built.missing))
    info = plugins.plugin_info(plugins.PLUGIN) if built.stage == "plugin" else None
    return {"built": built.stage, "missing": list(built.missing), "plugin": info}


def bench(work: Work, part: str) -> dict[str, Any]:
    """A part of plugins/bench/bench.py, with the libraries of plugins/lib/.

    Raises:
        StepError: it did not come to its end.
    """
    import subprocess

    from build.tensorrt.plugins import LIB, PLUGINS

    out = work.folder / f"bench-{part}.json"
    out.unlink(missing_ok=True)
    libraries = ["--core", LIB / "libssd_nms_core.so", "--reference", LIB / "libssd_nms_reference.so"]
    command = [sys.executable, PLUGINS / "bench" / "bench.py", "--only", part, "--out", out, *libraries]
    done = subprocess.run([*map(str, command)], stderr=subprocess.PIPE, text=True, check=False)
    if not out.is_file():
        lines = done.stderr.strip().splitlines()[-10:]
        raise StepError(f"bench.py ended with {done.returncode}: " + ("\n".join(lines) or "it gives no reason"))
    told: dict[str, Any] = json.loads(out.read_text())
    return told


def core(work: Work) -> dict[str, Any]:
    """Bits of the kernels against bits of the reference."""
    told = bench(work, "check")
    if told["check"]["failed"]:
        raise StepError(f"{told['check']['failed']} comparisons differ: {'; '.join(told['check']['failures'][:3])}")
    return told


def sanitizers(work: Work) -> dict[str, Any]:
    """memcheck, racecheck and synccheck over the small checks."""
    told = bench(work, "sanitize")
    wrong = [
        f"{tool}: {text}" for tool, text in told["sanitize"].items() if tool.endswith("check") and "exit 0" not in text
    ]
    if wrong or "memcheck" not in told["sanitize"]:
        raise StepError("; ".join(wrong) or str(told["sanitize"]))
    return told


def kernels(work: Work) -> dict[str, Any]:
    """The microbenchmark beside its peers, and what of the targets was met. A target missed is no failure."""
    told = bench(work, "measure")
    told["targets"] = list(targets(told["measure"]["rows"]))
    return told


def targets(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What was aimed at on H100 and H200, and what came out."""
    for row in rows:
        if (row["model"], row["type"], row["threshold"], row["inputs"]) != TARGETS_MODEL:
            continue
        if row["batch"] == 1:
            yield {"target": "batch 1: at most 12 us", "value": row["us"], "met": row["us"] <= 12}
        if row["batch"] == 64:
            times = row["times the floor"]
            yield {"target": "batch 64: at most 2 times the bytes floor", "value": times, "met": times <= 2}
        ratio = row.get("ours / EfficientNMS_TRT")
        if ratio:
            what = f"batch {row['batch']}: at least 3 times as fast as EfficientNMS_TRT"
            yield {"target": what, "value": round(1 / ratio, 2), "met": ratio <= 1 / 3}


# -- plans -------------------------------------------------------------------------------------------------------------


def build_plan(work: Work, precision: str, calibration: str = "explicit") -> dict[str, Any]:
    """A plan, built, put to its gate and published in a repository of its own."""
    from build import pipeline
    from build.gate.accuracy import mean_average_precision
    from build.publish import repository as store

    folder = precision if calibration == "explicit" else f"{precision}-{calibration}"
    pipeline.build_engines(
        [work.model],
        "tensorrt",
        precision,
        repository=work.repository(folder),
        artifacts=work.folder / "artifacts",
        judge=mean_average_precision,
        calibration=calibration,
    )
    _, manifest = store.served(work.repository(folder), work.model)
    return {key: manifest[key] for key in ("version", "runtime", "precision", "engine", "verified") if key in manifest}


@dataclass(frozen=True)
class Published:
    """A plan that a step before has published."""

    precision: str
    spec: Spec
    path: Path
    engine: dict[str, Any]

    def open(self, *, cuda_graphs: bool = False) -> Plan:
        """The plan, ready to run."""
        from build.tensorrt.plan import Plan
        from build.tensorrt.plugins import PLUGIN

        return Plan(self.path, self.engine, plugin=PLUGIN, cuda_graphs=cuda_graphs)

    def feeds(self, work: Work, batch: int) -> dict[str, Any]:
        """Held-out pictures, or what the gate takes in their place."""
        import numpy as np

        from build.gate.verify import images_for

        images, _ = images_for(self.spec, work.folder / "artifacts" / "datasets", batch)
        return dict(self.spec.nms.feeds(np.resize(images, (batch, *images.shape[1:]))))


def published(work: Work) -> Iterator[Published]:
    """Every plan that is there, in the order of contract.PRECISIONS."""
    from build.files import MODELS
    from build.publish import repository as store
    from build.spec import load

    spec = load(MODELS / work.model)
    for precision in (*precisions_of("tensorrt"), "int8-implicit"):
        if (work.repository(precision) / spec.model.name).is_dir():
            folder, manifest = store.served(work.repository(precision), spec.model.name)
            yield Published(precision, spec, folder / store.MODEL_FILE["tensorrt"], manifest["engine"])


def different(got: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """The outputs that differ in a bit."""
    return [name for name in want if got[name].tobytes() != want[name].tobytes()]


def rows(work: Work) -> dict[str, Any]:
    """Every batch size of every plan: a picture has the bits that it has in the largest batch."""
    told: dict[str, Any] = {}
    wrong = []
    for plan in published(work):
        with plan.open() as running:
            feeds = plan.feeds(work, running.max_batch)
            whole = running(feeds)
            told[plan.precision] = {"largest batch": running.max_batch, "differences": []}
            for batch in range(1, running.max_batch):
                got = running({name: array[:batch] for name, array in feeds.items()})
                names = different(got, {name: array[:batch] for name, array in whole.items()})
                if names:
                    told[plan.precision]["differences"].append({"batch": batch, "outputs": names})
                    wrong.append(f"{plan.precision}, batch {batch}: {', '.join(names)}")
    if wrong:
        raise StepError(f"a picture's answer depends on its batch: {'; '.join(wrong[:5])}")
    return told


def graphs(work: Work) -> dict[str, Any]:
    """Runs replayed from a CUDA graph give the bits of runs that are launched one by one."""
    told: dict[str, Any] = {}
    wrong = []
    for plan in published(work):
        with plan.open() as launched, plan.open(cuda_graphs=True) as replayed:
            for batch in sorted({1, min(8, launched.max_batch), launched.max_batch}):
                feeds = plan.feeds(work, batch)
                want = launched(feeds)
                names = sorted({name for _ in range(4) for name in different(replayed(feeds), want)})
                told.setdefault(plan.precision, {})[str(batch)] = names or "the same bits in 4 runs"
                if names:
                    wrong.append(f"{plan.precision}, batch {batch}: {', '.join(names)}")
    if wrong:
        raise StepError(f"a CUDA graph gives something else: {'; '.join(wrong)}")
    return told


def benchmark(work: Work) -> dict[str, Any]:
    """Every plan as trtexec would time it, with and without CUDA graphs."""
    told: dict[str, Any] = {}
    for plan in published(work):
        for cuda_graphs in (False, True):
            with plan.open(cuda_graphs=cuda_graphs) as running:
                for batch in sorted({1, min(8, running.max_batch), running.max_batch}):
                    timing = running.benchmark(plan.feeds(work, batch), seconds=2.0)
                    print(f"{plan.precision}, batch {batch}, CUDA graph: {cuda_graphs}\n{timing}", flush=True)
                    told.setdefault(plan.precision, []).append(timing.as_dict())
    return told


def fusion(work: Work) -> dict[str, Any]:
    """The fusion report from the real engine inspector and profile."""
    from build.reports.fusion import fusion_report

    told: dict[str, Any] = {}
    for plan in published(work):
        if plan.precision == "int8-implicit":
            continue
        repository, artifacts = work.repository(plan.precision), work.folder / "artifacts"
        folder = fusion_report(
            "tensorrt", work.model, plan.precision, artifacts=artifacts, published=repository, runs=30
        )
        told[plan.precision] = json.loads((folder / "report.json").read_text())
        for name in ("layers.json", "profile.json"):
            if (folder.parent / name).is_file():
                told[plan.precision][name] = json.loads((folder.parent / name).read_text())
    return told


def served(work: Work) -> dict[str, Any]:
    """Every plan on a real server: what the client detects in held-out pictures is what the plan gives here."""
    import numpy as np

    from build.gate import datasets
    from build.gate.scoring import detector
    from perf.served_accuracy import serving

    told: dict[str, Any] = {}
    for plan in published(work):
        pictures = datasets.held_out(plan.spec, work.folder / "artifacts" / "datasets").paths[:SERVED_PICTURES]
        with serving(work.repository(plan.precision), plan.spec.model.name) as (_, through_server):
            got = through_server(pictures)
        with plan.open() as running:
            want = detector(plan.spec, running)(pictures)
        wrong = [
            path.name
            for path, a, b in zip(pictures, got, want, strict=True)
            if not np.array_equal(a.classes, b.classes)
            or not np.allclose(a.scores, b.scores, atol=1e-6)
            or not np.allclose(a.boxes, b.boxes, atol=1e-2)
        ]
        detections = sum(len(row.scores) for row in got)
        told[plan.precision] = {"pictures": len(pictures), "detections": detections, "different": wrong}
        if wrong or not detections:
            what = f"{len(wrong)} of {len(pictures)} pictures differ" if wrong else "nothing was detected"
            raise StepError(f"{plan.precision}: {what} between the server and this process")
    return told


def _plan_step(precision: str) -> Step:
    extra = (f"for {precision}",) if precision in ("tf32", "bf16", "int8", "fp8") else ()

    def run(work: Work) -> dict[str, Any]:
        return build_plan(work, precision)

    return Step(
        f"plan-{precision}", f"a plan in {precision} through its gate", run, (*PLANS, "pycocotools", *extra), limit=3600
    )


_ORDER = ("fp32", "fp16", "int8", "tf32", "bf16", "fp8")
RUN = (*BASE, "tensorrt", "plugin", "plan")
STEPS = (
    Step("plugin", "the plugin, built as it is shipped", plugin, ("gpu", "nvcc", "compiler")),
    Step("core", "the kernels' bits against the reference's", core, BENCH),
    Step("sanitizers", "memcheck, racecheck, synccheck", sanitizers, (*BENCH, "compute-sanitizer")),
    Step("kernels", "the microbenchmark, beside its peers", kernels, BENCH, ("tensorrt", "onnx", "torchvision"), 3600),
    *map(_plan_step, _ORDER),
    Step("rows", "a picture's bits in every batch", rows, RUN),
    Step("graphs", "CUDA graphs give the same bits", graphs, RUN),
    Step("benchmark", "times of every plan", benchmark, RUN),
    Step("fusion", "the fusion report of the real inspector", fusion, RUN),
    Step(
        "implicit",
        "INT8 by TensorRT's own calibrator (up to 10)",
        lambda work: build_plan(work, "int8", "implicit"),
        (*PLANS, "pycocotools", "for implicit"),
        limit=3600,
    ),
    Step("served", "every plan on a real server", served, (*RUN, "tritonclient", "pycocotools", "server"), limit=1800),
)
