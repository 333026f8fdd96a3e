"""The same network in other runtimes, side by side in one run: ONNX Runtime FP32 and INT8, torch eager and compiled.

On a GPU torch, ONNX Runtime's CUDA provider and Torch-TensorRT as well, timed with CUDA events (never run on a GPU so
far). All take the pixels that the served model takes and end before SSDNMS, which only ONNX Runtime and TensorRT have.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import contract
from build.errors import RuntimeUnavailableError, SSDError
from build.spec import Spec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from perf.journal import Journal

BASE = "ONNX Runtime fp32"
FEWEST = 3  # runs of a round
_GET_TORCH = (
    "install the group train: .venv/bin/python -m pip install --no-deps --require-hashes -r requirements/train.lock"
)


@dataclass(frozen=True)
class Peer:
    """A network that is ready to run.

    Attributes:
        timed: runs one batch and gives its milliseconds.
        note: what a reader of its figures must know.
        keeps: memory that `timed` reads by its address alone.
    """

    timed: Callable[[], float]
    note: str = ""
    keeps: object = None


Makers = dict[str, Callable[[], Peer]]


def measure(
    spec: Spec,
    artifacts: Path,
    journal: Journal,
    batch_sizes: Sequence[int] = (1, 8),
    *,
    seconds: float = 0.5,
    rounds: int = 5,
) -> list[dict[str, Any]]:
    """Times every peer in turn within each round, one batch after another, with all cores.

    Args:
        spec: the model; torch's peers need a network.py beside it, which defines one torch.nn.Module.
        artifacts: where pictures and calibration are kept.
        journal: of the run.
        batch_sizes: one table for each.
        seconds: of a peer in each round.
        rounds: how many.

    Returns:
        Rows {name, threads, batch_size, images_per_second (one per round), median_ms (of a batch), ratio (the median
        over the rounds of images per second over ONNX Runtime's FP32 in the same round), note}; or {name, threads,
        batch_size, skipped}, where `skipped` says why and how to change that.

    Raises:
        SSDError: not even the FP32 graph can be made or run.
    """
    from build.publish.config import cores

    rows: list[dict[str, Any]] = []
    for batch_size in batch_sizes:
        settings: dict[str, Any] = {"batch_size": batch_size, "threads": cores(), "seconds": seconds, "rounds": rounds}
        work = functools.partial(_side_by_side, spec, artifacts, **settings)
        rows += journal.measure({"peers": spec.model.name, **settings}, work)["rows"]
    return rows


def _side_by_side(
    spec: Spec, artifacts: Path, *, batch_size: int, threads: int, seconds: float, rounds: int
) -> dict[str, Any]:
    from build.gate.verify import images_for
    from perf.direct import feeds

    pictures, _ = images_for(spec, artifacts / "datasets", batch_size)
    images = feeds(list(pictures), batch_size=batch_size)[0][contract.IMAGES]
    ready: dict[str, Peer] = {}
    skipped: dict[str, str] = {}
    makers = _on_cpu(spec, artifacts, images, threads) | _on_gpu(spec, images)
    for name, make in makers.items():
        try:
            ready[name] = make()
            ready[name].timed()
        except Exception as error:  # whatever a peer's own library raises must not take the others' figures along
            if name == BASE:
                raise
            ready.pop(name, None)
            skipped[name] = _why(error)
    times: dict[str, list[list[float]]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, peer in ready.items():
            times[name].append(_round(peer, seconds))
    speeds = {
        name: [batch_size * 1000 / statistics.fmean(milliseconds) for milliseconds in series]
        for name, series in times.items()
    }
    rows: list[dict[str, Any]] = []
    for name in makers:
        row = {"name": name, "threads": threads, "batch_size": batch_size}
        if name in skipped:
            rows.append({**row, "skipped": skipped[name]})
            continue
        ratios = [speed / base for speed, base in zip(speeds[name], speeds[BASE], strict=True)]
        rows.append(
            {
                **row,
                "images_per_second": speeds[name],
                "median_ms": statistics.median(milliseconds for series in times[name] for milliseconds in series),
                "ratio": statistics.median(ratios),
                "note": ready[name].note,
            }
        )
    return {"rows": rows}


def _round(peer: Peer, seconds: float) -> list[float]:
    peer.timed()  # whatever ran before has left its data in the caches and its threads spinning
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < FEWEST or time.perf_counter() < deadline:
        times.append(peer.timed())
    return times


def _why(error: Exception) -> str:
    """One line: what is wrong, and what to do about it."""
    if isinstance(error, SSDError):
        return ": ".join(filter(None, [error.what, error.fix]))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"it failed: {type(error).__name__}: {lines[0] if lines else 'no reason given'}"[:300]


# -- on the CPU --------------------------------------------------------------------------------------------------------


def _on_cpu(spec: Spec, artifacts: Path, images: NDArray[Any], threads: int) -> Makers:
    makers: Makers = {
        f"ONNX Runtime {kind}": functools.partial(_onnxruntime, spec, artifacts, images, threads, kind)
        for kind in ("fp32", "int8")
    }
    if _network_path(spec).is_file():
        makers |= {
            "torch eager": functools.partial(_torch, spec, images, threads, compiled=False),
            "torch.compile": functools.partial(_torch, spec, images, threads, compiled=True),
        }
    return makers


def _onnxruntime(spec: Spec, artifacts: Path, images: NDArray[Any], threads: int, kind: str) -> Peer:
    from build.graph.attach import before_nms
    from build.quantization.candidates import all_calibrators, candidates
    from build.session import session

    chosen = candidates(spec, kind, artifacts, calibrators=all_calibrators(kind)[:1])[0]
    runs = session(before_nms(chosen.runs), threads=threads)
    return Peer(_clocked(lambda: runs.run(None, {contract.IMAGES: images})))


def _torch(spec: Spec, images: NDArray[Any], threads: int, *, compiled: bool) -> Peer:
    torch = _import_torch()
    torch.set_num_threads(threads)
    network, note = network_of(spec)
    pixels = torch.from_numpy(images)
    run = network
    if compiled:
        torch.compiler.reset()  # it gives up, silently, after compiling the same code for a few batch sizes
        run = torch.compile(network, dynamic=False, options={"freezing": True})

    return Peer(_clocked(_inferring(torch, run, pixels)), note)


def _inferring(torch: Any, network: Callable[[Any], object], pixels: Any) -> Callable[[], None]:
    def once() -> None:
        with torch.inference_mode():
            network(pixels)

    return once


def _clocked(run: Callable[[], object]) -> Callable[[], float]:
    def timed() -> float:
        begun = time.perf_counter()
        run()
        return (time.perf_counter() - begun) * 1000

    return timed


def _import_torch() -> Any:
    try:
        import torch  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        if error.name != "torch":
            raise
        raise RuntimeUnavailableError("torch is not installed", fix=_GET_TORCH) from None
    return torch


def _network_path(spec: Spec) -> Path:
    return spec.path.parent / "network.py"


def network_of(spec: Spec) -> tuple[Any, str]:
    """The spec's network.py as a module of torch: UINT8 [B,H,W,3] → what the network answers, in evaluation mode.

    The weights are those of the source ONNX, where its constants are called as the network's parameters are.

    Returns:
        The module, and a note: empty, or that its weights are random.

    Raises:
        RuntimeUnavailableError: torch is not installed, or network.py does not define one network.
    """
    torch = _import_torch()
    from onnx import numpy_helper

    from build.graph.attach import load_source

    name, path = f"{spec.model.name}_network", _network_path(spec)
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(module_spec)  # torch.compile looks it up there
    module_spec.loader.exec_module(module)
    kinds = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, torch.nn.Module) and kind.__module__ == name
    ]
    if len(kinds) != 1:
        raise RuntimeUnavailableError(
            f"{path.name} defines {len(kinds)} classes of torch.nn.Module, but must define one to be timed"
        )
    network = kinds[0]()
    state = network.state_dict()
    trained = {tensor.name: numpy_helper.to_array(tensor) for tensor in load_source(spec).graph.initializer}
    wanted = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    known = all(key in trained and trained[key].shape == tuple(value.shape) for key, value in wanted.items())
    if known:
        network.load_state_dict({**state, **{key: torch.tensor(trained[key]) for key in wanted}})

    class Front(torch.nn.Module):  # type: ignore[misc, name-defined]
        """The served graph's front before the network."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network
            for key in ("mean", "std"):
                self.register_buffer(key, torch.tensor(getattr(spec.input, key)).reshape(1, 3, 1, 1))

        def forward(self, images: Any) -> Any:
            # The pictures' order in memory is the one that torch calls channels_last: its fastest on CPU and GPU.
            pixels = images.permute(0, 3, 1, 2).float()
            if spec.input.color_order == "BGR":
                pixels = pixels.flip(1)
            return self.network((pixels - self.mean) / self.std)

    note = "" if known else f"random weights: those of {spec.model.onnx} have other names"
    return Front().eval().to(memory_format=torch.channels_last), note


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def _on_gpu(spec: Spec, images: NDArray[Any]) -> Makers:
    makers: Makers = {"ONNX Runtime CUDA": functools.partial(_onnxruntime_cuda, spec, images)}
    if _network_path(spec).is_file():
        makers |= {
            "torch CUDA": functools.partial(_torch_cuda, spec, images),
            "Torch-TensorRT": functools.partial(_torch_tensorrt, spec, images),
        }
    return makers


def _cuda() -> Any:
    """torch on a GPU: its events time every peer there.

    Raises:
        RuntimeUnavailableError: it is not to be had.
    """
    from build.tensorrt.cuda import driver_version

    if not driver_version():
        raise RuntimeUnavailableError("no NVIDIA GPU here")
    torch = _import_torch()
    if not torch.cuda.is_available():
        raise RuntimeUnavailableError(f"torch {torch.__version__} finds no GPU", fix="install its build for CUDA")
    return torch


def _by_events(torch: Any, run: Callable[[], object], stream: Any = None) -> Callable[[], float]:
    """Milliseconds between two events around `run` on its stream (None = torch's): no copy from or to the host."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed() -> float:
        first.record(stream)
        run()
        last.record(stream)
        last.synchronize()
        return float(first.elapsed_time(last))

    return timed


def _gpu_note(torch: Any, note: str = "") -> str:
    return "; ".join(filter(None, [f"on {torch.cuda.get_device_name()}, pictures already there", note]))


def _torch_cuda(spec: Spec, images: NDArray[Any]) -> Peer:
    torch = _cuda()
    network, note = network_of(spec)
    network, pixels = network.cuda(), torch.from_numpy(images).cuda()

    return Peer(_by_events(torch, _inferring(torch, network, pixels)), _gpu_note(torch, note))


def _torch_tensorrt(spec: Spec, images: NDArray[Any]) -> Peer:
    torch = _cuda()
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise RuntimeUnavailableError("Torch-TensorRT is not installed", fix="pip install torch-tensorrt")
    import torch_tensorrt  # type: ignore[import-not-found,unused-ignore]

    network, note = network_of(spec)
    pixels = torch.from_numpy(images).cuda()
    compiled = torch_tensorrt.compile(network.cuda(), ir="dynamo", inputs=[pixels])

    return Peer(_by_events(torch, _inferring(torch, compiled, pixels)), _gpu_note(torch, note))


def _onnxruntime_cuda(spec: Spec, images: NDArray[Any]) -> Peer:
    torch = _cuda()
    import onnxruntime

    from build.graph.attach import attach, before_nms

    provider = "CUDAExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise RuntimeUnavailableError(
            "this onnxruntime has no CUDA provider", fix="pip install onnxruntime-gpu in place of onnxruntime"
        )
    pixels, stream = torch.from_numpy(images).cuda(), torch.cuda.Stream()
    torch.cuda.synchronize()
    settings = {"user_compute_stream": str(stream.cuda_stream)}
    session = onnxruntime.InferenceSession(
        before_nms(attach(spec)).SerializeToString(), providers=[(provider, settings)]
    )
    if provider not in session.get_providers():
        raise RuntimeUnavailableError(
            "ONNX Runtime's CUDA provider does not load", fix="see onnxruntime's own messages"
        )
    binding = session.io_binding()
    binding.bind_input(contract.IMAGES, "cuda", 0, images.dtype, images.shape, pixels.data_ptr())
    for name in contract.HEADS:
        binding.bind_output(name, "cuda", 0)
    run = _by_events(torch, lambda: session.run_with_iobinding(binding), stream)
    return Peer(run, _gpu_note(torch), keeps=pixels)
