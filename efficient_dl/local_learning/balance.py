"""Where to cut a chain: the contiguous partition whose dearest part is cheapest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache


def best_cuts(
    num_pieces: int,
    num_parts: int,
    cost: Callable[[int, int], int],
    allowed: Callable[[int, int], bool] = lambda first, end: True,
    cut_cost: Sequence[int] | None = None,
    added: Sequence[int] | None = None,
) -> list[int] | None:
    """The first pieces of parts 1 to num_parts - 1, ascending; None where `allowed` leaves no partition.

    cost(first, end): of the pieces first to end - 1 as one part, a whole number; it never falls as a part grows.
    added[k]: what part k costs beside its pieces. cut_cost[i]: of a cut in front of piece i.
    Of all partitions with the least maximum, the one with the least sum of squares, which balances what the dearest
    part leaves free; then with the least sum of cut costs; then the one that cuts late. Exact, by dynamic programming
    over (pieces, parts): num_parts · num_pieces² costs.
    """
    cost, allowed = cache(cost), cache(allowed)
    beside = added or [0] * num_parts
    least = _least_maximum(num_pieces, beside, cost, allowed)
    if least is None:
        return None
    # best[end]: (sum of squares, sum of cut costs), and the cuts, of pieces 0 to end - 1 in the parts made so far.
    best: dict[int, tuple[tuple[int, int], tuple[int, ...]]] = {0: ((0, 0), ())}
    for part, more in enumerate(beside):
        longer: dict[int, tuple[tuple[int, int], tuple[int, ...]]] = {}
        for first, ((squares, crossing), cuts) in best.items():
            for end in range(first + 1, num_pieces + 1):
                if cost(first, end) + more > least:
                    break
                if not allowed(first, end):
                    continue
                here = cut_cost[first] if cut_cost is not None and part else 0
                total = (squares + (cost(first, end) + more) ** 2, crossing + here)
                candidate = (total, (*cuts, first) if part else cuts)
                known = longer.get(end)
                if known is None or (total, _late(candidate[1])) < (known[0], _late(known[1])):
                    longer[end] = candidate
        best = longer
    return list(best[num_pieces][1])


def _late(cuts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-cut for cut in cuts)


def _least_maximum(
    num_pieces: int,
    added: Sequence[int],
    cost: Callable[[int, int], int],
    allowed: Callable[[int, int], bool],
) -> int | None:
    least: dict[int, int] = {0: 0}
    for more in added:
        longer: dict[int, int] = {}
        for first, before in least.items():
            for end in range(first + 1, num_pieces + 1):
                if allowed(first, end):
                    longer[end] = min(longer.get(end, 1 << 200), max(before, cost(first, end) + more))
        least = longer
    return least.get(num_pieces)
