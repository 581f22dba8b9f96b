"""A training step's threads, simulated: what the planner's formula is held against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

Work = tuple[Literal["core", "link"], float]  # seconds of a resource that nobody shares


def step_seconds(cores: int, stages: Sequence[Sequence[Sequence[Work]]]) -> float:
    """How long a step takes whose stages, a thread each, take every bucket in order, one after the other.

    stages: of each stage and bucket, what it does. A stage waits for the one before it. Those that want a core share
    the cores evenly, and so do those that send share the link.
    """
    bucket, part = [0] * len(stages), [0] * len(stages)
    left = [stage[0][0][1] for stage in stages]
    now, count = 0.0, len(stages[0])
    while bucket[-1] < count:
        running = [
            s for s in range(len(stages)) if bucket[s] < count and (s == 0 or bucket[s] < bucket[s - 1])
        ]
        wanted = {s: stages[s][bucket[s]][part[s]][0] for s in running}
        users = Counter(wanted.values())
        share = {"core": min(1.0, cores / max(users["core"], 1)), "link": 1 / max(users["link"], 1)}
        passed = min(left[s] / share[wanted[s]] for s in running)
        now += passed
        for s in running:
            left[s] -= passed * share[wanted[s]]
            while left[s] <= 1e-12 and bucket[s] < count:
                part[s] += 1
                if part[s] == len(stages[s][bucket[s]]):
                    bucket[s], part[s] = bucket[s] + 1, 0
                    if bucket[s] < count:
                        left[s] = stages[s][bucket[s]][0][1]
                    break
                left[s] = stages[s][bucket[s]][part[s]][1]
    return now


def compressed(
    backward: float,
    ready: Sequence[float],
    sizes: Sequence[float],
    encode: float,
    decode: float,
    transfer: float,
) -> list[list[list[Work]]]:
    """Of two ranks: backward, encode, exchange and sum, gather and decode. Seconds for all values; sizes: shares."""
    begins = (0.0, *ready)
    return [
        [[("core", backward * (end - begin))] for begin, end in zip(begins, ready, strict=False)],
        [[("core", encode * size / 2)] for size in sizes],
        [[("link", transfer * size / 2), ("core", (encode + decode) * size / 2)] for size in sizes],
        [[("link", transfer * size / 2), ("core", decode * size)] for size in sizes],
    ]
