"""The two steps around a detector that turn a picture's file into its input, and its boxes into pixels.

Published as `<version>/model.py` of `<name>_picture_decode` and of `<name>_picture_place`; config.pbtxt says which of
the two it is. Beside it lies a copy of the client's own `preprocess.py`: the pixels are those of a client.
"""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

THRESHOLDS = ("score_threshold", "iou_threshold")
TAKEN = b"used_dltensor"
_set_capsule_name = ctypes.pythonapi.PyCapsule_SetName
_set_capsule_name.argtypes = [ctypes.py_object, ctypes.c_char_p]


class TritonPythonModel:
    """What the backend calls."""

    def initialize(self, args):
        """Reads config.pbtxt's parameters and imports the client's modules from this version's folder."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        sys.path.insert(0, str(Path(args["model_repository"]) / args["model_version"]))
        try:
            from PIL import Image
            from ssd_client import preprocess
            from ssd_client.rule import Preprocessing
        except ImportError as error:
            raise pb_utils.TritonModelException(
                f"{config['name']}: the Python that the server runs models with ({sys.prefix}) cannot import "
                f"{error.name or error}: install numpy and pillow there"
            ) from error
        Image.MAX_IMAGE_PIXELS = None  # preprocess has a limit of its own
        self._preprocess = preprocess
        self._steps = {"decode": self._decode, "place": self._place}[parameters["step"]]
        if parameters["step"] == "decode":
            self._rule = Preprocessing(**json.loads(parameters["preprocessing"]))
            self._defaults = json.loads(parameters["thresholds"])
            self._lowest = float(parameters["lowest_score_threshold"])

    def execute(self, requests):
        """Answers every request, each with its result or with its own error."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        try:
            # By DLPack: the backend's own conversions misread arrays where a stub from before NumPy 2 meets NumPy 2.
            inputs = {tensor.name(): np.from_dlpack(tensor) for tensor in request.inputs()}
            outputs = self._steps(request, **inputs)
            return pb_utils.InferenceResponse(output_tensors=[_tensor(*item) for item in outputs.items()])
        except ValueError as error:  # an ImageError is one
            return _failed(str(error), pb_utils.TritonError.INVALID_ARG)
        except Exception as error:
            pb_utils.Logger.log_error(f"request {request.request_id() or '(no id)'} failed: {error}")
            return _failed(f"the picture could not be worked on: {error}", pb_utils.TritonError.INTERNAL)

    def _decode(self, request, image):
        """`image` UINT8 [1,bytes] → the detector's inputs, where the picture lies in them, and its size."""
        thresholds = self._thresholds(json.loads(request.parameters() or "{}"))
        pixels = np.empty((1, self._rule.height, self._rule.width, 3), np.uint8)
        picture = self._preprocess.load_image(image.tobytes())
        placement = self._preprocess.preprocess(picture, self._rule, pixels[0])
        place = [*placement.image_size, *placement.scale, *placement.offset, *placement.input_size]
        return {
            "images": pixels,
            "placement": np.array([place], np.float64),
            "image_size": np.array([placement.image_size], np.int32),
            **{name: np.full((1, 1), value, np.float32) for name, value in thresholds.items()},
        }

    def _thresholds(self, parameters):
        """The detector's thresholds, with what the request's parameters say."""
        thresholds = dict(self._defaults)
        for name in THRESHOLDS:
            if name not in parameters:
                continue
            if name not in thresholds:
                raise ValueError(
                    f"{name} is given, but the model has its thresholds built in\nwhat to do: leave it out"
                )
            try:
                value = float(parameters[name])
            except (TypeError, ValueError):
                value = -1.0
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is {parameters[name]!r}\nwhat to do: give a number in 0..1")
            if name == "score_threshold" and value < self._lowest:
                raise ValueError(
                    f"score_threshold is {value:g}, but the model drops everything up to {self._lowest:g}\n"
                    f"what to do: give at least {self._lowest:g}"
                )
            thresholds[name] = value
        return thresholds

    def _place(self, request, boxes, placement):
        """`boxes` FP32 [1,K,4] of the input → in pixels of the picture."""
        width, height, *scale_and_offset, across, down = placement[0].tolist()
        place = self._preprocess.Placement(
            (int(width), int(height)),
            (scale_and_offset[0], scale_and_offset[1]),
            (scale_and_offset[2], scale_and_offset[3]),
            (int(across), int(down)),
        )
        return {"detection_boxes": place.to_image(boxes[0])[None]}


def _tensor(name, array):
    """An output that shares the array's memory."""
    capsule = array.__dlpack__()
    tensor = pb_utils.Tensor.from_dlpack(name, capsule)
    _set_capsule_name(capsule, TAKEN)  # the protocol's name of a capsule that was taken; stubs give it another
    return tensor


def _failed(message, code):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
