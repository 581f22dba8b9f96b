"""best_cuts against all partitions there are."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from efficient_dl.local_learning.balance import best_cuts


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_no_partition_has_a_smaller_maximum_or_then_a_smaller_sum_of_squares(
    costs: list[int], data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, len(costs)))
    crossing = data.draw(st.lists(st.integers(0, 5), min_size=len(costs), max_size=len(costs)))
    added = data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))

    def rank(cuts: tuple[int, ...]) -> tuple[object, ...]:
        bounds = itertools.pairwise((0, *cuts, len(costs)))
        sums = [sum(costs[a:b]) + more for (a, b), more in zip(bounds, added, strict=True)]
        late = tuple(-cut for cut in cuts)
        return max(sums), sum(one**2 for one in sums), sum(crossing[cut] for cut in cuts), late

    found = best_cuts(len(costs), n, lambda a, b: sum(costs[a:b]), cut_cost=crossing, added=added)
    assert found is not None
    best = min(itertools.combinations(range(1, len(costs)), n - 1), key=rank)
    assert rank(tuple(found)) == rank(best)


def test_parts_that_are_not_allowed_are_avoided_or_there_is_no_partition() -> None:
    has_parameters = [True, False, False, True]
    allowed = lambda a, b: any(has_parameters[a:b])  # noqa: E731
    cuts = best_cuts(4, 2, lambda a, b: b - a, allowed)
    assert cuts is not None and len(cuts) == 1
    assert best_cuts(4, 3, lambda a, b: b - a, allowed) is None
