"""A multilayer perceptron with ReLU."""

from __future__ import annotations

from torch import Tensor, nn

# Widths of the hidden layers.
SIZES: dict[str, tuple[int, ...]] = {
    "nano": (32,),
    "micro": (128, 128),
    "mini": (256, 256, 256),
    "small": (512, 512, 512),
    "base": (1024, 1024, 1024),
}


class MLP(nn.Module):
    """Flattened images to class logits through linear layers, each followed by ReLU and dropout."""

    def __init__(self, numel: int, classes: int, *, hidden: tuple[int, ...], dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = numel
        for next_width in hidden:
            layers.append(nn.Sequential(nn.Linear(width, next_width), nn.ReLU(), nn.Dropout(dropout)))
            width = next_width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)
        self.initialize(self.layers)

    def initialize(self, module: nn.Module) -> None:
        """Draw the weights of hidden layers, or of new copies of them, as they begin."""
        for part in module.modules():
            if isinstance(part, nn.Linear):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
                nn.init.zeros_(part.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: float (batch, ...) of `numel` numbers a sample. Returns logits (batch, classes)."""
        return self.head(self.layers(x.flatten(1)))
