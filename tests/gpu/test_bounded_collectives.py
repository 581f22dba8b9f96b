"""Bounded messages with the GPU kernels: the host waits for nothing, and what it learns later it says.

On a GPU torch itself refuses what would wait; in the interpreter every look at a tensor's content is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_dl.comm import (
    BucketLayout,
    ChunkLayout,
    Compressor,
    Plan,
    Residuals,
    Transport,
    all_gather_chunks,
    all_reduce,
    reduce_scatter_chunks,
    summary,
)
from efficient_dl.errors import CorruptPacket
from tests.unit.ranks import on_ranks

NAMES, NUMELS = ["weight", "bias"], [700, 40]
NUMEL = sum(NUMELS)


class LooksAtContent(TorchDispatchMode):
    """Refuses what on a GPU would wait for the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name()
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"):
            raise AssertionError(f"the host waits: {name}")
        return func(*args, **(kwargs or {}))


_guard = threading.local()  # "on" between two kernels of a thread that must not wait


@pytest.fixture(autouse=True)
def content_is_only_for_kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What brings a tensor to the host without torch's dispatcher is for the interpreter's kernels alone."""
    if device != "cpu":
        return
    from triton.runtime.interpreter import GridExecutor

    run_grid = GridExecutor.__call__

    def run_one_grid(self: Any, *arguments: Any, **options: Any) -> Any:
        before, _guard.on = getattr(_guard, "on", False), False
        try:
            return run_grid(self, *arguments, **options)
        finally:
            _guard.on = before

    monkeypatch.setattr(GridExecutor, "__call__", run_one_grid)
    for name in ("tolist", "cpu"):
        monkeypatch.setattr(Tensor, name, guarded(getattr(Tensor, name)))


def guarded(original: Any) -> Any:
    def call(x: Tensor, *arguments: Any, **options: Any) -> Any:
        assert not getattr(_guard, "on", False), "the host waits"
        return original(x, *arguments, **options)

    return call


@contextmanager
def nobody_waits(device: str, together: threading.Barrier | None = None) -> Iterator[None]:
    """together: of all threads that are inside at once, because on a GPU the refusal is the whole process's."""
    if device == "cpu":
        with LooksAtContent():
            _guard.on = True
            try:
                yield
            finally:
                _guard.on = False
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if together is not None:
            together.wait(60)
        torch.cuda.set_sync_debug_mode("default")


