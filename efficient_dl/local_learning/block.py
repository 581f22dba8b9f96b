"""One partition in training: its layers, its auxiliary head, and the local loss that joins them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class LocalObjective(Protocol):
    """A partition's own loss. reaches_body: whether it depends on the body otherwise than by its output."""

    @property
    def reaches_body(self) -> bool: ...

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
        self._logits: list[Tensor] | None = None  # of the latest forward pass, where they are kept
        self._apart = False

    def part(self) -> None:
        """From now on the loss's graph ends at the features, so that the head's backward pass can go before the body's.

        That is without effect where the loss also depends on what happens inside of the body, or nothing there trains.
        """
        self._apart = not self.objective.reaches_body

    def keep_logits(self) -> None:
        """From now on keep what the head makes in a forward pass until `logits` takes it."""
        if self._logits is None:
            kept: list[Tensor] = []
            head = self.head

            def keep(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
                if module is head:  # a copy carries the hook along
                    kept[:] = [(output[0] if isinstance(output, tuple) else output).detach()]

            head.register_forward_hook(keep)
            self._logits = kept

    def logits(self) -> Tensor:
        """The head's logits of the latest forward pass, detached; once, and only after `keep_logits`."""
        assert self._logits
        return self._logits.pop()

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the features with their graph, the local loss, and the features that it was computed from.

        The latter are the same tensor or, after `part`, a leaf with the same values.
        """
        features = self.body(inputs)
        parts = self._apart and features.requires_grad
        seen = features.detach().requires_grad_() if parts else features
        return features, self.objective(inputs, seen, self.head, targets), seen
