"""Which partition trains where, as a pure function of costs, ranks, progress and options; with the reason."""

from __future__ import annotations

import math
from collections.abc import Sequence

from efficient_dl.coordinator.assignment import Assignment, Decision
from efficient_dl.coordinator.convergence import ended_partitions, waiting_notes
from efficient_dl.coordinator.costs import PartitionCosts
from efficient_dl.coordinator.facts import Kind, PartitionState, RankFacts, ScheduleOptions
from efficient_dl.coordinator.memory import held_bytes
from efficient_dl.coordinator.pipelining import laid_out
from efficient_dl.coordinator.plateau import PlateauRule
from efficient_dl.coordinator.wording import counted, size_text
from efficient_dl.errors import ConfigError

__all__ = ["Kind", "PartitionState", "PlateauRule", "RankFacts", "ScheduleOptions", "schedule"]


def schedule(
    costs: Sequence[PartitionCosts],
    ranks: Sequence[RankFacts],
    states: Sequence[PartitionState],
    options: ScheduleOptions,
    step: int,
) -> Decision:
    """Decides for the stage that begins at `step`. Equal arguments give equal decisions, on every rank.

    costs, states: by partition, in the order of the chain. ranks: by rank. A decision in which nothing trains ends
    the training: its until_step is `step`, and every rank is idle.

    Raises ConfigError, which says what would fit, if the ranks' memory, their number or micro_batches forbid it.
    """
    if not costs or len(costs) != len(states):
        raise ConfigError(
            "costs and states are not of the same partitions",
            expected="one of each for every partition, and at least one",
            found=f"{len(costs)} costs, {len(states)} states",
        )
    if not ranks:
        raise ConfigError("there is no rank to train on", expected="at least one rank", found="0")
    names = [f"partition {index} ({cost.name})" for index, cost in enumerate(costs)]
    ended = ended_partitions(states, options)
    left = [index for index in range(len(costs)) if index not in ended]
    sentences = [f"{names[one.index]} is frozen: {one.why}." for one in ended.values() if one.new]
    if not left or step >= options.total_steps:
        done = "all partitions are trained"
        if left:
            short = ", ".join(f"{names[k]} after {states[k].steps}" for k in left)
            done = (
                f"the run's {options.total_steps} steps are done, before these reached theirs: {short} steps"
            )
        text = " ".join([f"Training ends at step {step}: {done}.", *map(_capital, sentences)])
        return Decision(Assignment(((),) * len(costs)), (False,) * len(costs), step, text)

    trained = left[:1] if options.kind == "sequential" else left
    training = tuple(index in trained for index in range(len(costs)))
    # After the last partition that trains, nothing is needed; what comes before the first may be cached.
    held = range(trained[0] if options.release_frozen else 0, trained[-1] + 1)
    if options.kind == "pipelined":
        assignment, where = laid_out(costs, ranks, states, options, training, held)
    else:
        assignment, where = _on_all(costs, ranks, options, training, held)
    remaining = min(options.budget(index, len(costs)) - states[index].steps for index in trained)
    until = min(step + min(options.stage_steps, remaining), options.total_steps)
    sentences += [where, *waiting_notes(states, ended, options, names)]
    if options.kind == "sequential":
        budget = options.budget(trained[0], len(costs))
        sentences.insert(
            0, f"{names[trained[0]]} trains, {states[trained[0]].steps} of at most {budget} steps done."
        )
    sentences += _held_notes(costs, assignment, training, names)
    return Decision(assignment, training, until, " ".join(map(_capital, sentences)))


def _on_all(
    costs: Sequence[PartitionCosts],
    ranks: Sequence[RankFacts],
    options: ScheduleOptions,
    training: Sequence[bool],
    held: range,
) -> tuple[Assignment, str]:
    num_ranks, micro_batches = len(ranks), options.micro_batches
    if micro_batches % num_ranks:
        fitting = math.ceil(micro_batches / num_ranks) * num_ranks
        raise ConfigError(
            f"{micro_batches} micro-batches a step cannot be shared evenly by {num_ranks} ranks",
            expected=f"a multiple of {num_ranks}, because a {options.kind} schedule uses all ranks for each partition",
            found=f"micro_batches = {micro_batches}",
            fix=f"micro_batches = {fitting}, or {_largest_divisor(micro_batches, num_ranks)} ranks",
        )
    need = held_bytes(costs, training, held, options)
    for rank, facts in enumerate(ranks):
        if facts.memory_bytes is not None and need > facts.memory_bytes:
            raise ConfigError(
                f"rank {rank} has too little memory for a {options.kind} schedule",
                expected=f"{size_text(need)} ({need} bytes) on every rank",
                found=f"{size_text(facts.memory_bytes)} ({facts.memory_bytes} bytes) on rank {rank}",
                fix="a smaller micro-batch, fewer parameters"
                + (", a sequential or pipelined schedule" if options.kind == "simultaneous" else "")
                + (", or release_frozen with cached features" if held[0] == 0 and not training[0] else ""),
            )
    place = tuple(range(num_ranks))
    assignment = Assignment(tuple(place if index in held else () for index in range(len(costs))))
    everyone = "The only rank holds" if num_ranks == 1 else f"All {num_ranks} ranks hold"
    share = micro_batches // num_ranks
    unknown = sum(facts.memory_bytes is None for facts in ranks)
    return assignment, (
        f"{everyone} {counted('partition', held)}; each does {share} of {micro_batches} micro-batches of a"
        f" step and needs {size_text(need)}"
        + (f" (memory is unknown, hence not checked, on {unknown} of {num_ranks} ranks)." if unknown else ".")
    )


def _held_notes(
    costs: Sequence[PartitionCosts], assignment: Assignment, training: Sequence[bool], names: list[str]
) -> list[str]:
    forward = [k for k in range(len(costs)) if assignment.ranks[k] and not training[k]]
    cached = [k for k in range(training.index(True)) if not assignment.ranks[k]]
    idle = [k for k in range(training.index(True), len(costs)) if not assignment.ranks[k]]
    notes: list[str] = []
    if forward:
        notes.append(f"Only forward passes: {', '.join(names[k] for k in forward)}.")
    if cached:
        notes.append(f"On no rank, because its output is cached: {', '.join(names[k] for k in cached)}.")
    if idle:
        notes.append(
            f"On no rank, because no partition in training needs it: {', '.join(names[k] for k in idle)}."
        )
    return notes


def _largest_divisor(number: int, limit: int) -> int:
    return max(size for size in range(1, limit + 1) if number % size == 0)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
