"""The packet's header on a GPU: written and checked by kernels, so that the host need not wait for it."""

# The language of the kernels has types of its own.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

MAGIC = tl.constexpr(0x504C4445)  # "EDLP"
# What status[0] holds after an unsound packet.
WRONG_HEADER = 1
OTHER_DTYPE = 2
WRONG_BODY = 4
_FILL_BLOCK = 1024


@triton.jit(do_not_specialize=["kinds", "numel", "fingerprint"])
def write_kernel(packet_ptr, total_ptr, body_bytes_ptr, kinds, numel, fingerprint):
    """The header of a packet without a checksum; the body's bytes come from the device's memory."""
    total = tl.load(body_bytes_ptr) + 32
    tl.store(total_ptr, total)
    tl.store(packet_ptr, MAGIC)
    tl.store(packet_ptr + 1, kinds)
    tl.store(packet_ptr + 2, numel)
    tl.store(packet_ptr + 3, fingerprint)
    tl.store(packet_ptr + 4, total.to(tl.int32))
    tl.store(packet_ptr + 5, (total >> 32).to(tl.int32))
    tl.store(packet_ptr + 6, 0)
    tl.store(packet_ptr + 7, 0)


@triton.jit(do_not_specialize=["packet_bytes", "kinds", "dtype_mask", "numel", "fingerprint"])
def check_kernel(packet_ptr, status_ptr, packet_bytes, kinds, dtype_mask, numel, fingerprint):
    """status_ptr: int64 (3,), becomes error, packet bytes, flags. kinds: version | codec << 8. dtype_mask: bits."""
    found = tl.load(packet_ptr + 1)
    dtype = (found >> 16) & 255
    flags = (found >> 24) & 255
    low = tl.load(packet_ptr + 4).to(tl.uint32, bitcast=True).to(tl.int64)
    total = low | (tl.load(packet_ptr + 5).to(tl.int64) << 32)
    sound = (tl.load(packet_ptr) == MAGIC) & ((found & 0xFFFF) == kinds) & (dtype < 5) & (flags < 4)
    sound = sound & (tl.load(packet_ptr + 2) == numel) & (tl.load(packet_ptr + 3) == fingerprint)
    bounded = (flags & 2) != 0
    sound = sound & (total >= 32) & (total <= packet_bytes) & (bounded | (total == packet_bytes))
    # Only the block quantizer, codec 2, has bounded packets; an empty tensor has no body.
    sound = sound & ((flags < 2) | ((kinds >> 8) == 2)) & ((numel != 0) | (total == 32))
    digest = tl.load(packet_ptr + 6) | tl.load(packet_ptr + 7)
    sound = sound & (((flags & 1) != 0) | (digest == 0))
    known = ((dtype_mask >> tl.minimum(dtype, 31)) & 1) != 0
    tl.store(status_ptr, tl.where(sound, tl.where(known, 0, 2), 1).to(tl.int64))
    tl.store(status_ptr + 1, total)
    tl.store(status_ptr + 2, flags.to(tl.int64))


@triton.jit(do_not_specialize=["numel", "nan"])
def fill_kernel(out_ptr, status_ptr, numel, nan, BLOCK: tl.constexpr):
    """Fills out with the bits `nan` if the packet was not sound."""
    if tl.load(status_ptr) != 0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.zeros([BLOCK], tl.int32) + nan
        tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=place < numel)


def is_interpreted() -> bool:
    """Whether these kernels run in Triton's interpreter, on CPU tensors: decided when Triton was imported."""
    return isinstance(write_kernel, InterpretedFunction)


def write_header_on_device(
    packet: Tensor,
    body_bytes: Tensor,
    version: int,
    codec: int,
    dtype: int,
    flags: int,
    numel: int,
    fingerprint: int,
) -> Tensor:
    """Fills packet[:32], which starts at a multiple of 4 bytes; returns the packet's bytes, 0-dim int64.

    body_bytes: 0-dim int64 on the packet's device.
    """
    total = torch.empty((), dtype=torch.int64, device=packet.device)
    kinds = _signed(version | codec << 8 | dtype << 16 | flags << 24)
    front = packet[:32].view(torch.int32)
    write_kernel[(1,)](front, total, body_bytes, kinds, numel, _signed(fingerprint), num_warps=1)
    return total


def check_header(
    packet: Tensor, version: int, codec: int, dtypes: tuple[int, ...], numel: int, fingerprint: int
) -> Tensor:
    """Checks packet[:32], which starts at a multiple of 4 bytes; returns the status, int64 (3,).

    status: error (0, WRONG_HEADER or OTHER_DTYPE), packet bytes (at most packet.numel() if there is no error), flags.
    """
    status = torch.empty(3, dtype=torch.int64, device=packet.device)
    mask = sum(1 << code for code in dtypes)
    kinds, front = version | codec << 8, packet[:32].view(torch.int32)
    check_kernel[(1,)](front, status, packet.numel(), kinds, mask, numel, _signed(fingerprint), num_warps=1)
    return status


def fill_if_corrupt(out: Tensor, status: Tensor) -> None:
    """Fills out (1-D, a floating dtype) with NaN if status says that its packet was not sound."""
    integers = out.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[out.element_size()])
    nan = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}.get(out.dtype, 0x7F)
    grid = (triton.cdiv(out.numel(), _FILL_BLOCK),)
    fill_kernel[grid](integers, status, out.numel(), nan, BLOCK=_FILL_BLOCK)


def _signed(value: int) -> int:
    """A 32-bit pattern as the int32 that has it: Triton would take a larger integer for 64 bits."""
    return value - (1 << 32) if value >> 31 else value
