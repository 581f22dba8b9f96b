"""Pipelined schedules: the chain of partitions on disjoint groups of ranks, the slowest as fast as can be."""

from __future__ import annotations

import math
from collections.abc import Sequence

from efficient_dl.coordinator.assignment import Assignment
from efficient_dl.coordinator.costs import PartitionCosts
from efficient_dl.coordinator.facts import PartitionState, RankFacts, ScheduleOptions
from efficient_dl.coordinator.grouping import (
    Group,
    RankClass,
    best_groups,
    least_memory,
    rank_classes,
    slowest_link,
)
from efficient_dl.coordinator.links import link_bytes
from efficient_dl.coordinator.memory import held_bytes
from efficient_dl.coordinator.wording import counted, indices_text, size_text, time_text
from efficient_dl.errors import ConfigError


def laid_out(
    costs: Sequence[PartitionCosts],
    ranks: Sequence[RankFacts],
    states: Sequence[PartitionState],
    options: ScheduleOptions,
    training: Sequence[bool],
    held: range,
) -> tuple[Assignment, str]:
    """The assignment of the partitions `held`, the others idle, and a sentence or more on why.

    Minimizes the seconds of the slowest rank, subject to memory. Where partitions are now counts as good enough if
    moving them would gain less than options.move_gain.
    """
    unmeasured = [costs[index].name for index in held if costs[index].seconds(training[index]) <= 0.0]
    if unmeasured:
        raise ConfigError(
            "a pipelined schedule needs measured times",
            expected="seconds > 0 for every partition",
            found="nothing measured for " + ", ".join(unmeasured),
            fix="give partition() an example batch, so that it measures",
        )
    sizes = [size for size in range(1, len(ranks) + 1) if options.micro_batches % size == 0]
    classes = rank_classes(ranks, len(held), sizes)
    available = tuple(len(each.ranks) for each in classes)

    def need(group: Group) -> int:
        return held_bytes(costs, training, held[group.first : group.last], options)

    def seconds(group: Group) -> float:
        used = [each.facts for each, count in zip(classes, group.counts, strict=True) if count]
        memory = least_memory(used)
        if memory is not None and need(group) > memory:
            return math.inf
        holds = held[group.first : group.last]
        work = sum(costs[index].seconds(training[index]) for index in holds)
        share = options.micro_batches // group.num_ranks
        computing = share * work / min(facts.speed for facts in used)
        rate = slowest_link(used)
        if rate is None:
            return computing
        return max(computing, link_bytes(costs, training, holds, group.num_ranks, options) / rate)

    groups = best_groups(len(held), available, sizes, seconds)
    if groups is None:
        smallest = best_groups(len(held), available, sizes, need)
        raise _does_not_fit(costs, ranks, options, training, held, smallest, classes)
    best = _assignment(groups, classes, held, len(costs))
    best_seconds = step_seconds(best, costs, ranks, training, options)
    now = Assignment(tuple(states[index].ranks if index in held else () for index in range(len(costs))))
    if now != best and _possible(now, costs, ranks, training, options, held):
        now_seconds = step_seconds(now, costs, ranks, training, options)
        if now_seconds <= best_seconds * (1.0 + options.move_gain):
            kept = (
                f" Partitions stay where they are: {time_text(best_seconds)} a step elsewhere would be less than"
                f" {options.move_gain:.0%} faster."
            )
            return now, _described(
                now, costs, ranks, training, options, "moving would gain too little"
            ) + kept
    merged = [each for each in classes if len({ranks[rank] for rank in each.ranks}) > 1]
    note = "".join(
        f" Ranks {indices_text(each.ranks)} count as equally fast ({each.facts.speed:.3g}), to bound the search."
        for each in merged
    )
    idle_because = (
        f"with groups that share {options.micro_batches} micro-batches evenly, and by speed, memory and links, more"
        " ranks would not help"
    )
    return best, _described(best, costs, ranks, training, options, idle_because) + note


def rank_seconds(
    assignment: Assignment,
    costs: Sequence[PartitionCosts],
    ranks: Sequence[RankFacts],
    training: Sequence[bool],
    options: ScheduleOptions,
) -> list[float]:
    """How long a step keeps each rank, by the measured costs: computing, or its link if that takes longer.

    Both go on side by side: activations are streamed, gradients averaged while others are computed. 0.0: idle.
    """
    pairs = zip(
        _computing_seconds(assignment, costs, ranks, training, options),
        _link_seconds(assignment, costs, ranks, training, options),
        strict=True,
    )
    return [max(pair) for pair in pairs]


def _computing_seconds(
    assignment: Assignment,
    costs: Sequence[PartitionCosts],
    ranks: Sequence[RankFacts],
    training: Sequence[bool],
    options: ScheduleOptions,
) -> list[float]:
    seconds = [0.0] * len(ranks)
    for index, group in enumerate(assignment.ranks):
        for rank in group:
            share = options.micro_batches / len(group)
            seconds[rank] += share * costs[index].seconds(training[index]) / ranks[rank].speed
    return seconds


