"""Residuals and capacities: every CPU kernel writes the reference's packet and residual."""

from __future__ import annotations

import pytest
import torch

from efficient_dl.codec import Codec, PacketStats, Side, make_codec
from efficient_dl.codec.kernels.native.library import available_isas
from efficient_dl.errors import CorruptPacket, UnsupportedTensor

ISAS = available_isas()
SPECS = ("bits:0.1", "bits:2.0", "bits:4.0", "bits:7.0")
WITH_RESIDUALS = (*SPECS, "grid:0.3", "grid:2.0")  # which take no capacity
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
SMALL = 3000
TWO_TILES = 2 * 65_536 + 900  # of "bits:4.0" and "bits:7.0"
SIDES = (None, Side(segments=(700, 0, 1, 17, 255, 2027)))


def values(numel: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Scales that differ from block to block, outliers that need escapes, an empty block and one that is not finite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator)
    x *= torch.exp(torch.randn(numel // 256 + 1, generator=generator)).repeat_interleave(256)[:numel]
    x[7::97] *= 40
    x[512:768] = 0
    x[1100] = float("nan")
    return x.to(dtype)


def noise(numel: int) -> torch.Tensor:
    """A residual, with a NaN in one block and an infinity in another."""
    residual = torch.randn(numel, generator=torch.Generator().manual_seed(9)) * 0.1
    residual[1500], residual[2000] = float("nan"), float("-inf")
    return residual


def encode(
    codec: Codec,
    x: torch.Tensor,
    side: Side | None,
    residual: torch.Tensor | None,
    capacity: int | None,
) -> tuple[torch.Tensor, torch.Tensor, PacketStats]:
    """The packet, the residual that is left, and the stats; checks that no byte behind the capacity is written."""
    most = codec.max_bytes(x.numel(), x.dtype, side)
    most = most if capacity is None else min(most, capacity)
    room = torch.full((most + 64,), 0xA5, dtype=torch.uint8)
    left = torch.zeros(0) if residual is None else residual.clone()
    stats = PacketStats()
    count = codec.encode_into(
        x, room, side, stats, residual=None if residual is None else left, capacity=capacity
    )
    assert int(count) <= most and (room[most:] == 0xA5).all()
    return room[: int(count)], left, stats


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


def check_kernels(
    spec: str, x: torch.Tensor, side: Side | None, residual: torch.Tensor | None, capacity: int | None
) -> tuple[torch.Tensor, torch.Tensor, PacketStats]:
    """Every kernel gives the same; returns it."""
    expected = encode(make_codec(spec, kernel="reference"), x, side, residual, capacity)
    for isa in ISAS:
        packet, left, stats = encode(make_codec(spec, kernel=isa), x, side, residual, capacity)
        assert torch.equal(packet, expected[0]), isa
        assert torch.equal(bits_of(left), bits_of(expected[1])), isa
        assert stats.dropped_blocks == expected[2].dropped_blocks, isa
        assert (stats.empty_blocks, stats.escapes) == (expected[2].empty_blocks, expected[2].escapes), isa
        assert stats.order0_bits == pytest.approx(expected[2].order0_bits), isa
        assert stats.model_bits == pytest.approx(expected[2].model_bits), isa
        assert stats.header_bits == expected[2].header_bits, isa
    return expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", WITH_RESIDUALS)
def test_residuals_are_what_decoding_leaves_over(spec: str, dtype: torch.dtype) -> None:
    x, residual = values(SMALL, dtype), noise(SMALL)
    for side in SIDES:
        packet, left, stats = check_kernels(spec, x, side, residual, None)
        decoded = torch.empty(SMALL)
        make_codec(spec).decode(packet, decoded, side=side)
        total = x.float() + residual
        assert torch.equal(left, torch.where(decoded.isnan(), 0, total - decoded))
        # The residual takes part in what is sent.
        assert torch.equal(packet[32:], make_codec(spec, kernel="reference").encode(total, side)[32:])
        assert stats.nonfinite_blocks == 3 and left.isfinite().all()


@pytest.mark.parametrize("spec", WITH_RESIDUALS)
def test_repeated_residuals_lose_nothing(spec: str) -> None:
    codec, x, decoded = make_codec(spec), torch.randn(SMALL), torch.empty(SMALL)
    residual, received = torch.zeros(SMALL), torch.zeros(SMALL, dtype=torch.float64)
    room = torch.empty(codec.max_bytes(SMALL, x.dtype), dtype=torch.uint8)
    for _ in range(8):
        count = codec.encode_into(x, room, residual=residual)
        codec.decode(room[: int(count)], decoded)
        received += decoded
    assert torch.allclose(received + residual, 8 * x.double(), atol=1e-4)
    assert residual.norm() > 0


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_packets_fit_every_capacity(spec: str, with_residual: bool) -> None:
    x, residual = values(SMALL), noise(SMALL) if with_residual else None
    for side in SIDES:
        fixed, most = (
            make_codec(spec).fixed_bytes(SMALL, side),
            make_codec(spec).max_bytes(SMALL, x.dtype, side),
        )
        assert fixed == make_codec(spec, kernel="reference").fixed_bytes(SMALL, side)
        whole = encode(make_codec(spec), x, side, residual, most)[0].numel()
        for capacity in (fixed, fixed + 1, fixed + 600, whole - 1, whole, whole + 1, most, most + 9, 1 << 40):
            packet, left, _ = check_kernels(spec, x, side, residual, max(capacity, fixed))
            if residual is not None:
                decoded = torch.empty(SMALL)
                make_codec(spec).decode(packet, decoded, side=side)
                expected = torch.where(decoded.isnan(), 0, x + residual - decoded)
                assert torch.equal(bits_of(left), bits_of(expected))


@pytest.mark.parametrize("spec", ["bits:4.0", "bits:7.0"])
def test_tiles_that_do_not_fit_decode_to_zeros_and_stay_in_the_residual(spec: str) -> None:
    codec, x = make_codec(spec), values(TWO_TILES)
    x[2560:65_536] = 0  # the first tile is small
    x[131_072:] = 0  # and the last one empty
    x[65_536:131_072].view(-1, 8, 256)[:, 0] = 0  # of the second, what is sampled
    fixed, dropped, first = codec.fixed_bytes(TWO_TILES), list[int](), list[torch.Tensor]()
    for capacity in (fixed, fixed + 1000):
        packet, left, stats = check_kernels(spec, x, None, torch.zeros(TWO_TILES), capacity)
        decoded = torch.empty(TWO_TILES)
        codec.decode(packet, decoded)
        assert (decoded[65_536:] == 0).all()
        assert torch.equal(left[65_536:], x[65_536:])
        assert int.from_bytes(packet[56:60].numpy().tobytes(), "little") == stats.dropped_blocks
        dropped.append(stats.dropped_blocks)
        first.append(decoded[:65_536].nan_to_num())
    assert dropped == [224 + 8, 224]
    assert (first[0] == 0).all() and (first[1] != 0).any()


@pytest.mark.parametrize("kernel", ["reference", *ISAS])
def test_a_bounded_packet_is_decoded_from_a_longer_buffer(kernel: str) -> None:
    codec, x = make_codec("bits:2.0", kernel=kernel), values(SMALL)
    packet = encode(codec, x, None, None, 2000)[0]
    whole = codec.encode(x)
    expected, out = torch.empty(SMALL), torch.empty(SMALL)
    codec.decode(packet, expected)
    for extra in (1, 3, 4, 500):
        codec.decode(torch.cat([packet, torch.full((extra,), 0x5A, dtype=torch.uint8)]), out)
        assert torch.equal(bits_of(out), bits_of(expected))
        with pytest.raises(CorruptPacket, match="packet bytes"):
            codec.decode(torch.cat([whole, torch.zeros(extra, dtype=torch.uint8)]), out)
        with pytest.raises(CorruptPacket, match="packet bytes"):
            codec.decode(packet[:-extra].clone(), out)


@pytest.mark.parametrize("kernel", ["reference", *ISAS])
@pytest.mark.parametrize("spec", SPECS)
def test_a_capacity_below_the_fixed_bytes_is_refused(spec: str, kernel: str) -> None:
    codec, x = make_codec(spec, kernel=kernel), values(SMALL)
    for side in SIDES:
        fixed = codec.fixed_bytes(SMALL, side)
        room = torch.full((fixed,), 0xA5, dtype=torch.uint8)
        residual = torch.ones(SMALL)
        for capacity in (fixed - 1, 32, 0, -1):
            with pytest.raises(ValueError, match=f"fixed_bytes\\(\\) is {fixed}"):
                codec.encode_into(x, room, side, residual=residual, capacity=capacity)
        assert (room == 0xA5).all() and (residual == 1).all()
        with pytest.raises(ValueError, match=f"asks for {fixed}"):
            codec.encode_into(x, room[1:], side, capacity=fixed)


def test_an_empty_tensor_is_a_header() -> None:
    for kernel in ("reference", *ISAS):
        codec, room = make_codec("bits:2.0", kernel=kernel), torch.zeros(32, dtype=torch.uint8)
        assert codec.fixed_bytes(0) == 32
        assert int(codec.encode_into(torch.empty(0), room, residual=torch.empty(0), capacity=32)) == 32
        codec.decode(room, torch.empty(0))


@pytest.mark.parametrize("spec", ["lossless", "delta", "zstd", "grid:1.0", "int8", "topk:0.1", "fp16"])
@pytest.mark.parametrize("numel", [0, 100])
def test_other_codecs_refuse_them(spec: str, numel: int) -> None:
    codec, x, room = make_codec(spec), torch.ones(numel), torch.zeros(9000, dtype=torch.uint8)
    side, residual = Side(reference=x.clone()), torch.zeros(numel)
    if not spec.startswith("grid:"):
        with pytest.raises(ValueError, match="takes no residual"):
            codec.encode_into(x, room, side, residual=residual)
    for given in (None, residual):
        with pytest.raises(ValueError, match="takes no capacity"):
            codec.encode_into(x, room, side, residual=given, capacity=9000)
    with pytest.raises(ValueError, match="takes no capacity"):
        codec.fixed_bytes(numel)
    assert (room == 0).all()


def test_long_grids_feed_back_the_reference_residuals() -> None:
    """Several spans of chunks, a sample of the blocks; and a tensor that is zero in all of the sample's."""
    numel = 5000 * 256 + 77
    residual = torch.zeros(numel)
    residual[256:512] = 1e-3
    check_kernels("grid:2.0", values(numel), None, noise(numel), None)
    check_kernels("grid:2.0", torch.zeros(numel), None, residual, None)


def test_the_residual_counts_where_a_step_is_given() -> None:
    """It reaches a level that the values alone do not; what stays below is kept, in blocks without any level, too."""
    side, x = Side(segments=(300, 300), step_size=1.0), torch.full((600,), 0.5)
    residual = torch.zeros(600)
    residual[:300] = 0.375
    packet, left, _ = check_kernels("grid:2.0", x, side, residual, None)
    decoded = torch.empty(600)
    make_codec("grid:2.0").decode(packet, decoded, side=side)
    assert decoded.tolist() == [1.0] * 300 + [0.0] * 300
    assert left.tolist() == [-0.125] * 300 + [0.5] * 300


def test_residuals_of_another_kind_are_refused() -> None:
    codec, x, room = make_codec("bits:2.0"), torch.ones(100), torch.zeros(9000, dtype=torch.uint8)
    for residual in (torch.zeros(99), torch.zeros(100, dtype=torch.bfloat16), torch.zeros(200)[::2]):
        with pytest.raises(UnsupportedTensor, match="contiguous float32"):
            codec.encode_into(x, room, residual=residual)


def test_tensors_that_share_memory_are_refused() -> None:
    codec, memory = make_codec("bits:2.0"), torch.zeros(4000)
    x, room = memory[:1000], torch.zeros(9000, dtype=torch.uint8)
    for residual in (x, memory[999:1999]):
        with pytest.raises(ValueError, match="share memory"):
            codec.encode_into(x, room, residual=residual)
    with pytest.raises(ValueError, match="share memory"):
        codec.encode_into(x, memory.view(torch.uint8)[3996:])
    with pytest.raises(ValueError, match="share memory"):
        codec.encode_into(x, room, residual=room[5000:9000].view(torch.float32))
    packet = codec.encode(x)
    bytes_of_out = torch.cat([packet, packet.new_zeros(8000)])
    with pytest.raises(ValueError, match="share memory"):
        codec.decode(bytes_of_out[: packet.numel()], bytes_of_out[:4000].view(torch.float32))
    codec.encode_into(x, memory[2000:].view(torch.uint8), residual=memory[1000:2000])  # neighbours


def test_outputs_that_are_not_contiguous_are_refused() -> None:
    codec = make_codec("bits:2.0")
    with pytest.raises(UnsupportedTensor, match="contiguous"):
        codec.decode(codec.encode(torch.ones(12)), torch.zeros(4, 3).t())


@pytest.mark.parametrize("kernel", ["reference", *ISAS])
def test_a_view_that_negates_its_memory_is_refused(kernel: str) -> None:
    with pytest.raises(UnsupportedTensor, match="resolve_neg"):
        make_codec("lossless", kernel=kernel).encode(torch.tensor([1 + 2j]).conj().imag)


def test_a_step_that_rounds_up_out_of_the_range_is_refused() -> None:
    for step in (2.0**100 * (1 - 1e-12), 2.0**100, 2.0**-127, 0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="step_size"):
            Side(step_size=step)
    for step in (2.0**-126, 2.0**99):
        codec, side, out = make_codec("grid:1.0"), Side(step_size=step), torch.empty(300)
        codec.decode(codec.encode(torch.randn(300) * step, side), out, side=side)


@pytest.mark.parametrize(
    "spec", [*SPECS, "lossless", "grid:1.0", "delta", "int8", "int4:64", "sign", "topk:0.3"]
)
def test_all_kernels_ask_for_the_same_room(spec: str) -> None:
    """Ranks with different kernels allocate the same buffers."""
    reference = make_codec(spec, kernel="reference")
    for dtype in DTYPES:
        for numel in (1, 2, 255, 256, 257, 3000, 32_767, 32_769, 65_536, 131_073, 10**6, 2**31 - 1):
            for side in (None, Side(segments=(1,) * numel)) if numel <= 3000 else (None,):
                expected = reference.max_bytes(numel, dtype, side)
                for isa in ISAS:
                    assert make_codec(spec, kernel=isa).max_bytes(numel, dtype, side) == expected, (
                        numel,
                        isa,
                    )
    with pytest.raises(ValueError, match="sums to 5"):
        reference.max_bytes(6, torch.float32, Side(segments=(5,)))