class OnDevice:
    """The transport in memory for tensors of a GPU: what a rank sends is what another rank gets, there."""

    def __init__(self, transport: Transport, device: str) -> None:
        self._transport, self.device = transport, torch.device(device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def values(rank: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(rank)).to(device, dtype)


def compressor_on(device: str, **wishes: Any) -> Compressor:
    kernel = "triton" if device == "cpu" else "auto"
    residuals = Residuals(dict(zip(NAMES, NUMELS, strict=True)), torch.device(device))
    plan = Plan.of(2.0, messages="bounded", error_feedback=True, overrides={"bias": "none"}, **wishes)
    return Compressor(plan, NAMES, kernel, residuals)


def chunks(world_size: int) -> ChunkLayout:
    return ChunkLayout.of(NAMES, NUMELS, [-(-numel // world_size) for numel in NUMELS], world_size)


def reduce_all(x: Tensor, compressor: Compressor, transport: Any) -> Tensor:
    all_reduce(x, BucketLayout.of(NAMES, NUMELS, transport.world_size), compressor, transport)
    return x


def scatter(x: Tensor, compressor: Compressor, transport: Any) -> Tensor:
    out = x.new_empty(chunks(2).chunk_numel)
    reduce_scatter_chunks(x, out, chunks(2), compressor, transport)
    return out


def gather(x: Tensor, compressor: Compressor, transport: Any) -> Tensor:
    all_gather_chunks(x, chunks(2), compressor, transport)
    return x


@pytest.mark.parametrize(
    ("collective", "dtype"),
    [
        (reduce_all, torch.float32),
        (reduce_all, torch.bfloat16),
        (scatter, torch.float32),
        (gather, torch.float32),
    ],
)
def test_the_host_waits_for_nothing_between_two_sampled_steps(
    device: str, collective: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    together = threading.Barrier(2)

    def rank(transport: Transport) -> tuple[bool, Tensor, Tensor]:
        compressor, carrier = compressor_on(device), OnDevice(transport, device)
        compressor.begin_step()
        sampled = collective(values(transport.rank, device, dtype), compressor, carrier)
        compressor.commit_step()
        compressor.end_step(0.0)
        assert not compressor.samples
        x = values(transport.rank + 2, device, dtype)
        compressor.begin_step()
        with nobody_waits(device, together):
            result = collective(x, compressor, carrier)
        compressor.commit_step()
        compressor.end_step(0.0)
        return True, sampled.cpu(), result.cpu()

    results = on_ranks(2, rank, timeout=120)
    for _, sampled, result in results:
        assert torch.isfinite(sampled).all() and torch.isfinite(result).all()
    if collective is not scatter:
        assert torch.equal(results[0][1], results[1][1])
        assert torch.equal(results[0][2], results[1][2])


def test_the_refusal_above_sees_a_host_that_waits(device: str) -> None:
    x = torch.ones(3, device=device)
    for look in (lambda: int(x[0]), x.tolist, x.cpu):
        with pytest.raises((AssertionError, RuntimeError)), nobody_waits(device):
            look()


def test_a_damaged_packet_becomes_nan_and_the_next_step_names_its_sender(device: str) -> None:
    def rank(transport: Transport) -> list[str]:
        compressor, carrier = compressor_on(device), OnDevice(transport, device)
        compressor.meter.stepped(0.0)
        before = compressor.state_dict()
        if transport.rank == 1:
            encode = compressor.encode

            def damaged(*arguments: Any, **options: Any) -> Tensor:
                message = encode(*arguments, **options)
                message[0] ^= 1
                return message

            compressor.encode = damaged  # type: ignore[method-assign]
        x = reduce_all(values(transport.rank, device), compressor, carrier)
        assert bool(x.isnan().any())
        raised: list[str] = []
        for _ in range(4):
            try:
                compressor.end_step(0.0)
            except CorruptPacket as error:
                raised.append(str(error))
            if device == "cuda":
                torch.cuda.synchronize()
        with pytest.raises(CorruptPacket, match="rank 1's packet"):
            compressor.state_dict()  # no checkpoint keeps such a step
        compressor.load_state_dict(before)
        compressor.end_step(0.0)
        compressor.end_step(0.0)
        return raised

    for raised in on_ranks(2, rank, timeout=120):
        assert raised and all("rank 1's packet" in text for text in raised)


def test_blocks_without_room_are_counted_though_no_statistics_are_taken(device: str) -> None:
    """At the lowest rates the sample that chooses a step can be far cheaper than the rest."""
    numel = 256 * 132
    x = torch.randn(numel, generator=torch.Generator().manual_seed(1))
    x.view(-1, 256)[::2, 1:] = 0.0
    layout = BucketLayout.of(["weight"], [numel], 1)
    kernel = "triton" if device == "cpu" else "auto"
    compressor = Compressor(Plan.of(1.0, messages="bounded"), ["weight"], kernel)
    compressor.meter.stepped(0.0)
    from efficient_dl.comm.meter import Tally

    tally = Tally(layout)
    (shard,) = layout.shards
    room = torch.empty(compressor.max_bytes(shard, x.dtype), dtype=torch.uint8, device=device)
    with nobody_waits(device):
        compressor.encode(x.to(device), room, shard, tally, copies=1)
    assert tally.totals.dropped_blocks == tally.totals.encoded_values == 0
    dropped = summary(compressor.meter_state())["dropped_blocks"]
    assert dropped == int(room[56:60].view(torch.int32)[0]) > 0
    assert summary(compressor.state_dict()["meter"])["dropped_blocks"] == dropped


def test_ranks_on_different_kernels_understand_each_other(device: str) -> None:
    def rank(transport: Transport) -> Tensor:
        residuals = Residuals(dict(zip(NAMES, NUMELS, strict=True)), torch.device(device))
        plan = Plan.of(2.0, messages="bounded", error_feedback=True)
        kernels: Sequence[str] = ("triton" if device == "cpu" else "auto", "reference")
        compressor = Compressor(plan, NAMES, kernels[transport.rank], residuals)
        compressor.meter.stepped(0.0)
        return reduce_all(values(transport.rank, device), compressor, OnDevice(transport, device)).cpu()

    first, second = on_ranks(2, rank, timeout=120)
    assert torch.equal(first, second)
