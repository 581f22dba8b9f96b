"""float8 tensors: converted exactly as torch converts them, by every instruction set; refused where not supported."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from efficient_dl.codec import make_codec
from efficient_dl.codec.dtypes import DTYPE_CODES
from efficient_dl.codec.kernels.native.library import available_isas
from tests.unit.native_build import DRIVERS, linked

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def all_values(dtype: torch.dtype) -> Tensor:
    return torch.arange(256).to(torch.uint8).view(dtype)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The float8 bytes of x. e4m3fn saturates, which not every release of torch does of its own accord."""
    largest = torch.finfo(dtype).max if dtype == torch.float8_e4m3fn else torch.inf
    return x.clamp(-largest, largest).to(dtype).view(torch.uint8)


def dense_floats(dtype: torch.dtype) -> Tensor:
    """A million bit patterns; every value of dtype, every tie between two, and the floats beside each of those."""
    values = all_values(dtype).float()
    finite = values[values.isfinite()].sort().values
    ties = (finite[1:].double() + finite[:-1].double()).div(2).float()
    largest = finite[-1:] * torch.tensor([1 + 2**-4, 1 + 2**-3, 1.25])  # where rounding or saturating sets in
    special = torch.cat([finite, ties, largest, -largest]).view(torch.int32)
    near = (special[:, None] + torch.arange(-2, 3)).view(-1).to(torch.int32)
    patterns = torch.arange(-(2**31), 2**31, 4093).to(torch.int32)
    odd = torch.tensor([0, -(2**31), 0x7F800000, -0x00800000, 0x7F800001, 0x7FC00000, -1], dtype=torch.int32)
    return torch.cat([near, patterns, odd]).view(torch.float32)


@pytest.fixture(scope="module")
def converter(built_library: Path) -> Path:
    """The driver over the library's conversions."""
    return linked(DRIVERS / "float8.cpp", built_library, built_library.parent / "float8", "-O1")


def converted(converter: Path, isa: str, dtype: torch.dtype, what: str, data: Tensor) -> Tensor:
    done = subprocess.run(
        [converter, isa, str(DTYPE_CODES[dtype]), what],
        input=data.view(torch.uint8).numpy().tobytes(),
        capture_output=True,
        check=True,
    )
    return torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8)


@pytest.mark.slow
@pytest.mark.xdist_group("built")
@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", FLOAT8)
def test_every_float8_becomes_the_float32_of_torch(converter: Path, isa: str, dtype: torch.dtype) -> None:
    expected = all_values(dtype).float()
    got = converted(converter, isa, dtype, "load", all_values(dtype))
    assert torch.equal(got, expected.view(torch.uint8))


@pytest.mark.slow
@pytest.mark.xdist_group("built")
@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", FLOAT8)
def test_floats_round_to_float8_as_in_torch(converter: Path, isa: str, dtype: torch.dtype) -> None:
    x = dense_floats(dtype)
    assert torch.equal(converted(converter, isa, dtype, "store", x), rounded(x, dtype))


@pytest.mark.parametrize("kernel", ("reference", *available_isas()))
@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("spec", ("identity", "bits:4.0"))
def test_sums_saturate_or_overflow_alike_in_every_kernel(spec: str, dtype: torch.dtype, kernel: str) -> None:
    largest = torch.finfo(dtype).max
    x = torch.linspace(-largest, largest, 1000).to(dtype)
    codec = make_codec(spec, kernel=kernel)
    out, wide = x.clone(), x.float()
    codec.decode(codec.encode(x), out, accumulate=True)
    codec.decode(codec.encode(x), wide, accumulate=True)
    assert torch.equal(out.view(torch.uint8), rounded(wide, dtype))
    assert (wide.abs() > largest).any()


@pytest.mark.parametrize("kernel", ("reference", *available_isas()))
@pytest.mark.parametrize("dtype", FLOAT8)
def test_a_block_with_a_nan_has_one_bit_pattern(dtype: torch.dtype, kernel: str) -> None:
    x = torch.ones(1000).to(dtype)
    x.view(torch.uint8)[300] = 0xFF
    codec = make_codec("bits:2.0", kernel=kernel)
    out = torch.zeros(1000).to(dtype)
    codec.decode(codec.encode(x), out)
    assert (out.view(torch.uint8)[256:512] == 0x7F).all()
    assert out[:256].float().isfinite().all() and out[512:].float().isfinite().all()
