"""How many bytes the link of a rank carries for the partitions that it holds."""

from __future__ import annotations

from collections.abc import Sequence

from efficient_dl.coordinator.costs import PartitionCosts
from efficient_dl.coordinator.facts import ScheduleOptions


def link_bytes(
    costs: Sequence[PartitionCosts],
    training: Sequence[bool],
    held: Sequence[int],
    num_ranks: int,
    options: ScheduleOptions,
) -> float:
    """In a step, each way, of each of `num_ranks` ranks that hold the partitions `held` (ascending) of a pipeline.

    Activations come in for its share of the micro-batches and go out for the next partition that needs them; the larger
    of both counts, since a link carries both ways at once. What several ranks train they average: by reduce-scatter and
    all-gather 2 (n - 1) / n of the gradients' bytes. Features from a cache cost nothing.
    """
    share = options.micro_batches / num_ranks * options.activation_share
    first, last = held[0], held[-1]
    cached = options.release_frozen and not any(training[:first])
    entering = 0 if first == 0 or cached else costs[first - 1].output_bytes
    leaving = costs[last].output_bytes if any(training[last + 1 :]) else 0
    trained = sum(
        costs[index].parameter_bytes + costs[index].head_parameter_bytes for index in held if training[index]
    )
    averaged = 2 * (num_ranks - 1) / num_ranks * trained * options.gradient_share
    return share * max(entering, leaving) + averaged
