"""`invoke build-engines`: spec → graph → self-check → engine → gate → model repository.

Nothing at all where nothing changed, and nothing published of what fails its gate.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import audit, backend, datasets, engine, graph, implicit, plan, ssd_nms, verify
from build import repository as store
from build.errors import GraphError, OptionError, RuntimeUnavailableError, SpecError, VerifyError
from build.spec import Spec, load

if TYPE_CHECKING:
    import onnx
    from rich.console import Console

RUNTIMES = ("onnxruntime", "tensorrt")
PRECISIONS = {
    "onnxruntime": ("fp32", "fp16", "int8"),  # on a CPU it has no kernels for the others
    "tensorrt": ("fp32", "tf32", "fp16", "bf16", "int8", "fp8"),
}
CALIBRATIONS = ("explicit", "implicit")

_ROOT = Path(__file__).resolve().parent.parent


def build_engines(
    models: Sequence[str] | None = None,
    runtime: str = "auto",
    precision: str = "fp32",
    force: bool = False,
    repository: Path = _ROOT / "model_repository",
    *,
    sources: Path = _ROOT / "models",
    artifacts: Path = _ROOT / "artifacts",
    judge: verify.Judge | None = None,
    calibration: str = "explicit",
    console: Console | None = None,
) -> dict[str, int]:
    """Builds and publishes models; what is published already from the same inputs is left as it is.

    Args:
        models: folders of `sources`; None = all that have a spec.toml.
        runtime: auto, onnxruntime or tensorrt.
        precision: fp32, fp16 or int8; for tensorrt also tf32, bf16 and fp8.
        force: build and publish even where nothing changed.
        repository: where to publish.
        sources: where the models are.
        artifacts: gets <name>/<precision>/model.onnx; beside it what a runtime is given instead: model.plan, or
            onnxruntime.onnx, where the same numbers are typed otherwise to be fast on a CPU.
        judge: mAP of COCO detections for the gate; None = the gate does not look at mAP.
        calibration: explicit (the graph says what is INT8) or, for int8 and TensorRT up to 10, implicit (it does).
        console: where to say what is done; None = standard output.

    Returns:
        The served version of each model.

    Raises:
        SSDError: nothing of the model in question was published; models before it were.
    """
    from rich.console import Console

    say = console or Console(highlight=False, soft_wrap=True)
    runtime, why = choose_runtime(runtime)
    if precision not in PRECISIONS[runtime]:
        known = ", ".join(PRECISIONS[runtime])
        raise OptionError(f"precision is {precision!r}, but this version builds {known} only for {runtime}")
    if calibration not in CALIBRATIONS:
        raise OptionError(f"calibration is {calibration!r}, but must be one of {', '.join(CALIBRATIONS)}")
    if calibration == "implicit" and (runtime, precision) != ("tensorrt", "int8"):
        raise OptionError(
            f"calibration is 'implicit', but this would build {precision} for {runtime}",
            why="only TensorRT calibrates by itself, and only INT8",
            fix="add --runtime tensorrt --precision int8, or leave --calibration implicit out",
        )
    say.print(f"runtime {runtime}: {why}", markup=False)
    return {
        spec.model.name: _build(spec, runtime, precision, calibration, force, repository, artifacts, judge, say)
        for spec in [load(sources / name) for name in _names(models, sources)]
    }


def rollback(model: str, repository: Path = _ROOT / "model_repository") -> int:
    """Serves the version before the current one again.

    Returns:
        That version.

    Raises:
        OptionError: no model was named.
        PublishError: there is no such version, or it is damaged.
    """
    from rich.console import Console

    if not model:
        raise OptionError("--rollback needs to know which model", fix="name it: --model shapes")
    version = store.rollback(repository, model)
    Console(highlight=False, soft_wrap=True).print(f"{model}: version {version} is served again", markup=False)
    return version


def verify_published(
    models: Sequence[str] | None = None,
    repository: Path = _ROOT / "model_repository",
    *,
    sources: Path = _ROOT / "models",
    artifacts: Path = _ROOT / "artifacts",
    judge: verify.Judge | None = None,
    count: int = verify.PICTURES,
    console: Console | None = None,
) -> list[verify.Report]:
    """Puts what is served to its gate again, against the source model as it is now.

    Args:
        models: as for `build_engines`; None = all that have a spec.toml.
        repository, sources, artifacts, judge: likewise.
        count: how many pictures.
        console: where the reports are printed; None = standard output.

    Returns:
        A report for each model; `require` of each raises if something did not hold.

    Raises:
        SSDError: a model is not published, damaged, or cannot run here.
    """
    from rich.console import Console

    say = console or Console(highlight=False, soft_wrap=True)
    reports = []
    for spec in [load(sources / name) for name in _names(models, sources)]:
        folder, manifest = store.served(repository, spec.model.name)
        runtime, precision = manifest["runtime"], manifest["precision"]
        calibration = manifest.get("calibration", {}).get("way", "explicit")
        reference = _typed(spec, runtime, precision, calibration, artifacts)
        built, facts = folder / store.MODEL_FILE[runtime], manifest.get("engine")
        report = _gate(spec, runtime, precision, reference, built, facts, artifacts, judge, count)
        say.print(str(report), markup=False)
        reports.append(report)
    return reports


def benchmark_published(
    model: str,
    repository: Path = _ROOT / "model_repository",
    *,
    batch: int = 1,
    seconds: float = 3.0,
    cuda_graphs: bool = False,
    dump_profile: bool = False,
    sources: Path = _ROOT / "models",
    artifacts: Path = _ROOT / "artifacts",
    console: Console | None = None,
) -> Path:
    """Times the published plan on held-out pictures as trtexec would: throughput, latency, compute, copies, enqueue.

    Args:
        model, repository, sources, artifacts, console: as for `verify_published`.
        batch: pictures in a run.
        seconds: how long.
        cuda_graphs: whether runs are replayed from a CUDA graph.
        dump_profile: whether to print and write each layer's time, and the engine inspector's layers, too.

    Returns:
        `<artifacts>/<model>/<precision>/benchmark.json`; `profile.json` and `layers.json` lie beside it.

    Raises:
        OptionError: the published model is no plan.
        SSDError: it cannot run here.
    """
    import json

    import numpy as np
    from rich.console import Console

    say = console or Console(highlight=False, soft_wrap=True)
    spec = load(sources / _names([model], sources)[0])
    folder, manifest = store.served(repository, spec.model.name)
    if manifest["runtime"] != "tensorrt":
        raise OptionError(
            f"{spec.model.name} is published for {manifest['runtime']}, but only a plan can be timed like this",
            fix="publish a plan: invoke build-engines --runtime tensorrt; for the CPU there is invoke audit --speed",
        )
    if not 1 <= batch <= spec.serving.max_batch_size:
        raise OptionError(f"batch is {batch}, but {spec.model.name} takes 1 to {spec.serving.max_batch_size}")
    images, _ = verify.images_for(spec, artifacts / "datasets", batch)
    inputs = verify.feeds(spec, np.resize(images, (batch, *images.shape[1:])))
    written: dict[str, Any] = {}
    plan_file = folder / store.MODEL_FILE["tensorrt"]
    with plan.Plan(plan_file, manifest["engine"], plugin=engine.PLUGIN, cuda_graphs=cuda_graphs) as running:
        timing = running.benchmark(inputs, seconds=seconds)
        say.print(str(timing), markup=False)
        written["benchmark.json"] = {**timing.as_dict(), "engine": manifest["engine"]}
        if dump_profile:
            rows = running.layer_times(inputs)
            for row in rows[1:]:
                say.print(f"{row['medianMs']:9.4f} ms {row['percentage']:5.1f} %  {row['name']}", markup=False)
            written |= {"profile.json": rows, "layers.json": running.layers()}
    target: Path = artifacts / spec.model.name / manifest["precision"]
    with store.explained(target):
        target.mkdir(parents=True, exist_ok=True)
        for name, value in written.items():
            (target / name).write_text(json.dumps(value, indent=2) + "\n")
    say.print(f"written: {', '.join(str(_relative(target / name)) for name in written)}", markup=False)
    return target / "benchmark.json"


def _typed(spec: Spec, runtime: str, precision: str, calibration: str, artifacts: Path) -> onnx.ModelProto:
    """The graph that a runtime gets in a precision: FP32 from its source, any other as it was built.

    Raises:
        OptionError: it was not built here.
    """
    import onnx

    if precision in audit.UNTYPED or calibration == "implicit":
        return graph.attach(spec)
    path = _artifact(spec, runtime, precision, calibration, artifacts)
    if not path.is_file():
        raise OptionError(f"{path}: the graph to compare with is not there", fix="build it: ./invoke build-engines")
    return onnx.load(path)


def _artifact(spec: Spec, runtime: str, precision: str, calibration: str, artifacts: Path) -> Path:
    """The ONNX file that a runtime gets; an FP32 graph to be calibrated by TensorRT has a folder of its own."""
    special = (runtime, precision) == ("onnxruntime", "int8")
    folder = f"{precision}-implicit" if calibration == "implicit" else precision
    return artifacts / spec.model.name / folder / ("onnxruntime.onnx" if special else "model.onnx")


def _gate(
    spec: Spec,
    runtime: str,
    precision: str,
    model: onnx.ModelProto,
    built: Path,
    facts: Mapping[str, Any] | None,
    artifacts: Path,
    judge: verify.Judge | None,
    count: int,
) -> verify.Report:
    """The report on a built file: a plan on this machine's GPU, or an ONNX file in ONNX Runtime."""
    import onnx

    what = f"{spec.model.name} ({precision}, {runtime})"
    within, cache = verify.tolerance(runtime, precision), artifacts / "datasets"
    baseline = None if precision in audit.UNTYPED else graph.attach(spec)
    if facts is None:
        candidate = verify.onnxruntime_runner(onnx.load(built))
        return verify.gate(
            spec, what, candidate, model, within, baseline=baseline, judge=judge, cache=cache, count=count
        )
    with plan.Plan(built, facts, plugin=engine.PLUGIN) as running:
        return verify.gate(
            spec,
            what,
            running,
            model,
            within,
            baseline=baseline,
            judge=judge,
            cache=cache,
            count=max(count, running.max_batch),
            max_batch=running.max_batch,
        )


