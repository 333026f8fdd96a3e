"""The audit: resampled mAP against pycocotools itself, the gate, sensitivity with its checkpoint; that INT8 pays."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from build import contract
from build import spec as specs
from build.errors import DataError, VerifyError
from build.files import ROOT
from build.gate import accuracy, datasets, scoring
from build.graph.attach import attach, load_source
from build.quantization import audit, noise, qdq, sensitivity
from build.reports import speed
from build.session import runner
from build.spec import Spec, load
from tests.build import pictures, tiny_model


def silent() -> Console:
    return Console(quiet=True)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    """The tiny model, its pictures labelled with what its FP32 graph sees: what differs, differs by precision."""
    folder = tmp_path_factory.mktemp("audit") / "tiny"
    path = tiny_model.write(folder)
    pictures.write(folder / "calibration", 120, tiny_model.LABELS, seed=1)
    pictures.write(folder / "held_out", 40, tiny_model.LABELS, seed=2)
    data = 'calibration = "calibration"\nheld_out = "held_out"'
    path.write_text(f"{path.read_text()}\n[data]\n{data}\n\n[quantization]\ngate = 0.5  # of noise\n")
    spec = load(path)
    truth = json.loads((folder / "held_out" / "instances.json").read_text())
    detect = scoring.detector(spec, runner(attach(spec)))
    truth["annotations"] = []
    for image in truth["images"]:
        (found,) = detect([folder / "held_out" / image["file_name"]])
        for (x1, y1, x2, y2), score, label in zip(found.boxes.tolist(), found.scores, found.classes, strict=True):
            if score > 0.5 and x2 > x1 and y2 > y1:
                row = {"image_id": image["id"], "category_id": int(label) + 1, "iscrowd": 0}
                row |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                truth["annotations"].append({"id": len(truth["annotations"]) + 1, **row})
    (folder / "held_out" / "instances.json").write_text(json.dumps(truth))
    return spec


@pytest.fixture
def spec(seen: Spec, tmp_path: Path) -> Spec:
    """A copy that a test may change."""
    import shutil

    shutil.copytree(seen.path.parent, tmp_path / "tiny")
    return load(tmp_path / "tiny")


# -- resampling --------------------------------------------------------------------------------------------------------


def coco(rng: np.random.Generator, images: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Random labels and detections that are partly right, with equal scores among them."""
    truth: dict[str, Any] = {
        "images": [{"id": i + 1, "width": 100, "height": 100, "file_name": f"{i}.png"} for i in range(images)],
        "categories": [{"id": c, "name": str(c)} for c in (1, 2, 7)],
        "annotations": [],
    }
    detections = []
    for image in range(1, images + 1):
        for _ in range(rng.integers(0, 5)):
            category, box = int(rng.choice([1, 2, 7])), [*rng.uniform(0, 60, 2), *rng.uniform(5, 40, 2)]
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(rng.random() < 0.05),
                }
            )
            for _ in range(rng.integers(0, 3)):
                moved = (np.array(box) + rng.normal(0, 2, 4)).clip(1).tolist()
                score = round(float(rng.random()), 1)
                detections.append({"image_id": image, "category_id": category, "bbox": moved, "score": score})
    return truth, detections


def test_resampled_map_is_that_of_pictures_that_really_repeat() -> None:
    """Picture i counted n times against pycocotools on a data set in which it is there n times."""
    rng = np.random.default_rng(0)
    truth, detections = coco(rng, 30)
    judge = accuracy.judge(truth, detections)
    curves = scoring.Curves(judge)
    assert curves.mean_average_precision() == pytest.approx(accuracy.accuracy(judge).map, abs=1e-12)
    for _ in range(5):
        times = np.bincount(rng.integers(0, 30, 30), minlength=30)
        repeated: dict[str, Any] = {"images": [], "annotations": [], "categories": truth["categories"]}
        found = []
        for image, count in zip(truth["images"], times, strict=True):
            for _ in range(count):
                new = {**image, "id": len(repeated["images"]) + 1}
                repeated["images"].append(new)
                for one in truth["annotations"]:
                    if one["image_id"] == image["id"]:
                        number = len(repeated["annotations"]) + 1
                        repeated["annotations"].append({**one, "id": number, "image_id": new["id"]})
                found += [{**one, "image_id": new["id"]} for one in detections if one["image_id"] == image["id"]]
        wanted = accuracy.evaluate(repeated, found).map
        # Equal scores of different pictures may change places.
        assert curves.mean_average_precision(times.astype(float)) == pytest.approx(wanted, abs=2e-3)


