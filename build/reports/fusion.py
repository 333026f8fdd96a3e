"""`invoke fusion-report`: which source nodes became which kernel, what each kernel costs, and what bounds it.

Two runtimes give the same `Report`: ONNX Runtime (its optimised graph and its profile) and TensorRT (the JSON of its
engine inspector and of its profile). Every kernel is mapped back to the nodes of the source ONNX by evidence alone: a
tensor that kept its name, a kernel that is named after one, the region of a local function, TensorRT's metadata. Each
claim is then checked on the source's dataflow; a kernel for which nothing holds is reported as unmapped.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from build import files
from build.contract import BASELINE, RUNTIMES
from build.errors import OptionError
from build.files import ARTIFACTS, MODELS, REPOSITORY
from build.graph.attach import attach
from build.publish import repository
from build.publish.config import instances_and_threads
from build.reports import fusion_html, fusion_text
from build.reports.fusion_model import Report
from build.reports.fusion_onnxruntime import onnxruntime_report
from build.reports.fusion_tensorrt import record_layers, tensorrt_report
from build.reports.html import number
from build.reports.roofline import FusionError, measure_ceilings, read_ceilings
from build.spec import load

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def fusion_report(
    runtime: str = "onnxruntime",
    model: str = "shapes",
    precision: str = "fp32",
    *,
    layers: Path | None = None,
    profile: Path | None = None,
    ceilings: Path | None = None,
    threads: int = 0,
    runs: int = 50,
    models: Path = MODELS,
    artifacts: Path = ARTIFACTS,
    published: Path = REPOSITORY,
) -> Path:
    """Writes report.md, report.json and report.html, and prints the essence.

    Args:
        runtime: onnxruntime, or tensorrt.
        model: a folder of `models`.
        precision: fp32, or another one that has been built.
        layers: tensorrt: the engine inspector's JSON; default: what the published plan says on the GPU here, which is
            kept as artifacts/<model>/<precision>/layers.json, or else what was kept there before.
        profile: tensorrt: times in trtexec's format; default profile.json beside it, where it is there.
        ceilings: a JSON file of ceilings; default: measured here for onnxruntime, ceilings.json beside the layers.
        threads: for onnxruntime; 0 = as many as a served instance has.
        runs: profiled runs.
        models: where the source models are.
        artifacts: where built models are and where the report goes.
        published: the model repository.

    Returns:
        The folder with the three files: artifacts/<model>/<precision>/fusion-<runtime>.

    Raises:
        SSDError: the model, the precision or a file is not there or not right.
    """
    import onnx

    if runtime not in RUNTIMES:
        raise OptionError(f"runtime is {runtime!r}, but must be {' or '.join(RUNTIMES)}")
    for name, value, least in (("runs", runs, 1), ("threads", threads, 0)):
        if value < least:
            raise OptionError(f"{name} is {value}, but must be {least} or more")
    spec = load(models / model)
    name, built = spec.model.name, artifacts / spec.model.name / precision
    if precision == BASELINE:
        graph = attach(spec)
    elif (built / "model.onnx").is_file():
        graph = onnx.load(built / "model.onnx")
    else:
        raise FusionError(
            f"{built / 'model.onnx'} is not there", fix=f"build it: ./invoke build-engines --precision {precision}"
        )
    feeds = spec.nms.feeds(picture(spec.input.height, spec.input.width)[None])
    if runtime == "onnxruntime":
        threads = threads or instances_and_threads(spec, runtime)[1]
        limits = read_ceilings(ceilings) if ceilings else measure_ceilings(threads)
        report = onnxruntime_report(name, graph, precision, feeds, threads=threads, runs=runs, ceilings=limits)
    else:
        if layers is None:
            layers = built / "layers.json"
            version = published / name / str(repository.served_version(published, name))
            record_layers(version, precision, feeds, layers, runs)
        profile = profile or _if_there(layers.with_name("profile.json"))
        ceilings = ceilings or _if_there(layers.with_name("ceilings.json"))
        given = read_ceilings(ceilings) if ceilings else None
        report = tensorrt_report(name, graph, precision, layers, profile, given)
    folder = built / f"fusion-{runtime}"
    files.write_json(folder / "report.json", report.as_json())
    files.write(folder / "report.md", fusion_text.markdown(report))
    files.write(folder / "report.html", fusion_html.html(report))
    _print(report, folder)
    return folder


def _if_there(path: Path) -> Path | None:
    return path if path.is_file() else None


def picture(height: int, width: int) -> NDArray[np.uint8]:
    """UINT8 [H,W,3], the same every time: shapes of plain colour on a gradient with a little noise."""
    import numpy as np
    from PIL import Image, ImageDraw

    random = np.random.default_rng(0)
    across = np.linspace(60, 190, width)[None, :, None] + np.linspace(-40, 40, height)[:, None, None]
    ground = across + random.normal(0, 4, (height, width, 3)) + random.uniform(-20, 20, 3)
    image = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for place in range(8):
        x, y = random.uniform(0.05, 0.75, 2) * (width, height)
        w, h = random.uniform(0.1, 0.3, 2) * (width, height)
        colour = tuple(int(value) for value in random.integers(0, 256, 3))
        (draw.ellipse if place % 2 else draw.rectangle)((x, y, x + w, y + h), fill=colour)
    return np.asarray(image)


def _print(report: Report, folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    heading = f"{report.model} in {report.runtime} {report.version}, {report.precision}"
    table = Table(title=heading, title_justify="left")
    for column in ("kernel does", "ms", "share", "FLOP/byte", "bound", "INT8"):
        table.add_column(column, justify="left" if column in ("kernel does", "bound", "INT8") else "right")
    for kernel in report.top():
        table.add_row(
            fusion_text.title(report, kernel).replace("BatchNormalization", "BN"),
            number(kernel.milliseconds),
            fusion_text.percent(kernel.share),
            number(kernel.intensity),
            kernel.bound,
            kernel.int8,
        )
    console.print(table)
    unmapped = sum(kernel.evidence == "unmapped" for kernel in report.kernels)
    console.print(
        f"{report.computing_nodes()} nodes → {len(report.kernels)} kernels; "
        f"{len(report.groups('Conv+BatchNormalization+Relu'))} Conv+BatchNormalization+Relu became one kernel each; "
        f"unmapped: {unmapped} kernels, {len(report.fates().get('unmapped', []))} nodes"
    )
    for note in report.notes:
        console.print(f"note: {note}")
    console.print(f"written: {folder}/report.md, report.json, report.html", soft_wrap=True)
