"""Parses and builds graphs with TensorRT for RTX, in a process of its own: what it refuses may end the process.

    python tests/build/graph/compile_with_rtx.py SPEC MODEL...

Prints one line of JSON for each model: the network's inputs and outputs with their types and the plan's size, or the
error.
"""

from __future__ import annotations

import json
import sys

import onnx
import tensorrt_rtx_bindings as trt

from build.contract import Target
from build.errors import SSDError
from build.spec import load
from build.tensorrt import compat, engine


def types(model: onnx.ModelProto) -> dict[str, str]:
    """Each input and output of the parsed network with its type."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = compat.create_network(trt, builder)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        return {}
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    return {tensor.name: tensor.dtype.name for tensor in tensors}


def main() -> None:
    """See the module."""
    spec = load(sys.argv[1])
    for path in sys.argv[2:]:
        model = onnx.load(path)
        try:
            plan = engine.serialize(spec, model, Target("tensorrt"), trt=trt)
            print(json.dumps({"types": types(model), "bytes": len(plan)}), flush=True)
        except SSDError as error:
            print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main()
