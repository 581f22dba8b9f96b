"""What a partition costs: measured numbers, nothing of the model itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PartitionCosts:
    """One micro-batch of one partition on one rank, measured.

    forward_seconds, backward_seconds: of the partition alone, without its auxiliary head. parameter_bytes: of its
    parameters. activation_bytes: what backward needs of a forward pass, parameters left out. output_bytes: what the
    next partition receives. again_bytes: what a checkpointed layer keeps while it runs again, at most.
    head_seconds, head_parameter_bytes, head_activation_bytes: the same of the auxiliary head with its loss, forward and
    backward together; only a partition that trains has one. 0.0 and 0 stand for "not measured".
    """

    name: str
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    parameter_bytes: int = 0
    activation_bytes: int = 0
    output_bytes: int = 0
    head_seconds: float = 0.0
    head_parameter_bytes: int = 0
    head_activation_bytes: int = 0
    again_bytes: int = 0

    def seconds(self, training: bool) -> float:
        """Of one micro-batch: all of it where the partition trains, else the forward pass alone."""
        return self.forward_seconds + (self.backward_seconds + self.head_seconds if training else 0.0)
