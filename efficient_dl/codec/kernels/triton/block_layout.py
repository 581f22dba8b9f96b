"""Where the blocks of a flat tensor begin, on its device (docs/format.md, "Segments and the block grid")."""

# The language of the kernels has types of its own.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

from collections import OrderedDict

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_VALUES = 256
_KEPT_LAYOUTS = 256

_layouts: OrderedDict[tuple[tuple[int, ...], torch.device], Tensor] = OrderedDict()
_captured: set[tuple[tuple[int, ...], torch.device]] = set()


@triton.jit
def block_start(block, starts_ptr, numel, HAS_STARTS: tl.constexpr):
    """The first value of blocks, int32; of the block behind the last one it is numel."""
    if HAS_STARTS:
        return tl.load(starts_ptr + block)
    return tl.minimum(block.to(tl.int64) * 256, numel).to(tl.int32)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def to_device(values: list[int] | list[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small table on the device, without waiting for it; not possible in a CUDA graph."""
    table = torch.tensor(values, dtype=dtype)
    if device.type == "cpu":
        return table
    if is_capturing(device):
        raise RuntimeError(
            "a codec must run once with the same dtype, numel and side before it is captured in a CUDA graph: "
            "its kernels are compiled and its tables are sent to the device then"
        )
    return table.pin_memory().to(device, non_blocking=True)


def block_starts(segments: tuple[int, ...], device: torch.device) -> Tensor | None:
    """The blocks' first values, int32 (num_blocks + 1,), with numel behind them; None for one segment.

    Kept for the next call: a training step encodes the same buckets again and again. What a CUDA graph reads stays
    for good.
    """
    if len(segments) == 1:
        return None
    key = (segments, device)
    starts = _layouts.get(key)
    if starts is None:
        starts = _layouts[key] = _build(segments, device)
    _layouts.move_to_end(key)
    if is_capturing(device):
        _captured.add(key)
    while len(_layouts) - len(_captured) > _KEPT_LAYOUTS:
        del _layouts[next(k for k in _layouts if k not in _captured)]
    return starts


def _build(segments: tuple[int, ...], device: torch.device) -> Tensor:
    first_values, first_blocks = [0], [0]
    for segment in segments:
        first_values.append(first_values[-1] + segment)
        first_blocks.append(first_blocks[-1] + -(-segment // BLOCK_VALUES))
    table = to_device([*first_values, *first_blocks], torch.int64, device).view(2, -1)
    counts = table[1].diff(append=table[1, -1:] + 1)
    segment_of = torch.repeat_interleave(
        torch.arange(len(first_blocks), device=device), counts, output_size=first_blocks[-1] + 1
    )
    block = torch.arange(first_blocks[-1] + 1, device=device)
    starts = table[0][segment_of] + BLOCK_VALUES * (block - table[1][segment_of])
    return starts.to(torch.int32)
