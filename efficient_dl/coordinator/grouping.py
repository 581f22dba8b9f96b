"""The fastest way to lay a chain of partitions onto groups of ranks: an exact dynamic programme."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from efficient_dl.coordinator.facts import RankFacts

SEARCH_LIMIT = 200_000  # states × choices, about a second; see `rank_classes`


@dataclass(frozen=True)
class RankClass:
    """Ranks that count as equal, ascending."""

    ranks: tuple[int, ...]
    facts: RankFacts


@dataclass(frozen=True)
class Group:
    """Partitions first … last − 1 of the chain, on counts[c] ranks of class c."""

    first: int
    last: int
    counts: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        return sum(self.counts)


def rank_classes(ranks: Sequence[RankFacts], num_partitions: int, sizes: Sequence[int]) -> list[RankClass]:
    """Equal ranks in one class, by first rank.

    Where there are so many kinds of ranks that the search would not end soon, the two most alike count as equal, with
    the lesser speed, memory and link of both, until it does.
    """
    members: dict[RankFacts, list[int]] = {}
    for rank, facts in enumerate(ranks):
        members.setdefault(facts, []).append(rank)
    classes = [RankClass(tuple(of_class), facts) for facts, of_class in members.items()]
    while len(classes) > 1 and _search_size(classes, num_partitions, sizes) > SEARCH_LIMIT:
        one, other = min(
            ((a, b) for i, a in enumerate(classes) for b in classes[i + 1 :]),
            key=lambda pair: _distance(*pair),
        )
        classes = [each for each in classes if each not in (one, other)]
        classes.append(
            RankClass(
                tuple(sorted(one.ranks + other.ranks)),
                RankFacts(
                    least_memory([one.facts, other.facts]),
                    min(one.facts.speed, other.facts.speed),
                    slowest_link([one.facts, other.facts]),
                ),
            )
        )
        classes.sort(key=lambda each: each.ranks)
    return classes


def least_memory(facts: Sequence[RankFacts]) -> int | None:
    """The least of the memories that are known."""
    return min((each.memory_bytes for each in facts if each.memory_bytes is not None), default=None)


def slowest_link(facts: Sequence[RankFacts]) -> float | None:
    """The fewest bytes a second of the links that are known."""
    return min((each.bytes_per_second for each in facts if each.bytes_per_second is not None), default=None)


def best_groups(
    num_partitions: int,
    available: tuple[int, ...],
    sizes: Sequence[int],
    cost: Callable[[Group], float],
) -> list[Group] | None:
    """Cuts the chain into groups with the least cost of the costliest; None if none has a finite cost.

    available: how many ranks each class has; a rank is in one group at most, and may be in none. sizes: numbers of
    ranks that a group may have. Several partitions share one rank, or one partition has one or several ranks; never
    several partitions several ranks. Among the best, the least Σ ranks · cost² is taken, then the first found.
    """
    choices = sorted(_choices(available, sizes), key=lambda counts: (sum(counts), [-n for n in counts]))
    cost = functools.cache(cost)

    def options(first: int, left: tuple[int, ...]) -> list[tuple[Group, tuple[int, ...]]]:
        found: list[tuple[Group, tuple[int, ...]]] = []
        for counts in choices:
            if all(n <= m for n, m in zip(counts, left, strict=True)):
                rest = tuple(m - n for n, m in zip(counts, left, strict=True))
                lasts = range(first + 1, num_partitions + 1) if sum(counts) == 1 else (first + 1,)
                found += [(Group(first, last, counts), rest) for last in lasts]
        return found

    # From the chain's end to its beginning: least[first][left] for partitions first …, with `left` ranks left.
    states = list(product(*(range(n + 1) for n in available)))
    least: list[dict[tuple[int, ...], float]] = [{} for _ in range(num_partitions)]
    least.append(dict.fromkeys(states, 0.0))
    for first in reversed(range(num_partitions)):
        for left in states:
            best = math.inf
            for group, rest in options(first, left):
                if least[group.last][rest] < best:
                    best = min(best, max(cost(group), least[group.last][rest]))
            least[first][left] = best
    bottleneck = least[0][available] if num_partitions else 0.0
    if not math.isfinite(bottleneck):
        return None

    even: list[dict[tuple[int, ...], tuple[float, Group | None]]] = [{} for _ in range(num_partitions)]
    even.append(dict.fromkeys(states, (0.0, None)))
    for first in reversed(range(num_partitions)):
        for left in states:
            best_sum, best_group = math.inf, None
            if least[first][left] <= bottleneck:
                for group, rest in options(first, left):
                    if cost(group) <= bottleneck:
                        total = even[group.last][rest][0] + group.num_ranks * cost(group) ** 2
                        if total < best_sum * (1 - 1e-12):
                            best_sum, best_group = total, group
            even[first][left] = (best_sum, best_group)
    return _followed(even, available, num_partitions)


def _followed(
    even: list[dict[tuple[int, ...], tuple[float, Group | None]]], left: tuple[int, ...], end: int
) -> list[Group]:
    groups: list[Group] = []
    first = 0
    while first < end:
        group = even[first][left][1]
        assert group is not None
        groups.append(group)
        first, left = group.last, tuple(m - n for n, m in zip(group.counts, left, strict=True))
    return groups


def _choices(available: tuple[int, ...], sizes: Sequence[int]) -> list[tuple[int, ...]]:
    allowed = set(sizes)
    if len(available) == 1:
        return [(size,) for size in sizes if size <= available[0]]
    return [counts for counts in product(*(range(n + 1) for n in available)) if sum(counts) in allowed]


def _search_size(classes: Sequence[RankClass], num_partitions: int, sizes: Sequence[int]) -> int:
    states = math.prod(len(each.ranks) + 1 for each in classes)
    if states * num_partitions > SEARCH_LIMIT:
        return states * num_partitions
    choices = _choices(tuple(len(each.ranks) for each in classes), sizes)
    singles = sum(sum(counts) == 1 for counts in choices)
    return num_partitions * states * (len(choices) + singles * num_partitions // 2)


def _distance(one: RankClass, other: RankClass) -> tuple[bool, float, float]:
    memories = [each.facts.memory_bytes or math.inf for each in (one, other)]
    memory = 0.0 if memories[0] == memories[1] else abs(math.log(memories[0]) - math.log(memories[1]))
    links = [each.facts.bytes_per_second or math.inf for each in (one, other)]
    link = 0.0 if links[0] == links[1] else abs(math.log(links[0]) - math.log(links[1]))
    speed = abs(math.log(one.facts.speed / other.facts.speed))
    return memory > 0.0, memory + link + speed, speed
