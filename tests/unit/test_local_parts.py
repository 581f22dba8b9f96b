"""Parts of layer-wise runs: batches in order, and what a rank reads of a checkpoint."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from efficient_dl.coordinator.assignment import Assignment, Decision
from efficient_dl.training.in_order import InOrder
from efficient_dl.training.stage import wanted_from


def test_items_come_in_order_again_and_skipping_some() -> None:
    items = InOrder("abcd")
    assert [items(number) for number in (0, 0, 2, 2, 3)] == ["a", "a", "c", "c", "d"]


@pytest.mark.parametrize("number", [0, 4])
def test_an_item_that_is_past_or_not_there_is_an_error(number: int) -> None:
    items = InOrder("abcd")
    items(1)
    with pytest.raises(ValueError, match=f"item {number}"):
        items(number)


def test_a_rank_reads_the_partitions_it_holds_and_optimizers_of_those_it_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    decision = Decision(Assignment(((0, 1), (1,), (0,))), (False, True, True), 9, "because")
    names = [{"0.weight": "a.weight"}, {"0.weight": "b.weight"}, {"0.weight": "c.weight"}]
    wanted = wanted_from(decision, names)
    kinds = [f"model/{name}.weight" for name in "abc"]
    kinds += [f"{kind}/{index}/x" for kind in ("head", "optimizer") for index in range(3)]
    assert [key for key in kinds if wanted(key)] == [
        "model/a.weight",
        "model/b.weight",
        "head/1/x",
        "optimizer/1/x",
    ]