def choose_runtime(runtime: str) -> tuple[str, str]:
    """The runtime to build for, and why.

    Raises:
        OptionError: no runtime has this name.
        RuntimeUnavailableError: tensorrt was asked for and cannot be used; says all that is missing.
    """
    if runtime not in ("auto", *RUNTIMES):
        raise OptionError(f"runtime is {runtime!r}, but must be one of auto, {', '.join(RUNTIMES)}")
    if runtime == "onnxruntime":
        return runtime, "asked for"
    missing = []
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        missing.append("an NVIDIA GPU (no /dev/nvidia0)")
    if importlib.util.find_spec("tensorrt") is None:
        missing.append("the Python package tensorrt")
    if importlib.util.find_spec("cuda") is None:
        missing.append("the Python package cuda-python")
    if not engine.PLUGIN.is_file():
        missing.append(f"{_relative(engine.PLUGIN)} (./invoke build-plugins)")
    if not missing:
        return "tensorrt", "a GPU, TensorRT and the plugin are here"
    if runtime == "auto":
        return "onnxruntime", f"tensorrt would need {'; '.join(missing)}"
    raise RuntimeUnavailableError(
        f"the runtime tensorrt cannot be used; missing: {'; '.join(missing)}",
        fix="build for the CPU: invoke build-engines --runtime onnxruntime",
    )


