"""How DDP's buckets are averaged: by our reduction, or natively with our accounting in the shadow."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from efficient_dl.comm import (
    BucketLayout,
    Compressor,
    Divisible,
    GroupedReducer,
    HierarchicalReducer,
    Levels,
    OverlappedReducer,
    ProcessGroupTransport,
    ShadowReducer,
    Topology,
    Transport,
)

TorchFuture = torch.futures.Future

_log = logging.getLogger(__name__)
_STEPS_BEFORE_REBUILD = 2
_REBUILD_STEPS = 4  # DDP rebuilds its buckets after the first step, or with a static graph after the second


class BucketEngine(Protocol):
    """Averages buckets in the background."""

    def start(
        self, x: Tensor, layout: BucketLayout, divisors: Tensor | None = None
    ) -> tuple[TorchFuture[Tensor], Future[Any]]:
        """Starts on one bucket; returns what DDP waits for, and what ends when all work on it is done.

        divisors: as in `Reduction`.
        """
        ...

    def abort(self) -> None:
        """Breaks the connections to the peers."""
        ...

    def stop(self, timeout: float) -> None:
        """Ends the threads."""
        ...

    def close(self, timeout: float) -> None:
        """Ends the threads and gives up its transports."""
        ...


class CompressedEngine:
    """Our one-shot reduction, the one in groups, or with several ranks on each node the hierarchical one."""

    def __init__(self, reducer: OverlappedReducer | GroupedReducer | HierarchicalReducer) -> None:
        self._reducer = reducer
        self.abort = self._reducer.abort
        self.stop = self._reducer.stop
        self.close = self._reducer.close

    @staticmethod
    def flat(compressor: Compressor, carrier: Transport) -> CompressedEngine:
        """One level, on siblings of a transport."""
        exchange = carrier.sibling()
        gather = carrier.sibling() if carrier.device.type == "cpu" else exchange
        return CompressedEngine(OverlappedReducer(compressor, exchange, gather))

    @staticmethod
    def by_nodes(
        compressor: Compressor, control: ProcessGroupTransport, topology: Topology
    ) -> CompressedEngine:
        """Two levels, on process groups of their own."""
        return CompressedEngine(HierarchicalReducer(compressor, Levels.of(topology, control)))

    @staticmethod
    def in_groups(compressor: Compressor, carrier: Divisible, topology: Topology) -> CompressedEngine:
        """Two levels, both compressed, on transports of their own."""
        return CompressedEngine(GroupedReducer(compressor, Levels.of(topology, carrier)))

    def start(
        self, x: Tensor, layout: BucketLayout, divisors: Tensor | None = None
    ) -> tuple[TorchFuture[Tensor], Future[Any]]:
        """See `BucketEngine.start`."""
        done = self._reducer.submit(x, layout, divisors=divisors)
        return _as_torch_future(done, x, self._reducer.stream), done


class ShadowEngine:
    """The native all-reduce, as DDP does it, and our accounting beside it.

    DDP multiplies a gradient by 1 / n while it copies it into its bucket, and so does this. It divides gradients that
    already lie in their buckets (gradient_as_bucket_view=True with zero_grad(set_to_none=False)), which differs in the
    last bit unless n is a power of two.
    """

    def __init__(self, compressor: Compressor, control: ProcessGroupTransport) -> None:
        self._control = control
        self._reducer = ShadowReducer(compressor, control.rank, control.device)
        self.stop = self.close = self._reducer.stop

    def start(
        self, x: Tensor, layout: BucketLayout, divisors: Tensor | None = None
    ) -> tuple[TorchFuture[Tensor], Future[Any]]:
        """See `BucketEngine.start`."""
        watched = self._reducer.watch(x, layout, divisors)
        x.mul_(1.0 / self._control.world_size)
        work = dist.all_reduce(x, group=self._control.group, async_op=True)
        assert work is not None
        native = work.get_future()
        done = self._reducer.submit(watched, native.wait)
        return native.then(lambda future: future.value()[0]), done

    def abort(self) -> None:
        """It has no connections of its own."""


class BucketRecord:
    """Which buckets steps are reduced in, so that a restarted run can go on in those of the run before.

    buckets: the parameters' names in each bucket of the last step. settled: DDP has certainly rebuilt its buckets, and
    these are those of every step to come.
    """

    def __init__(self) -> None:
        self.buckets: list[list[str]] = []
        self._step: list[list[str]] = []
        self._steps_to_hold = 0
        self._steps_seen = 0
        self.settled = False

    @property
    def holds(self) -> bool:
        """Whether this step is to be reduced in `buckets`, whatever DDP's own are (see `HeldStep`)."""
        return self._steps_to_hold > 0

    def hold(self, buckets: list[list[str]], settled: bool) -> None:
        """Holds steps until DDP's own buckets are these."""
        self.buckets, self.settled = buckets, settled
        self._steps_to_hold = _REBUILD_STEPS

    def know(self, buckets: list[list[str]]) -> None:
        """Takes DDP's buckets for settled, where steps were not seen because they were not ours."""
        self.buckets, self.settled = buckets, True

    def add(self, names: list[str]) -> None:
        """Notes one of DDP's buckets of this step."""
        self._step.append(names)

    def end_step(self) -> None:
        """Decides what the next step is reduced in."""
        step, self._step = self._step, []
        self._steps_seen += 1
        if self.holds and step != self.buckets:
            self._steps_to_hold -= 1
            if not self.holds:
                _log.warning(
                    "DDP builds other buckets than before the restart: a lossy run goes on differently"
                )
        else:
            self.settled |= self._steps_seen > _STEPS_BEFORE_REBUILD and step == self.buckets
            self.buckets, self._steps_to_hold = step, 0


