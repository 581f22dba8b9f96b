"""Reductions beside backward: buckets flow through encode, exchange and gather while the caller goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

import torch
from torch import Tensor

from efficient_dl.comm.collectives import Op, Reduction
from efficient_dl.comm.compressor import Compressor
from efficient_dl.comm.grouped import GroupedReduction
from efficient_dl.comm.hierarchy import HierarchicalReduction, Levels
from efficient_dl.comm.layout import BucketLayout
from efficient_dl.comm.pipeline import Pipeline
from efficient_dl.comm.transport import Transport

R = TypeVar("R", Reduction, HierarchicalReduction, GroupedReduction)


class _Reducer(Generic[R]):
    """Starts all-reduces that run in threads of their own, first in, first out.

    start: makes one from x, layout, op, divisors. steps: of each, in order. transports: what the steps use; they are
        this object's own from now on. one_thread: for all steps, instead of one for each.
    """

    def __init__(
        self,
        start: Callable[[Tensor, BucketLayout, Op, Tensor | None], R],
        steps: Sequence[Callable[[R], None]],
        transports: Sequence[Transport],
        one_thread: bool,
    ) -> None:
        self._start = start
        self._transports = transports

        def all_steps(reduction: R) -> None:
            for step in steps:
                step(reduction)

        stages = [all_steps] if one_thread else steps
        self._pipeline: Pipeline[R] = Pipeline("edl-reduce", stages, transports[0].device)

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """The CUDA stream on which results are complete; None on a CPU."""
        return self._pipeline.stream

    def submit(
        self, x: Tensor, layout: BucketLayout, op: Op = "avg", divisors: Tensor | None = None
    ) -> Future[R]:
        """Queues the all-reduce of x, in place (see `Reduction`); in the same order on all ranks."""
        if self.stream is not None:
            x.record_stream(self.stream)
            if divisors is not None:
                divisors.record_stream(self.stream)
        return self._pipeline.submit(self._start(x, layout, op, divisors))

    def abort(self) -> None:
        """Breaks the connections: the peers get a TransportError now, not after a time-out."""
        for transport in self._transports:
            transport.abort()

    def stop(self, timeout: float) -> None:
        """Lets what is queued finish and ends the threads; breaks the connections if a peer keeps them waiting."""
        if not self._pipeline.close(timeout):
            self.abort()
            self._pipeline.close(timeout)

    def close(self, timeout: float = 10.0) -> None:
        """Ends the threads, as `stop`, and closes the transports."""
        self.stop(timeout)
        for transport in self._transports:
            transport.close()


class OverlappedReducer(_Reducer[Reduction]):
    """Starts all-reduces that run in threads of their own, first in, first out.

    compressor: encodes, decodes and counts.
    exchange, gather: one transport for each phase, on groups that nothing else uses, so that the exchange of one
        bucket runs beside the gathering of the one before it; they are this object's own from now on. On CUDA devices
        pass one transport twice: a bucket's steps then run in one thread, because the collectives of two NCCL groups
        in flight at once could start in another order on another rank.
    """

    def __init__(self, compressor: Compressor, exchange: Transport, gather: Transport) -> None:
        super().__init__(
            lambda x, layout, op, divisors: Reduction(x, layout, compressor, exchange.rank, op, divisors),
            [
                Reduction.encode,
                lambda reduction: reduction.exchange_and_reduce(exchange),
                lambda reduction: reduction.gather_and_decode(gather),
            ],
            [exchange] if exchange is gather else [exchange, gather],
            one_thread=exchange is gather,
        )


class HierarchicalReducer(_Reducer[HierarchicalReduction]):
    """The same with a `HierarchicalReduction` for each bucket.

    levels: as for `OverlappedReducer`: a transport of its own for each phase, or on CUDA devices one for each level,
        used twice, and one thread.
    """

    def __init__(self, compressor: Compressor, levels: Levels) -> None:
        transports = levels.transports
        super().__init__(
            lambda x, layout, op, divisors: HierarchicalReduction(
                x, layout, compressor, levels, op, divisors
            ),
            [
                lambda reduction: reduction.scatter_and_reduce(levels.scatter),
                HierarchicalReduction.encode,
                lambda reduction: reduction.exchange_and_reduce(levels.exchange),
                lambda reduction: reduction.gather_and_decode(levels.gather),
                lambda reduction: reduction.spread(levels.spread),
            ],
            transports,
            one_thread=len(transports) < 4,
        )


class GroupedReducer(_Reducer[GroupedReduction]):
    """The same with a `GroupedReduction` for each bucket.

    levels: as for `HierarchicalReducer`, of groups.
    """

    def __init__(self, compressor: Compressor, levels: Levels) -> None:
        compressor.expect_groups()
        transports = levels.transports
        super().__init__(
            lambda x, layout, op, divisors: GroupedReduction(x, layout, compressor, levels, op, divisors),
            [
                GroupedReduction.encode,
                lambda reduction: reduction.scatter_and_reduce(levels.scatter),
                lambda reduction: reduction.exchange_and_reduce(levels.exchange),
                lambda reduction: reduction.gather_and_decode(levels.gather),
                lambda reduction: reduction.spread(levels.spread),
            ],
            transports,
            one_thread=len(transports) < 4,
        )
