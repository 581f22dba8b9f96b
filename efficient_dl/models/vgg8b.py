"""VGG8B: six convolutions and two linear layers, the network on which local losses are compared."""

from __future__ import annotations

from torch import Tensor, nn

# Nøkland & Eidnes 2019, arXiv 1901.06656: channels of the convolutions, "pool" halves height and width.
PLAN: tuple[int | str, ...] = (128, 256, "pool", 256, 512, "pool", 512, "pool", 512, "pool")
HIDDEN = 1024
# Divisor of all widths; base is the paper's network.
SIZES: dict[str, int] = {"nano": 16, "micro": 8, "mini": 4, "small": 2, "base": 1}


class VGG8B(nn.Module):
    """Images to class logits, after Nøkland & Eidnes 2019.

    Every layer but the last is convolution (3 × 3) or linear, then batch norm, ReLU and dropout. Images smaller
    than 16 pixels run out of pixels before they run out of pools: a side of 1 is not pooled any more.
    """

    def __init__(
        self, shape: tuple[int, ...], classes: int, *, divisor: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        channels, height, width = shape
        layers: list[nn.Module] = []
        for step in PLAN:
            if isinstance(step, int):
                layers.append(_convolution(channels, step // divisor, dropout))
                channels = step // divisor
            elif min(height, width) >= 2:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
        self.features = nn.Sequential(*layers)
        hidden = HIDDEN // divisor
        self.hidden = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * height * width, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.head = nn.Linear(hidden, classes)
        self.initialize(self)

    def initialize(self, module: nn.Module) -> None:
        """Draw the weights of one of this model's parts, or of a new copy of it, as they begin."""
        for part in module.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear)) and part is not self.head:
                nn.init.kaiming_normal_(part.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """x: float (batch, channels, height, width). Returns logits (batch, classes)."""
        return self.head(self.hidden(self.features(x)))


def _convolution(channels_in: int, channels_out: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
        nn.Dropout2d(dropout),
    )
