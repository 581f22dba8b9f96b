"""FSDP2's custom collectives: a reduce-scatter of gradients and an all-gather of weights for each unit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efficient_dl.comm import (
    AllGather,
    ChunkLayout,
    Compressor,
    OverlappedSharding,
    OwnPacket,
    ProcessGroupTransport,
    ReduceScatter,
    sharded_native_tally,
)
from efficient_dl.errors import EdlError, UnsupportedTensor
from efficient_dl.integrations.fsdp_units import Unit

_log = logging.getLogger(__name__)
GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHT_DTYPES = (*GRADIENT_DTYPES, torch.float8_e4m3fn, torch.float8_e5m2)


class Lane:
    """One process group of the model, and the groups of our own that were made from it.

    control: for what is said outside of training steps, on the model's own group.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout: float) -> None:
        self.control = ProcessGroupTransport(group, device, timeout)
        self._sharding: OverlappedSharding | None = None

    def start(self) -> OverlappedSharding:
        """Makes the groups and threads."""
        exchange = self.control.sibling()
        gather = self.control.sibling() if self.control.device.type == "cpu" else exchange
        self._sharding = OverlappedSharding(exchange, gather)
        return self._sharding

    @property
    def sharding(self) -> OverlappedSharding:
        """The collectives; after `start`."""
        assert self._sharding is not None
        return self._sharding


class Backward:
    """The reduce-scatters of the running backward pass: what is to be waited for at its end, and the seconds waited."""

    def __init__(self, abort: Callable[[], None], at_end: Callable[[float], None]) -> None:
        self._abort = abort
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
        self._at_end(seconds)


class _Comm:
    """What torch asks of a custom collective."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Comm.allocate` of torch."""
        return torch.empty(*size, dtype=dtype, device=device)


class GradientReduceScatter(_Comm):
    """Reduce-scatters the gradients of one unit. compressor: with the plan "none" torch does it, and we count."""

    def __init__(self, unit: Unit, compressor: Compressor, lane: Lane, backward: Backward) -> None:
        self._unit = unit
        self._compressor = compressor
        self._lane = lane
        self._backward = backward
        self.replica_bytes = 0

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        """See `ReduceScatter.__call__` of torch."""
        layout = self._unit.reduce_layout()
        world_size = self._unit.world_size
        if layout.chunk_numel != output_tensor.numel():
            raise EdlError(
                "a reduce-scatter holds other gradients than those we have seen",
                expected=f"{layout.chunk_numel} values in a chunk: {', '.join(layout.bucket.names)}",
                found=f"{output_tensor.numel()} values",
                where=f"the module of {self._unit.label!r}",
                fix="report this with your torch version",
            )
        in_backward = self._backward.opened()
        self._count_replicas(output_tensor)
        if self._compressor.plan.codec == "none":
            tally = sharded_native_tally(layout, group.rank(), input_tensor.element_size(), gathers=False)
            self._compressor.meter.add(tally)
            return native_reduce_scatter(output_tensor, input_tensor, group, op, async_op)
        if input_tensor.dtype not in GRADIENT_DTYPES:
            raise UnsupportedTensor(
                f"the gradients of {self._unit.label!r} cannot be compressed",
                expected="float32, bfloat16 or float16",
                found=str(input_tensor.dtype),
                fix="set reduce_dtype in MixedPrecisionPolicy",
            )
        divisor = self._divisor(op, world_size)
        job = ReduceScatter(input_tensor, output_tensor, layout, self._compressor, group.rank(), divisor)
        future = self._lane.sharding.reduce_scatter(job)
        if async_op:
            return FutureWork(future, self._backward)
        # torch divides a sum by itself afterwards.
        if in_backward and op != dist.ReduceOp.SUM and self._unit.may_defer(output_tensor.dtype):
            self._backward.wait_at_end(future)
        else:
            self._backward.wait(future)
        return None

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

    def _count_replicas(self, result: Tensor) -> None:
        if self._unit.reduces_replicas:
            replicas = self._unit.replicas
            assert replicas is not None
            share = 2 * (replicas.size() - 1) / replicas.size()
            self.replica_bytes += int(share * result.numel() * result.element_size())


class WeightAllGather(_Comm):
    """All-gathers the weights of one unit. compressor: with the plan "none" torch does it, and we count.

    What no codec takes is gathered natively, with a line in the log and a count: the dtypes of extensions, several
    dtypes in one unit, and the smaller group of reshard_after_forward=<int>, which is there to be fast.
    """

    def __init__(self, unit: Unit, compressor: Compressor, lane: Lane, backward: Backward) -> None:
        self._unit = unit
        self._compressor = compressor
        self._lane = lane
        self._backward = backward
        self._own_packet = OwnPacket()
        self._layout = unit.gather_layout()
        self.native_gathers = 0
        self.native_bytes = 0

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """See `AllGather.__call__` of torch.

        On a CPU it returns a Work whether asked to or not: torch waits for it before it uses the weights, so that what
        it prefetches in backward arrives beside the computation.
        """
        itemsize = input_tensor.element_size()
        if self._compressor.plan.codec == "none":
            tally = sharded_native_tally(self._layout, group.rank(), itemsize, gathers=True)
            self._compressor.meter.add(tally)
            return native_all_gather(output_tensor, input_tensor, group, async_op)
        if reason := self._why_native(input_tensor, group):
            if not self.native_gathers:
                _log.warning("the weights of %r are gathered uncompressed: %s", self._unit.label, reason)
            self.native_gathers += 1
            self.native_bytes += (group.size() - 1) * input_tensor.numel() * itemsize
            return native_all_gather(output_tensor, input_tensor, group, async_op)
        rank, numel = group.rank(), self._layout.chunk_numel
        own = output_tensor[rank * numel : (rank + 1) * numel]
        if own.data_ptr() != input_tensor.data_ptr():
            own.copy_(input_tensor)
        job = AllGather(output_tensor, self._layout, self._compressor, rank, self._own_packet)
        work = FutureWork(self._lane.sharding.all_gather(job), self._backward)
        if not async_op and output_tensor.device.type != "cpu":
            work.wait()
            return None
        return work

    def gathered(self) -> dict[str, Tensor] | None:
        """Every parameter's gathered values by name, as a forward pass would see them; None where torch gathers."""
        own = self._unit.own_chunk()
        if own is None or self._compressor.plan.codec == "none" or self._why_native(own, self._unit.group):
            return None
        buffer = own.new_empty(own.numel() * self._unit.world_size)
        work = self(buffer, own, self._unit.group, async_op=True)
        assert work is not None
        work.wait()
        return self._layout.parameters(buffer)

    @property
    def layout(self) -> ChunkLayout:
        """How the unit's parameters lie in the buffers."""
        return self._layout

    def _why_native(self, own: Tensor, group: dist.ProcessGroup) -> str:
        if group.group_name != self._unit.group.group_name:
            return f"backward gathers within a smaller group, of {group.size()} ranks"
        if own.dtype not in WEIGHT_DTYPES:
            return f"no codec takes {own.dtype}"
        if own.numel() != self._layout.chunk_numel:
            return "an extension gathers something else than the shards"
        return ""


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


def native_reduce_scatter(
    output: Tensor, x: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool
) -> dist.Work | None:
    """torch's own; under its new name since 2.13, where the old one warns."""
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return call(output, x, op=op, group=group, async_op=async_op)


def native_all_gather(
    output: Tensor, x: Tensor, group: dist.ProcessGroup, async_op: bool
) -> dist.Work | None:
    """torch's own; under its new name since 2.13, where the old one warns."""
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return call(output, x, group=group, async_op=async_op)