def _link_seconds(
    assignment: Assignment,
    costs: Sequence[PartitionCosts],
    ranks: Sequence[RankFacts],
    training: Sequence[bool],
    options: ScheduleOptions,
) -> list[float]:
    seconds = [0.0] * len(ranks)
    for rank, facts in enumerate(ranks):
        holds = assignment.of_rank(rank)
        if holds and facts.bytes_per_second is not None:
            size = len(assignment.ranks[holds[0]])
            seconds[rank] = link_bytes(costs, training, holds, size, options) / facts.bytes_per_second
    return seconds


def step_seconds(
    assignment: Assignment,
    costs: Sequence[PartitionCosts],
    ranks: Sequence[RankFacts],
    training: Sequence[bool],
    options: ScheduleOptions,
) -> float:
    """How long a step takes when the forward queues are full: as long as it keeps the slowest rank."""
    return max(rank_seconds(assignment, costs, ranks, training, options))


def _assignment(
    groups: Sequence[Group], classes: Sequence[RankClass], held: range, num_partitions: int
) -> Assignment:
    left = [list(each.ranks) for each in classes]
    of_partition: list[tuple[int, ...]] = [()] * num_partitions
    for group in groups:
        taken = [left[c].pop(0) for c, count in enumerate(group.counts) for _ in range(count)]
        for index in held[group.first : group.last]:
            of_partition[index] = tuple(sorted(taken))
    return Assignment(tuple(of_partition))


def _possible(
    assignment: Assignment,
    costs: Sequence[PartitionCosts],
    ranks: Sequence[RankFacts],
    training: Sequence[bool],
    options: ScheduleOptions,
    held: range,
) -> bool:
    """Whether it is a pipelined assignment that these ranks can hold."""
    for index in held:
        group = assignment.ranks[index]
        if not group or max(group) >= len(ranks) or options.micro_batches % len(group):
            return False
    for rank, facts in enumerate(ranks):
        holds = assignment.of_rank(rank)
        if not holds:
            continue
        together = list(holds) == list(range(holds[0], holds[-1] + 1))
        if not together or (len(holds) > 1 and any(assignment.ranks[index] != (rank,) for index in holds)):
            return False
        if (
            facts.memory_bytes is not None
            and held_bytes(costs, training, holds, options) > facts.memory_bytes
        ):
            return False
    return True


def _described(
    assignment: Assignment,
    costs: Sequence[PartitionCosts],
    ranks: Sequence[RankFacts],
    training: Sequence[bool],
    options: ScheduleOptions,
    idle_because: str,
) -> str:
    """In words: a step's time, each group with its own time, who is idle, what was not checked."""
    seconds = rank_seconds(assignment, costs, ranks, training, options)
    computing = _computing_seconds(assignment, costs, ranks, training, options)
    partitions: dict[tuple[int, ...], list[int]] = {}
    for index, group in enumerate(assignment.ranks):
        if group:
            partitions.setdefault(group, []).append(index)
    slowest = max(seconds)
    parts: list[str] = []
    for group, held in partitions.items():
        time = max(seconds[rank] for rank in group)
        by_link = time > max(computing[rank] for rank in group)
        time_and_why = time_text(time) + (" for its link" if by_link else "")
        parts.append(f"{counted('partition', held)} on {counted('rank', group)} ({time_and_why})")
    text = f"A step takes {time_text(slowest)}, as long as its slowest rank: {', '.join(parts)}."
    idle = [rank for rank in range(len(ranks)) if not assignment.of_rank(rank)]
    if idle:
        verb = "is" if len(idle) == 1 else "are"
        text += f" {counted('Rank', idle)} {verb} idle: {idle_because}."
    unknown = [rank for rank, facts in enumerate(ranks) if facts.memory_bytes is None]
    if unknown:
        text += f" Memory is unknown, hence not checked, on {len(unknown)} of {len(ranks)} ranks."
    return text


def _does_not_fit(
    costs: Sequence[PartitionCosts],
    ranks: Sequence[RankFacts],
    options: ScheduleOptions,
    training: Sequence[bool],
    held: range,
    smallest: Sequence[Group] | None,
    classes: Sequence[RankClass],
) -> ConfigError:
    assert smallest is not None  # one rank can hold the whole chain, as far as the groups' shape goes
    needs = [held_bytes(costs, training, held[group.first : group.last], options) for group in smallest]
    enough = max(needs)
    memories = [facts.memory_bytes for facts in ranks if facts.memory_bytes is not None]
    alone = {index: held_bytes(costs, training, [index], options) for index in held}
    largest = max(alone, key=lambda index: alone[index])
    merged = any(len({ranks[rank] for rank in each.ranks}) > 1 for each in classes)
    return ConfigError(
        "no pipelined assignment fits into the ranks' memory",
        expected=f"{len(ranks)} ranks with {size_text(enough)} ({enough} bytes) each would do",
        found=f"{size_text(min(memories))} to {size_text(max(memories))}; the largest partition, {largest}"
        f" ({costs[largest].name}), needs {size_text(alone[largest])} alone"
        + ("; unlike ranks counted as the lesser of both, to bound the search" if merged else ""),
        fix="more partitions than now, or a smaller micro-batch"
        if alone[largest] > max(memories)
        else "more ranks, a smaller micro-batch, or an optimizer with less state",
    )
