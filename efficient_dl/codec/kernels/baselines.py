"""What the baselines' kernels agree on: codec ids, block sizes, how many values top-k keeps, the largest bodies."""

from __future__ import annotations

from typing import Final

INT8: Final = 16
INT4: Final = 17
TOPK: Final = 18
SIGN: Final = 19
FLOAT16: Final = 20
BFLOAT16: Final = 21
ZSTD: Final = 22
LZ4: Final = 23

DEFAULT_BLOCK_VALUES: Final = 256
BLOCK_MULTIPLE: Final = 8
MAX_BLOCK_VALUES: Final = 2**31 - 8

_VALUES_PER_BYTE: Final = {INT8: 1, INT4: 2, SIGN: 8}
_BLOCK_HEADER_BYTES: Final = 4
_TOPK_HEADER_BYTES: Final = 12


def max_blockwise_bytes(codec_id: int, block_values: int, numel: int, num_segments: int) -> int:
    """The largest body of int8, int4 or sign: every segment ends with a short block."""
    num_blocks = min(numel, numel // block_values + num_segments)
    packed = _VALUES_PER_BYTE[codec_id]
    return _BLOCK_HEADER_BYTES + 2 * num_blocks + (numel + (packed - 1) * num_blocks) // packed


def topk_count(fraction: float, numel: int) -> int:
    """The values that top-k keeps of numel: fraction * numel in float64, rounded half up, at least 1."""
    return min(numel, max(1, int(fraction * numel + 0.5)))


def max_topk_bytes(itemsize: int, numel: int, count: int) -> int:
    """The largest body of top-k: gaps of 1 or 2 bytes with their skips, or a bitmap if that is smaller."""
    bitmap = -(-numel // 8)
    position_bytes = min(count + numel // 0xFF, 2 * (count + numel // 0xFFFF), bitmap)
    return _TOPK_HEADER_BYTES + -(-position_bytes // 4) * 4 + count * itemsize