def self_check(model: onnx.ModelProto, spec: Spec) -> None:
    """Runs the graph in ONNX Runtime: heads and outputs have the contract's shapes, types and values in range.

    Raises:
        GraphError: it does not run, or answers something else.
    """
    import numpy as np
    import onnxruntime

    rows, most = 2, spec.nms.max_detections
    size = (rows, spec.input.height, spec.input.width, 3)
    feeds = {graph.IMAGES: np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)}

    def run(part: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(
                part.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            names = [output.name for output in session.get_outputs()]
            return dict(zip(names, session.run(names, inputs), strict=True))
        except Exception as error:  # ONNX Runtime's own exceptions have no common type
            raise GraphError(f"{spec.onnx_path}: ONNX Runtime cannot run it: {error}") from error

    anchors = len(spec.load_anchors())
    heads = run(graph.before_nms(model), feeds)
    for name, last in zip(graph.HEADS, (4, spec.classes), strict=True):
        found, wanted_shape = heads[name].shape, (rows, anchors, last)
        if found != wanted_shape:
            raise GraphError(
                f"{spec.onnx_path}: {name} has the shape {list(found)}, but must have {list(wanted_shape)}",
                why="anchors.npy or labels.txt belong to another model",
            )
    if spec.nms.runtime_thresholds:
        feeds |= {name: np.full((rows, 1), getattr(spec.nms, name), np.float32) for name in ssd_nms.THRESHOLDS}
    number, boxes, scores, classes = run(model, feeds).values()
    wanted = [((rows, 1), "int32"), ((rows, most, 4), "float32"), ((rows, most), "float32"), ((rows, most), "int32")]
    for name, array, (shape, kind) in zip(ssd_nms.OUTPUTS, (number, boxes, scores, classes), wanted, strict=True):
        if array.shape != shape or array.dtype != kind:
            raise GraphError(f"{spec.onnx_path}: {name} is {array.dtype}{list(array.shape)}, not {kind}{list(shape)}")
    if number.max() > most or classes.max() >= len(spec.labels) or (np.diff(scores, axis=1) > 0).any():
        raise GraphError(f"{spec.onnx_path}: its detections are not in order, or more or other ones than there can be")


def _build(
    spec: Spec,
    runtime: str,
    precision: str,
    calibration: str,
    force: bool,
    target: Path,
    artifacts: Path,
    judge: verify.Judge | None,
    say: Console,
) -> int:
    name = spec.model.name
    artifact = _artifact(spec, runtime, precision, calibration, artifacts)
    implicitly = calibration == "implicit"
    if implicitly:
        _require_implicit(spec, artifacts, judge)
    here = engine.target() if runtime == "tensorrt" else None
    manifest = None if force else store.fresh_manifest(spec, target, precision, runtime, here, calibration)
    if manifest and artifact.is_file():
        digest = hashlib.sha256(artifact.read_bytes()).hexdigest()
        if (manifest["engine"]["onnx_sha256"] if here else manifest["files"]["model.onnx"]) == digest:
            version: int = manifest["version"]
            say.print(f"{name}: nothing changed, version {version} stays ({precision}, {runtime})", markup=False)
            return version
    chosen = audit.approved(spec, "fp32" if implicitly else precision, artifacts, say)  # the gate judges the plan
    model = chosen.runs if artifact.name == "onnxruntime.onnx" else chosen.graph
    self_check(chosen.runs, spec)
    with store.explained(artifact):
        artifact.parent.mkdir(parents=True, exist_ok=True)
        for path, written in {artifact.with_name("model.onnx"): chosen.graph, artifact: model}.items():
            unfinished = path.with_suffix(".new")
            unfinished.write_bytes(written.SerializeToString(deterministic=True))
            unfinished.replace(path)
    say.print(
        f"{name}: built {_relative(artifact)} ({artifact.stat().st_size / 1e6:.1f} MB), runs as its spec says",
        markup=False,
    )
    built, facts = artifact, dict[str, Any]()
    if here:
        built = artifact.with_name("model.plan")
        made = engine.build(spec, model, precision, built, calibration=artifacts if implicitly else None, console=say)
        facts = {"target": here, "engine": made}
        say.print(
            f"{name}: built {_relative(built)} ({built.stat().st_size / 1e6:.1f} MB) for {here['gpu']} "
            f"with TensorRT {here['tensorrt']} in {facts['engine']['build_seconds']:.0f} s",
            markup=False,
        )
    count = spec.data.held_out_count if implicitly else verify.PICTURES  # no graph was audited before on all of them
    report = _gate(spec, runtime, precision, model, built, facts.get("engine"), artifacts, judge, count)
    say.print(str(report.require()), markup=False)
    facts["verified"] = report.as_dict()
    version = store.publish(spec, built, target, precision, runtime, facts, calibration)
    serving = store.recipe(spec, precision, runtime)["serving"]
    say.print(
        f"{name}: published version {version} to {_relative(target / name)} "
        f"({precision}, {runtime}, instances x threads: {serving['instances']} x {serving['threads']})",
        markup=False,
    )
    if not here:
        server = backend.choose(spec.serving.backend)
        say.print(f"{name}: served by Triton's backend {server.name}: {server.why}", markup=False)
        if server.name == backend.PYTHON and spec.serving.backend == "auto":
            say.print(f"{name}: {backend.SLOWER}", markup=False)
    return version


def _require_implicit(spec: Spec, artifacts: Path, judge: verify.Judge | None) -> None:
    """That TensorRT calibrates by itself, and that what it makes of it can be judged.

    Raises:
        RuntimeUnavailableError: this TensorRT does not.
        DataError: there are no labelled held-out pictures.
        VerifyError: nobody measures mAP.
    """
    implicit.base_class(implicit.method_of(spec))
    datasets.held_out(spec, artifacts / "datasets")
    if judge is None:
        raise VerifyError(
            f"{spec.model.name}: implicit calibration is judged by mAP, and nothing measures it here",
            fix="give build_engines a judge, as invoke build-engines does",
        )


def _names(models: Sequence[str] | None, sources: Path) -> list[str]:
    known = sorted(path.parent.name for path in sources.glob("*/spec.toml"))
    if not known:
        raise SpecError(f"{sources}: no model has a spec.toml there", fix="add one (docs/spec.md)")
    for name in models or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise SpecError(f"{sources}: has no model {name!r}", fix=f"{hint}there are {', '.join(known)}")
    return list(models or known)


def _relative(path: Path) -> Path:
    return path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path