def test_intervals() -> None:
    rng = np.random.default_rng(1)
    truth, detections = coco(rng, 60)
    worse = [one for one in copy.deepcopy(detections) if rng.random() < 0.6]
    exact, less = (scoring.Curves(accuracy.judge(truth, found)) for found in (detections, worse))
    (same,), (interval,) = scoring.differences(exact, [exact], 50), scoring.differences(exact, [less], 200)
    assert same == (0.0, 0.0)
    difference = less.mean_average_precision() - exact.mean_average_precision()
    assert interval[0] < difference < interval[1] < 0
    assert scoring.differences(exact, [less], 200)[0] == interval


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda truth: truth["categories"].pop(), r"annotations\[\d+\] category_id is 2, but no category has it"),
        (
            lambda truth: truth.update(categories=truth["categories"][:1], annotations=[]),
            r"the model alone has \['dog'\]",
        ),
        (lambda truth: truth["categories"][0].update(name="cow"), r"the pictures alone \['cow'\]"),
        (lambda truth: truth["images"].pop(), "1 pictures have no labels, like 0039"),
        (lambda truth: truth.pop("annotations"), "no COCO instances file"),
    ],
)
def test_labels_must_fit(spec: Spec, tmp_path: Path, change: Any, complaint: str) -> None:
    path = spec.path.parent / "held_out" / "instances.json"
    truth = json.loads(path.read_text())
    change(truth)
    path.write_text(json.dumps(truth))
    with pytest.raises(DataError, match=complaint):
        audit.audit(spec, tmp_path / "artifacts", precisions=("fp16",), console=silent())
    assert not (tmp_path / "artifacts" / "audit").exists()


def test_unreadable_pictures_count_as_unseen_up_to_a_limit(spec: Spec, tmp_path: Path) -> None:
    folder = spec.path.parent / "held_out"
    held = datasets.held_out(spec, tmp_path)
    detect = scoring.detector(spec, runner(attach(spec)))
    whole = scoring.score(held, detect, "", silent())
    (folder / "0007.png").write_bytes(b"broken")
    broken = scoring.score(held, detect, "", silent())
    assert len(broken.detected) == 40
    assert not len(broken.detected[7].boxes)
    assert broken.accuracy.map < whole.accuracy.map
    for name in ("0008.png", "0011.png"):
        (folder / name).write_bytes(b"broken")
    with pytest.raises(DataError, match="3 of 16 pictures cannot be read"):
        scoring.score(held, detect, "", silent())


# -- the audit and the gate --------------------------------------------------------------------------------------------


