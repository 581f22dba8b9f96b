"""Ranks that start together find each other in a store full of others' keys."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from efficient_dl.errors import TransportError
from efficient_dl.training.session import session


def started(store: dist.Store, size: int) -> set[str]:
    """The value that each rank of a new start reads at a key that all of them have written."""
    with ThreadPoolExecutor(size) as threads:
        own = list(threads.map(lambda rank: session(store, rank, size, 30.0), range(size)))
    own[0].set("who", str(id(own)))
    return {one.get("who").decode() for one in own}


def test_every_start_has_keys_of_its_own_in_one_store() -> None:
    store = dist.HashStore()
    values = [started(store, size) for size in (3, 3, 2, 3)]
    assert [len(one) for one in values] == [1] * 4
    assert len(set.union(*values)) == 4


def test_tokens_of_dead_ranks_are_not_taken_for_living_ones() -> None:
    store = dist.HashStore()
    started(store, 2)
    assert store.check(["session/2/token/1"])
    with pytest.raises(TransportError, match="rank 1"):
        session(store, 0, 2, timeout=0.1)


def test_an_answer_to_others_is_no_answer() -> None:
    store = dist.HashStore()
    store.set("session/2/answer", json.dumps({"name": "old", "tokens": {"1": "other"}}))
    with pytest.raises(TransportError, match="rank 0 does not answer"):
        session(store, 1, 2, timeout=0.1)
