"""Buffers are used again, and never by two at once."""

from __future__ import annotations

import torch

from efficient_dl.comm.buffers import BufferPool

CPU = torch.device("cpu")


def test_a_buffer_that_was_given_back_is_used_again() -> None:
    pool = BufferPool()
    first = pool.take(1000, CPU)
    pool.give([first])
    assert pool.take(900, CPU) is first


def test_a_buffer_in_use_is_not_handed_out() -> None:
    pool = BufferPool()
    assert pool.take(10, CPU).data_ptr() != pool.take(10, CPU).data_ptr()


def test_the_smallest_that_is_large_enough_is_taken() -> None:
    pool = BufferPool()
    buffers = [pool.take(size, CPU) for size in (5000, 10, 1000)]
    pool.give(buffers)
    assert pool.take(900, CPU) is buffers[2]
    assert pool.take(900, CPU) is buffers[0]


def test_the_pool_holds_no_more_buffers_than_were_in_use_at_once() -> None:
    pool = BufferPool()
    for size in range(1000, 100_000, 1000):
        pool.give([pool.take(size, CPU)])
    held = [pool.take(0, CPU).numel() for _ in range(3)]
    assert [numel for numel in held if numel] == [max(held)]
