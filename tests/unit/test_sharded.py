"""The compressed reduce-scatter and all-gather, between threads: what they compute, send and count."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from efficient_dl.comm import (
    AllGather,
    ChunkLayout,
    Compressor,
    GatherSource,
    LoopbackHub,
    OwnPacket,
    Plan,
    SizeRound,
    Transport,
    all_gather_chunks,
    reduce_scatter_chunks,
)

NAMES, NUMELS = ["a", "b", "c", "d"], [7 * 300, 5, 1, 9 * 64]
ROWS, WIDTHS = [7, 5, 1, 9], [300, 1, 1, 64]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layout_of(world_size: int) -> ChunkLayout:
    slots = [-(-rows // world_size) * width for rows, width in zip(ROWS, WIDTHS, strict=True)]
    return ChunkLayout.of(NAMES, NUMELS, slots, world_size)


def chunked(parameters: dict[str, Tensor], world_size: int) -> Tensor:
    """What torch makes of whole parameters: rank-chunked on their first dimension, padded with zeros."""
    chunks: list[Tensor] = []
    for rank in range(world_size):
        for (name, values), rows, width in zip(parameters.items(), ROWS, WIDTHS, strict=True):
            part = -(-rows // world_size)
            padded = values.new_zeros(part * world_size, width)
            padded[:rows] = parameters[name].view(rows, width)
            chunks.append(padded[rank * part : (rank + 1) * part].reshape(-1))
    return torch.cat(chunks)


def parameters_of(rank: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {
        name: torch.randn(numel, generator=generator).to(dtype)
        for name, numel in zip(NAMES, NUMELS, strict=True)
    }


def on_all_ranks(world_size: int, rank_does: Callable[[Transport], Tensor]) -> list[Tensor]:
    hub = LoopbackHub(world_size, timeout=20.0)
    with ThreadPoolExecutor(world_size) as pool:
        running = [pool.submit(rank_does, hub.transport(rank)) for rank in range(world_size)]
        return [future.result() for future in running]


def bits_of(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_layout_finds_every_value_and_no_padding(world_size: int) -> None:
    layout, whole = layout_of(world_size), parameters_of(0)
    buffer = chunked(whole, world_size)
    assert layout.chunk_numel * world_size == buffer.numel()
    assert sum(shard.numel for shard in layout.bucket.shards) == sum(NUMELS)
    assert all(torch.equal(values, whole[name]) for name, values in layout.parameters(buffer).items())
    for rank, chunk in enumerate(layout.chunks(buffer)):
        taken, refilled = layout.take(chunk, rank).clone(), torch.full_like(chunk, torch.nan)
        assert taken.numel() == layout.bucket.shards[rank].numel
        if len(layout.pieces[rank]) == 1:
            refilled[: taken.numel()] = taken  # a view: values are decoded in place
        layout.put(taken, refilled, rank)
        assert torch.equal(refilled, chunk)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_lossless_reduce_scatter_is_the_sum_in_rank_order(world_size: int, dtype: torch.dtype) -> None:
    layout = layout_of(world_size)
    inputs = [chunked(parameters_of(rank, dtype), world_size) for rank in range(world_size)]
    for bits in ("identity", "lossless"):

        def scatter(transport: Transport, bits: str = bits) -> Tensor:
            out = torch.full((layout.chunk_numel,), torch.nan, dtype=dtype)
            x = inputs[transport.rank].clone()
            reduce_scatter_chunks(
                x, out, layout, Compressor(Plan.of(bits), NAMES), transport, float(world_size)
            )
            assert torch.equal(bits_of(x), bits_of(inputs[transport.rank]))
            return out

        total = inputs[0].float()
        for x in inputs[1:]:
            total = total + x.float()
        expected = layout.chunks((total / world_size).to(dtype))
        for found, wanted in zip(on_all_ranks(world_size, scatter), expected, strict=True):
            assert torch.equal(found, wanted)


def test_a_lossy_reduce_scatter_takes_the_own_contribution_as_it_is() -> None:
    layout = layout_of(2)
    own = chunked(parameters_of(0), 2)

    def scatter(transport: Transport) -> Tensor:
        x = own.clone() if transport.rank == 0 else torch.zeros_like(own)
        out = torch.empty(layout.chunk_numel)
        reduce_scatter_chunks(x, out, layout, Compressor(Plan.of(1.0), NAMES), transport)
        return out

    first, second = on_all_ranks(2, scatter)
    assert torch.equal(first, layout.chunks(own)[0])
    assert not torch.equal(second, layout.chunks(own)[1])


def test_a_value_that_is_not_finite_reaches_its_owner() -> None:
    layout = layout_of(3)

    def scatter(transport: Transport) -> Tensor:
        parameters = parameters_of(transport.rank)
        if transport.rank == 0:
            parameters["a"][-1] = torch.inf
        out = torch.empty(layout.chunk_numel)
        x = chunked(parameters, 3)
        reduce_scatter_chunks(x, out, layout, Compressor(Plan.of(2.0), NAMES), transport)
        return out

    assert [bool(out.isfinite().all()) for out in on_all_ranks(3, scatter)] == [True, True, False]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_lossless_all_gather_returns_every_bit(world_size: int, dtype: torch.dtype) -> None:
    layout, whole = layout_of(world_size), chunked(parameters_of(5, torch.float32), world_size).to(dtype)

    def gather(transport: Transport) -> Tensor:
        out = torch.full((whole.numel(),), torch.nan).to(dtype)
        layout.chunks(out)[transport.rank].copy_(layout.chunks(whole)[transport.rank])
        all_gather_chunks(out, layout, Compressor(Plan.of("lossless"), NAMES), transport)
        return out

    assert all(torch.equal(bits_of(out), bits_of(whole)) for out in on_all_ranks(world_size, gather))


def test_a_lossy_all_gather_gives_the_owner_the_same_bits_as_the_others() -> None:
    layout, whole = layout_of(3), chunked(parameters_of(5), 3)

    def gather(transport: Transport) -> Tensor:
        out = torch.full_like(whole, torch.nan)
        layout.chunks(out)[transport.rank].copy_(layout.chunks(whole)[transport.rank])
        all_gather_chunks(out, layout, Compressor(Plan.of(4.0), NAMES), transport)
        return out

    outs = on_all_ranks(3, gather)
    assert all(torch.equal(bits_of(out), bits_of(outs[0])) for out in outs)
    assert 0.0 < float((outs[0] - whole).norm() / whole.norm()) < 0.1


def test_an_unchanged_chunk_is_encoded_once_and_counted_each_time_it_is_sent() -> None:
    layout, whole = layout_of(2), chunked(parameters_of(5), 2)
    meters: list[dict[str, int]] = []

    def gather(transport: Transport) -> Tensor:
        compressor, packet = Compressor(Plan.of("lossless"), NAMES), OwnPacket()
        for number in range(3):
            out = whole.clone()
            if number == 2:
                layout.chunks(out)[transport.rank][3] += 1.0  # as an optimizer, or p.data.copy_(), would
            job = AllGather(out, layout, compressor, transport.rank, packet)
            job.encode()
            job.gather_and_decode(transport)
        meters.append(compressor.meter.state_dict()["totals"])
        return out

    first, second = on_all_ranks(2, gather)
    assert torch.equal(first, second)
    assert float(first.sum() - whole.sum()) == pytest.approx(2.0, abs=1e-2)
    for totals in meters:
        assert 3 * totals["encoded_values"] == 2 * totals["values_sent"] > 0
        assert totals["raw_bytes"] > totals["wire_bytes"] > totals["encoded_bytes"]


@pytest.mark.parametrize("weights", ["lossless", 6.0])
def test_after_a_round_sizes_are_not_sent_until_a_packet_has_another(weights: str | float) -> None:
    """Rank 1's weights change after the round; all ranks still get them, and know the new size from then on."""
    layout = layout_of(3)
    counts: list[list[int]] = []

    def gather(transport: Transport) -> Tensor:
        compressor, packet = Compressor(Plan.of(weights), NAMES), OwnPacket()
        whole = chunked(parameters_of(5), 3)
        own = layout.chunks(whole)[transport.rank]
        other = GatherSource(layout, OwnPacket(), lambda: None)  # one that torch gathers
        round_of_two = SizeRound([GatherSource(layout, packet, own.clone), other], compressor, transport.rank)
        round_of_two.encode()
        round_of_two.gather_and_decode(transport)
        assert other.own_packet.sizes is None
        sent: list[int] = [compressor.meter.totals.wire_bytes]
        for number in range(4):
            out, total = torch.full_like(whole, torch.nan), compressor.meter.totals.wire_bytes
            if number == 1 and transport.rank == 1:
                own[:600].zero_()
            layout.chunks(out)[transport.rank].copy_(own)
            job = AllGather(out, layout, compressor, transport.rank, packet)
            job.encode()
            job.gather_and_decode(transport)
            assert packet.sizes is not None
            sent.append(compressor.meter.totals.wire_bytes - total - 2 * packet.sizes[transport.rank])
        counts.append(sent)
        return out

    first, *others = on_all_ranks(3, gather)
    changed = chunked(parameters_of(5), 3)
    layout.chunks(changed)[1][:600].zero_()
    assert all(torch.equal(bits_of(first), bits_of(other)) for other in others)
    assert float((first - changed).norm() / changed.norm()) < (0.1 if weights == 6.0 else 1e-30)
    for round_bytes, before, resent, after, last in counts:
        assert round_bytes == 2 * 2 * 8  # two sizes to two ranks
        assert before == after == last == 2  # a byte to each
        assert resent > 2 * 8
