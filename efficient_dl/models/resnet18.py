"""ResNet-18 in its basic-block form, with a stem for small or for large images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Channels of the first stage; base is the paper's network (He et al. 2015, arXiv 1512.03385).
SIZES: dict[str, int] = {"nano": 4, "micro": 8, "mini": 16, "small": 32, "base": 64}
LARGE_IMAGE = 64  # pixels from which the paper's stem, which divides the sides by 4, leaves something to see


class BasicBlock(nn.Module):
    """Two convolutions around a shortcut, which is a 1 × 1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class ResNet18(nn.Module):
    """Images to class logits, after He et al. 2015.

    stem: "cifar", a 3 × 3 convolution at full resolution; "imagenet", a 7 × 7 convolution with stride 2 and a
    max-pool; "auto" takes imagenet from 64 pixels on.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        *,
        width: int = 64,
        stem: str = "auto",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        large = stem == "imagenet" or (stem == "auto" and min(shape[1:]) >= LARGE_IMAGE)
        self.stem = _large_stem(shape[0], width) if large else _small_stem(shape[0], width)
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(4):
            for stride in (1 if stage == 0 else 2, 1):
                blocks.append(BasicBlock(channels, width * 2**stage, stride))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, classes)
        self.initialize(self)

    def initialize(self, module: nn.Module) -> None:
        """Draw the weights of one of this model's parts, or of a new copy of it, as they begin."""
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(part, BasicBlock):
                # Every block starts as its shortcut: Goyal et al. 2017, arXiv 1706.02677, section 5.1.
                nn.init.zeros_(part.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: float (batch, channels, height, width). Returns logits (batch, classes)."""
        features = self.blocks(self.stem(x))
        return self.head(self.dropout(torch.flatten(nn.functional.adaptive_avg_pool2d(features, 1), 1)))


def _small_stem(channels: int, width: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def _large_stem(channels: int, width: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(), pool)
