"""Collectives for lists and dicts of tensors, on in-memory ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efficient_dl.comm import (
    Compressor,
    Plan,
    Transport,
    all_gather,
    all_reduce_coalesced,
    all_to_all,
    broadcast,
    summary,
)
from efficient_dl.errors import ConfigError, UnsupportedTensor
from tests.unit.ranks import on_ranks

SUMMABLE = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*SUMMABLE, torch.float8_e4m3fn, torch.float8_e5m2]
NAMES = ["a", "b", "c", "d"]
BITS = ["identity", "lossless", 2.0]


def values(seed: int, shape: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def compressor(bits: str | float, names: list[str] | None = None) -> Compressor:
    return Compressor(Plan.of(bits), names or ["tensor"], kernel="reference")


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tensors of different shapes: a scalar, an empty and a transposed one among them."""
    shapes: list[list[int]] = [[30, 20], [], [0, 3], [7, 90]]
    made = {
        name: values(seed + i, shape, dtype)
        for i, (name, shape) in enumerate(zip(NAMES, shapes, strict=True))
    }
    made["d"] = made["d"].t()
    return made


def run(
    world_size: int,
    bits: str | float,
    call: Callable[[int, Compressor, Transport], Any],
    names: list[str] | None = None,
) -> tuple[list[Any], list[dict[str, Any]]]:
    """What call(rank, compressor, transport) returns on every rank, and every meter's summary."""

    def rank(transport: Transport) -> tuple[Any, dict[str, Any]]:
        own = compressor(bits, names)
        return call(transport.rank, own, transport), summary(own.meter.state_dict())

    results = on_ranks(world_size, rank)
    return [value for value, _ in results], [stats for _, stats in results]


def reduced(world_size: int, bits: str | float, op: Any, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    def call(rank: int, own: Compressor, transport: Transport) -> dict[str, Tensor]:
        tensors = state(10 * rank, dtype)
        if rank % 2:
            tensors = dict(reversed(tensors.items()))  # the order of a dict is not part of the contract
        all_reduce_coalesced(tensors, own, transport, op)
        return tensors

    return run(world_size, bits, call, NAMES)[0]


@pytest.mark.parametrize("dtype", SUMMABLE)
@pytest.mark.parametrize("op", ["avg", "sum"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_coalesced_all_reduce_sums_every_tensor_in_float32(
    world_size: int, op: str, dtype: torch.dtype
) -> None:
    results = reduced(world_size, "lossless", op, dtype)
    for name in NAMES:
        total = state(0, dtype)[name].float()
        for rank in range(1, world_size):
            total = total + state(10 * rank, dtype)[name].float()
        exact = (total / world_size if op == "avg" else total).to(dtype)
        assert all(same_bits(result[name], exact) for result in results)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_lossy_coalesced_all_reduce_ends_bitwise_equal(world_size: int) -> None:
    results = reduced(world_size, 2.0, "avg", torch.float32)
    assert all(same_bits(results[0][name], other[name]) for other in results[1:] for name in NAMES)


def test_small_tensors_of_one_dtype_travel_in_one_message_each_way() -> None:
    names = [f"p{i}" for i in range(50)]

    def call(rank: int, own: Compressor, transport: Transport) -> None:
        all_reduce_coalesced({name: torch.ones(20) for name in names}, own, transport)

    _, stats = run(2, "identity", call, names)
    assert sum(row["wire_bytes"] for row in stats) == 2 * 4 * 1000 + 4 * (32 + 8)


def test_tensors_of_several_dtypes_are_reduced_together() -> None:
    def call(rank: int, own: Compressor, transport: Transport) -> list[Any]:
        tensors = {
            name: torch.full((3,), float(rank), dtype=d) for name, d in zip(NAMES, SUMMABLE, strict=False)
        }
        all_reduce_coalesced(tensors, own, transport)
        return [(x.dtype, x.tolist()) for x in tensors.values()]

    results, _ = run(2, "lossless", call, NAMES)
    assert results[0] == results[1] == [(dtype, [0.5] * 3) for dtype in SUMMABLE]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_lossless_broadcast_is_exact(world_size: int, dtype: torch.dtype) -> None:
    root = world_size - 1

    def call(rank: int, own: Compressor, transport: Transport) -> dict[str, Tensor]:
        tensors = state(10 * rank, dtype)
        broadcast(tensors, own, transport, root)
        return tensors

    for result in run(world_size, "lossless", call, NAMES)[0]:
        assert all(same_bits(result[name], state(10 * root, dtype)[name]) for name in NAMES)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_broadcast_ends_bitwise_equal_and_the_root_sends_its_packet_once(
    world_size: int, bits: str | float
) -> None:
    def call(rank: int, own: Compressor, transport: Transport) -> Tensor:
        x = values(rank, [5000]).requires_grad_()
        broadcast({"tensor": x}, own, transport)
        return x.detach()

    results, stats = run(world_size, bits, call)
    assert all(same_bits(results[0], other) for other in results[1:])
    transfers = 1 if world_size == 2 else 2
    packet = stats[0]["wire_bytes"] - 8 * transfers * (world_size - 1)
    sizes = 8 * transfers * world_size * (world_size - 1)
    assert sum(row["wire_bytes"] for row in stats) == (world_size - 1) * packet + sizes
    assert sum(row["values_sent"] for row in stats) == pytest.approx(
        (world_size - 1) * 5000, abs=2 * world_size
    )
    if bits == "identity":
        assert packet == 32 + 4 * 5000
        assert all(row["ratio"] == 1.0 for row in stats)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_gather_returns_every_ranks_shape_and_bits(world_size: int, dtype: torch.dtype) -> None:
    shapes: list[list[int]] = [[3, 5], [0], [17, 2, 11]]

    def call(rank: int, own: Compressor, transport: Transport) -> list[Tensor]:
        return all_gather(values(rank, shapes[rank], dtype), own, transport)

    for result in run(world_size, "lossless", call)[0]:
        assert all(same_bits(x, values(rank, shapes[rank], dtype)) for rank, x in enumerate(result))


def test_a_lossy_all_gather_ends_bitwise_equal() -> None:
    def call(rank: int, own: Compressor, transport: Transport) -> list[Tensor]:
        return all_gather(values(rank, [300 * (rank + 1)]), own, transport)

    results, stats = run(3, 2.0, call)
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert all(row["ratio"] > 2 for row in stats)


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 400), min_size=3, max_size=3), min_size=3, max_size=3),
    dtype=st.sampled_from(DTYPES),
)
def test_all_to_all_delivers_tensors_of_any_sizes(sizes: list[list[int]], dtype: torch.dtype) -> None:
    def call(rank: int, own: Compressor, transport: Transport) -> list[Tensor]:
        sent = [values(3 * rank + target, [size], dtype) for target, size in enumerate(sizes[rank])]
        return all_to_all(sent, own, transport)

    for target, received in enumerate(run(3, "lossless", call)[0]):
        for source, x in enumerate(received):
            assert same_bits(x, values(3 * source + target, [sizes[source][target]], dtype))


