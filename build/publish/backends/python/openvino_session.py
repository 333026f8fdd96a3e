"""OpenVINO on a CPU behind the few calls of an ONNX Runtime session that model.py makes.

Published beside model.py where the engine is OpenVINO. The packages lie in a folder of their own, which config.pbtxt's
parameter `engine_packages` names.
"""

import sys
from collections import namedtuple
from pathlib import Path

Tensor = namedtuple("Tensor", "name type shape")

_TYPES = {"u8": "tensor(uint8)", "i32": "tensor(int32)", "f32": "tensor(float)"}


class Session:
    """A compiled model with one stream.

    Args:
        path: an ONNX file without functions of its own.
        threads: of the stream.
        packages: the folder with the package openvino; empty where Python finds it by itself.
        precision: in which it computes what is not quantised: f32 or bf16.

    Raises:
        ImportError: there is no such package.
        RuntimeError: OpenVINO cannot read or compile the model.
    """

    def __init__(self, path, threads, packages="", precision="f32"):
        if packages and packages not in sys.path:
            sys.path.append(packages)  # last: NumPy and the rest stay those that are installed
        import openvino

        core = openvino.Core()
        settings = {
            # Without it a CPU with AVX512-BF16 or AMX computes in BF16.
            "INFERENCE_PRECISION_HINT": precision,
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            # Instances are processes: each would pin itself to the first core.
            "ENABLE_CPU_PINNING": False,
        }
        compiled = core.compile_model(core.read_model(Path(path)), "CPU", settings)
        self._inputs = [_tensor(port) for port in compiled.inputs]
        self._outputs = [_tensor(port) for port in compiled.outputs]
        self._places = {tensor.name: place for place, tensor in enumerate(self._outputs)}
        self._request = compiled.create_infer_request()

    def get_inputs(self):
        return self._inputs

    def get_outputs(self):
        return self._outputs

    def run(self, names, feeds):
        """The outputs of these names, as arrays of their own."""
        self._request.infer(feeds, share_inputs=True)
        return [self._request.get_output_tensor(self._places[name]).data.copy() for name in names]


def _tensor(port):
    kind = port.get_element_type().get_type_name()
    sizes = [None if size.is_dynamic else size.get_length() for size in port.get_partial_shape()]
    return Tensor(port.get_any_name(), _TYPES.get(kind, kind), sizes)
