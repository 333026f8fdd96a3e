"""Typed ONNX → TensorRT plan, with all that a manifest must say about it.

`serialize` parses and builds: TensorRT's builder needs a GPU for that, the one of TensorRT for RTX does not. `build` is
the whole stage: this machine's GPU, timing cache, plan, the plan's own table of inputs and outputs, manifest.

No plan was built so far: on an H100 the builder refused to start (docs/tensorrt.md). Without a GPU, the tests cover
everything up to the builder and, with TensorRT for RTX, the parser and the strongly typed builder on the graph before
SSDNMS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import contract
from build.contract import Target
from build.errors import EngineError, RuntimeUnavailableError
from build.files import ARTIFACTS, relative, sha256, write
from build.graph import ssd_nms
from build.spec import Profile, Spec
from build.tensorrt import compat
from build.tensorrt import plan as plans
from build.tensorrt.cuda import Cuda, Gpu
from build.tensorrt.plugins import PLUGIN, plugin_info

if TYPE_CHECKING:
    import onnx
    from rich.console import Console

TIMING_CACHES = ARTIFACTS / "timing_caches"

# First match wins: what TensorRT logged, why, what to do. {0} is what the pattern's group caught.
_CAUSES = (
    (
        r"(?i)out of memory|OutOfMemory|cudaErrorMemoryAllocation|insufficient memory",
        "the GPU has no memory left for building",
        "end other programs on the GPU (nvidia-smi names them), lower the profiles' max or [tensorrt] workspace_mib",
    ),
    (
        r"Could not find any implementation for node (\S+)",
        "no kernel for {0} fits the workspace, the tactic sources or this GPU",
        "raise [tensorrt] workspace_mib, leave tactic_sources empty, or raise optimization_level",
    ),
    (
        r"(?i)(?:no|unable to find|could not find)[^\n]*plugin[^\n]*\b(\w+)\b",
        "a plugin is missing: {0}",
        f"build {relative(PLUGIN)} for this TensorRT (see plugins/README.md)",
    ),
)


def build(
    spec: Spec,
    model: onnx.ModelProto,
    target: Target,
    plan: Path,
    *,
    plugin: Path = PLUGIN,
    timing_caches: Path = TIMING_CACHES,
    calibrator: Callable[..., Any] | None = None,
    console: Console | None = None,
    trt: Any = None,
    cuda: Cuda | None = None,
) -> dict[str, Any]:
    """Builds the plan of a served graph for this machine's GPU.

    Args:
        spec: what the graph was made from, and the options of the build.
        model: the typed graph with its one SSDNMS node.
        target: what it is built for; its precision says whether FP32 may round to TF32.
        plan: the file that gets the plan, whole or not at all.
        plugin: the library with the SSDNMS plugin.
        timing_caches: the folder of the timing caches.
        calibrator: for a target with implicit calibration: makes TensorRT's calibrator from the serialised graph, and
            takes `batch`, `trt` and `cuda` (build/quantization/implicit.py); None = the graph says what is quantised.
        console: where progress is shown; None = standard error.
        trt, cuda: the packages; None = the installed ones.

    Returns:
        The manifest's part `engine` (docs/tensorrt.md explains its keys).

    Raises:
        EngineError: the plan cannot be built; `plan` is as it was.
        RuntimeUnavailableError: there is no TensorRT or no GPU here, or it has no calibrators any more.
        DataError: there are no pictures to calibrate on.
    """
    trt = trt or compat.load()
    cuda = cuda or Cuda()
    gpu = cuda.gpu()
    serialized = model.SerializeToString(deterministic=True)
    calibrates = None
    if calibrator:
        calibrates = calibrator(serialized, batch=_calibration_sizes(spec).opt, trt=trt, cuda=cuda)
    started = time.monotonic()
    with timing_cache(timing_caches, gpu, compat.version(trt)) as cache:
        data = serialize(
            spec, model, target, trt=trt, plugin=plugin, cache=cache, calibrator=calibrates, console=console
        )
    seconds = time.monotonic() - started
    log = plans.Log()
    logger = compat.logger(trt, log)  # must outlive the engine
    compatible = spec.tensorrt.version_compatible
    engine = plans.deserialize(trt, data, logger, log, str(plan), version_compatible=compatible)
    manifest = {
        "plan_sha256": hashlib.sha256(data).hexdigest(),
        "onnx_sha256": hashlib.sha256(serialized).hexdigest(),
        "spec_sha256": sha256(spec.path),
        "plugin": {"file": plugin.name, "sha256": sha256(plugin), **plugin_info(plugin)},
        "tensorrt": compat.version(trt),
        "gpu": gpu.as_dict(),
        "precision": target.precision,
        "tf32": _tf32(spec, target),
        "strongly_typed": calibrates is None and compat.strongly_typed(trt),
        "profiles": [dataclasses.asdict(profile) for profile in spec.profiles],
        "options": {k: v for k, v in dataclasses.asdict(spec.tensorrt).items() if k not in ("profiles", "tf32")},
        "build_seconds": round(seconds, 1),
        "device_memory_bytes": compat.device_memory(engine),
        "io": [dataclasses.asdict(tensor) for tensor in compat.io_table(engine)],
    }
    write(plan, data)
    return manifest


def built_for(plugin: Path = PLUGIN, trt: Any = None, cuda: Cuda | None = None) -> dict[str, str]:
    """The machine that a plan built here is for; a published plan for another one is stale.

    Raises:
        RuntimeUnavailableError: there is no TensorRT or no GPU here.
        PluginBuildError: the plugin is not built.
    """
    gpu = (cuda or Cuda()).gpu()
    plugin_info(plugin)
    return {
        "gpu": gpu.name,
        "compute_capability": gpu.compute_capability,
        "tensorrt": compat.version(trt or compat.load()),
        "plugin_sha256": sha256(plugin),
    }


def require_builder() -> None:
    """That TensorRT's builder starts here: it is asked before minutes of other work, not after them.

    Raises:
        RuntimeUnavailableError: it does not.
    """
    trt, log = compat.load(), plans.Log()
    _builder(trt, compat.logger(trt, log), log)


def _builder(trt: Any, logger: Any, log: plans.Log) -> Any:
    try:
        return trt.Builder(logger)
    except TypeError:
        raise RuntimeUnavailableError(
            f"TensorRT {compat.version(trt)} does not start: {log.last() or 'it gives no reason'}",
            why="there is no NVIDIA GPU here, its driver is too old, or a library of TensorRT is missing or changed",
            fix="see what nvidia-smi says (in a container, start it with --gpus all); "
            "if it shows the GPU, install TensorRT again: ./invoke install-tensorrt",
        ) from None


def serialize(
    spec: Spec,
    model: onnx.ModelProto,
    target: Target,
    *,
    trt: Any,
    plugin: Path | None = None,
    cache: Path | None = None,
    calibrator: Any = None,
    console: Console | None = None,
) -> bytes:
    """Parses and builds.

    Args:
        spec, target: profiles and options.
        model: the typed graph; with a SSDNMS node it needs the plugin, without one nothing but TensorRT.
        trt: the tensorrt module, or another of its interface.
        plugin: the plugin's library.
        cache: the timing cache, read and written; None = without.
        calibrator: for an FP32 graph that TensorRT quantises by itself; None = types are the graph's.
        console: where progress is shown; None = standard error.

    Raises:
        EngineError: refused, with the node, the option or the file that it is about.
        RuntimeUnavailableError: the builder does not start.
    """
    log = plans.Log()
    logger = compat.logger(trt, log)
    stripped = ssd_nms.strip_function(model)
    if any(node.op_type == contract.OP_TYPE for node in stripped.graph.node):
        require_plugin(trt, logger, plugin)
    builder = _builder(trt, logger, log)
    network = compat.create_network(trt, builder, typed=calibrator is None)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(stripped.SerializeToString()):
        raise _parser_error(model, compat.parser_faults(parser), log)
    config = builder.create_builder_config()
    _configure(trt, config, spec, target)
    if calibrator is None:
        compat.set_types(trt, network, config, _types(model))
    else:
        profile = _profile(builder, network, _calibration_sizes(spec), "the calibration's profile")
        half, exclude = spec.quantization.rest == "fp16", spec.quantization.exclude_nodes
        compat.set_calibration(trt, network, config, calibrator, profile, half=half, exclude=exclude)
    _add_profiles(builder, network, config, spec)
    timings = _attach_cache(config, cache) if cache else None
    data = _run(trt, builder, network, config, log, console)
    if cache and timings is not None:
        write(cache, bytes(config.get_timing_cache().serialize()))
    return data


def require_plugin(trt: Any, logger: Any, plugin: Path | None) -> None:
    """Loads the plugin's library, if nothing before did, and looks its creator up.

    Raises:
        EngineError: it is missing; names the file and how to load it.
    """
    name, number = contract.OP_TYPE, str(contract.OP_VERSION)
    compat.load_plugins(trt, logger, None)
    if compat.plugin_creator(trt, name, number) is None:
        compat.load_plugins(trt, logger, plugin)
    if compat.plugin_creator(trt, name, number) is None:
        raise EngineError(
            f"no plugin {name} of version {number} is registered with TensorRT {compat.version(trt)}"
            + (f", though {plugin} was loaded" if plugin else ""),
            why="the library holds another plugin or version of it" if plugin else "no library was given",
            fix=f"build it (./invoke build-plugins); {PLUGIN.name} is loaded from {relative(PLUGIN.parent)}/, "
            "or before everything else with LD_PRELOAD",
        )


@contextlib.contextmanager
def timing_cache(folder: Path, gpu: Gpu, tensorrt: str) -> Iterator[Path]:
    """The timing cache of a GPU and TensorRT; no other build can take it until the end of the block.

    Two builds at once would also falsify each other's timings.

    Raises:
        EngineError: another build is under way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    path = folder / f"{slug}-sm{gpu.compute_capability.replace('.', '')}-tensorrt-{tensorrt}.cache"
    with path.with_suffix(".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EngineError(
                f"another build for {gpu.name} is under way (it holds {path.with_suffix('.lock')})",
                fix="wait for it: builds beside each other would falsify each other's timings",
            ) from None
        yield path