def test_what_all_to_all_sends_is_counted() -> None:
    def call(rank: int, own: Compressor, transport: Transport) -> None:
        all_to_all([torch.ones(100)] * 3, own, transport)

    _, stats = run(3, "identity", call)
    assert all(row["wire_bytes"] == row["raw_bytes"] == 2 * (8 + 3 * 8 + 32 + 400) for row in stats)
    assert all(row["values_sent"] == row["parameters"]["tensor"]["values_sent"] == 200 for row in stats)


def test_a_non_finite_value_reaches_every_rank() -> None:
    def call(rank: int, own: Compressor, transport: Transport) -> list[bool]:
        x = torch.ones(600)
        x[5] = float("nan") if rank == 1 else 1.0
        reduced, sent = {"tensor": x.clone()}, {"tensor": x.clone()}
        all_reduce_coalesced(reduced, own, transport)
        broadcast(sent, own, transport, root=1)
        everyone = [reduced["tensor"], sent["tensor"], all_gather(x, own, transport)[1]]
        return [bool(torch.isnan(y[5])) and bool(torch.isfinite(y[-1])) for y in everyone]

    assert run(3, 2.0, call)[0] == [[True] * 3] * 3


def test_what_cannot_be_sent_is_refused_before_anything_is() -> None:
    def call(rank: int, own: Compressor, transport: Transport) -> list[str]:
        texts: list[str] = []
        for refused in (
            lambda: all_reduce_coalesced({"other": torch.ones(3)}, own, transport),
            lambda: all_reduce_coalesced({"tensor": torch.ones(3, dtype=torch.int32)}, own, transport),
            lambda: all_reduce_coalesced({"tensor": torch.ones(3).to(torch.float8_e5m2)}, own, transport),
            lambda: all_to_all([torch.ones(3)], own, transport),
            lambda: broadcast({"tensor": torch.ones(3)}, own, transport, root=2),
        ):
            with pytest.raises((ConfigError, UnsupportedTensor)) as caught:
                refused()
            texts.append(str(caught.value).splitlines()[0])
        return texts

    for texts in run(2, "lossless", call)[0]:
        assert "does not know a tensor 'other'" in texts[0]
        assert all("cannot be sent compressed" in text for text in texts[1:3])
        assert "one tensor for each rank" in texts[3]
        assert "no rank 2" in texts[4]
