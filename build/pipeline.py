"""`invoke build-engines`: spec → graph → self-check → engine → gate → model repository.

A model whose inputs are unchanged is skipped. What fails its gate is not published.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import checks, contract, files, rehearsal
from build.contract import Target
from build.errors import OptionError, PublishError, RuntimeUnavailableError, SpecError, VerifyError
from build.files import ARTIFACTS, MODELS, REPOSITORY, relative
from build.gate import datasets, verify
from build.gate.self_check import self_check
from build.graph.attach import attach, before_nms
from build.graph.precision import runnable
from build.publish import backend, engines, openvino, picture
from build.publish import repository as store
from build.publish.config import instances_and_threads
from build.quantization import audit, implicit
from build.session import runner
from build.spec import Spec, load
from build.tensorrt import engine, plan
from build.tensorrt.plugins import PLUGIN

if TYPE_CHECKING:
    import onnx
    from rich.console import Console


def build_engines(
    models: Sequence[str] | None = None,
    runtime: str = "auto",
    precision: str = contract.BASELINE,
    force: bool = False,
    repository: Path = REPOSITORY,
    *,
    sources: Path = MODELS,
    artifacts: Path = ARTIFACTS,
    judge: verify.Judge | None = None,
    calibration: str = "explicit",
    rehearse: bool = True,
    serving_engine: str = "",
    console: Console | None = None,
) -> dict[str, int]:
    """Builds and publishes models; what is published already from the same inputs is left as it is.

    Args:
        models: folders of `sources`; None = all that have a spec.toml.
        runtime: auto, or of contract.RUNTIMES.
        precision: of contract.PRECISIONS, as far as the runtime has it.
        force: build and publish even where nothing changed.
        repository: where to publish.
        sources: where the models are.
        artifacts: gets <name>/<precision>/model.onnx; beside it what a runtime is given instead: model.plan, or
            onnxruntime.onnx, where the same numbers are typed otherwise to be fast on a CPU.
        judge: mAP of COCO detections for the gate; None = the gate does not look at mAP.
        calibration: explicit (the graph says what is INT8) or, for int8 and TensorRT up to 10, implicit (it does).
        rehearse: whether a real server has to answer with the files before they are published (a second each), and
            whether the engine of [serving] engine = "auto" is chosen on one.
        serving_engine: in place of each spec's [serving] engine; empty = as the spec says.
        console: where to print what is done; None = standard output.

    Returns:
        The served version of each model.

    Raises:
        SSDError: nothing of the model in question was published; models before it were.
    """
    show = _console(console)
    runtime, why = choose_runtime(runtime)
    target = Target(runtime, precision, calibration)
    show.print(f"runtime {runtime}: {why}", markup=False)
    specs = [load(sources / name) for name in _names(models, sources)]
    if serving_engine:
        specs = [replace(spec, serving=replace(spec.serving, engine=serving_engine)) for spec in specs]
    return {
        spec.model.name: _build(spec, target, force, repository, artifacts, judge, rehearse, show) for spec in specs
    }


def rollback(model: str, repository: Path = REPOSITORY) -> int:
    """Serves the version before the current one again.

    Returns:
        That version.

    Raises:
        OptionError: no model was named.
        PublishError: there is no such version, or it is damaged.
    """
    if not model:
        raise OptionError("--rollback needs to know which model", fix="name it: --model shapes")
    version = store.rollback(repository, model)
    picture.serve(repository, model, version)
    _console().print(f"{model}: version {version} is served again", markup=False)
    return version


def verify_published(
    models: Sequence[str] | None = None,
    repository: Path = REPOSITORY,
    *,
    sources: Path = MODELS,
    artifacts: Path = ARTIFACTS,
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
    show = _console(console)
    reports = []
    for spec in [load(sources / name) for name in _names(models, sources)]:
        folder, manifest = store.served(repository, spec.model.name)
        served_by = backend.of(manifest)
        fault = backend.damage() if served_by and served_by.name == backend.NATIVE else ""
        if fault:
            raise PublishError(f"{spec.model.name}: its backend is damaged: {fault}", fix=backend.AGAIN)
        target = Target.of(manifest)
        engine_name = served_by.engine if served_by else ""
        graph = _published_graph(spec, target, artifacts, engine_name)
        built = folder / store.MODEL_FILE[target.runtime]
        report = checks.gate(spec, target, graph, built, manifest.get("engine"), artifacts, judge, count, engine_name)
        show.print(str(report), markup=False)
        reports.append(report)
    return reports


def benchmark_published(
    model: str,
    repository: Path = REPOSITORY,
    *,
    batch: int = 1,
    seconds: float = 3.0,
    cuda_graphs: bool = False,
    dump_profile: bool = False,
    sources: Path = MODELS,
    artifacts: Path = ARTIFACTS,
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
    import numpy as np

    show = _console(console)
    spec = load(sources / _names([model], sources)[0])
    folder, manifest = store.served(repository, spec.model.name)
    if manifest["runtime"] != "tensorrt":
        raise OptionError(
            f"{spec.model.name} is published for {manifest['runtime']}, but only a plan can be timed like this",
            fix="publish a plan: ./invoke build-engines --runtime tensorrt; on a CPU: ./invoke audit --speed",
        )
    if not 1 <= batch <= spec.serving.max_batch_size:
        raise OptionError(f"batch is {batch}, but {spec.model.name} takes 1 to {spec.serving.max_batch_size}")
    images, _ = verify.images_for(spec, artifacts / "datasets", batch)
    inputs = spec.nms.feeds(np.resize(images, (batch, *images.shape[1:])))
    written: dict[str, Any] = {}
    plan_file = folder / store.MODEL_FILE["tensorrt"]
    with plan.Plan(plan_file, manifest["engine"], plugin=PLUGIN, cuda_graphs=cuda_graphs) as running:
        timing = running.benchmark(inputs, seconds=seconds)
        show.print(str(timing), markup=False)
        written["benchmark.json"] = {**timing.as_dict(), "engine": manifest["engine"]}
        if dump_profile:
            rows = running.layer_times(inputs)
            for row in rows[1:]:
                show.print(f"{row['medianMs']:9.4f} ms {row['percentage']:5.1f} %  {row['name']}", markup=False)
            written |= {"profile.json": rows, "layers.json": running.layers()}
    target = artifacts / spec.model.name / str(manifest["precision"])
    for name, value in written.items():
        files.write_json(target / name, value)
    show.print(f"written: {', '.join(str(relative(target / name)) for name in written)}", markup=False)
    return target / "benchmark.json"


def _published_graph(spec: Spec, target: Target, artifacts: Path, served_engine: str) -> onnx.ModelProto:
    """The graph that a target's runtime gets: from the source where it is the source's own, else as it was built.

    Raises:
        OptionError: it was not built here.
    """
    import onnx

    if not target.typed:
        return attach(spec)
    path = _artifact(spec, target, artifacts)
    if served_engine == openvino.NAME:
        path = path.with_name("model.onnx")
    if not path.is_file():
        raise OptionError(f"{path}: the graph to compare with is not there", fix="build it: ./invoke build-engines")
    return onnx.load(path)


def _artifact(spec: Spec, target: Target, artifacts: Path) -> Path:
    """The ONNX file that a runtime gets; an FP32 graph to be calibrated by TensorRT has a folder of its own."""
    on_cpu = (target.runtime, target.precision) == ("onnxruntime", "int8")
    folder = f"{target.precision}-implicit" if target.implicit else target.precision
    return artifacts / spec.model.name / folder / ("onnxruntime.onnx" if on_cpu else "model.onnx")


def choose_runtime(runtime: str) -> tuple[str, str]:
    """The runtime to build for, and why.

    Raises:
        OptionError: no runtime has this name.
        RuntimeUnavailableError: tensorrt was asked for and cannot be used; says all that is missing.
    """
    if runtime not in ("auto", *contract.RUNTIMES):
        raise OptionError(f"runtime is {runtime!r}, but must be one of auto, {', '.join(contract.RUNTIMES)}")
    if runtime == "onnxruntime":
        return runtime, "asked for"
    missing = []
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        missing.append("an NVIDIA GPU (no /dev/nvidia0)")
    if importlib.util.find_spec("tensorrt") is None:
        missing.append("the Python package tensorrt")
    if importlib.util.find_spec("cuda") is None:
        missing.append("the Python package cuda-python")
    if not PLUGIN.is_file():
        missing.append(f"{relative(PLUGIN)} (./invoke build-plugins)")
    if not missing:
        return "tensorrt", "a GPU, TensorRT and the plugin are here"
    if runtime == "auto":
        return "onnxruntime", f"tensorrt would need {'; '.join(missing)}"
    raise RuntimeUnavailableError(
        f"the runtime tensorrt cannot be used; missing: {'; '.join(missing)}",
        fix="build for the CPU: ./invoke build-engines --runtime onnxruntime",
    )


def _build(
    spec: Spec,
    target: Target,
    force: bool,
    repository: Path,
    artifacts: Path,
    judge: verify.Judge | None,
    rehearse: bool,
    show: Console,
) -> int:
    """Builds, checks and publishes one model.

    Returns:
        Its served version.
    """
    name = spec.model.name
    artifact = _artifact(spec, target, artifacts)
    if target.implicit:
        _require_implicit(spec, artifacts, judge)
    plans = target.runtime == "tensorrt"
    machine = engine.built_for() if plans else None
    engines.require(spec, target)
    served_by = None if plans else _prepared(spec, repository)
    manifest = None if force else store.fresh_manifest(spec, repository, target, machine, served_by)
    held = artifact.with_name(engines.FILE) if served_by and served_by.engine == openvino.NAME else artifact
    if manifest and held.is_file():
        digest = manifest["engine"]["onnx_sha256"] if plans else manifest["files"][store.MODEL_FILE[target.runtime]]
        if digest == files.sha256(held):
            version: int = manifest["version"]
            picture.bring_about(spec, repository, version, target.runtime)
            show.print(f"{name}: nothing changed, version {version} stays ({target})", markup=False)
            return version
    if plans:
        engine.require_builder()
    # Where TensorRT calibrates, no graph is quantised: the gate judges the plan.
    chosen = audit.approved(spec, contract.BASELINE if target.implicit else target.precision, artifacts, show)
    # The audit may have written which layers stay unquantised.
    spec = replace(spec, quantization=load(spec.path).quantization)
    graph = chosen.runs if artifact.name == "onnxruntime.onnx" else chosen.graph
    self_check(chosen.runs, spec)
    for path, written in {artifact.with_name("model.onnx"): chosen.graph, artifact: graph}.items():
        files.write(path, written.SerializeToString(deterministic=True))
    show.print(
        f"{name}: built {relative(artifact)} ({artifact.stat().st_size / 1e6:.1f} MB), runs as its spec says",
        markup=False,
    )
    built, facts = artifact, dict[str, Any]()
    if machine:
        built = artifact.with_name("model.plan")
        calibrator = functools.partial(implicit.calibrator, spec, artifacts) if target.implicit else None
        facts = {"target": machine}
        facts["engine"] = engine.build(spec, graph, target, built, calibrator=calibrator, console=show)
        show.print(
            f"{name}: built {relative(built)} ({built.stat().st_size / 1e6:.1f} MB) for {machine['gpu']} "
            f"with TensorRT {machine['tensorrt']} in {facts['engine']['build_seconds']:.0f} s",
            markup=False,
        )
    if plans:
        # The audit saw all pictures, if it ran.
        count = spec.data.held_out_count if target.implicit else verify.PICTURES
        report = checks.gate(spec, target, graph, built, facts["engine"], artifacts, judge, count).require()
        show.print(str(report), markup=False)
    else:
        served_by, built, graph, report, facts["engine_choice"] = checks.with_engine(
            spec, target, chosen.graph, graph, artifact, artifacts, judge, show, rehearse
        )
    facts["verified"] = report.as_dict()
    last = functools.partial(_rehearse, spec, target, graph, served_by, facts.get("engine"), artifacts, show)
    version = store.publish(spec, built, repository, target, facts, served_by, last if rehearse else None)
    picture.bring_about(spec, repository, version, target.runtime)
    instances, threads = instances_and_threads(spec, target.runtime)
    show.print(
        f"{name}: published version {version} to {relative(repository / name)} "
        f"({target}, instances x threads: {instances} x {threads})",
        markup=False,
    )
    if spec.serving.picture_input:
        show.print(f"{name}: {picture.parts(name)[-1]} takes the files of pictures", markup=False)
    if served_by:
        show.print(
            f"{name}: served by Triton's backend {served_by.name} with {served_by.engine}: {served_by.why}",
            markup=False,
        )
        if served_by.name == backend.PYTHON and spec.serving.backend == "auto":
            show.print(f"{name}: {backend.SLOWER}", markup=False)
    return version


def _prepared(spec: Spec, repository: Path) -> backend.Backend:
    """The backend that is compared with what is published; if the build chooses the engine, with the one it chose."""
    chosen = spec.serving.engine
    if chosen == "auto":
        with contextlib.suppress(PublishError):
            before = backend.of(store.served(repository, spec.model.name)[1])
            chosen = before.engine if before else chosen
    if chosen == openvino.NAME:
        try:
            openvino.install()
            return backend.prepare(spec.serving.backend, engine=openvino.NAME)
        except RuntimeUnavailableError:
            if spec.serving.engine == openvino.NAME:
                raise
    return backend.prepare(spec.serving.backend)


def _rehearse(
    spec: Spec,
    target: Target,
    graph: onnx.ModelProto,
    served_by: backend.Backend | None,
    engine_facts: Mapping[str, Any] | None,
    artifacts: Path,
    show: Console,
    content: Path,
) -> None:
    """Has a real server answer with a version folder before it is published; says where none can.

    Raises:
        VerifyError: it does not load, or answers otherwise.
    """
    name = served_by.name if served_by else "tensorrt"
    reason = rehearsal.unavailable(name)
    if reason:
        show.print(f"{spec.model.name}: not asked on a real server before publishing: {reason}", markup=False)
        return
    images, _ = verify.images_for(spec, artifacts / "datasets", rehearsal.PICTURES)
    images = images[: rehearsal.PICTURES]
    built = content / store.MODEL_FILE[target.runtime]
    engine_name = served_by.engine if served_by else ""
    with checks.running(built, engine_facts, engine_name, target.precision) as candidate:
        heads = runner(before_nms(runnable(graph, target.precision)), optimised=False)
        said = rehearsal.rehearse(spec, target, content, candidate, heads, images)
    show.print(f"{spec.model.name}: {said}", markup=False)


def _require_implicit(spec: Spec, artifacts: Path, judge: verify.Judge | None) -> None:
    """That TensorRT calibrates by itself, and that what it makes of it can be judged.

    Raises:
        RuntimeUnavailableError: this TensorRT does not.
        DataError: there are no labelled held-out pictures.
        VerifyError: nobody measures mAP.
    """
    implicit.base_class(spec.quantization.implicit_calibrator)
    datasets.held_out(spec, artifacts / "datasets")
    if judge is None:
        raise VerifyError(
            f"{spec.model.name}: implicit calibration is judged by mAP, and nothing measures it here",
            fix="give build_engines a judge, as ./invoke build-engines does",
        )


def _console(console: Console | None = None) -> Console:
    from rich.console import Console

    return console or Console(highlight=False, soft_wrap=True)


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
