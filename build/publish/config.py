"""config.pbtxt: what tritonserver reads about a published version (docs/design.md, "The served model")."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import contract
from build.contract import Target
from build.errors import PublishError
from build.publish import openvino
from build.publish.backend import NATIVE, NVIDIA, Backend
from build.spec import Spec

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

# Instances beyond the requests that run at once: they have the next requests' inputs ready. Where a queue has a limit,
# Triton 2.51 looks at it only when a request comes or after 0.5 s, unless an instance is idle: without these, a request
# that found all instances busy waited for the request behind it (docs/perf.md).
AHEAD = 4


def config(
    spec: Spec,
    version: int,
    target: Target,
    manifest_sha256: str,
    served_by: Backend | None = None,
    model_sha256: str = "",
) -> ModelConfig:
    """config.pbtxt of one version: the contract's inputs and outputs, and all that a client needs as parameters.

    Args:
        spec: the model.
        version: the one version that is served.
        target: what it was built for.
        manifest_sha256: of the version's manifest.
        served_by: the backend that runs an ONNX file; None for a plan.
        model_sha256: of model.onnx, which the backend compares with what it loads; empty = it does not.
    """
    from tritonclient.grpc import model_config_pb2 as pb

    instances, threads = instances_and_threads(spec, target.runtime)
    rule = spec.input.preprocessing
    parameters = {
        "contract": contract.VERSION,
        "input_width": str(rule.width),
        "input_height": str(rule.height),
        "color_order": rule.color_order,
        "resize": rule.resize,
        "resample": rule.resample,
        "pad_value": str(rule.pad_value),
        "labels": json.dumps(spec.labels),
        **{name: repr(getattr(spec.nms, name)) for name in contract.THRESHOLDS},
        "lowest_score_threshold": repr(spec.nms.lowest_score_threshold),
        "runtime_thresholds": json.dumps(spec.nms.runtime_thresholds),
        "max_detections": str(spec.nms.max_detections),
        "precision": target.precision,
        "runtime": target.runtime,
        "manifest_sha256": manifest_sha256,
    }
    result = pb.ModelConfig(name=spec.model.name, max_batch_size=spec.serving.max_batch_size)
    result.version_policy.specific.versions.append(version)
    for entries, tensors in ((result.input, spec.inputs), (result.output, spec.outputs)):
        for tensor in tensors:
            entries.add(name=tensor.name, data_type=pb.DataType.Value(f"TYPE_{tensor.triton}"), dims=tensor.shape)
    # Only a batcher's queue has a limit and drops what nobody waits for. What that costs: docs/perf.md.
    alone = served_by is not None and served_by.name == NATIVE  # it runs every request by itself
    if spec.serving.dynamic_batching == "off" or (alone and spec.serving.dynamic_batching == "auto"):
        result.dynamic_batching.preferred_batch_size.append(1)
    else:
        result.dynamic_batching.max_queue_delay_microseconds = spec.serving.queue_delay_us
    policy = result.dynamic_batching.default_queue_policy
    policy.timeout_action = pb.ModelQueuePolicy.REJECT
    policy.default_timeout_microseconds = spec.serving.queue_timeout_ms * 1000
    policy.allow_timeout_override = True  # a request's own timeout counts where it is shorter
    policy.max_queue_size = spec.serving.max_queue_size
    if target.runtime == "tensorrt":
        _serve_with_tensorrt(result, spec, instances)
    else:
        assert served_by is not None
        result.backend = served_by.name
        result.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=instances + (AHEAD if alone else 0))
        parameters["threads"] = str(threads)
        if alone:
            parameters["runners"] = str(instances)
        if served_by.engine == openvino.NAME:
            parameters |= {"engine": served_by.engine, "engine_precision": openvino.hint(target.precision)}
        if model_sha256:
            parameters["model_sha256"] = model_sha256
        if served_by.name == NVIDIA:
            parameters |= {"intra_op_thread_count": str(threads), "inter_op_thread_count": "1"}
    for name, value in parameters.items():
        result.parameters[name].string_value = value
    return result


def _serve_with_tensorrt(result: ModelConfig, spec: Spec, instances: int) -> None:
    """What only a plan needs: its GPU and profiles, CUDA graphs, and requests that find a warm model."""
    from tritonclient.grpc import model_config_pb2 as pb

    serving = spec.serving
    result.platform = "tensorrt_plan"
    group = result.instance_group.add(kind=pb.ModelInstanceGroup.KIND_GPU, count=instances)
    if len(spec.profiles) > 1:  # an instance takes the profile that fits each batch
        group.profile.extend(str(index) for index in range(len(spec.profiles)))
    if serving.cuda_graphs:  # without bounds of our own: graph_lower_bound would show rows that nothing wrote
        result.optimization.cuda.graphs = True
    if serving.warmup:
        for batch in sorted({1, serving.max_batch_size}):
            warm = result.model_warmup.add(name=f"batch {batch}", batch_size=batch)
            for entry in result.input:
                given = warm.inputs[entry.name]
                given.data_type = entry.data_type
                given.dims.extend(entry.dims)
                if entry.name == contract.IMAGES:
                    given.random_data = True
                else:
                    given.zero_data = True


def batches(result: ModelConfig) -> bool:
    """Whether the server hands waiting requests over together."""
    return result.HasField("dynamic_batching") and list(result.dynamic_batching.preferred_batch_size) != [1]


def check_engine(spec: Spec, result: ModelConfig, engine: Mapping[str, Any]) -> None:
    """Compares config.pbtxt with the plan's own table of inputs and outputs.

    Args:
        spec: the model.
        result: the configuration.
        engine: the manifest's part `engine` (build/tensorrt/engine.py).

    Raises:
        PublishError: they differ; the server would refuse the model, or answer with other shapes.
    """
    from tritonclient.grpc import model_config_pb2 as pb

    kinds = {tensor.tensorrt: f"TYPE_{tensor.triton}" for tensor in (*spec.inputs, *spec.outputs)}
    for mode, entries in (("INPUT", result.input), ("OUTPUT", result.output)):
        wanted = {entry.name: (pb.DataType.Name(entry.data_type), [-1, *entry.dims]) for entry in entries}
        held = {t["name"]: (kinds.get(t["dtype"]), list(t["shape"])) for t in engine["io"] if t["mode"] == mode}
        if wanted != held:
            table = {t["name"]: f"{t['dtype']}{list(t['shape'])}" for t in engine["io"] if t["mode"] == mode}
            config_table = {name: f"{kind}{dims}" for name, (kind, dims) in wanted.items()}
            raise PublishError(
                f"{result.name}: the plan's {mode.lower()}s are {table}, but config.pbtxt would have {config_table}",
                why="the plan was built from another graph or spec",
                fix="build it again: ./invoke build-engines --runtime tensorrt --force",
            )
    most = max((shapes[2][0] for t in engine["io"] for shapes in t["profiles"]), default=0)
    if result.max_batch_size != most:
        raise PublishError(
            f"{result.name}: config.pbtxt would allow batches of {result.max_batch_size}, but the plan ends at {most}",
            fix="build it again: ./invoke build-engines --runtime tensorrt --force",
        )


def text(message: ModelConfig) -> str:
    """The file's text."""
    from google.protobuf import text_format

    return f"# Written by build/publish/; ./invoke build-engines makes it anew.\n{text_format.MessageToString(message)}"


def cpu_name() -> str:
    """The processor's model, as Linux names it; empty elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return ""


def cores() -> int:
    """The processor cores that this process may use, container limits included."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return count if quota == "max" else max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):
        return count


def instances_and_threads(spec: Spec, runtime: str) -> tuple[int, int]:
    """Sessions and threads of each; where the spec leaves them open, together as many as there are cores.

    A plan takes one execution context per instance on the GPU, one where the spec leaves it open.
    """
    instances, threads = spec.serving.instances, spec.serving.threads
    if runtime == "tensorrt":
        return instances or 1, 1
    instances = instances or max(1, cores() // max(1, threads))
    return instances, threads or max(1, cores() // instances)
