"""Reductions beside backward: buckets flow through encode, exchange and gather while the caller goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch import Tensor

from efficient_dl.comm.collectives import Op, Reduction
from efficient_dl.comm.compressor import Compressor
from efficient_dl.comm.layout import BucketLayout
from efficient_dl.comm.pipeline import Pipeline
from efficient_dl.comm.transport import Transport


class OverlappedReducer:
    """Starts all-reduces that run in threads of their own, first in, first out.

    compressor: encodes, decodes and counts.
    exchange, gather: one transport for each phase, on groups that nothing else uses, so that the exchange of one
        bucket runs beside the gathering of the one before it; they are this object's own from now on. On CUDA devices
        pass one transport twice: a bucket's steps then run in one thread, because the collectives of two NCCL groups
        in flight at once could start in another order on another rank.
    """

    def __init__(self, compressor: Compressor, exchange: Transport, gather: Transport) -> None:
        self._compressor = compressor
        self._rank = exchange.rank
        self._transports = [exchange] if exchange is gather else [exchange, gather]

        def exchange_step(reduction: Reduction) -> None:
            reduction.exchange_and_reduce(exchange)

        def gather_step(reduction: Reduction) -> None:
            reduction.gather_and_decode(gather)

        def all_steps(reduction: Reduction) -> None:
            reduction.encode()
            reduction.exchange_and_reduce(exchange)
            reduction.gather_and_decode(gather)

        stages: list[Callable[[Reduction], None]] = (
            [all_steps] if exchange is gather else [Reduction.encode, exchange_step, gather_step]
        )
        self._pipeline: Pipeline[Reduction] = Pipeline("edl-reduce", stages, exchange.device)

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """The CUDA stream on which results are complete; None on a CPU."""
        return self._pipeline.stream

    def submit(
        self, x: Tensor, layout: BucketLayout, op: Op = "avg", divisors: Tensor | None = None
    ) -> Future[Reduction]:
        """Queues the all-reduce of x, in place (see `Reduction`); in the same order on all ranks."""
        if self.stream is not None:
            x.record_stream(self.stream)
            if divisors is not None:
                divisors.record_stream(self.stream)
        return self._pipeline.submit(Reduction(x, layout, self._compressor, self._rank, op, divisors))

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
