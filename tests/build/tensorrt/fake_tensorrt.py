"""A stand-in for the tensorrt package with exactly the names of a recorded version (tensorrt_api.json), and no more.

Tests that use it are tests of the API's shape: they show that the code asks each version only for what that version
has, and what it does with the answers. They show nothing of what TensorRT itself does.
"""

from __future__ import annotations

import enum
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx

from build.quantization import implicit

SURFACES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "tensorrt_api.json").read_text())
VERSIONS = tuple(SURFACES)


class _Recorded:
    """An object that lets through only the names that its class has in the recorded version."""

    def __init__(self, surface: list[str], **values: Any) -> None:
        object.__setattr__(self, "_names", set(surface))
        unknown = set(values) - self._names
        object.__setattr__(self, "_values", {key: value for key, value in values.items() if key not in unknown})
        object.__setattr__(self, "assigned", {})

    def __getattr__(self, name: str) -> Any:
        if name in self._names and name in self._values:
            return self._values[name]
        raise AttributeError(f"{name} {'is not scripted' if name in self._names else 'is not in this version'}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._names:
            raise AttributeError(f"{name} is not in this version")
        self._values[name] = value
        self.assigned[name] = value


class FakeTensorRT:
    """The module.

    Args:
        version: one of VERSIONS.
        faults: what the parser refuses: (node index, text).
        creators: (name, version) of the plugins that are registered from the start.
        on_load: those that appear when a library is loaded.
        says: messages that the builder and the runtime log as errors.
        plan: what building gives; None = it fails.
        foreign_cache: whether the builder refuses the timing cache.
        gpu: without one the builder does not start.
        script: called with the builder's config in the middle of a build.
    """

    def __init__(self, version: str, **options: Any) -> None:
        self.__version__ = version
        self.surface = SURFACES[version]
        self.options = {
            "faults": (),
            "creators": {("SSDNMS", "1")},
            "says": (),
            "plan": b"plan",
            "foreign_cache": False,
            "gpu": True,
            "script": lambda config: None,
            "engine": None,
        } | options
        self.seen = SimpleNamespace(network_flags=None, config=None, profiles=[], layers=[], parsed=None, runtimes=[])
        for name, names in self.surface.items():
            if isinstance(names, dict):
                setattr(self, name, enum.IntEnum(name, names))
        fake = self

        class ILogger:
            def log(self, severity: Any, msg: str) -> None:
                raise NotImplementedError

        class Monitor:
            pass

        self.ILogger, self.IProfiler = ILogger, type("IProfiler", (), {})
        self.Severity = enum.IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3})
        if "int8_calibrator" in self.surface["IBuilderConfig"]:  # not recorded: taken to be there where a config has it
            for name in implicit.BASES.values():
                setattr(self, name, type(name, (), {}))
        if "IProgressMonitor" in self.surface:
            self.IProgressMonitor = Monitor

        def builder(logger: Any) -> Any:
            fake.log(logger)
            if not fake.options["gpu"]:
                raise TypeError("pybind11::init(): factory function returned nullptr")
            return fake._builder(logger)

        self.Builder, self.OnnxParser = builder, self._parser

    def log(self, logger: Any) -> None:
        for text in self.options["says"]:
            logger.log(self.Severity.ERROR, text)

    def _of(self, kind: str, **values: Any) -> _Recorded:
        return _Recorded(self.surface[kind], **values)

    def _builder(self, logger: Any) -> Any:
        def create_network(flags: int) -> Any:
            self.seen.network_flags = flags
            self.seen.network = self._of("INetworkDefinition", num_inputs=0, num_layers=0)
            return self.seen.network

        def create_config() -> Any:
            flags: set[str] = {"TF32"}
            config = self._of(
                "IBuilderConfig",
                builder_optimization_level=3,
                int8_calibrator=None,
                set_calibration_profile=lambda profile: config.assigned.update(calibration=profile.shapes) or True,
                set_flag=lambda flag: flags.add(flag.name),
                clear_flag=lambda flag: flags.discard(flag.name),
                set_memory_pool_limit=lambda pool, size: config.assigned.update({pool.name: size}),
                set_tactic_sources=lambda bits: config.assigned.update(tactic_sources=bits) or True,
                add_optimization_profile=lambda profile: self.seen.profiles.append(profile.shapes) or len(flags),
                create_timing_cache=lambda data: self._of("ITimingCache", serialize=lambda: data + b"+"),
                set_timing_cache=lambda cache, ignore: (
                    config.assigned.update(cache=cache) or not self.options["foreign_cache"]
                ),
                get_timing_cache=lambda: config.assigned["cache"],
            )
            self.seen.config, self.seen.flags = config, flags
            return config

        def build(network: Any, config: Any) -> bytes | None:
            self.options["script"](config)
            monitor = config.assigned.get("progress_monitor")
            if monitor:
                monitor.phase_start("Building", None, 2)
                for step in range(2):
                    if not monitor.step_complete("Building", step):
                        return None
                monitor.phase_finish("Building")
            return self.options["plan"]

        return self._of(
            "Builder",
            create_network=create_network,
            create_builder_config=create_config,
            create_optimization_profile=_Profile,
            build_serialized_network=build,
        )

    def _parser(self, network: Any, logger: Any) -> Any:
        faults = self.options["faults"]

        def parse(data: bytes) -> bool:
            model = onnx.load_from_string(data)
            self.seen.parsed = model
            inputs = [
                SimpleNamespace(
                    name=info.name,
                    shape=tuple(
                        d.dim_value if d.HasField("dim_value") else -1 for d in info.type.tensor_type.shape.dim
                    ),
                )
                for info in model.graph.input
            ]
            layers = [self._layer(node) for node in model.graph.node]
            self.seen.layers = layers
            network._values.update(
                num_inputs=len(inputs),
                get_input=inputs.__getitem__,
                num_layers=len(layers),
                get_layer=layers.__getitem__,
            )
            return not faults

        def error(index: int) -> Any:
            number, text = faults[index]
            node = self.seen.parsed.graph.node[number]
            return self._of(
                "ParserError",
                node=lambda: number,
                desc=lambda: text,
                node_name=lambda: node.name,
                node_operator=lambda: node.op_type,
            )

        return self._of("OnnxParser", parse=parse, num_errors=len(faults), get_error=error)

    def _layer(self, node: onnx.NodeProto) -> Any:
        outputs = [SimpleNamespace(name=name, is_execution_tensor=True) for name in node.output]
        kinds = {"Conv": "CONVOLUTION", "Constant": "CONSTANT", "SSDNMS": "PLUGIN_V2"}
        layer = self._of(
            "ILayer",
            name=node.name,
            type=self.LayerType[kinds.get(node.op_type, "ELEMENTWISE")],
            num_outputs=len(outputs),
            get_output=outputs.__getitem__,
            set_output_type=lambda index, kind: layer.assigned.update({index: kind.name}),
            precision=None,
        )
        return layer

    def init_libnvinfer_plugins(self, logger: Any, namespace: str) -> bool:
        return True

    def get_plugin_registry(self) -> Any:
        def find(name: str, version: str, namespace: str) -> Any:
            return object() if (name, version) in self.options["creators"] else None

        return self._of("IPluginRegistry", get_creator=find, get_plugin_creator=find)

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        def deserialize(data: bytes) -> Any:
            self.log(logger)
            engine = self.options["engine"]
            return engine(self) if engine else None

        runtime = self._of("Runtime", deserialize_cuda_engine=deserialize)
        self.seen.runtimes.append(runtime)
        return runtime

    def engine(self, tensors: dict[str, tuple[str, str, tuple[int, ...]]], profiles: list[tuple[int, int, int]]) -> Any:
        """An engine with these tensors (name → mode, type, shape), whose context records what it is told."""
        names = list(tensors)
        context = self._of(
            "IExecutionContext",
            set_optimization_profile_async=lambda index, stream: context.assigned.update(profile=index) or True,
            set_input_shape=lambda name, shape: context.assigned.setdefault("shapes", {}).update({name: shape}) or True,
            set_tensor_address=lambda name, address: (
                context.assigned.setdefault("addresses", {}).update({name: address}) or True
            ),
            execute_async_v3=lambda stream: self.options.get("execute", lambda c: True)(context),
        )
        self.seen.context = context
        return self._of(
            "ICudaEngine",
            num_io_tensors=len(names),
            num_optimization_profiles=len(profiles),
            get_tensor_name=names.__getitem__,
            get_tensor_mode=lambda name: self.TensorIOMode[tensors[name][0]],
            get_tensor_dtype=lambda name: self.DataType[tensors[name][1]],
            get_tensor_shape=lambda name: tensors[name][2],
            get_tensor_profile_shape=lambda name, index: [(size, *tensors[name][2][1:]) for size in profiles[index]],
            create_execution_context=lambda: context,
            device_memory_size=1000,
            device_memory_size_v2=1000,
        )


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, low: Any, best: Any, high: Any) -> None:
        self.shapes[name] = (low, best, high)
