"""Where DeepSpeed reduces gradients: its methods that this replaces on one engine, and what takes their place.

DeepSpeed has no public hook for it. The methods below are its own internals, so their signatures are compared with the
expected ones before anything is replaced. Only the collective inside them changes: casts to the communication dtype,
pre- and post-division and the copies into partitions stay as DeepSpeed has them.
"""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from efficient_dl.errors import ConfigError, EdlError
from efficient_dl.integrations.deepspeed_reducers import Piece, Reducer

# Tested with these; a change of what a method's arguments mean comes with a new minor version.
OLDEST_VERSION, NEXT_VERSION = (0, 19, 8), (0, 20, 0)
PACKAGE = "deepspeed>=0.19.8,<0.20"

ENGINE_METHODS = {"allreduce_bucket": ("self", "bucket", "dp_group", "dp_world_size")}
ZERO_METHODS = {
    "allreduce_bucket": (
        *("self", "bucket", "communication_data_type", "rank", "log", "divide", "process_group"),
    ),
    "allreduce_and_copy_with_multiple_ranks": (
        *("self", "small_bucket", "communication_data_type", "log", "divide", "process_group"),
        *("bucket_ranks", "output_bucket"),
    ),
    "gradient_reduction_w_predivide": ("self", "tensor", "communication_data_type"),
}


def check_version(version: str) -> None:
    """Raises ConfigError unless this version of DeepSpeed is one whose internals are known."""
    found = tuple(int(part) for part in version.partition("+")[0].split(".")[:3] if part.isdigit())
    if not OLDEST_VERSION <= found < NEXT_VERSION:
        raise ConfigError(
            "this version of DeepSpeed is not supported",
            expected=PACKAGE,
            found=version,
            fix=f"pip install '{PACKAGE}'",
        )


def check_signatures(owner: type, methods: Mapping[str, tuple[str, ...]], version: str) -> None:
    """Raises ConfigError unless the class has these methods with these arguments."""
    for name, expected in methods.items():
        method = getattr(owner, name, None)
        found = tuple(inspect.signature(method).parameters) if method else ()
        if found != expected:
            raise ConfigError(
                f"{owner.__name__}.{name} of DeepSpeed {version} is not the one this was written for",
                expected=f"({', '.join(expected)})",
                found=f"({', '.join(found)})" if method else "no such method",
                where=f"{owner.__module__}; the replaced methods are known for {PACKAGE}",
                fix=f"pip install '{PACKAGE}', with its files unchanged",
            )