@pytest.fixture
def fp8_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if TensorRT had FP8 kernels for the few channels of the tiny model."""
    monkeypatch.setattr(qdq, "_FP8_TOO_FEW", 0)


def test_audit_of_every_precision(seen: Spec, fp8_everywhere: None, tmp_path: Path) -> None:
    summary = audit.audit(seen, tmp_path, console=silent())
    assert json.loads((tmp_path / "audit" / "summary.json").read_text()) == summary
    assert set(summary) == {"fp32", "fp16", "bf16", "int8", "fp8"}
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    rows = {(row["precision"], row["calibrator"]): row for row in report["rows"]}
    assert {calibrator for kind, calibrator in rows if kind == "int8"} == set(contract.CALIBRATORS)
    best = max(contract.CALIBRATORS, key=lambda one: rows["int8", one]["map"])
    assert summary["int8"]["map"] == rows["int8", best]["map"]
    assert summary["fp32"]["map"] > 0.99
    assert summary["fp16"]["ratio"] > summary["int8"]["ratio"] > 0.5
    for row in rows.values():
        assert set(row["by_class"]) == set(seen.labels)
        assert row["map"] == min(row["forms"].values())
        assert row["ci95"][0] <= row["map"] - rows["fp32", None]["map"] <= row["ci95"][1] or row["ci95"] == [0, 0]
    worst = list((tmp_path / "audit" / "worst").glob("*.png"))
    assert worst
    assert (tmp_path / "audit" / "scales.csv").is_file()


def test_a_served_model_is_judged_by_what_it_answers(seen: Spec, tmp_path: Path) -> None:
    detect = scoring.detector(seen, runner(attach(seen)))

    def half_blind(paths: Any) -> list[scoring.Detected]:
        return [
            one if index % 2 else scoring.Detected(one.boxes[:0], one.scores[:0], one.classes[:0])
            for index, one in enumerate(detect(paths))
        ]

    summary = audit.audit(seen, tmp_path, served=("int8", half_blind), console=silent())
    assert set(summary) == {"fp32", "int8 served"}
    assert summary["int8 served"]["ratio"] < 0.8
    assert {path.name for path in (tmp_path / "audit").iterdir()} == {
        "served_summary.json",
        "served_report.json",
        "served_worst",
    }


def test_the_gate_takes_the_best_and_refuses_what_loses_too_much(spec: Spec, tmp_path: Path) -> None:
    chosen = audit.approved(spec, "int8", tmp_path, silent())
    assert chosen.calibrator in contract.CALIBRATORS
    assert len(chosen.quantised) == 3
    # With half of all activations clipped nothing is left to be seen, whichever layer is left out.
    settings = dataclasses.replace(spec.quantization, calibrator="percentile", percentile=50, gate=0.99)
    before = spec.path.read_bytes()
    with pytest.raises(
        VerifyError,
        match=r"int8 percentile .*keeps .*the gate asks for 99\.00%\): fails; nothing was changed: no more than 10% of "
        "the convolutions that can be quantised are left out; it is not published",
    ):
        audit.approved(dataclasses.replace(spec, quantization=settings), "int8", tmp_path, silent())
    assert spec.path.read_bytes() == before


def test_nothing_to_judge_on(seen: Spec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blind = dataclasses.replace(seen, data=dataclasses.replace(seen.data, held_out=""))
    with pytest.raises(DataError, match="names no held-out pictures"):
        audit.approved(blind, "int8", tmp_path, silent())
    assert audit.approved(blind, "fp16", tmp_path, Console(soft_wrap=True)).precision == "fp16"
    assert "fp16 was not audited" in capsys.readouterr().out


# -- sensitivity -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fragile(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> str:
    """The first Conv, made to lose everything when it is quantised."""
    plain = qdq.quantize

    def breaks(source: Any, clips: Any, **options: Any) -> qdq.Placed:
        return plain(source, {**clips, "ssd/front/div": 1e-3}, **options)

    monkeypatch.setattr(qdq, "quantize", breaks)
    return next(conv.name for conv in qdq.convs(qdq.fold(load_source(spec))))


def test_audit_and_sensitivity_come_to_the_same_verdict(spec: Spec, fragile: str, tmp_path: Path) -> None:
    """Before the search and after it: the same share of the same form, the same side of the gate, the same words."""
    before = audit.audit(spec, tmp_path, precisions=("int8",), console=silent())["int8"]
    assert not before["passes"]
    shown = Console(record=True, soft_wrap=True, quiet=False, file=io.StringIO(), width=40)
    found = sensitivity.search(spec, tmp_path, console=shown)
    text = shown.export_text()
    assert f"keeps {before['ratio']:.2%} of FP32's mAP" in text
    assert found.exclude_nodes == (fragile,)
    assert next(iter(found.layers)) == fragile
    assert all(name in text for name in found.layers), "names are cut"
    after = audit.audit(found.spec, tmp_path, precisions=("int8",), console=silent())["int8"]
    assert after["passes"] is found.passes is True
    assert after["ratio"] == found.best.share  # type: ignore[union-attr]
    assert "with 1 of 3 convolutions left in FP32" in found.verdict
    assert "passes" in found.verdict
    assert load(spec.path).quantization.exclude_nodes == (fragile,)
    assert "gate = 0.5  # of noise" in spec.path.read_text()
    # Again: nothing is to do, and it says so.
    again = sensitivity.search(found.spec, tmp_path, console=silent())
    assert again.verdict.endswith("passes; spec.toml stays as it is")
    assert again.best.share == found.best.share  # type: ignore[union-attr]


def test_a_build_leaves_out_what_does_not_bear_int8(spec: Spec, fragile: str, tmp_path: Path) -> None:
    specs.edit(spec.path, {"quantization.calibrator": "minmax"})
    spec = load(spec.path)
    chosen = audit.approved(spec, "int8", tmp_path, silent())
    assert len(chosen.quantised) == 2
    assert fragile not in chosen.quantised
    assert load(spec.path).quantization.exclude_nodes == (fragile,)


def test_what_fp8_leaves_out_is_its_own(spec: Spec, fragile: str, fp8_everywhere: None, tmp_path: Path) -> None:
    specs.edit(spec.path, {"quantization.calibrator": "minmax"})
    chosen = audit.approved(load(spec.path), "fp8", tmp_path, silent())
    assert chosen.left == {fragile: "excluded"}
    settings = load(spec.path).quantization
    assert (settings.exclude_nodes, settings.exclude_nodes_fp8) == ((), (fragile,))
    assert settings.excluded("int8") == ()
    assert settings.excluded("fp8") == (fragile,)


def test_fp8_without_any_kernel_is_refused(spec: Spec, tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="none of its 3 convolutions would be fp8") as caught:
        audit.approved(spec, "fp8", tmp_path, silent())
    assert qdq.NO_KERNEL in str(caught.value)
    assert "int8" in str(caught.value)


def test_an_interrupted_search_goes_on(
    spec: Spec, fragile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(spec.quantization, calibrator="minmax")
    spec = dataclasses.replace(spec, quantization=settings)
    early = sensitivity.search(spec, tmp_path, budget=1e-6, console=silent())
    assert not early.done
    assert "run it again to go on" in early.verdict
    assert sensitivity.search(spec, tmp_path, write=False, console=silent()).passes
    monkeypatch.setattr(noise, "decibels", lambda *a, **k: pytest.fail("it was measured again"))
    assert sensitivity.search(spec, tmp_path, write=False, console=silent()).exclude_nodes == (fragile,)
    assert not load(spec.path).quantization.exclude_nodes


def test_no_more_than_a_tenth_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets are tried in growing steps, then what was not needed comes back."""
    tried: list[int] = []
    needed = {"a3", "a5"}

    class Graphs:
        def candidate(self, calibrator: str, exclude: Any) -> Any:
            return frozenset(exclude)

    class Judge:
        def of(self, left: Any) -> Any:
            tried.append(len(left))
            return SimpleNamespace(passes=needed <= left, share=len(needed & left) / 2, left=left)

    names = [f"a{i}" for i in range(20)]
    start: Any = SimpleNamespace(
        candidate=SimpleNamespace(calibrator="minmax"), passes=False, share=0.0, left=frozenset()
    )

    def fewest(most: int, base: tuple[str, ...] = ()) -> Any:
        trials = sensitivity._Trials(Graphs(), Judge(), start, base, float("inf"))  # type: ignore[arg-type]
        return trials.fewest([name for name in names if name not in base], most)

    assert fewest(8).left == needed
    assert tried[:5] == [1, 2, 3, 5, 8]
    assert not fewest(5).passes
    assert fewest(5).left == frozenset({"a0", "a1", "a2", "a3", "a4"}), "the best there was"
    assert fewest(3, ("a3",)).passes is False, "what the spec leaves out counts"
    assert fewest(8, ("a3",)).left == needed


# -- speed -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_int8_pays(tmp_path: Path) -> None:
    """On a CPU with VNNI; the margin is wide because a test shares its machine. docs/precision.md has the figures."""
    if "vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs a CPU with AVX512-VNNI or AVX-VNNI")
    spec = load(ROOT / "models" / "shapes")
    data = dataclasses.replace(spec.data, calibration_count=16, held_out_count=16)
    result = speed.measure(dataclasses.replace(spec, data=data), tmp_path, rounds=15, console=silent())
    assert result["int8"]["before_nms_ratio"] > 1.5
    assert result["int8"]["whole_ratio"] > 1.4
    layers = {row["conv"]: row for row in result["layers"]}
    assert len(layers) == 31  # thirty Convs and the rest
    assert all(row["before_ms"] and row["after_ms"] for row in layers.values())
    assert layers[spec.quantization.exclude_nodes[0]]["why"] == "left unquantised"
