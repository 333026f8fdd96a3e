"""The network of the shapes model: a light SSD300 in PyTorch, and its export to ONNX."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from models.shapes.anchors import ANCHORS_PER_CELL, ANCHORS_PER_MAP, IMAGE_SIZE
from models.shapes.scenes import LABELS

CLASSES = len(LABELS) + 1  # class 0 is the background

# (channels out, kernel, stride, padding); a map that the heads read ends each group.
GROUPS = (
    (
        (24, 3, 2, 1),
        (32, 3, 2, 1),
        (48, 3, 1, 1),
        (64, 3, 2, 1),
        (64, 3, 1, 1),
        (64, 3, 1, 1),
        (96, 3, 1, 1),
    ),  # 38 × 38
    ((128, 3, 2, 1), (128, 3, 1, 1), (128, 3, 1, 1)),  # 19 × 19
    ((128, 3, 2, 1), (128, 3, 1, 1)),  # 10 × 10
    ((96, 1, 1, 0), (128, 3, 2, 1)),  # 5 × 5
    ((96, 1, 1, 0), (128, 3, 1, 0)),  # 3 × 3
    ((96, 1, 1, 0), (128, 3, 1, 0)),  # 1 × 1
)


def _block(channels_in: int, channels_out: int, kernel: int, stride: int, padding: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class ShapesSSD(nn.Module):
    """SSD300 (Liu et al. 2016) on a plain Conv-BatchNorm-ReLU backbone.

    Input FP32 [B,3,300,300] in -1..1; outputs `box_deltas` [B,8732,4] and `class_logits` [B,8732,CLASSES], FP32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.ModuleList()
        self.box_heads = nn.ModuleList()
        self.class_heads = nn.ModuleList()
        channels = 3
        for group, per_cell in zip(GROUPS, ANCHORS_PER_CELL, strict=True):
            blocks = []
            for out, kernel, stride, padding in group:
                blocks.append(_block(channels, out, kernel, stride, padding))
                channels = out
            self.groups.append(nn.Sequential(*blocks))
            self.box_heads.append(nn.Conv2d(channels, per_cell * 4, 3, padding=1))
            self.class_heads.append(nn.Conv2d(channels, per_cell * CLASSES, 3, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for head in [*self.box_heads, *self.class_heads]:
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        boxes, logits = [], []
        for group, box_head, class_head, rows in zip(
            self.groups, self.box_heads, self.class_heads, ANCHORS_PER_MAP, strict=True
        ):
            pixels = group(pixels)
            boxes.append(box_head(pixels).permute(0, 2, 3, 1).reshape(-1, rows, 4))
            logits.append(class_head(pixels).permute(0, 2, 3, 1).reshape(-1, rows, CLASSES))
        return torch.cat(boxes, 1), torch.cat(logits, 1)


def export(network: ShapesSSD, path: Path) -> None:
    """Writes the ONNX (opset 17, dynamic batch) with Conv, BatchNormalization and Relu left as separate nodes."""
    network.eval()
    torch.onnx.export(
        network,
        (torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE),),
        str(path),
        input_names=["pixels"],
        output_names=["box_deltas", "class_logits"],
        dynamic_axes={"pixels": {0: "batch"}, "box_deltas": {0: "batch"}, "class_logits": {0: "batch"}},
        opset_version=17,
        dynamo=False,
        do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,
    )
