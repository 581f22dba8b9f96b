"""How much of a rank's memory the partitions that it holds take."""

from __future__ import annotations

from collections.abc import Sequence

from efficient_dl.coordinator.costs import PartitionCosts
from efficient_dl.coordinator.facts import ScheduleOptions


def held_bytes(
    costs: Sequence[PartitionCosts], training: Sequence[bool], held: Sequence[int], options: ScheduleOptions
) -> int:
    """Of a rank that holds the partitions `held` (ascending): what stays, and the most of what comes and goes.

    Parameters stay, and for what trains also gradients and the optimizer's state, heads included. Activations exist
    of one partition at a time, because each runs backward before the next runs forward, its head before its layers.
    With window 2 those of its layers wait for the next partition, with their output and the gradient of that; the
    head's, too, if heads wait. Where a partition's input comes from elsewhere, or its output goes to another rank, a
    queue of micro-batches stands between.
    options.reserved_bytes comes on top.
    """
    if not held:
        return 0
    resident, passing, waiting = options.reserved_bytes, 0, 0
    for index in held:
        cost = costs[index]
        if training[index]:
            copies = 2.0 + options.optimizer_bytes_per_parameter_byte
            resident += round((cost.parameter_bytes + cost.head_parameter_bytes) * copies)
            own = cost.activation_bytes + cost.output_bytes
            head, again = cost.head_activation_bytes, cost.again_bytes
            passing = max(passing, waiting + own + (head + again if options.heads_wait else max(head, again)))
            waiting = own + (head if options.heads_wait else cost.output_bytes) if options.window == 2 else 0
        else:
            resident += cost.parameter_bytes
            passing = max(passing, cost.output_bytes)
            waiting = 0
        if index > 0 and index - 1 not in held:
            resident += options.queue_micro_batches * costs[index - 1].output_bytes
        if index + 1 not in held and any(training[index + 1 :]):
            resident += options.queue_micro_batches * cost.output_bytes
    return resident + passing