class GradientMap:
    """Which parameters a flat tensor holds gradients of, told from where the gradients lie in memory.

    gradients: pairs of a parameter's name and its gradient, dense in memory.
    """

    def __init__(self, gradients: Iterable[tuple[str, Tensor]]) -> None:
        spans = sorted((g.data_ptr(), g.data_ptr() + g.nbytes, name) for name, g in gradients if g.numel())
        self._starts = [start for start, _, _ in spans]
        self._spans = spans

    def pieces(self, x: Tensor) -> list[Piece]:
        """What x holds, in order. Raises EdlError for memory of no gradient."""
        position, stop = x.data_ptr(), x.data_ptr() + x.nbytes
        pieces: list[Piece] = []
        while position < stop:
            index = bisect_right(self._starts, position) - 1
            if index < 0 or position >= self._spans[index][1]:
                raise EdlError(
                    "DeepSpeed reduces values that belong to no parameter's gradient",
                    found=f"{(stop - position) // x.element_size()} values behind {pieces[-1:] or 'nothing'}",
                    fix=f"report this with DeepSpeed's configuration; known: {PACKAGE}",
                )
            start, end, name = self._spans[index]
            itemsize = x.element_size()
            pieces.append((name, (min(end, stop) - position) // itemsize, (position - start) // itemsize))
            position = min(end, stop)
        return pieces


class EnginePlug:
    """Takes the place of the engine's own all-reduce: without ZeRO, and for DeepSpeed's BF16_Optimizer.

    BF16_Optimizer is what DeepSpeed makes of ZeRO stage 1 with bf16 parameters and float32 accumulation.
    """

    methods = ENGINE_METHODS
    sums_at_owners = False

    reducer: Reducer

    def __init__(self, engine: Any, names: Mapping[int, str]) -> None:
        self.target = engine
        self.group = engine.seq_data_parallel_group
        self._names = names

    def allreduce_bucket(
        self, bucket: list[Tensor], dp_group: dist.ProcessGroup, dp_world_size: float | None = None
    ) -> Tensor:
        """Returns the bucket's gradients, flat, averaged as DeepSpeedEngine.allreduce_bucket does."""
        engine = self.target
        _check_group(dp_group, self.group)
        size = dist.get_world_size(dp_group) if dp_world_size is None else dp_world_size
        located = GradientMap(self._gradients())
        pieces = [piece for gradient in bucket for piece in located.pieces(gradient)]
        flat = engine.flatten(bucket)
        x = flat.to(engine.communication_data_type)
        predivide = engine.gradient_predivide_factor()
        if not engine.gradient_average:
            self.reducer.all_reduce(x, pieces)
        elif engine.postscale_gradients():
            if predivide != 1.0:
                x.mul_(1.0 / predivide)
            self.reducer.all_reduce(x, pieces)
            if predivide != size:
                x.mul_(predivide / size)
        else:
            x.mul_(1.0 / size)
            self.reducer.all_reduce(x, pieces)
        return flat if x is flat else flat.copy_(x)

    def gradient_numels(self) -> dict[str, int]:
        """Values of the gradients that are longer than their parameters: padding counts as the last one's."""
        return {name: gradient.numel() for name, gradient in self._gradients()}

    def _gradients(self) -> Iterable[tuple[str, Tensor]]:
        optimizer = self.target.optimizer
        if not hasattr(optimizer, "get_grads_for_reduction"):
            for parameter in self.target.module.parameters():
                if parameter.requires_grad and parameter.grad is not None:
                    yield self._names[id(parameter)], parameter.grad
            return
        # BF16_Optimizer reduces float32 gradients of its own, flat by group.
        for parameters, flat in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients_flat, strict=True):
            numels = [parameter.numel() for parameter in parameters]
            numels[-1] += flat.numel() - sum(numels)
            for parameter, gradient in zip(parameters, flat.split(numels), strict=True):
                yield self._names[id(parameter)], gradient


class ZeroPlug:
    """Takes the place of the reductions of DeepSpeedZeroOptimizer, which is ZeRO stages 1 and 2.

    With "reduce_scatter": true, DeepSpeed reads a sum at the rank that owns the partition alone (natively it
    all-reduces, and discards): there the sums are made at their owners and not sent down again.
    """

    methods = ZERO_METHODS

    reducer: Reducer

    def __init__(self, engine: Any, names: Mapping[int, str]) -> None:
        self.target = engine.optimizer
        self.group = engine.optimizer.dp_process_group
        self._names = names

    @property
    def sums_at_owners(self) -> bool:
        """Whether sums are needed at one rank alone."""
        return bool(self.target.reduce_scatter)

    def gradient_numels(self) -> dict[str, int]:
        """As `EnginePlug.gradient_numels`; there are none."""
        return {}

    def allreduce_and_copy_with_multiple_ranks(
        self,
        small_bucket: list[Tensor],
        communication_data_type: Any,
        log: Any = None,
        divide: bool = True,
        process_group: dist.ProcessGroup | None = None,
        bucket_ranks: Sequence[Any] = (),
        output_bucket: Sequence[Tensor | None] | None = None,
    ) -> None:
        """Sums every slice of the bucket at its rank, and puts the sums where DeepSpeed wants them."""
        optimizer, rank = self.target, self.reducer.rank
        owners = [_single_owner(owner) for owner in bucket_ranks]
        result = self._sum_at(owners, small_bucket, communication_data_type, divide, process_group)
        mine = [index for index, owner in enumerate(owners) if owner == rank]
        sums = result.split([small_bucket[index].numel() for index in mine])
        for index, values in zip(mine, sums, strict=True):
            shaped = values.view_as(small_bucket[index])
            if output_bucket is not None:
                optimizer._add_to_grad_partition_buffer(output_bucket[index], shaped)
            small_bucket[index].copy_(shaped)

    def allreduce_bucket(
        self,
        bucket: list[Tensor],
        communication_data_type: Any,
        rank: int | None = None,
        log: Any = None,
        divide: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """Returns the bucket's sum, flat; with a rank given only there, and the rank's own values elsewhere."""
        if rank is not None:
            owners = [rank] * len(bucket)
            result = self._sum_at(owners, bucket, communication_data_type, divide, process_group, rank)
            return result if rank == self.reducer.rank else self.target.flatten(bucket)
        pieces = self._pieces(bucket, communication_data_type)
        flat = self.target.flatten(bucket)
        x = flat.to(communication_data_type)
        self._divide(x, divide, process_group)
        self.reducer.all_reduce(x, [piece for part in pieces for piece in part])
        if x is not flat:
            flat.copy_(x)
        return x

    def gradient_reduction_w_predivide(self, tensor: Tensor, communication_data_type: Any) -> Tensor:
        """Averages a flat bucket in place on all ranks, as "reduce_scatter": false asks for; returns the average."""
        optimizer = self.target
        if tensor.numel() == 0:
            return tensor
        (pieces,) = self._pieces([tensor], communication_data_type)
        size, predivide = dist.get_world_size(self.group), optimizer.gradient_predivide_factor
        x = tensor.to(communication_data_type)
        if not optimizer.gradient_average:
            self.reducer.all_reduce(x, pieces)
        elif optimizer.postscale_gradients:
            if predivide != 1.0:
                x.mul_(1.0 / predivide)
            self.reducer.all_reduce(x, pieces)
            if predivide != size:
                x.mul_(predivide / size)
        else:
            x.div_(size)
            self.reducer.all_reduce(x, pieces)
        if x is not tensor:
            tensor.copy_(x)
        return x

    def _sum_at(
        self,
        owners: list[int],
        bucket: list[Tensor],
        dtype: Any,
        divide: bool,
        group: Any,
        root: int | None = None,
    ) -> Tensor:
        pieces = self._pieces(bucket, dtype)
        flat = self.target.flatten(bucket).to(dtype)
        self._divide(flat, divide, group)
        return self.reducer.sum_slices(flat, [x.numel() for x in bucket], owners, pieces, root)

    def _divide(self, x: Tensor, divide: bool, group: dist.ProcessGroup | None) -> None:
        _check_group(group or self.group, self.group)
        if divide and self.target.gradient_average:
            x.div_(dist.get_world_size(self.group))

    def _pieces(self, bucket: list[Tensor], dtype: Any) -> list[list[Piece]]:
        """The named pieces of each tensor: whole gradients, or slices of the flat bucket that they lie in."""
        waiting = self.target.ipg_buckets[dtype]
        located = GradientMap(
            (self._names[id(self.target.bit16_groups[group][index])], gradient)
            for (group, index, _), gradient in zip(waiting.params, waiting.grads, strict=True)
        )
        return [located.pieces(x) for x in bucket]


def install(plug: EnginePlug | ZeroPlug) -> None:
    """Puts the plug's methods in the place of its target's. Raises ConfigError if something else did that already."""
    taken = [name for name in plug.methods if name in vars(plug.target)]
    if taken:
        raise ConfigError(
            f"{type(plug.target).__name__}.{taken[0]} was replaced already", fix="compress an engine once"
        )
    for name in plug.methods:
        setattr(plug.target, name, getattr(plug, name))


def remove(plug: EnginePlug | ZeroPlug) -> None:
    """Gives the target its own methods back."""
    for name in plug.methods:
        delattr(plug.target, name)


def _single_owner(rank: Any) -> int:
    ranks = rank if isinstance(rank, frozenset) else (rank,)
    if len(ranks) != 1:
        raise EdlError(
            "DeepSpeed wants a gradient slice at several ranks, as its Muon optimizer does",
            expected="one rank",
            found=str(sorted(ranks)),
        )
    return next(iter(ranks))


def _check_group(group: Any, expected: Any) -> None:
    if group is not expected:
        raise EdlError(
            "DeepSpeed reduces gradients over another group than the data-parallel one",
            expected=f"ranks {dist.get_process_group_ranks(expected)}",
            found=f"ranks {dist.get_process_group_ranks(group)}",
            fix="train expert- or sequence-parallel models without compression",
        )