def _configure(trt: Any, config: Any, spec: Spec, target: Target) -> None:
    """The options of the build; refit and weight streaming stay as TensorRT has them."""
    options = spec.tensorrt
    if options.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    compat.set_flag(trt, config, "TF32", _tf32(spec, target), f"precision {target.precision}")
    if options.version_compatible:
        compat.set_flag(trt, config, "VERSION_COMPATIBLE", True, "[tensorrt] version_compatible")
    compat.set_hardware_compatibility(trt, config, options.hardware_compatible)
    compat.set_tactic_sources(trt, config, options.tactic_sources)


def _tf32(spec: Spec, target: Target) -> bool:
    """Whether FP32 convolutions may round to TF32: never in fp32, always in tf32, else as the spec says."""
    return target.precision == "tf32" or (target.precision != contract.BASELINE and spec.tensorrt.tf32)


def _add_profiles(builder: Any, network: Any, config: Any, spec: Spec) -> None:
    """Adds the spec's profiles for every input.

    Raises:
        EngineError: the graph cannot take a profile's batches.
    """
    for number, sizes in enumerate(spec.profiles):
        what = f"optimisation profile {number}"
        if config.add_optimization_profile(_profile(builder, network, sizes, what)) < 0:
            raise _profile_error(what, sizes, "TensorRT does not accept it")


