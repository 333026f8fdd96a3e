"""All differences between TensorRT 8.6, 10 and 11 live here, detected by feature, not by version number.

Every function takes the module as `trt`, so that it also works on another package of the same interface (TensorRT for
RTX) and on the tests' stand-in. Bits of flags come from the enumerations: their values moved between versions.
"""

from __future__ import annotations

import ctypes
import importlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build.errors import EngineError, RuntimeUnavailableError
from build.tensorrt.plugins import plugin_info

# What TensorRT < 11 must be allowed to use before it takes a type that a weakly typed graph asks for.
_TYPE_FLAGS = {"HALF": "FP16", "BF16": "BF16", "INT8": "INT8", "FP8": "FP8"}


def load() -> Any:
    """The installed tensorrt module.

    Raises:
        RuntimeUnavailableError: it is not there, or its libraries are not.
    """
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "tensorrt"
        raise RuntimeUnavailableError(
            "the Python package tensorrt " + ("is not installed" if missing else f"cannot be imported: {error}"),
            why="" if missing else "a library that it needs is missing, or belongs to another CUDA version",
            fix="./invoke install-tensorrt (docs/tensorrt.md says which version a server needs)",
        ) from None


def version(trt: Any) -> str:
    """The version, as the package tells it."""
    return str(trt.__version__)


def version_numbers(text: str) -> tuple[int, ...]:
    """The first three numbers of a version, for comparing: "10.13.2.6" → (10, 13, 2)."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def enum_value(trt: Any, kind: str, name: str, what: str) -> Any:
    """A member of an enumeration.

    Raises:
        EngineError: this version does not have it; names what asked for it and the members that there are.
    """
    members = getattr(trt, kind).__members__
    if name not in members:
        raise EngineError(
            f"{what} needs {kind}.{name}, which TensorRT {version(trt)} does not have",
            why="it came with a later version or went with an earlier one",
            fix=f"this version has {', '.join(members)}",
        )
    return members[name]


def _bits(members: Iterable[Any]) -> int:
    return sum(1 << int(member) for member in members)


def strongly_typed(trt: Any) -> bool:
    """Whether the version builds networks whose types are the graph's."""
    return "STRONGLY_TYPED" in trt.NetworkDefinitionCreationFlag.__members__


def create_network(trt: Any, builder: Any, *, typed: bool = True) -> Any:
    """An empty network, strongly typed where the version has that and it is asked for."""
    flags = trt.NetworkDefinitionCreationFlag.__members__
    wanted = ("EXPLICIT_BATCH", "STRONGLY_TYPED") if typed else ("EXPLICIT_BATCH",)
    return builder.create_network(_bits(flags[name] for name in wanted if name in flags))


def set_types(trt: Any, network: Any, config: Any, types: Mapping[str, str]) -> None:
    """Makes a version without strongly typed networks keep to the types of the graph.

    Lets the builder use every type that the graph has, and asks it to obey the one that each floating layer has there.

    Args:
        trt: the module.
        network, config: of the build.
        types: tensor name → name of its DataType, as the ONNX graph has it.

    Raises:
        EngineError: the version cannot do a type of the graph at all.
    """
    if strongly_typed(trt):
        return
    used = [name for name in _TYPE_FLAGS if name in types.values()]
    for name in used:
        config.set_flag(enum_value(trt, "BuilderFlag", _TYPE_FLAGS[name], f"a graph of type {name}"))
    if used != ["HALF"]:  # without HALF there is nothing to choose; with Q/DQ nodes, they say what is quantised
        return
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    free = [trt.LayerType.CONSTANT, trt.LayerType.SHAPE, trt.LayerType.PLUGIN, trt.LayerType.PLUGIN_V2]
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        floats = [types.get(tensor.name) in ("FLOAT", "HALF") and tensor.is_execution_tensor for tensor in outputs]
        if layer.type in free or not all(floats) or not outputs:
            continue
        layer.precision = trt.DataType.__members__[types[outputs[0].name]]
        for i, tensor in enumerate(outputs):
            layer.set_output_type(i, trt.DataType.__members__[types[tensor.name]])


def set_calibration(
    trt: Any, network: Any, config: Any, calibrator: Any, profile: Any, *, half: bool, exclude: Collection[str]
) -> None:
    """Has the builder measure a weakly typed FP32 network and choose what becomes INT8.

    Args:
        trt: the module.
        network, config: of the build.
        calibrator: feeds the pictures.
        profile: the shapes of what it feeds.
        half: whether what does not become INT8 may become FP16.
        exclude: names of layers that stay floating.

    Raises:
        EngineError: the version does not calibrate, or the network has no such layer.
    """
    what = "implicit calibration"
    if not hasattr(config, "int8_calibrator"):
        raise EngineError(
            f"{what} needs IBuilderConfig.int8_calibrator, which TensorRT {version(trt)} does not have",
            fix="calibrate explicitly, which every version takes: leave --calibration implicit out",
        )
    for name in ("INT8", "FP16") if half else ("INT8",):
        config.set_flag(enum_value(trt, "BuilderFlag", name, what))
    config.int8_calibrator = calibrator
    if not config.set_calibration_profile(profile):
        raise EngineError(f"TensorRT {version(trt)} refuses the shapes of the calibration pictures")
    if exclude:
        config.set_flag(enum_value(trt, "BuilderFlag", "OBEY_PRECISION_CONSTRAINTS", "[quantization] exclude_nodes"))
        layers = {layer.name: layer for layer in (network.get_layer(i) for i in range(network.num_layers))}
        for name in exclude:
            if name not in layers:
                raise EngineError(
                    f"[quantization] exclude_nodes names {name!r}, but TensorRT's network has no layer of that name",
                    fix="calibrate explicitly: there the graph's own nodes are left out",
                )
            layers[name].precision = trt.DataType.__members__["HALF" if half else "FLOAT"]


