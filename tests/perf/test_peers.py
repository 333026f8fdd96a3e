"""Peers: measured in turn, compared round by round, and missing ones named instead of left out."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build import contract
from build.errors import RuntimeUnavailableError
from build.graph.attach import attach, before_nms, load_source
from build.session import session
from build.spec import Spec, load
from perf import peers
from perf.journal import Journal
from perf.peers import BASE, Peer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def spec() -> Spec:
    return load(ROOT / "models" / "shapes" / "spec.toml")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Peers whose milliseconds are known; the list receives their names as they run."""
    ran: list[str] = []

    def peer(name: str, *milliseconds: float) -> Callable[[], Peer]:
        def make() -> Peer:
            if not milliseconds:
                raise RuntimeUnavailableError(f"{name} is not installed", fix="install it")
            values = itertools.cycle(milliseconds)

            def timed() -> float:
                ran.append(name)
                return next(values)

            return Peer(timed, "as scripted")

        return make

    def crash() -> Peer:
        raise ValueError("first line\nsecond line")

    makers = {BASE: peer(BASE, 4.0), "fast": peer("fast", 2.0), "missing": peer("missing"), "crashes": crash}
    monkeypatch.setattr(peers, "_on_cpu", lambda spec, artifacts, images, threads: makers)
    monkeypatch.setattr(peers, "_on_gpu", lambda spec, images: {})
    return ran


def measured(spec: Spec, journal: Journal, **settings: Any) -> list[dict[str, Any]]:
    fewer = replace(spec, data=replace(spec.data, held_out=""))  # noise will do
    return peers.measure(fewer, Path("nowhere"), journal, seconds=0, rounds=3, **settings)


def test_rows(spec: Spec, scripted: list[str]) -> None:
    rows = measured(spec, Journal(), batch_sizes=(1, 8))
    assert [(row["name"], row["batch_size"]) for row in rows] == [
        (name, batch) for batch in (1, 8) for name in (BASE, "fast", "missing", "crashes")
    ]
    assert rows[0]["images_per_second"] == [250.0] * 3
    assert rows[0]["ratio"] == 1
    assert rows[5]["images_per_second"] == [4000.0] * 3
    assert (rows[5]["median_ms"], rows[5]["ratio"], rows[5]["note"]) == (2.0, 2.0, "as scripted")
    assert rows[2]["skipped"] == "missing is not installed: install it"
    assert rows[3]["skipped"] == "it failed: ValueError: first line"


def test_in_turn(spec: Spec, scripted: list[str]) -> None:
    measured(spec, Journal(), batch_sizes=(1,))
    turns = [name for name, _ in itertools.groupby(scripted)]
    assert turns == [BASE, "fast"] * 4  # the first is for warming up


def test_what_the_journal_has_is_not_measured_again(spec: Spec, scripted: list[str]) -> None:
    journal = Journal()
    first = measured(spec, journal, batch_sizes=(1,))
    before = len(scripted)
    assert measured(spec, journal, batch_sizes=(1,)) == first
    assert len(scripted) == before
    measured(spec, journal, batch_sizes=(2,))
    assert len(scripted) > before


def test_without_the_base_there_is_nothing_to_compare(
    spec: Spec, scripted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Peer:
        raise RuntimeUnavailableError("no onnxruntime")

    monkeypatch.setattr(peers, "_on_cpu", lambda *_: {BASE: fails})
    with pytest.raises(RuntimeUnavailableError, match="no onnxruntime"):
        measured(spec, Journal())


def test_onnxruntime_runs_up_to_ssd_nms(spec: Spec, tmp_path: Path) -> None:
    peer = peers._onnxruntime(spec, tmp_path, np.zeros((2, 300, 300, 3), np.uint8), 1, "fp32")
    assert peer.timed() > 0


def test_torch_only_where_there_is_a_network(spec: Spec, tmp_path: Path) -> None:
    images = np.zeros((1, 300, 300, 3), np.uint8)
    other = replace(spec, path=tmp_path / "spec.toml")
    assert list(peers._on_cpu(spec, tmp_path, images, 1)) == [
        BASE,
        "ONNX Runtime int8",
        "torch eager",
        "torch.compile",
    ]
    assert list(peers._on_cpu(other, tmp_path, images, 1)) == [BASE, "ONNX Runtime int8"]
    assert list(peers._on_gpu(other, images)) == ["ONNX Runtime CUDA"]


def test_no_gpu_is_said(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("build.tensorrt.cuda.driver_version", lambda: "")
    for make in peers._on_gpu(spec, np.zeros((1, 300, 300, 3), np.uint8)).values():
        with pytest.raises(RuntimeUnavailableError, match="no NVIDIA GPU"):
            make()


def test_torchs_network_answers_as_the_onnx_does(spec: Spec) -> None:
    torch = pytest.importorskip("torch", reason="needs torch: the group train (./invoke train installs it)")
    images = np.random.default_rng(0).integers(0, 256, (2, 300, 300, 3), dtype=np.uint8)

    network, note = peers.network_of(spec)
    assert note == ""
    with torch.no_grad():
        answers = network(torch.from_numpy(images))
    wanted = session(before_nms(attach(spec)), threads=1).run(None, {contract.IMAGES: images})
    for answer, due in zip(answers, wanted, strict=True):
        np.testing.assert_allclose(answer.numpy(), due, rtol=1e-3, atol=1e-3)


def test_other_names_give_random_weights_and_say_so(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="needs torch: the group train (./invoke train installs it)")
    source = load_source(spec)
    source.graph.initializer[0].name = "another"
    monkeypatch.setattr("build.graph.attach.load_source", lambda spec: source)
    assert peers.network_of(spec)[1].startswith("random weights")


def test_without_torch_its_rows_say_how_to_get_it(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeUnavailableError, match=r"torch is not installed[\s\S]*train\.lock"):
        peers._torch(spec, np.zeros((1, 300, 300, 3), np.uint8), 1, compiled=False)
