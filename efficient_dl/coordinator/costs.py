"""What a partition costs: measured numbers, nothing of the model itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PartitionCosts:
    """One micro-batch of one partition on one rank, measured.

    forward_seconds, backward_seconds: of the partition alone, without its auxiliary head. parameter_bytes: of its
    parameters. activation_bytes: what backward needs of a forward pass, parameters left out. output_bytes: what the
    next partition receives. 0.0 and 0 stand for "not measured".
    """

    name: str
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    parameter_bytes: int = 0
    activation_bytes: int = 0
    output_bytes: int = 0
