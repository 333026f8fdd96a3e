"""INT8 by TensorRT's own calibration, for versions up to 10: the builder measures and decides, the graph stays FP32.

Explicit Q/DQ (build/quantization/qdq.py) is the way that lasts: TensorRT deprecated this one in 10.1 and removed it in
11. It is here for those who must reproduce an older engine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import DataError, RuntimeUnavailableError
from build.files import write
from build.gate import datasets
from build.spec import Spec
from build.tensorrt import compat
from build.tensorrt.cuda import Buffer, Cuda

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Method → TensorRT's base class.
BASES = {
    "entropy": "IInt8EntropyCalibrator2",
    "minmax": "IInt8MinMaxCalibrator",
    "percentile": "IInt8LegacyCalibrator",
}


def calibrator(
    spec: Spec,
    cache: Path,
    model: bytes,
    *,
    batch: int = 8,
    trt: Any = None,
    cuda: Cuda | None = None,
) -> Any:
    """What `IBuilderConfig.int8_calibrator` takes: the calibration pictures, and a cache that is refused when stale.

    Args:
        spec: names the pictures, the calibrator and its percentile.
        cache: the artifacts' folder.
        model: the served graph, serialised; another one makes another cache.
        batch: pictures per step.
        trt: the module; None = the installed one.
        cuda: the calls; None = cuda-python's.

    Raises:
        RuntimeUnavailableError: TensorRT is not there, or has no calibrators any more.
        DataError: there are no pictures, or not enough for one batch.
    """
    trt = trt or compat.load()
    method = spec.quantization.implicit_calibrator
    base = base_class(method, trt)
    pictures = datasets.calibration(spec, cache / "datasets")
    if len(pictures) < batch:
        raise DataError(
            f"{pictures.name} holds {len(pictures)} pictures, but TensorRT calibrates on whole batches of {batch}",
            fix="name a folder with more: [data] calibration; some hundreds make good scales",
        )
    feed = _Feed(spec, pictures, batch, cuda)
    about = [method, spec.quantization.percentile, compat.version(trt), pictures.digest(), batch]
    key = hashlib.sha256(json.dumps(about).encode() + model).hexdigest()
    file = cache / spec.model.name / f"implicit-{method}.cache"

    class Calibrator(base):  # type: ignore[misc, valid-type]
        """The base class decides how; this one only says on what."""

        def get_batch_size(self) -> int:
            return batch

        def get_batch(self, names: list[str]) -> list[int] | None:
            return feed.next(names)

        def read_calibration_cache(self) -> bytes | None:
            return read_cache(file, key)

        def write_calibration_cache(self, data: Any) -> None:
            write_cache(file, key, bytes(data))

        # Of the legacy calibrator alone.
        def get_quantile(self) -> float:
            return spec.quantization.percentile / 100

        def get_regression_cutoff(self) -> float:
            return 1.0

        def read_histogram_cache(self, length: int) -> None:
            return None

        def write_histogram_cache(self, data: Any, length: int) -> None:
            return None

    return Calibrator()


def base_class(method: str, trt: Any = None) -> Any:
    """TensorRT's base class of a method.

    Raises:
        RuntimeUnavailableError: TensorRT is not there, or has no calibrators any more.
    """
    trt = trt or compat.load()
    base = getattr(trt, BASES[method], None)
    if base is None:
        raise RuntimeUnavailableError(
            f"TensorRT {compat.version(trt)} has no {BASES[method]}: implicit calibration is not possible with it",
            why="TensorRT 11 removed calibrators together with weakly typed networks",
            fix="calibrate explicitly, which every version takes: leave --calibration implicit out",
        )
    return base


def read_cache(file: Path, key: str) -> bytes | None:
    """TensorRT's calibration table, if it was written under this key; None lets TensorRT calibrate anew."""
    try:
        stored, _, data = file.read_bytes().partition(b"\n")
    except OSError:
        return None
    return data if stored.decode(errors="replace") == key else None


def write_cache(file: Path, key: str, data: bytes) -> None:
    """Keeps TensorRT's calibration table under its key, whole or not at all.

    Raises:
        WriteError: the operating system refuses.
    """
    write(file, f"{key}\n".encode() + data)


class _Feed:
    """The pictures on the GPU, batch by batch; TensorRT wants whole batches, so that a last part one is left out."""

    def __init__(self, spec: Spec, pictures: datasets.Pictures, batch: int, cuda: Cuda | None) -> None:
        self._spec, self._batch, self._cuda = spec, batch, cuda
        self._batches: Iterator[NDArray[np.uint8]] = datasets.arrays(pictures, spec.input, batch)
        self._buffers: dict[str, Buffer] = {}

    def next(self, names: list[str]) -> list[int] | None:
        """The GPU's addresses of the next batch of these inputs; None after the last, when the memory is given back."""
        cuda = self._cuda = self._cuda or Cuda()
        pixels = next((part for part in self._batches if len(part) == self._batch), None)
        if pixels is None:
            for buffer in self._buffers.values():
                buffer.close()
            self._buffers = {}
            return None
        values = self._spec.nms.feeds(pixels)
        for name in names:
            array = values[name]
            if name not in self._buffers:
                self._buffers[name] = Buffer(cuda, array.shape, array.dtype)
            self._buffers[name].host(array.shape)[...] = array
            self._buffers[name].upload(array.nbytes, 0)
        cuda("cudaStreamSynchronize", 0)
        return [self._buffers[name].device for name in names]