def bucket_names(model: DistributedDataParallel, parameters: Mapping[str, Tensor]) -> list[list[str]]:
    """The parameters in each of DDP's present buckets, in the order in which they are reduced; [] if it cannot tell."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    buckets = model.reducer._get_zeros_like_grad_buckets()
    found = [[names.get(id(one), "") for one in bucket.parameters()] for bucket in buckets]
    return found if all(name for bucket in found for name in bucket) else []


class HeldStep:
    """A step after a restart, in which DDP's buckets are not yet what they were.

    DDP rebuilds its buckets after the first steps of a process. A lossy codec sees other shards in other buckets, so
    until then steps are reduced in the buckets of the run that is continued: held back until all gradients are there.
    """

    def __init__(self, buckets: Sequence[Sequence[str]]) -> None:
        self._buckets = buckets
        self._parts: dict[str, Tensor] = {}
        self._results: list[tuple[TorchFuture[Tensor], Tensor]] = []
        self._started: list[tuple[list[Tensor], TorchFuture[Tensor]]] = []

    def hold(self, x: Tensor, layout: BucketLayout) -> TorchFuture[Tensor]:
        """Takes one of DDP's buckets, and returns what DDP waits for."""
        self._parts |= zip(layout.names, x.split(layout.numels), strict=True)
        result: TorchFuture[Tensor] = TorchFuture(devices=[x.device] if x.is_cuda else None)
        self._results.append((result, x))
        return result

    def start(
        self, all_reduce: Callable[[Tensor, Sequence[str], Sequence[int]], TorchFuture[Tensor]]
    ) -> None:
        """Starts on all buckets of the continued run. all_reduce(x, names, numels) starts on one."""
        for names in self._buckets:
            parts = [self._parts[name] for name in names]
            averaged = all_reduce(torch.cat(parts), names, [part.numel() for part in parts])
            self._started.append((parts, averaged))

    def finish(self) -> None:
        """Waits for the averages, puts them where DDP wants them, and ends what DDP waits for."""
        for parts, averaged in self._started:
            for part, values in zip(parts, averaged.wait().split([p.numel() for p in parts]), strict=True):
                part.copy_(values)
        for result, x in self._results:
            result.set_result(x)


def _as_torch_future(done: Future[Any], x: Tensor, stream: torch.cuda.Stream | None) -> TorchFuture[Tensor]:
    """A future for DDP that ends with x, or with the exception's text, when `done` ends."""
    future: TorchFuture[Any] = TorchFuture(devices=[x.device] if stream else None)

    def finish(done: Future[Any]) -> None:
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            future.set_result(done.exception() or x)

    done.add_done_callback(finish)
    return future.then(_value)


def _value(future: TorchFuture[Any]) -> Tensor:
    value = future.value()
    if isinstance(value, BaseException):
        raise value
    return value
