"""What this project asks of CUDA, through cuda-python: the GPU's facts, memory, streams, events and graphs.

Every call of cuda-python answers (error, values ...); `Cuda` turns an error into an EngineError that says what was
asked. The module moved with cuda-python 12.8: `runtime` finds it in both places.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from build.errors import EngineError, RuntimeUnavailableError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """The GPU and the software under it.

    Attributes:
        name: as NVIDIA names it.
        compute_capability: "9.0" and the like.
        memory_mib: its memory.
        driver: the driver's version; empty where the system does not say.
        cuda_driver, cuda_runtime: the CUDA version that the driver can do, and that of cuda-python.
    """

    name: str
    compute_capability: str
    memory_mib: int
    driver: str
    cuda_driver: str
    cuda_runtime: str

    def as_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return dataclasses.asdict(self)


def runtime() -> Any:
    """cuda-python's module of the CUDA runtime.

    Raises:
        RuntimeUnavailableError: the package is not there.
    """
    try:
        from cuda.bindings import runtime as module
    except ImportError:
        try:
            from cuda import cudart as module
        except ImportError:
            raise RuntimeUnavailableError(
                "the Python package cuda-python is not installed",
                fix="./invoke install-tensorrt (docs/tensorrt.md says which version a server needs)",
            ) from None
    return module


class Cuda:
    """The calls, each checked.

    Args:
        module: cuda-python's runtime module; None = the installed one.
    """

    def __init__(self, module: Any = None) -> None:
        self.module = module or runtime()

    def __call__(self, name: str, *args: Any) -> Any:
        """Calls `name` of the runtime; None, its one value, or the tuple of its values.

        Raises:
            EngineError: CUDA reports an error.
        """
        try:
            error, *values = getattr(self.module, name)(*args)
        except RuntimeError as failed:  # no driver library to call into
            raise EngineError(f"{name}: {failed}", why="there is no NVIDIA driver on this machine") from None
        if int(error):
            text = self.module.cudaGetErrorString(error)[1]
            text = text.decode() if isinstance(text, bytes) else str(text)
            out_of_memory = error == self.module.cudaError_t.cudaErrorMemoryAllocation
            raise EngineError(
                f"{name}: {text}",
                why="the GPU has no memory left" if out_of_memory else "",
                fix="end other programs on the GPU (nvidia-smi names them), or take a smaller batch"
                if out_of_memory
                else "",
            )
        return values[0] if len(values) == 1 else tuple(values) or None

    def gpu(self) -> Gpu:
        """The facts of the current GPU.

        Raises:
            RuntimeUnavailableError: there is none, or no driver for it.
        """
        try:
            properties = self("cudaGetDeviceProperties", self("cudaGetDevice"))
            versions = self("cudaDriverGetVersion"), self("cudaRuntimeGetVersion")
        except EngineError as error:
            raise RuntimeUnavailableError(
                f"no NVIDIA GPU can be used: {error.what}",
                why="there is none, or its driver is missing or older than this CUDA",
                fix="see what nvidia-smi says; in a container, start it with --gpus all",
            ) from None
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        driver, library = (f"{version // 1000}.{version % 1000 // 10}" for version in versions)
        capability, memory = f"{properties.major}.{properties.minor}", int(properties.totalGlobalMem) >> 20
        return Gpu(name.rstrip("\0"), capability, memory, driver_version(), driver, library)


def driver_version(path: Path = _DRIVER) -> str:
    """The NVIDIA driver's version, as the kernel module tells it; empty where it does not."""
    try:
        line = path.read_text().splitlines()[0]
    except (OSError, IndexError):
        return ""
    return next((word for word in line.split() if word[0].isdigit() and "." in word), "")


class Buffer:
    """One tensor's memory: pinned on the host, and on the GPU.

    Args:
        cuda: the calls.
        shape, dtype: of the largest array that it will hold.
    """

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        import ctypes
        import math

        import numpy as np

        self._cuda, self.dtype = cuda, dtype
        self.nbytes = math.prod(shape) * dtype.itemsize
        self.device = int(cuda("cudaMalloc", self.nbytes))
        try:
            self._pinned = int(cuda("cudaMallocHost", self.nbytes))
        except EngineError:
            cuda("cudaFree", self.device)
            raise
        memory = (ctypes.c_ubyte * self.nbytes).from_address(self._pinned)
        self._host: NDArray[Any] = np.ctypeslib.as_array(memory)

    def host(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """The pinned memory as an array of this shape; later runs write over it."""
        import math

        part: NDArray[Any] = self._host[: math.prod(shape) * self.dtype.itemsize]
        return part.view(self.dtype).reshape(shape)

    def upload(self, nbytes: int, stream: Any) -> None:
        """Host to GPU, without waiting."""
        kind = self._cuda.module.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._cuda("cudaMemcpyAsync", self.device, self._pinned, nbytes, kind, stream)

    def download(self, nbytes: int, stream: Any) -> None:
        """GPU to host, without waiting."""
        kind = self._cuda.module.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._cuda("cudaMemcpyAsync", self._pinned, self.device, nbytes, kind, stream)

    def close(self) -> None:
        """Gives the memory back; arrays from `host` must not be used any more."""
        self._cuda("cudaFree", self.device)
        self._cuda("cudaFreeHost", self._pinned)

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
