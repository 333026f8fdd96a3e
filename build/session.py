"""ONNX Runtime on the CPU of this process: the one place that makes its sessions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import GraphError

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]
    Runner = Callable[[Arrays], Arrays]  # inputs by name → outputs by name

_ONLY_FATAL = 4  # errors are raised: the caller says them in its own words


def session(
    model: onnx.ModelProto,
    *,
    threads: int = 0,
    optimised: bool = True,
    literal: bool = False,
    spinning: bool = True,
    profile: Path | None = None,
    written: Path | None = None,
) -> Any:
    """A session for a model.

    Args:
        model: the graph.
        threads: for one operator; 0 = ONNX Runtime's choice.
        optimised: False runs the graph node by node as it is written.
        literal: compute every Q/DQ pair for itself in place of integer kernels; a graph with FP8 in it always is.
        spinning: whether idle threads spin; a served instance's do not.
        profile: prefix of the file for ONNX Runtime's profile; None = none is written.
        written: where ONNX Runtime writes the graph that it made of the model; None = nowhere.

    Raises:
        GraphError: ONNX Runtime cannot run the graph.
    """
    import onnx
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ONLY_FATAL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimised:
        options.graph_optimization_level = levels.ORT_DISABLE_ALL
    elif literal or any(constant.data_type == onnx.TensorProto.FLOAT8E4M3FN for constant in model.graph.initializer):
        # ONNX Runtime 1.31's further optimisations take FP8 pairs for INT8 ones: wrong answers, or an error at a Clip.
        options.graph_optimization_level = levels.ORT_ENABLE_BASIC
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if written is not None:
        options.optimized_model_filepath = str(written)
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions have no common type
        raise GraphError(
            f"ONNX Runtime cannot run {model.graph.name or 'this graph'}: {error}",
            why="an operator has no CPU kernel for the types it is used with, or the graph is not valid",
        ) from None


def runner(model: onnx.ModelProto, **options: Any) -> Runner:
    """The model as a function from inputs by name to outputs by name; options as for `session`.

    Raises:
        GraphError: ONNX Runtime cannot run the graph.
    """
    runs = session(model, **options)
    names = [output.name for output in runs.get_outputs()]

    def run(feeds: Arrays) -> Arrays:
        return dict(zip(names, runs.run(names, dict(feeds)), strict=True))

    return run
