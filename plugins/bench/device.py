"""Where the tensors of a call are: on the GPU, by cuda-python alone, or in the host's memory for a CPU's library."""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from build.tensorrt.cuda import Cuda

Array = np.ndarray[Any, Any]
WARM_UP = 3


class HostBlock:
    """Bytes of the host at an address that 16 divides."""

    def __init__(self, nbytes: int) -> None:
        whole = np.empty(nbytes + 16, np.uint8)
        start = -whole.ctypes.data % 16
        self._bytes = whole[start : start + nbytes]
        self.address, self.nbytes = self._bytes.ctypes.data, nbytes

    def fill(self, byte: int) -> None:
        """Every byte."""
        self._bytes[:] = byte

    def write(self, array: Array) -> None:
        """The array's bytes, from the block's start."""
        self._bytes[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def read(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array of its own."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self._bytes[:size].view(dtype).reshape(shape).copy()


class Host:
    """The CPU: launches run at once."""

    stream = 0

    def block(self, nbytes: int) -> HostBlock:
        """Uninitialised bytes."""
        return HostBlock(nbytes)

    def synchronize(self) -> None:
        """Nothing is under way."""


class GpuBlock:
    """Bytes of the GPU; given back with the object."""

    def __init__(self, gpu: Gpu, nbytes: int) -> None:
        self._gpu, self.nbytes = gpu, nbytes
        self.address = int(gpu.cuda("cudaMalloc", max(nbytes, 1)))

    def __del__(self) -> None:
        address = getattr(self, "address", None)
        if address is not None:
            with contextlib.suppress(Exception):  # after an error of a kernel every call fails
                self._gpu.cuda("cudaFree", address)

    def fill(self, byte: int) -> None:
        """Every byte."""
        self._gpu.cuda("cudaMemset", self.address, byte, self.nbytes)

    def write(self, array: Array) -> None:
        """The array's bytes, from the block's start."""
        array = np.ascontiguousarray(array)
        kind = self._gpu.cuda.module.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._gpu.cuda("cudaMemcpy", self.address, array.ctypes.data, array.nbytes, kind)

    def read(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array of its own."""
        array = np.empty(shape, dtype)
        kind = self._gpu.cuda.module.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._gpu.cuda("cudaMemcpy", array.ctypes.data, self.address, array.nbytes, kind)
        return array


class Gpu:
    """The current GPU.

    Args:
        cuda: the calls; None = those of the installed cuda-python.

    Raises:
        RuntimeUnavailableError: there is no cuda-python, driver or GPU.
    """

    def __init__(self, cuda: Cuda | None = None) -> None:
        self.cuda = cuda or Cuda()
        self.facts = self.cuda.gpu()
        properties = self.cuda("cudaGetDeviceProperties", self.cuda("cudaGetDevice"))
        self.l2_bytes, self.multiprocessors = int(properties.l2CacheSize), int(properties.multiProcessorCount)
        self.handle = self.cuda("cudaStreamCreate")
        self.stream = int(self.handle)

    def block(self, nbytes: int) -> GpuBlock:
        """Uninitialised bytes."""
        return GpuBlock(self, nbytes)

    def synchronize(self) -> None:
        """Waits for all that was launched."""
        self.cuda("cudaStreamSynchronize", self.handle)

    @contextmanager
    def graph(self, launch: Callable[[], None]) -> Iterator[Any]:
        """A CUDA graph of what `launch` enqueues on `stream`."""
        mode = self.cuda.module.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.cuda("cudaStreamBeginCapture", self.handle, mode)
        try:
            launch()
        finally:
            captured = self.cuda("cudaStreamEndCapture", self.handle)
        graph = self.cuda("cudaGraphInstantiate", captured, 0)
        try:
            yield graph
        finally:
            self.cuda("cudaGraphExecDestroy", graph)
            self.cuda("cudaGraphDestroy", captured)

    def replay(self, graph: Any) -> None:
        """Runs a graph and waits for it."""
        self.cuda("cudaGraphLaunch", graph, self.handle)
        self.synchronize()

    def timed(self, graph: Any, calls: int, replays: int) -> tuple[float, float]:
        """Median and smallest microseconds of one of the graph's calls, by CUDA events."""
        start, end = self.cuda("cudaEventCreate"), self.cuda("cudaEventCreate")
        times = []
        for _ in range(WARM_UP + replays):
            self.cuda("cudaEventRecord", start, self.handle)
            self.cuda("cudaGraphLaunch", graph, self.handle)
            self.cuda("cudaEventRecord", end, self.handle)
            self.cuda("cudaEventSynchronize", end)
            times.append(float(self.cuda("cudaEventElapsedTime", start, end)) * 1000 / calls)
        for event in (start, end):
            self.cuda("cudaEventDestroy", event)
        return statistics.median(times[WARM_UP:]), min(times[WARM_UP:])

    def copy_bandwidth(self, nbytes: int = 2 << 30) -> float:
        """Bytes read and written in a second by a copy on the device."""
        source, target = self.block(nbytes), self.block(nbytes)
        source.fill(1)
        kind = self.cuda.module.cudaMemcpyKind.cudaMemcpyDeviceToDevice

        def copy() -> None:
            self.cuda("cudaMemcpyAsync", target.address, source.address, nbytes, kind, self.handle)

        with self.graph(copy) as graph:
            return 2 * nbytes / (self.timed(graph, 1, 25)[0] * 1e-6)
