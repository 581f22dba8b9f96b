"""One partition in training: its layers, its auxiliary head, and the local loss that joins them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class LocalObjective(Protocol):
    """A partition's own loss."""

    def __call__(self, inputs: Tensor, features: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
        """The mean loss, 0-dim float32. inputs, features: what went into the partition and what came out."""
        ...


class LocalBlock(nn.Module):
    """A partition with its head. DDP wraps it whole: the parameters of both are trained by one local loss.

    head: from features to logits; the model's last partition, whose output are logits, has nn.Identity().
    """

    def __init__(self, body: nn.Module, head: nn.Module, objective: LocalObjective) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.objective = objective

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the features, with their graph, and the local loss."""
        features = self.body(inputs)
        return features, self.objective(inputs, features, self.head, targets)
