"""Tasks that measure what is served, and what waits for a GPU."""

from __future__ import annotations

from pathlib import Path

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task

from .common import ARTIFACTS, REPOSITORY, explained, given, given_or_name, path_of


@task(
    help={
        "quick": "a rough look in about a minute",
        "model": "folder of models/",
        "precision": "one or several, with commas (default: fp32 and int8; quick: fp32)",
        "slo": "search the highest rate whose p99 stays within so many ms",
        "images": "folder of pictures to send (default: the model's held-out ones)",
        "resume": "folder of a run to go on with, also one of mlperf: measures what is missing or was not VALID",
        "compare": "two runs, with a comma: is the second faster?",
        "publish_figures": "write the newest runs' figures into README.md and docs/perf.md",
    }
)
@explained
def perf(
    c: Context,
    quick: bool = False,
    model: str = "shapes",
    precision: str = "",
    slo: float = 0.0,
    images: str = "",
    resume: str = "",
    compare: str = "",
    publish_figures: bool = False,
) -> None:
    """Load the served model, check its answers, set it against the same model in process; writes artifacts/perf/."""
    from perf.compare import compare_runs
    from perf.run import perf as run
    from perf.settings import Settings

    if publish_figures:
        from perf.figures import publish

        print("\n".join(publish(ARTIFACTS)))
        return
    if compare:
        compare_runs([given_or_name(run) for run in compare.split(",")], ARTIFACTS)
        return
    precisions = tuple(precision.split(",")) if precision else (("fp32",) if quick else ("fp32", "int8"))
    settings = Settings(model, precisions, quick, slo, given(images))
    run(settings, resume=Path(given_or_name(resume)) if resume else None, artifacts=ARTIFACTS)


@task(
    help={
        "model": "one or several folders of models/, with commas",
        "precision": "one or several, with commas",
        "engine": "one or several, with commas",
        "clients": "that send requests at once, with shared memory",
        "rounds": "how often each is measured; the medians count",
        "seconds": "of each measurement",
    }
)
@explained
def perf_engines(
    c: Context,
    model: str = "shapes",
    precision: str = "fp32,bf16,int8",
    engine: str = "onnxruntime,openvino",
    clients: int = 4,
    rounds: int = 5,
    seconds: float = 1.5,
) -> None:
    """Time models, precisions and engines of the CPU side by side, served and in process; writes JSON."""
    from perf.engines import side_by_side

    side_by_side(
        model.split(","),
        precisions=precision.split(","),
        engines=engine.split(","),
        clients=clients,
        rounds=rounds,
        seconds=seconds,
        artifacts=ARTIFACTS,
    )


@task(
    help={
        "scenario": "single-stream, multi-stream, server, offline or all",
        "seconds": "of each run of LoadGen, at least (the rules ask for 600)",
        "accuracy": "LoadGen's accuracy mode, too: mAP, and the same answers in both modes",
        "find_peak": "search the highest rate of the server scenario",
        "model": "folder of models/",
        "precision": "one or several, with commas",
        "images": "folder of pictures to send (default: the model's held-out ones)",
        "transport": "how pictures reach the server: shm (shared memory), grpc or http",
    }
)
@explained
def mlperf(
    c: Context,
    scenario: str = "all",
    seconds: float = 20.0,
    accuracy: bool = False,
    find_peak: bool = False,
    model: str = "shapes",
    precision: str = "fp32",
    transport: str = "shm",
    images: str = "",
) -> None:
    """Drive the served model with MLPerf's LoadGen and check every answer; unofficial; writes artifacts/mlperf/."""
    from perf.mlperf.runs import SCENARIOS
    from perf.run import perf as run
    from perf.settings import Settings

    scenarios = tuple(SCENARIOS) if scenario == "all" else (scenario,)
    how = {"seconds": seconds, "accuracy": accuracy, "find_peak": find_peak, "transport": transport}
    settings = Settings(model, tuple(precision.split(",")), images=given(images), scenarios=scenarios, **how)  # type: ignore[arg-type]
    run(settings, artifacts=ARTIFACTS)


@task(
    help={
        "model": "the published model; it must be a plan",
        "batch": "pictures in a run",
        "seconds": "how long to measure",
        "cuda_graphs": "replay the runs from a CUDA graph",
        "dump_profile": "each layer's time and the engine inspector's layers, too",
    }
)
@explained
def benchmark(
    c: Context,
    model: str = "shapes",
    batch: int = 1,
    seconds: float = 3.0,
    cuda_graphs: bool = False,
    dump_profile: bool = False,
) -> None:
    """Time a published TensorRT plan as trtexec would, on real pictures; writes JSON (needs an NVIDIA GPU)."""
    from build.pipeline import benchmark_published

    benchmark_published(
        model,
        REPOSITORY,
        batch=batch,
        seconds=seconds,
        cuda_graphs=cuda_graphs,
        dump_profile=dump_profile,
        artifacts=ARTIFACTS,
    )


@task(
    help={
        "model": "folder of models/",
        "only": "steps to run, with commas (default: all; the table names them)",
        "site": "a folder of packages for this Python, read-only or not, for machines that reach no package index",
        "force": "run again what passed before",
    }
)
@explained
def gpu_check(c: Context, model: str = "shapes", only: str = "", site: str = "", force: bool = False) -> None:
    """All that waits for an NVIDIA GPU, step by step; says what is missing; writes perf/results/gpu/."""
    from perf.gpu.check import gpu_check as run

    steps = tuple(filter(None, only.split(",")))
    if run(model=model, only=steps, site=path_of(site), force=force, artifacts=ARTIFACTS):
        raise Exit("error: a step failed (see above)", code=1)
