"""The gate's last step: a real tritonserver answers with the very files that are about to be published.

The gate before it runs the model in this process. Only this step runs the backend, config.pbtxt and libraries that
ship.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from build import tritonserver
from build.contract import Target
from build.errors import ServeError, VerifyError
from build.gate import verify
from build.publish import backend, picture
from build.publish.repository import CONFIG
from build.serve import TritonServer, http_inputs
from build.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from build.session import Arrays, Runner

PICTURES = 2


def unavailable(name: str) -> str:
    """Why no server of this machine can rehearse a model of a backend; empty where one can.

    Args:
        name: Triton's name of the backend.
    """
    try:
        installed = tritonserver.find()
        tritonserver.usage(installed.binary, tritonserver.environment())
    except ServeError as error:
        return error.what
    if name not in (backend.NATIVE, backend.PYTHON) and not (installed.backends / name).is_dir():
        return f"tritonserver {installed.version} has no backend {name}"
    return ""


def rehearse(
    spec: Spec,
    target: Target,
    content: Path,
    candidate: Runner,
    heads: Runner,
    images: NDArray[np.uint8],
    backends: Path = backend.BACKENDS,
) -> str:
    """Serves a version folder that is not published yet and compares its answers with those that passed the gate.

    Args:
        spec: the model.
        target: what it was built for.
        content: the version folder, named by its version.
        candidate: what passed the gate.
        heads: what the gate held it against: the raw heads of the graph that it was built from.
        images: UINT8 [n,H,W,3], n >= 1; sent alone and together.
        backends: the folder of this project's backends.

    Returns:
        What was seen, in words.

    Raises:
        VerifyError: the server does not load it, or answers otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="ssd-rehearsal-") as name:
        model = Path(name) / spec.model.name
        model.mkdir()
        shutil.copyfile(content / CONFIG, model / CONFIG)
        (model / content.name).symlink_to(content.resolve())
        picture.bring_about(spec, Path(name), int(content.name), target.runtime)
        server = TritonServer(name, backends=backends)
        try:
            server.start()
            asker = _Asker(server, spec)
            check = _compare(spec, target, asker, candidate, heads, images[: spec.serving.max_batch_size])
            if check.passed and spec.serving.picture_input:
                check = _compare_picture(spec, asker, images[:1], check.detail)
            version = server.version
        except ServeError as error:
            raise VerifyError(
                f"{spec.model.name}: tritonserver does not serve what would be published: {error.what}",
                why=error.why,
                fix=error.fix or "see the server's log above; nothing was published",
            ) from None
        finally:
            server.stop(timeout=0)
    if not check.passed:
        raise VerifyError(
            f"{spec.model.name}: tritonserver {version} answers otherwise than what passed the gate: {check.detail}",
            why="the backend that serves it, or config.pbtxt, is at fault",
            fix="nothing was published; compare the backend with ONNX Runtime (tests/build/publish/test_backends.py)",
        )
    return f"tritonserver {version} with these files: {check.detail}"


class _Asker:
    """A server as a `Runner`."""

    def __init__(self, server: TritonServer, spec: Spec) -> None:
        self._url, self._model = server.http_url, spec.model.name
        self._kinds = {tensor.name: tensor.triton for tensor in spec.inputs}

    def __call__(self, feeds: Arrays, model: str = "") -> Arrays:
        from tritonclient import http, utils

        try:
            with closing(http.InferenceServerClient(self._url, network_timeout=120)) as client:
                kinds = {name: self._kinds.get(name, "UINT8") for name in feeds}
                answer = client.infer(model or self._model, http_inputs(feeds, kinds))
                return {entry["name"]: answer.as_numpy(entry["name"]) for entry in answer.get_response()["outputs"]}
        except (utils.InferenceServerException, OSError, ValueError) as error:
            raise ServeError(f"it does not answer: {error}") from error


def _compare(
    spec: Spec, target: Target, served: Runner, candidate: Runner, heads: Runner, images: NDArray[np.uint8]
) -> verify.Check:
    """Equal bits, else within the gate's tolerance: a server may run with other threads than this process."""
    together = range(len(images))
    batches = [together] if len(images) == 1 else [range(1), together]
    equal = True
    for batch in batches:
        feeds = spec.nms.feeds(images[batch.start : batch.stop])
        wanted, answered = candidate(feeds), served(feeds)
        equal &= wanted.keys() == answered.keys() and not verify.differing(wanted, answered)
    if equal:
        return verify.Check("served", True, f"equal bits on {len(images)} pictures, alone and together")
    return verify.check_parity(spec, served, heads, images, verify.tolerance(target), len(images))


def _compare_picture(spec: Spec, served: _Asker, image: NDArray[np.uint8], detail: str) -> verify.Check:
    """The picture input with the model's input as a file, against the model itself: equal but for the boxes' unit."""
    import numpy as np
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image[0]).save(stream, "PPM")  # the served input is RGB, whatever the graph makes of it
    wanted = served(spec.nms.feeds(image))
    answered = served({"image": np.frombuffer(stream.getvalue(), np.uint8)[None]}, picture.parts(spec.model.name)[-1])
    names = [name for name in wanted if name != "detection_boxes"]
    different = [name for name in names if wanted[name].tobytes() != answered[name].tobytes()]
    boxes, size = wanted["detection_boxes"], [spec.input.width, spec.input.height] * 2
    if not np.allclose(boxes * np.array(size, np.float32), answered["detection_boxes"], atol=1e-3 * max(size)):
        different.append("detection_boxes")
    if different:
        return verify.Check("picture input", False, f"as a picture's file it gets another {', '.join(different)}")
    return verify.Check("picture input", True, f"{detail}; the same from a picture's file")
