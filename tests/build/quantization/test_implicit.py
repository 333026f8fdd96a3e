"""TensorRT's own calibration: answers to what TensorRT 8 to 10 ask a calibrator; refused where it is gone."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from build.errors import DataError, RuntimeUnavailableError
from build.gate import datasets
from build.quantization import implicit
from build.spec import Spec, load
from build.tensorrt.cuda import Cuda
from tests.build import pictures, tiny_model


class HostOnly:
    """cuda-python's calls on host memory, so that what was uploaded can be looked at."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1)  # noqa: N815

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}

    def _allocate(self, size: int) -> tuple[int, int]:
        memory = ctypes.create_string_buffer(size)
        address = ctypes.addressof(memory)
        self.held[address] = memory
        return 0, address

    cudaMalloc = cudaMallocHost = _allocate  # noqa: N815

    def _free(self, address: int) -> tuple[int]:
        del self.held[address]
        return (0,)

    cudaFree = cudaFreeHost = _free  # noqa: N815

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:  # noqa: N802
        ctypes.memmove(to, source, size)
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:  # noqa: N802
        return (0,)


class Base:
    """Stands for TensorRT's base class."""


def version(number: str, *names: str) -> Any:
    return SimpleNamespace(__version__=number, **dict.fromkeys(names, Base))


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    path = tiny_model.write(tmp_path / "tiny")
    pictures.write(tmp_path / "tiny" / "pictures", 19, tiny_model.LABELS)
    path.write_text(f'{path.read_text()}\n[data]\ncalibration = "pictures"\n\n[quantization]\npercentile = 99.5\n')
    return load(path)


@pytest.mark.parametrize("method", implicit.BASES)
def test_it_feeds_the_pictures_in_whole_batches_and_gives_the_memory_back(
    spec: Spec, tmp_path: Path, method: str
) -> None:
    device = HostOnly()
    trt = version("10.3.0", *implicit.BASES.values())
    settings = dataclasses.replace(spec.quantization, calibrator=method)
    spec = dataclasses.replace(spec, quantization=settings)
    calibrator = implicit.calibrator(spec, tmp_path, b"model", batch=8, trt=trt, cuda=Cuda(device))
    assert isinstance(calibrator, Base)
    assert calibrator.get_batch_size() == 8
    wanted = np.concatenate(list(datasets.arrays(datasets.calibration(spec, tmp_path), spec.input, 8)))
    names = ["images", "iou_threshold"]
    for start in (0, 8):
        addresses = calibrator.get_batch(names)
        pixels = np.ctypeslib.as_array((ctypes.c_uint8 * wanted[:8].size).from_address(addresses[0]))
        assert (pixels.reshape(8, 8, 8, 3) == wanted[start : start + 8]).all()
        thresholds = np.ctypeslib.as_array((ctypes.c_float * 8).from_address(addresses[1]))
        assert (thresholds == np.float32(spec.nms.iou_threshold)).all()
    assert calibrator.get_batch(names) is None
    assert not device.held
    assert calibrator.get_quantile() == pytest.approx(0.995)


def test_its_cache_is_refused_when_anything_changed(spec: Spec, tmp_path: Path) -> None:
    trt = version("10.3.0", *implicit.BASES.values())

    def calibrator(model: bytes = b"model", spec: Spec = spec, trt: Any = trt) -> Any:
        return implicit.calibrator(spec, tmp_path, model, trt=trt, cuda=Cuda(HostOnly()))

    assert calibrator().read_calibration_cache() is None
    calibrator().write_calibration_cache(memoryview(b"TRT-100300-EntropyCalibration2\nimages: 3c010a14\n"))
    assert calibrator().read_calibration_cache() == b"TRT-100300-EntropyCalibration2\nimages: 3c010a14\n"
    assert calibrator(model=b"another").read_calibration_cache() is None
    assert calibrator(trt=version("10.4.0", *implicit.BASES.values())).read_calibration_cache() is None
    (spec.path.parent / "pictures" / "0000.png").unlink()
    assert calibrator().read_calibration_cache() is None


def test_where_it_cannot_be(spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"TensorRT 11\.1\.0 has no IInt8EntropyCalibrator2"):
        implicit.calibrator(spec, tmp_path, b"", trt=version("11.1.0"))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(RuntimeUnavailableError, match="the Python package tensorrt"):
        implicit.calibrator(spec, tmp_path, b"")
    with pytest.raises(DataError, match="holds 19 pictures, but TensorRT calibrates on whole batches of 20"):
        implicit.calibrator(spec, tmp_path, b"", batch=20, trt=version("10.3.0", *implicit.BASES.values()))
    for picture in (spec.path.parent / "pictures").glob("*.png"):
        picture.unlink()
    with pytest.raises(DataError, match="holds no pictures"):
        implicit.calibrator(spec, tmp_path, b"", trt=version("10.3.0", *implicit.BASES.values()))
