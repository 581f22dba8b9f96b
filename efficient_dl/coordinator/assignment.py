"""Which ranks hold which partition, and the decision behind it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Assignment:
    """ranks[k]: the ranks of partition k, ascending; () where it is idle. A rank may hold several partitions."""

    ranks: tuple[tuple[int, ...], ...]

    def of_rank(self, rank: int) -> tuple[int, ...]:
        """The partitions that a rank holds, ascending."""
        return tuple(index for index, ranks in enumerate(self.ranks) if rank in ranks)

    def rank_for(self, partition: int, micro_batch: int) -> int:
        """The rank that does this micro-batch of this partition."""
        ranks = self.ranks[partition]
        return ranks[micro_batch % len(ranks)]


@dataclass(frozen=True)
class Decision:
    """An assignment that holds until the step `until_step`.

    training[k]: whether partition k is trained; one that is held but not trained is frozen and only computes its
    output. reason: why it was decided, for people.
    """

    assignment: Assignment
    training: tuple[bool, ...]
    until_step: int
    reason: str

    @property
    def ended(self) -> bool:
        """Whether the training is over: no partition is trained, and every rank is idle."""
        return not any(self.training)

    def fingerprint(self) -> str:
        """16 hexadecimal digits over all that is decided; every rank compares it before it acts."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]