def _profile(builder: Any, network: Any, sizes: Profile, what: str) -> Any:
    """A profile with these batches of every input.

    Raises:
        EngineError: the graph cannot take them.
    """
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        batch, *rest = (int(size) for size in tensor.shape)
        if batch != -1 and not sizes.min == sizes.opt == sizes.max == batch:
            raise _profile_error(what, sizes, f"input {tensor.name!r} has the fixed batch {batch}")
        try:
            profile.set_shape(tensor.name, *((size, *rest) for size in (sizes.min, sizes.opt, sizes.max)))
        except ValueError as error:
            raise _profile_error(what, sizes, f"input {tensor.name!r} {[batch, *rest]}: {error}") from None
    return profile


def _calibration_sizes(spec: Spec) -> Profile:
    """What a calibrator feeds: batches of one size, since TensorRT takes whole ones only."""
    batch = min(8, spec.serving.max_batch_size)
    return Profile(batch, batch, batch)


def _profile_error(what: str, sizes: Profile, reason: str) -> EngineError:
    return EngineError(
        f"{what} (batch {sizes.min} to {sizes.max}) does not fit the model: {reason}",
        fix="correct [[tensorrt.profiles]], or export the model with a dynamic batch",
    )


def _attach_cache(config: Any, path: Path) -> Any:
    """Gives the builder the timings of earlier builds.

    Raises:
        EngineError: they are of another machine, or damaged.
    """
    data = path.read_bytes() if path.is_file() else b""
    timings = config.create_timing_cache(data)
    if timings is None or not config.set_timing_cache(timings, False):
        raise EngineError(
            f"the timing cache {path} is not of this GPU and TensorRT, or is damaged",
            why="it was copied from another machine, or the driver's view of the GPU changed",
            fix="delete it: it is made again, and the build then takes longer once",
        )
    return timings


