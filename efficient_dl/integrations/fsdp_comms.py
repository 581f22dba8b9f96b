"""FSDP2's custom reduce-scatter of a unit's gradients, and what it shares with the all-gather of its weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efficient_dl.comm import (
    AllGather,
    BucketLayout,
    ChunkLayout,
    Compressor,
    GatherSource,
    GradientReduction,
    OverlappedSharding,
    ProcessGroupTransport,
    ReduceScatter,
    ReplicaReduction,
    ReplicaTransports,
    ShadowReplicas,
    ShadowScatter,
    ShardedShadow,
    SizeRound,
    sharded_native_tally,
)
from efficient_dl.comm.collectives import Op
from efficient_dl.errors import EdlError, UnsupportedTensor
from efficient_dl.integrations.fsdp_units import Unit
from efficient_dl.integrations.native_wait import wait_for_native

GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Lane:
    """One process group of the model, with that of its replicas, and the groups of our own that were made from them.

    control, replica_control: for what is said outside of training steps, on the model's own groups.
    sources: the weights that are gathered among the group; filled by those who gather.
    weights_may_have_changed: set at the end of every backward pass that reduces, at the same time on all ranks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
        device: torch.device,
        timeout: float,
    ) -> None:
        self.control = ProcessGroupTransport(group, device, timeout)
        self.replica_control = ProcessGroupTransport(replicas, device, timeout) if replicas else None
        self.sources: list[GatherSource] = []
        self.weights_may_have_changed = True
        self._sharding: OverlappedSharding | None = None

    @property
    def controls(self) -> list[ProcessGroupTransport]:
        """Both, or the one that there is."""
        return [self.control, *([self.replica_control] if self.replica_control else [])]

    def start(self, reduces_replicas: bool) -> OverlappedSharding:
        """Makes the groups and threads."""
        exchange, gather = _siblings(self.control)
        replicas = None
        if reduces_replicas and self.replica_control is not None:
            replicas = ReplicaTransports(*_siblings(self.replica_control))
        self._sharding = OverlappedSharding(exchange, gather, replicas)
        return self._sharding

    def gather(self, job: AllGather, compressor: Compressor) -> Future[Any]:
        """Starts an all-gather; the first after weights may have changed exchanges the sizes for all of them."""
        if self.starts_round(compressor):
            self.sharding.gather(SizeRound(self.sources, compressor, self.control.rank))
        return self.sharding.gather(job)

    def starts_round(self, compressor: Compressor) -> bool:
        """Whether sizes are to be told before the next gather; asked once for each."""
        starts = self.weights_may_have_changed and self.tells_sizes and not compressor.bounded
        self.weights_may_have_changed = False
        return starts

    @property
    def tells_sizes(self) -> bool:
        """Whether they are told for all gathers together: not on a GPU, where packets are not kept."""
        return self.control.device.type == "cpu"

    @property
    def sharding(self) -> OverlappedSharding:
        """The collectives; after `start`."""
        assert self._sharding is not None
        return self._sharding


def _siblings(control: ProcessGroupTransport) -> tuple[ProcessGroupTransport, ProcessGroupTransport]:
    first = control.sibling()
    return first, control.sibling() if control.device.type == "cpu" else first


class Backward:
    """The reductions of the running backward pass: what is to be waited for at its end, and the seconds waited.

    is_off: the kill switch was pulled: torch's own collectives do everything.
    """

    def __init__(
        self, abort: Callable[[], None], at_begin: Callable[[], None], at_end: Callable[[float], None]
    ) -> None:
        self.is_off = False
        self._abort = abort
        self._at_begin = at_begin
        self._at_end = at_end
        self._pending: list[Future[Any]] = []
        self._is_open = False
        self._exposed_seconds = 0.0

    def wait(self, future: Future[Any]) -> None:
        """Waits now. Whatever fails breaks the connections, so that the peers learn of it now."""
        start = time.perf_counter()
        try:
            future.result()
        except BaseException:
            self._abort()
            raise
        finally:
            self._exposed_seconds += time.perf_counter() - start

    def opened(self) -> bool:
        """Called by every reduce-scatter; False outside of a backward pass."""
        try:
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        except RuntimeError:
            return False
        if not self._is_open:
            self._at_begin()
        self._is_open = True
        return True

    def wait_at_end(self, future: Future[Any]) -> None:
        """Waits when the backward pass ends."""
        self._pending.append(future)

    def _end(self) -> None:
        # The first of these callbacks runs after FSDP's own, which may add reduce-scatters; the others do nothing.
        if not self._is_open:
            return
        self._is_open = False
        pending, self._pending = self._pending, []
        for future in pending:
            self.wait(future)
        seconds, self._exposed_seconds = self._exposed_seconds, 0.0
        try:
            self._at_end(seconds)
        except BaseException:
            self._abort()
            raise


class Comm:
    """What torch asks of a custom collective."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Comm.allocate` of torch."""
        return torch.empty(*size, dtype=dtype, device=device)