def set_flag(trt: Any, config: Any, name: str, on: bool, what: str) -> None:
    """Sets or clears one BuilderFlag; one that the version lacks is an error only where it is asked for."""
    if on:
        config.set_flag(enum_value(trt, "BuilderFlag", name, what))
    elif name in trt.BuilderFlag.__members__:
        config.clear_flag(trt.BuilderFlag.__members__[name])


def set_tactic_sources(trt: Any, config: Any, names: Iterable[str]) -> None:
    """Lets the builder take kernels from these sources alone."""
    what = "[tensorrt] tactic_sources"
    members = [enum_value(trt, "TacticSource", name.upper(), what) for name in names]
    if members and not config.set_tactic_sources(_bits(members)):
        wanted = ", ".join(member.name for member in members)
        raise EngineError(f"TensorRT {version(trt)} refuses {what} {wanted}", why="one contradicts another option")


def set_hardware_compatibility(trt: Any, config: Any, level: str) -> None:
    """Which other GPUs the plan is to run on."""
    if level != "none":
        what = "[tensorrt] hardware_compatible"
        config.hardware_compatibility_level = enum_value(trt, "HardwareCompatibilityLevel", level.upper(), what)


def set_progress(trt: Any, config: Any, tell: Callable[[str, int, int], None], go_on: Callable[[], bool]) -> bool:
    """Has the builder tell how far it is, and ask whether to go on, where the version can.

    Args:
        trt: the module.
        config: of the build; keeps the monitor alive.
        tell: gets a phase, how many of its steps are done, and their number (0 and 0 when the phase is over).
        go_on: False ends the build.

    Returns:
        Whether the version can: only then can a build be stopped.
    """
    if not hasattr(trt, "IProgressMonitor"):
        return False

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            tell(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            tell(phase_name, step + 1, self.steps.get(phase_name, step + 1))
            return go_on()

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)
            tell(phase_name, 0, 0)

    config.progress_monitor = Monitor()
    return True


def logger(trt: Any, tell: Callable[[str, str], None]) -> Any:
    """A logger that gives each message and its severity (ERROR, WARNING ...) to `tell`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            tell(getattr(severity, "name", str(severity)), msg)

    return Logger()


def plugin_creator(trt: Any, name: str, plugin_version: str, namespace: str = "") -> Any:
    """The registered creator of a plugin, or None."""
    registry = trt.get_plugin_registry()
    find = registry.get_creator if hasattr(registry, "get_creator") else registry.get_plugin_creator
    return find(name, plugin_version, namespace)


def load_plugins(trt: Any, log: Any, library: Path | None) -> None:
    """Registers TensorRT's own plugins, then those of a library: loading it is enough, they register themselves.

    Raises:
        PluginBuildError: the library is not there, or is another one.
        EngineError: it is of another TensorRT, or cannot be loaded.
    """
    trt.init_libnvinfer_plugins(log, "")
    if library is None:
        return
    made_for, here = plugin_info(library)["tensorrt"], version(trt)
    if version_numbers(made_for)[:1] != version_numbers(here)[:1]:  # it would end the process
        raise EngineError(
            f"the plugin library {library} was built for TensorRT {made_for}, here is TensorRT {here}",
            fix="build it with this one's headers: ./invoke build-plugins --tensorrt-ref TAG (plugins/README.md)",
        )
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise EngineError(
            f"the plugin library {library} cannot be loaded: {error}",
            why="a library that it needs is missing, or is not the one that it was built with",
            fix="build it on this machine (./invoke build-plugins)",
        ) from None


@dataclass(frozen=True)
class ParserFault:
    """What the ONNX parser says about one node.

    Attributes:
        index: of the node in the graph; -1 where the parser names none.
        name, operator: of the node, where the version tells (otherwise empty).
        text: what is wrong.
    """

    index: int
    name: str
    operator: str
    text: str


def parser_faults(parser: Any) -> list[ParserFault]:
    """What the parser refused, in its order."""
    faults = []
    for error in (parser.get_error(i) for i in range(parser.num_errors)):
        name, operator = (getattr(error, key, str)() for key in ("node_name", "node_operator"))
        faults.append(ParserFault(int(error.node()), str(name), str(operator), str(error.desc())))
    return faults


def device_memory(engine: Any) -> int:
    """Bytes of GPU memory that one execution context takes."""
    return int(engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size)


@dataclass(frozen=True)
class Tensor:
    """One input or output of an engine.

    Attributes:
        name: as in the graph.
        mode: INPUT or OUTPUT.
        dtype: the name of TensorRT's DataType: UINT8, FLOAT, INT32 ...
        shape: with -1 for the batch.
        profiles: of an input, (min, opt, max) shape in each profile.
    """

    name: str
    mode: str
    dtype: str
    shape: tuple[int, ...]
    profiles: tuple[tuple[tuple[int, ...], ...], ...] = ()


def io_table(engine: Any) -> tuple[Tensor, ...]:
    """The engine's inputs and outputs, in its order."""
    table = []
    for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
        mode = engine.get_tensor_mode(name).name
        shapes: tuple[tuple[tuple[int, ...], ...], ...] = ()
        if mode == "INPUT":
            shapes = tuple(
                tuple(tuple(int(size) for size in shape) for shape in engine.get_tensor_profile_shape(name, index))
                for index in range(engine.num_optimization_profiles)
            )
        shape = tuple(int(size) for size in engine.get_tensor_shape(name))
        table.append(Tensor(name, mode, engine.get_tensor_dtype(name).name, shape, shapes))
    return tuple(table)