def _run(trt: Any, builder: Any, network: Any, config: Any, log: plans.Log, console: Console | None) -> bytes:
    """Builds in a thread, so Ctrl-C works; shows the progress if the version reports it.

    Raises:
        EngineError: the builder gives up.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    show = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    stop, done, outcome = threading.Event(), threading.Event(), _Outcome()
    with Progress(*columns, console=show, transient=True) as progress:
        total = progress.add_task(f"TensorRT {compat.version(trt)} builds", total=None)
        tasks: dict[str, Any] = {}

        def show_progress(phase: str, done: int, steps: int) -> None:
            if not steps:
                progress.remove_task(tasks.pop(phase, total))
            elif phase in tasks:
                progress.update(tasks[phase], completed=done)
            else:
                tasks[phase] = progress.add_task(phase, total=steps, completed=done)

        can_stop = compat.set_progress(trt, config, show_progress, lambda: not stop.is_set())

        def work() -> None:
            try:
                outcome.data = builder.build_serialized_network(network, config)
            except BaseException as error:
                outcome.error = error
            finally:
                done.set()

        thread = threading.Thread(target=work, name="tensorrt-build", daemon=True)
        try:
            thread.start()
            while not done.wait(0.1):  # not join: a join that Ctrl-C interrupts takes the thread for dead
                pass
        except KeyboardInterrupt:
            stop.set()
            if not can_stop:
                progress.console.print(f"TensorRT {compat.version(trt)} cannot stop in between: waiting for it")
            progress.console.print("Ctrl-C again ends the process; what is published stays as it is")
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if thread.ident is not None:
                done.wait()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise
    if outcome.error:
        raise outcome.error
    if outcome.data is None:
        raise _build_error("TensorRT could not build the engine", log)
    return bytes(outcome.data)


class _Outcome:
    """The result of the builder's thread."""

    data: Any = None
    error: BaseException | None = None


def _build_error(what: str, log: plans.Log) -> EngineError:
    """The error with its cause, as far as TensorRT's log shows it."""
    text = "\n".join(log.errors)
    for pattern, why, fix in _CAUSES:
        match = re.search(pattern, text)
        if match:
            return EngineError(f"{what}: {log.last()}", why=why.format(*match.groups()), fix=fix)
    return EngineError(f"{what}: {log.last() or 'it gives no reason'}")


def _parser_error(model: onnx.ModelProto, faults: list[compat.ParserFault], log: plans.Log) -> EngineError:
    """What the parser refused, each with the node, its operator and the types of its inputs."""
    shown = _tensors(model)
    lines = []
    for fault in faults:
        nodes = model.graph.node
        known = next((node for node in nodes if fault.name and node.name == fault.name), None)
        if known is None and 0 <= fault.index < len(nodes):
            known = nodes[fault.index]
        if known is None:
            lines.append(fault.text)
            continue
        inputs = ", ".join(f"{name}: {shown.get(name, 'unknown')}" for name in known.input)
        lines.append(f"node {known.name!r} ({known.op_type}; {inputs}): {fault.text}")
    return EngineError(
        "TensorRT's parser refuses the graph:\n" + "\n".join(f"  {line}" for line in lines or [log.last()]),
        why="an operator, or the types it is used with, that this TensorRT does not have",
        fix="export the model without it, or write it with other operators",
    )


def _tensors(model: onnx.ModelProto) -> dict[str, str]:
    """Tensor → its type and shape in words, as far as ONNX can infer them."""
    from onnx import TensorProto

    shown = {}
    for name, info in _inferred(model).items():
        tensor = info.type.tensor_type
        sizes = [d.dim_param or (str(d.dim_value) if d.HasField("dim_value") else "?") for d in tensor.shape.dim]
        kind = TensorProto.DataType.Name(tensor.elem_type)
        shown[name] = f"{kind}[{','.join(sizes)}]" if tensor.HasField("shape") else kind
    constants = {c.name: f"{TensorProto.DataType.Name(c.data_type)}{list(c.dims)}" for c in model.graph.initializer}
    return shown | constants


def _types(model: onnx.ModelProto) -> dict[str, str]:
    """Tensor → the name of its TensorRT DataType, for the types that the builder must be told about."""
    from onnx import TensorProto

    names = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "BFLOAT16": "BF16", "INT8": "INT8", "FLOAT8E4M3FN": "FP8"}
    kinds = {name: info.type.tensor_type.elem_type for name, info in _inferred(model).items()}
    named = {name: TensorProto.DataType.Name(kind) for name, kind in kinds.items()}
    return {name: names[kind] for name, kind in named.items() if kind in names}


def _inferred(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    import onnx

    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except onnx.shape_inference.InferenceError:
        graph = model.graph
    return {info.name: info for info in (*graph.input, *graph.value_info, *graph.output)}
