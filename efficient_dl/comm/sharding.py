"""A sharded model's collectives beside its computation: reductions and gathers in threads of their own."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from efficient_dl.comm.gathers import GatherJob
from efficient_dl.comm.pipeline import Pipeline
from efficient_dl.comm.replicas import ReplicaReduction
from efficient_dl.comm.sharded import ReduceScatter
from efficient_dl.comm.transport import Transport

J = TypeVar("J")


@dataclass(frozen=True)
class GradientReduction:
    """One buffer of gradients: what to do on each axis of the mesh; None where nothing is (left) to do.

    scatter: among the ranks that shard one copy of the model. replicas: then, between its copies.
    """

    scatter: ReduceScatter | None
    replicas: ReplicaReduction | None = None


@dataclass(frozen=True)
class ReplicaTransports:
    """Among the ranks that hold the same shard: one transport for each phase, on CUDA devices twice the same."""

    exchange: Transport
    gather: Transport


class OverlappedSharding:
    """Starts reductions and all-gathers that run in threads of their own, each kind first in, first out.

    exchange, gather: one transport for each kind, on groups that nothing else uses, so that both kinds proceed side by
        side; they are this object's own from now on. On CUDA devices pass one transport twice: everything then runs in
        the calling thread, on its current stream, where FSDP has already put it beside backward.
    replicas: the same for the all-reduce between replicas, which also runs beside the next reduce-scatter; None
        without such an axis.
    """

    def __init__(
        self, exchange: Transport, gather: Transport, replicas: ReplicaTransports | None = None
    ) -> None:
        self._exchange, self._gather, self._replicas = exchange, gather, replicas
        self._steps = _steps(exchange, replicas)
        self._reductions: Pipeline[GradientReduction] | None = None
        self._gathers: Pipeline[GatherJob] | None = None
        if exchange is not gather:

            def encode_step(job: GatherJob) -> None:
                job.encode()

            def gather_step(job: GatherJob) -> None:
                job.gather_and_decode(gather)

            self._reductions = Pipeline("edl-scatter", self._steps, exchange.device)
            self._gathers = Pipeline("edl-gather", [encode_step, gather_step], gather.device)

    def reduce(self, job: GradientReduction) -> Future[GradientReduction]:
        """Queues the reduction of a buffer; in the same order on all ranks."""
        if self._reductions is not None:
            return self._reductions.submit(job)
        for step in self._steps:
            step(job)
        return _done(job)

    def gather(self, job: GatherJob) -> Future[GatherJob]:
        """Queues an `AllGather`, or a `SizeRound` before some; in the same order on all ranks."""
        if self._gathers is not None:
            return self._gathers.submit(job)
        job.encode()
        job.gather_and_decode(self._gather)
        return _done(job)

    def abort(self) -> None:
        """Breaks the connections: the peers get a TransportError now, not after a time-out."""
        for transport in self._transports():
            transport.abort()

    def stop(self, timeout: float) -> None:
        """Lets what is queued finish and ends the threads; breaks the connections if a peer keeps them waiting."""
        closings: list[Callable[[float], bool]] = [
            pipeline.close for pipeline in (self._reductions, self._gathers) if pipeline is not None
        ]
        deadline = time.monotonic() + timeout
        stuck = [close for close in closings if not close(max(deadline - time.monotonic(), 0.0))]
        if stuck:
            self.abort()
            for close in stuck:
                close(timeout)

    def close(self, timeout: float = 10.0) -> None:
        """Ends the threads, as `stop`, and closes the transports."""
        self.stop(timeout)
        for transport in self._transports():
            transport.close()

    def _transports(self) -> list[Transport]:
        replicas = self._replicas
        own = [self._exchange, self._gather]
        return list(
            {id(t): t for t in own + ([replicas.exchange, replicas.gather] if replicas else [])}.values()
        )


def _steps(
    exchange: Transport, replicas: ReplicaTransports | None
) -> list[Callable[[GradientReduction], None]]:
    """A thread each: what one buffer does on the second axis runs beside what the next does on the first."""

    def encode(job: GradientReduction) -> None:
        if job.scatter is not None:
            job.scatter.encode()

    def scatter(job: GradientReduction) -> None:
        if job.scatter is not None:
            job.scatter.exchange_and_reduce(exchange)

    def exchange_replicas(job: GradientReduction) -> None:
        if job.replicas is not None and replicas is not None:
            job.replicas.encode()
            job.replicas.exchange_and_reduce(replicas.exchange)

    def gather_replicas(job: GradientReduction) -> None:
        if job.replicas is not None and replicas is not None:
            job.replicas.gather_and_decode(replicas.gather)

    return [encode, scatter] if replicas is None else [encode, scatter, exchange_replicas, gather_replicas]


def _done(job: J) -> Future[J]:
    future: Future[J] = Future()
    future.set_result(job)
    return future
