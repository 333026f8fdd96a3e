"""Times what a torch user would write, with torchvision's batched_nms, on the inputs that bench.py gives SSDNMS."""

from __future__ import annotations

import statistics
import time

from calls import Inputs
from params import Settings


def measure(settings: Settings, inputs: Inputs) -> float | str:
    """Microseconds of softmax, decode and batched_nms on the host's clock; a string says why there are none."""
    try:
        import torch
        from torchvision.ops import batched_nms
    except Exception as error:
        return f"not measured: torchvision cannot be imported: {error}"[:200]
    if not torch.cuda.is_available():
        return "not measured: this torch sees no GPU"
    deltas, logits, anchors = (torch.from_numpy(array).cuda() for array in inputs.arrays()[:3])

    def run() -> None:
        scores = logits.float().softmax(-1)[..., 1:]
        d = deltas.float()
        centre = d[..., :2] / 10 * anchors[:, 2:] + anchors[:, :2]
        size = (d[..., 2:] / 5).exp() * anchors[:, 2:]
        boxes = torch.cat([centre - size / 2, centre + size / 2], -1).clamp(0, 1)
        for row_scores, row_boxes in zip(scores, boxes, strict=True):
            anchor, label = (row_scores > settings.score_threshold).nonzero(as_tuple=True)
            chosen, score = row_boxes[anchor], row_scores[anchor, label]
            keep = batched_nms(chosen, score, label, settings.iou_threshold)[: settings.max_detections]
            chosen[keep], score[keep], label[keep]

    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[2:])
