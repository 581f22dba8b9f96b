"""What the scheduler knows besides costs: the ranks, how far each partition is, and what the user asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from efficient_dl.coordinator.plateau import PlateauRule
from efficient_dl.errors import ConfigError

Kind = Literal["sequential", "simultaneous", "pipelined"]


@dataclass(frozen=True)
class RankFacts:
    """One rank. memory_bytes: what it may use for training; None: unknown, and not checked.

    speed: relative to the rank on which the costs hold; twice the speed takes half the seconds.
    bytes_per_second: that its link carries each way, while all ranks use theirs; None: unknown, and taken to be enough.
    """

    memory_bytes: int | None = None
    speed: float = 1.0
    bytes_per_second: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.speed) and self.speed > 0):
            raise ConfigError(
                "a rank's speed is not a positive number", expected="speed > 0", found=str(self.speed)
            )
        rate = self.bytes_per_second
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise ConfigError(
                "a rank's link does not carry a positive number of bytes a second",
                expected="bytes_per_second > 0, or None if unknown",
                found=str(rate),
            )
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise ConfigError(
                "a rank's memory is not a positive number of bytes",
                expected="memory_bytes > 0, or None if unknown",
                found=str(self.memory_bytes),
            )


@dataclass(frozen=True)
class PartitionState:
    """How far a partition is.

    steps: how many it was trained. losses: its local loss in each stage in which it trained, oldest first, each
    smoothed (`plateau.smoothed`). frozen: trained to its end; this is never taken back. ranks: where it is now, so that
    it is not moved for nothing; () if nowhere.
    """

    steps: int = 0
    losses: tuple[float, ...] = ()
    frozen: bool = False
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class ScheduleOptions:
    """What the user asked for. Equal on all ranks.

    kind: "sequential": one partition after the other, each on all ranks. "simultaneous": all partitions on all
        ranks. "pipelined": each partition on ranks of its own.
    micro_batches: M, of a step; each partition's number of ranks divides it.
    stage_steps: steps between two decisions, at most.
    total_steps: of the run.
    partition_steps: for which a partition trains at most; None: all of the run or, sequential, an even share of it.
    plateau: when a partition has converged; None: never, it trains to its budget.
    optimizer_bytes_per_parameter_byte: 2 for Adam, 1 for momentum, 0 for plain SGD; of fp32 parameters.
    reserved_bytes: of each rank's memory, for everything else (framework, codec, data).
    queue_micro_batches: outputs that wait in a forward queue between ranks, at most.
    activation_share, gradient_share: of the bytes of outputs and of gradients, what is sent after compression.
    release_frozen: the outputs of a frozen beginning of the chain are read from a cache, hence no rank holds it.
    move_gain: by what share a step must become faster before partitions move to other ranks.
    window: 2: a partition's activations also wait for the next one's loss.
    heads_wait: its head's, too, because the loss also depends on what happens inside of the partition.
    """

    kind: Kind
    micro_batches: int
    stage_steps: int
    total_steps: int
    partition_steps: int | None = None
    plateau: PlateauRule | None = field(default_factory=PlateauRule)
    optimizer_bytes_per_parameter_byte: float = 2.0
    reserved_bytes: int = 0
    queue_micro_batches: int = 2
    activation_share: float = 1.0
    gradient_share: float = 1.0
    release_frozen: bool = False
    move_gain: float = 0.05
    window: int = 1
    heads_wait: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(
                f"unknown kind of schedule {self.kind!r}", expected="one of " + ", ".join(get_args(Kind))
            )
        budget = {} if self.partition_steps is None else {"partition_steps": self.partition_steps}
        for name, value in {
            "micro_batches": self.micro_batches,
            "stage_steps": self.stage_steps,
            "total_steps": self.total_steps,
            **budget,
        }.items():
            if value < 1:
                raise ConfigError(f"{name} is out of range", expected="at least 1", found=str(value))
        for name in (
            "optimizer_bytes_per_parameter_byte",
            "reserved_bytes",
            "queue_micro_batches",
            "activation_share",
            "gradient_share",
            "move_gain",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is out of range", expected="at least 0", found=str(value))

    def budget(self, partition: int, num_partitions: int) -> int:
        """For how many steps this partition trains at most."""
        if self.partition_steps is not None:
            return self.partition_steps
        if self.kind != "sequential":
            return self.total_steps
        bounds = [self.total_steps * index // num_partitions for index in (partition, partition + 1)]
        return bounds[1] - bounds[0]