class GradientReduceScatter(Comm):
    """Reduce-scatters the gradients of one unit, and with HSDP reduces them between replicas.

    gradients, replicas: for each axis; with the plan "none" torch does it, and we count. shadow: torch does both, and
    the compressors only count. sample: called with the rank's own gradients and their layout, before they are reduced.

    Where a compressor's residuals wait to be drained, torch's own collective takes its place, with them added.
    """

    def __init__(
        self,
        unit: Unit,
        gradients: Compressor,
        replicas: Compressor,
        lane: Lane,
        backward: Backward,
        shadow: ShardedShadow | None,
        sample: Callable[[Tensor, ChunkLayout], None],
    ) -> None:
        self._unit = unit
        self._gradients, self._replicas = gradients, replicas
        self._sample = sample
        self._lane = lane
        self._backward = backward
        self._shadow = shadow
        self._shadowed: tuple[ShadowReplicas, Tensor] | None = None
        self.replica_bytes = 0
        self.has_reduced_replicas = False  # in this backward pass

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        """See `ReduceScatter.__call__` of torch."""
        unit, rank = self._unit, group.rank()
        layout = unit.reduce_layout()
        if layout.chunk_numel != output_tensor.numel():
            raise EdlError(
                "a reduce-scatter holds other gradients than those we have seen",
                expected=f"{layout.chunk_numel} values in a chunk: {', '.join(layout.bucket.names)}",
                found=f"{output_tensor.numel()} values",
                where=f"the module of {unit.label!r}",
                fix="report this with your torch version",
            )
        in_backward = self._backward.opened()
        drains = self._drains(self._gradients, layout.bucket.names)
        compresses = self._gradients.plan.codec != "none" and not self._backward.is_off and not drains
        self.has_reduced_replicas |= unit.reduces_replicas
        if unit.reduces_replicas and not unit.is_replacing:
            self._count_native_replicas(output_tensor)
        if compresses or unit.is_replacing:
            _check_dtype(unit, input_tensor.dtype)
        self._sample(input_tensor, layout)
        scatter = None
        if compresses and self._shadow is None:
            divisor = self._divisor(op, unit.world_size)
            scatter = ReduceScatter(input_tensor, output_tensor, layout, self._gradients, rank, divisor)
        else:
            if drains:
                _drain(self._gradients, input_tensor, layout)
            if compresses and self._shadow is not None:
                watched = ShadowScatter(input_tensor, layout, self._gradients, rank)
                self._backward.wait_at_end(self._shadow.submit(watched))
            else:
                itemsize = input_tensor.element_size()
                self._gradients.meter.add(sharded_native_tally(layout, rank, itemsize, gathers=False))
            watches = self._shadow is not None and unit.reduces_replicas and self._compresses_replicas
            work = native_reduce_scatter(
                output_tensor, input_tensor, group, op, async_op and not (watches or unit.is_replacing)
            )
            if watches:
                self._watch_replicas(output_tensor, layout, rank)
            if not unit.is_replacing:
                return work
        if unit.is_replacing and not self._encodes_replicas(layout, rank):
            if scatter is not None:
                self._backward.wait(self._lane.sharding.reduce(GradientReduction(scatter)))
            self._reduce_replicas_natively(output_tensor, layout, rank)
            return _FINISHED if async_op else None
        replicas = self._reduction_of_replicas(output_tensor, layout, rank) if unit.is_replacing else None
        future = self._lane.sharding.reduce(GradientReduction(scatter, replicas))
        if async_op:
            return FutureWork(future, self._backward)
        # torch divides a sum by itself afterwards.
        if in_backward and op != dist.ReduceOp.SUM and unit.may_defer(output_tensor.dtype):
            self._backward.wait_at_end(future)
        else:
            self._backward.wait(future)
        return None

    def after_pass(self) -> None:
        """torch has reduced between replicas, too."""
        if self._shadowed is not None and self._shadow is not None:
            watched, chunk = self._shadowed
            self._shadowed = None
            self._unit.wait_for_reduction()
            watched.reduced(chunk)
            self._backward.wait_at_end(self._shadow.submit(watched))

    @property
    def _compresses_replicas(self) -> bool:
        return self._replicas.plan.codec != "none" and not self._backward.is_off

    def _drains(self, compressor: Compressor, names: Sequence[str]) -> bool:
        """Whether what it has left out of these parameters is to go out now, uncompressed; the same on all ranks."""
        residuals = compressor.residuals
        idle = residuals is None or self._shadow is not None or self._backward.is_off
        return not idle and residuals is not None and residuals.waits(names)

    def _encodes_replicas(self, layout: ChunkLayout, rank: int) -> bool:
        drains = self._drains(self._replicas, layout.bucket.shards[rank].names)
        return self._replicas.plan.codec != "none" and not drains

    def _reduction_of_replicas(self, chunk: Tensor, layout: ChunkLayout, rank: int) -> ReplicaReduction:
        unit = self._unit
        assert unit.replicas is not None
        partial = self._partial_of(chunk)
        replica_rank, num_replicas = unit.replicas.rank(), unit.replicas.size()
        return ReplicaReduction(
            chunk, layout, rank, self._replicas, replica_rank, num_replicas, self._replica_op, partial
        )

    def _reduce_replicas_natively(self, chunk: Tensor, layout: ChunkLayout, rank: int) -> None:
        """In the units of `_reduction_of_replicas`, so that what its packets left out can be added."""
        replicas, control = self._unit.replicas, self._lane.replica_control
        assert replicas is not None and control is not None
        partial = self._partial_of(chunk)
        if partial is not None:
            chunk.add_(partial)
        shard = layout.bucket.shards[rank]
        if self._drains(self._replicas, shard.names) and self._replicas.residuals is not None and shard.numel:
            values = layout.take(chunk, rank)
            whole = BucketLayout.of(shard.names, shard.segments, 1).shards[0]
            self._replicas.residuals.drain_shard(whole, values)
            layout.put(values, chunk, rank)
        wait_for_native(
            lambda: dist.all_reduce(chunk, group=replicas, async_op=True),
            control,
            "all-reduce between replicas",
        )
        if self._replica_op == "avg":
            chunk.div_(replicas.size())
        self._count_native_replicas(chunk)

    @property
    def _replica_op(self) -> Op:
        """A divisor of the user's own has been applied already; else torch, which sees one axis, divides by that."""
        return "avg" if self._unit.divide_factor is None else "sum"

    def _partial_of(self, chunk: Tensor) -> Tensor | None:
        partial = self._unit.partial
        if partial is not None and partial.shape != chunk.shape:
            raise EdlError(
                "passes without an all-reduce had gradients of other parameters than this one",
                expected=f"{partial.numel()} values in a chunk",
                found=f"{chunk.numel()}",
                where=f"the module of {self._unit.label!r}",
                fix="use the same parameters in every accumulated pass, or set_reduce_scatter_unused_params(True)",
            )
        return partial

    def _watch_replicas(self, chunk: Tensor, layout: ChunkLayout, rank: int) -> None:
        replicas, partial = self._unit.replicas, self._unit.partial
        assert replicas is not None
        contribution = chunk if partial is None else chunk + partial
        watched = ShadowReplicas(contribution, layout, rank, self._replicas, replicas.rank(), replicas.size())
        self._shadowed = watched, chunk

    def _divisor(self, op: Any, world_size: int) -> float:
        if op == dist.ReduceOp.AVG:
            return float(world_size)
        if op == dist.ReduceOp.SUM:
            return 1.0
        if op == dist.ReduceOp.PREMUL_SUM and self._unit.divide_factor:
            return self._unit.divide_factor
        raise EdlError(
            f"gradients cannot be reduced by {op}",
            expected="a sum, an average, or a sum divided by set_gradient_divide_factor()",
            where=f"the module of {self._unit.label!r}",
            fix='use bits="none" with other reductions',
        )

    def _count_native_replicas(self, result: Tensor) -> None:
        replicas = self._unit.replicas
        assert replicas is not None
        share = 2 * (replicas.size() - 1) / replicas.size()
        self.replica_bytes += int(share * result.numel() * result.element_size())


