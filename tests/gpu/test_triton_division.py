"""The GPU encoders' division by a frequency where it is hardest: the first and the last states of quotients."""

# pyright: basic, reportArgumentType=false
# (A kernel takes numbers where it says tl.constexpr.)
from __future__ import annotations

import torch
import triton
import triton.language as tl

from efficient_dl.codec.kernels.triton.rans import divide
from efficient_dl.codec.kernels.triton.tables import reciprocals

BLOCK = 4096


@triton.jit
def quotient_kernel(states_ptr, frequencies_ptr, quotients_ptr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    frequency = tl.load(frequencies_ptr + index)
    reciprocal = reciprocals(frequency).to(tl.uint32)
    state = tl.load(states_ptr + index).to(tl.uint32, bitcast=True)
    quotient = divide(state, frequency.to(tl.uint32), reciprocal)
    tl.store(quotients_ptr + index, quotient.to(tl.int32, bitcast=True))


def test_every_frequency_divides_exactly(device: str) -> None:
    powers = 1 << torch.arange(21)
    drawn = torch.randint(0, 1 << 20, (40,), generator=torch.Generator().manual_seed(5))
    quotient = torch.cat([powers - 1, powers[:-1], powers[1:-1] + 1, drawn])
    frequency = torch.arange(1, 4097)
    first = quotient[:, None] * frequency
    state = torch.stack([first, first + frequency - 1])
    assert int(state.max()) == (1 << 32) - 1
    frequency = frequency.expand_as(state).to(torch.int32).reshape(-1).to(device)
    found = torch.empty_like(frequency)
    quotient_kernel[(state.numel() // BLOCK,)](
        state.view(-1).to(torch.int32).to(device), frequency, found, BLOCK=BLOCK
    )
    assert torch.equal(
        found.cpu().view(state.shape), quotient[:, None].expand_as(first).to(torch.int32).expand_as(state)
    )
