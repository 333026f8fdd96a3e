"""Fuzzed requests: each is answered or refused, and the next good one has the right bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from build.contract import Target
from build.graph.attach import attach
from build.publish import backend, repository
from build.serve import TritonServer
from build.spec import load
from tests.build import tiny_model
from tests.reliability.fuzz import Fuzzer, fuzz


@pytest.mark.triton
@pytest.mark.parametrize("requests", [150, pytest.param(15_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", [backend.NATIVE, pytest.param(backend.PYTHON, marks=pytest.mark.long)])
def test_whatever_arrives_the_server_answers_on(
    request: pytest.FixtureRequest, kind: str, tmp_path: Path, requests: int
) -> None:
    if kind == backend.NATIVE:
        request.getfixturevalue("native")
    spec = load(tiny_model.write(tmp_path / "models" / "tiny"))
    built = tmp_path / "built.onnx"
    built.write_bytes(attach(spec).SerializeToString())
    root = tmp_path / "model_repository"
    repository.publish(spec, built, root, Target("onnxruntime"), served_by=backend.prepare(kind))
    with TritonServer(root) as server:
        counts = fuzz(server, requests, seed=7)
        server.check()
    assert counts["answered"] > requests / 10
    assert counts["refused"] > requests / 2


def test_a_seed_gives_the_same_requests() -> None:
    first, second = Fuzzer(5), Fuzzer(5)
    assert [first.over_http() for _ in range(20)] == [second.over_http() for _ in range(20)]
    assert [first.over_grpc() for _ in range(20)] == [second.over_grpc() for _ in range(20)]
