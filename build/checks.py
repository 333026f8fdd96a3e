"""A built file in what will serve it, put to the gate; on a CPU, the fastest engine whose file passes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import rehearsal, throughput
from build.contract import Target
from build.errors import RuntimeUnavailableError, VerifyError
from build.gate import verify
from build.graph.attach import attach, before_nms
from build.graph.precision import runnable
from build.publish import backend, engines, openvino
from build.publish.config import instances_and_threads
from build.session import runner
from build.spec import Spec
from build.tensorrt import plan
from build.tensorrt.plugins import PLUGIN

if TYPE_CHECKING:
    import onnx
    from rich.console import Console


def gate(
    spec: Spec,
    target: Target,
    graph: onnx.ModelProto,
    built: Path,
    engine_facts: Mapping[str, Any] | None,
    artifacts: Path,
    judge: verify.Judge | None,
    count: int,
    served_engine: str = "",
) -> verify.Report:
    """The report on a built file: a plan on this machine's GPU, or an ONNX file in ONNX Runtime.

    The reference is the graph that the file was built from, in ONNX Runtime as it is written; a graph in types that
    ONNX Runtime has no kernels for is widened first (contract.PRECISIONS).
    """
    written = runnable(graph, target.precision)
    check = functools.partial(
        verify.gate,
        spec,
        f"{spec.model.name} ({target})",
        reference=runner(written, optimised=False),
        heads=runner(before_nms(written), optimised=False),
        within=verify.tolerance(target),
        baseline=runner(attach(spec)) if target.kind.typed else None,
        judge=judge,
        cache=artifacts / "datasets",
    )
    with running(built, engine_facts, served_engine, target.precision) as candidate:
        if engine_facts is None:
            return check(candidate, count=count)
        return check(candidate, count=max(count, candidate.max_batch), max_batch=candidate.max_batch)


@contextlib.contextmanager
def running(built: Path, engine_facts: Mapping[str, Any] | None, served_engine: str, precision: str) -> Iterator[Any]:
    """A built file in what will serve it: a plan on this machine's GPU, or an ONNX file in its engine."""
    import onnx

    if engine_facts is not None:
        with plan.Plan(built, engine_facts, plugin=PLUGIN) as running:
            yield running
    elif served_engine == openvino.NAME:
        yield openvino.runner(built, precision=openvino.hint(precision))
    else:
        yield runner(onnx.load(built))


def with_engine(
    spec: Spec,
    target: Target,
    typed: onnx.ModelProto,
    graph: onnx.ModelProto,
    artifact: Path,
    artifacts: Path,
    judge: verify.Judge | None,
    show: Console,
    rehearse: bool,
) -> tuple[backend.Backend, Path, onnx.ModelProto, verify.Report, dict[str, Any]]:
    """The fastest engine that passes the gate.

    Args:
        spec, target, artifacts, judge, show, rehearse: as for `build.pipeline`; engines are compared on a real server
            if there may be a rehearsal on one.
        typed: the graph as TensorRT would get it; OpenVINO gets it.
        graph: ONNX Runtime's.
        artifact: ONNX Runtime's file.

    Returns:
        The backend with that engine, its file, the graph of that file, the gate's report, and what the manifest says.

    Raises:
        SSDError: no engine passes.
    """
    name = spec.model.name
    images, _ = verify.images_for(spec, artifacts / "datasets", throughput.PICTURES)
    threads = instances_and_threads(spec, target.runtime)[1]
    served = rehearse and not rehearsal.unavailable(backend.NATIVE)
    serve = functools.partial(throughput.compare, spec, target, images[: throughput.PICTURES]) if served else None
    choice = engines.choose(spec, target, typed, artifact, images[:1], threads, serve)
    for engine_name in choice.order:
        vino = engine_name == openvino.NAME
        built, source = (artifact.with_name(engines.FILE), typed) if vino else (artifact, graph)
        if spec.serving.engine != openvino.OTHER:
            show.print(f"{name}: engine {engine_name}: {choice.why}", markup=False)
        try:
            served_by = backend.prepare(spec.serving.backend, engine=engine_name)
            # ONNX Runtime's form of BF16, which the audit saw, is not what runs: the gate looks at all pictures.
            count = spec.data.held_out_count if target.kind.widened else verify.PICTURES
            report = gate(spec, target, source, built, None, artifacts, judge, count, engine_name).require()
        except (RuntimeUnavailableError, VerifyError) as error:
            asked = spec.serving.engine == openvino.NAME and not target.kind.widened  # ONNX Runtime could serve it
            if vino and asked and isinstance(error, VerifyError):
                other = 'set [serving] engine = "auto", which serves ONNX Runtime where OpenVINO fails its gate'
                raise VerifyError(error.what, why=error.why, fix=f"{error.fix}; or {other}") from None
            if engine_name == choice.order[-1]:
                raise
            show.print(f"{name}: not served with {engine_name}: {error.what}", markup=False)
        else:
            show.print(str(report), markup=False)
            return served_by, built, source, report, choice.as_dict(engine_name)
    raise AssertionError("there is always an engine to try")
