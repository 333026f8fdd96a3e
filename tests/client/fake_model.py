"""A detector for Triton's `python` backend that obeys the served model's contract and needs no weights.

It finds the bounding box of pure red (class 0, score 0.9) and of pure blue (class 1, score 0.6), and adds one detection
(class 2) whose box is a checksum of the row's pixels and whose score is the row's IoU threshold, so that a test sees
whether every byte and every threshold arrived. The first pixel of a row can ask for trouble: `SLEEP`, `RAISE`, `DIE`.
"""

import json
import os
import time
import zlib

import numpy as np

SLEEP, RAISE, DIE = 250, 251, 252  # red of the pixel (0, 0) where its green is 1; its blue is tenths of a second
K = 10


class TritonPythonModel:
    def initialize(self, args):
        import triton_python_backend_utils as pb_utils

        self.utils = pb_utils
        parameters = json.loads(args["model_config"])["parameters"]
        self.defaults = [float(parameters[name]["string_value"]) for name in ("score_threshold", "iou_threshold")]
        self.channels = (0, 2) if parameters["color_order"]["string_value"] == "RGB" else (2, 0)

    def execute(self, requests):
        return [self._respond(request) for request in requests]

    def _input(self, request, name):
        # Through DLPack: the stub's own as_numpy misreads strides where numpy 2 is installed.
        tensor = self.utils.get_input_tensor_by_name(request, name)
        return None if tensor is None else np.from_dlpack(tensor)

    def _respond(self, request):
        images = self._input(request, "images")
        batch = len(images)
        thresholds = []
        for name, default in zip(("score_threshold", "iou_threshold"), self.defaults, strict=True):
            given = self._input(request, name)
            thresholds.append(np.full((batch, 1), default, np.float32) if given is None else given)
        for order, mark, argument in images[:, 0, 0].tolist():
            if mark == 1 and order == SLEEP:
                time.sleep(argument / 10)
            if mark == 1 and order == RAISE:
                error = self.utils.TritonError("the picture asked for an error")
                return self.utils.InferenceResponse(error=error)
            if mark == 1 and order == DIE:
                os._exit(3)

        count = np.zeros((batch, 1), np.int32)
        boxes = np.zeros((batch, K, 4), np.float32)
        scores = np.zeros((batch, K), np.float32)
        classes = np.full((batch, K), -1, np.int32)
        for row in range(batch):
            patches = find(images[row], thresholds[1][row, 0], self.channels)
            patches = sorted((f for f in patches if f[0] > thresholds[0][row, 0]), key=lambda f: -f[0])
            count[row] = len(patches)
            for k, (score, index, box) in enumerate(patches):
                scores[row, k], classes[row, k], boxes[row, k] = score, index, box
        outputs = {
            "num_detections": count,
            "detection_boxes": boxes,
            "detection_scores": scores,
            "detection_classes": classes,
        }
        tensors = [self.utils.Tensor.from_dlpack(name, value) for name, value in outputs.items()]
        return self.utils.InferenceResponse(tensors)


def find(image, iou_threshold, channels=(0, 2)):
    """(score, class, box) of the coloured patches of one UINT8 [H,W,3] image, and its checksum."""
    height, width, _ = image.shape
    checksum = np.frombuffer(zlib.crc32(image.tobytes()).to_bytes(4, "big"), np.uint8) / np.float32(255)
    patches = [(np.float32(iou_threshold), 2, checksum)]
    for index, (channel, score) in enumerate(zip(channels, (0.9, 0.6), strict=True)):
        others = [c for c in range(3) if c != channel]
        patch = (image[..., channel] > 200) & (image[..., others] < 60).all(axis=-1)
        ys, xs = np.nonzero(patch)
        if len(xs):
            box = [xs.min() / width, ys.min() / height, (xs.max() + 1) / width, (ys.max() + 1) / height]
            patches.append((np.float32(score), index, np.float32(box)))
    return patches
