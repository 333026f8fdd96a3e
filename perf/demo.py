"""`invoke demo`: the whole way on real input, in one run: build, serve, detect, evaluate, load.

Writes `<artifacts>/demo/detections.png` (a contact sheet), `<artifacts>/demo/summary.json`, and for each imported
detector in models/ `<artifacts>/demo/<name>.png`: what it sees on a photograph.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import SSDError
from build.files import IMPORT_FILE, MODELS, relative, write_json
from perf.direct import CLIENTS, beside
from perf.figures import demo_rows
from perf.ratio import TRANSPORTS, served_ratio, single_stream

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console
    from rich.table import Table

    from perf.bench import Bench

MODEL = "shapes"
DRAWN = 24
DRAW_THRESHOLD = 0.5


def demo(repository: Path, artifacts: Path, *, quick: bool = False) -> dict[str, Any]:
    """Runs the demo and returns what it wrote to summary.json.

    Args:
        repository: where the model is published and served from.
        artifacts: its folder `demo` receives the sheet and the summary, `datasets` the scenes.
        quick: 100 scenes instead of 500 and a shorter load.

    Raises:
        SSDError: of whichever stage failed.
    """
    from rich.console import Console
    from ssd_client import SSDClient

    from build import pipeline, spec
    from build.gate import verify
    from models.shapes.scenes import write_split
    from perf import environment
    from perf.bench import PICTURES, start_bench
    from perf.journal import Journal
    from perf.served_accuracy import evaluate_served

    console = Console(highlight=False, soft_wrap=True)
    started = time.monotonic()
    out = artifacts / "demo"
    out.mkdir(parents=True, exist_ok=True)
    images = 100 if quick else 500

    pipeline.build_engines([MODEL], repository=repository)
    imported = _build_imported(repository, console)
    with console.status(f"drawing {images} held-out scenes (once; kept in {artifacts.name}/datasets)"):
        pictures, truth = write_split(artifacts / "datasets" / MODEL, "held_out", images)
    sent, _ = verify.images_for(spec.load(MODELS / MODEL / "spec.toml"), artifacts / "datasets", PICTURES)
    facts = environment.capture()

    with start_bench(repository, MODEL, list(sent), Journal()) as bench:
        server = bench.server
        facts["versions"]["tritonserver"] = server.version
        console.print(f"tritonserver {server.version} serves {MODEL}: gRPC {server.grpc_url}, HTTP {server.http_url}")
        with SSDClient(server.grpc_url, model=MODEL, shared_memory="system") as client:
            detected = client.detect(pictures[:DRAWN], score_threshold=DRAW_THRESHOLD)
            contact_sheet([detections.draw() for detections in detected]).save(out / "detections.png")
            photographs = {name: photograph(server.grpc_url, name) for name in imported}
            for name, (picture, _) in photographs.items():
                picture.save(out / f"{name}.png")
            with console.status(f"evaluating {images} scenes through the server"):
                accuracy = evaluate_served(client, pictures, truth)
        with console.status("perf_analyzer: single stream, then 4 clients, beside the same model in process"):
            load = _load(bench, quick=quick)
        summary = {
            "run": time.strftime("%Y-%m-%d"),
            "quick": quick,
            "runtime": bench.config.runtime,
            "precision": bench.config.precision,
            "accuracy": asdict(accuracy),
            "load": load,
            "environment": facts,
        }
    write_json(out / "summary.json", summary)
    console.print(_table(summary))
    console.print(f"done in {time.monotonic() - started:.0f} s; where to look next:")
    console.print(f"  {relative(out / 'detections.png')}   what it sees: {DRAWN} held-out scenes with boxes")
    for name, (_, found) in photographs.items():
        console.print(f"  {relative(out / f'{name}.png')!s:32} {name} on a photograph: {found}")
    console.print(f"  {relative(out / 'summary.json')}     these figures, for machines")
    console.print(
        "  ./invoke serve                   keep it running; then: .venv/bin/python -m ssd_client IMAGE --out DIR"
    )
    return summary


def _build_imported(repository: Path, console: Console, models: Path = MODELS) -> list[str]:
    """Publishes what `import-model` wrote; a detector that cannot be published is said and left out."""
    from build import pipeline

    names = []
    for path in sorted(models.glob(f"*/{IMPORT_FILE}")):
        name = path.parent.name
        try:
            pipeline.build_engines([name], repository=repository, sources=models)
            names.append(name)
        except SSDError as error:
            console.print(f"the demo goes on without {name}: {error}", markup=False)
    return names


def photograph(url: str, model: str) -> tuple[Image.Image, str]:
    """A photograph with what a served detector sees on it, and that in words: "2 person, 1 face"."""
    from ssd_client import SSDClient

    from build.gate.datasets import photographs

    with SSDClient(url, model=model) as client:
        detections = client.detect(photographs()[0], score_threshold=DRAW_THRESHOLD)
    seen = Counter(detections.labels)
    return detections.draw(), ", ".join(f"{count} {label}" for label, count in seen.items()) or "nothing"


def _load(bench: Bench, *, quick: bool) -> dict[str, Any]:
    """The part of `invoke perf` that a first look needs: its ratio and single stream, and throughput by clients."""
    rounds, seconds = (2, 0.5) if quick else (3, 0.5)
    with beside(bench.server, bench.model, bench.images, bench.config) as raw:
        single = single_stream(bench, raw, rounds=rounds, seconds=seconds)
        ratio = served_ratio(bench, raw, rounds=rounds, seconds=seconds)
    throughput = {}
    for clients in (1, 2):
        record = bench.point("concurrency", replace(TRANSPORTS["shm"], concurrency=clients), seconds=seconds)
        throughput[str(clients)] = record["point"]["throughput"]
    return {
        "latency_ms": single["served_ms"],
        "overhead_ms": single["overhead_ms"],
        "throughput_ips": {**throughput, str(CLIENTS): ratio["served_ips"]["shm"]},
        **ratio,
    }


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 6, gap: int = 6) -> Image.Image:
    """Pictures of one size in rows of `columns`, on white."""
    from PIL import Image

    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return sheet


def _table(summary: dict[str, Any]) -> Table:
    from rich.table import Table

    title = f"{MODEL}, {summary['precision']}, runtime {summary['runtime']}"
    table = Table(title=title, title_justify="left", show_header=False)
    for row in demo_rows(summary):
        table.add_row(*row)
    return table
