"""Records which names a TensorRT Python package has: what tensorrt_api.json holds and the tests' stand-in keeps to.

    python tests/build/tensorrt/record_tensorrt_api.py [MODULE] >surface.json

Needs nothing but the package that it imports (`tensorrt`, or `tensorrt_bindings` of the wheel of that name); nothing of
TensorRT is called, so that no GPU is needed.
"""

import importlib
import inspect
import json
import sys

CLASSES = (
    *("Builder", "BuilderFlag", "DataType", "EngineInspector", "HardwareCompatibilityLevel", "IBuilderConfig"),
    *("ICudaEngine", "IExecutionContext", "IHostMemory", "ILayer", "ILogger", "INetworkDefinition"),
    *("IOptimizationProfile", "IPluginRegistry", "IProfiler", "IProgressMonitor", "ITensor", "ITimingCache"),
    *("LayerInformationFormat", "LayerType", "Logger", "MemoryPoolType", "NetworkDefinitionCreationFlag"),
    *("OnnxParser", "ParserError", "ProfilingVerbosity", "Runtime", "TacticSource", "TensorIOMode"),
)
FUNCTIONS = ("get_plugin_registry", "init_libnvinfer_plugins")


def surface(module):
    """Class → its public names, or for an enumeration its members and their values; None for a function."""
    names = {name: None for name in FUNCTIONS if hasattr(module, name)}
    for name in CLASSES:
        kind = getattr(module, name, None)
        if inspect.isclass(kind):
            members = getattr(kind, "__members__", None)
            names[name] = (
                {key: int(value) for key, value in members.items()}
                if members
                else [key for key in sorted(dir(kind)) if not key.startswith("_")]
            )
    return names


if __name__ == "__main__":
    trt = importlib.import_module(sys.argv[1] if len(sys.argv) > 1 else "tensorrt")
    print(json.dumps({trt.__version__: surface(trt)}))