class FutureWork(dist.Work):
    """What torch waits for: the end of one of our collectives."""

    def __init__(self, future: Future[Any], backward: Backward) -> None:
        super().__init__()
        self._future = future
        self._backward = backward

    def wait(self, timeout: Any = None) -> bool:
        """Returns when the collective has ended, or raises what it raised; the transport has a time-out of its own."""
        self._backward.wait(self._future)
        return True

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        return self._future.done()


class _Finished(dist.Work):
    """Work that is done."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


_FINISHED = _Finished()


def _drain(compressor: Compressor, x: Tensor, layout: ChunkLayout) -> None:
    """Adds what its packets have left out to a buffer of gradients."""
    assert compressor.residuals is not None
    for owner, (chunk, shard) in enumerate(zip(layout.chunks(x), layout.bucket.shards, strict=True)):
        if shard.numel:
            values = layout.take(chunk, owner)
            compressor.residuals.drain_shard(shard, values)
            layout.put(values, chunk, owner)


def _check_dtype(unit: Unit, dtype: torch.dtype) -> None:
    if dtype not in GRADIENT_DTYPES:
        raise UnsupportedTensor(
            f"the gradients of {unit.label!r} cannot be compressed",
            expected="float32, bfloat16 or float16",
            found=str(dtype),
            fix="set reduce_dtype in MixedPrecisionPolicy",
        )


def native_reduce_scatter(
    output: Tensor, x: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool
) -> dist.Work | None:
    """torch's own; under its new name since 2.13, where the old one warns."""
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return call(output, x, op=op, group=group, async_op=async_op)
