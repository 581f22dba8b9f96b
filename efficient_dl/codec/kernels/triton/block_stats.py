"""Where the bits of a packet from the GPU went: for reports, and the one part of encoding that waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_dl.codec.contract import PacketStats
from efficient_dl.codec.entropy import model_bits, order0_bits
from efficient_dl.codec.kernels.reference.wire import integers
from efficient_dl.codec.kernels.triton.block_workspace import Workspace
from efficient_dl.codec.steps import FIRST_STEP_INDEX, STEPS

_HEAD_BYTES = 28
_MAX_Q = 127


def fill_stats(stats: PacketStats, work: Workspace, body: Tensor) -> None:
    """Fills stats, without the packet's header, from what the kernels left in the workspace and the body."""
    mode, num_blocks = work.mode, work.num_blocks
    kept, table_bytes, _ = integers(work.plan)
    codes = body[_HEAD_BYTES : _HEAD_BYTES + num_blocks].cpu().to(torch.int64)
    has_rows = (codes > 0) & (codes < 255)
    rows = work.symbols.view(num_blocks, -1).cpu()[has_rows].to(torch.int64).view(-1, 128)
    sent = work.escapes.view(num_blocks, -1).cpu()[has_rows]
    escapes = work.num_escapes.cpu()[has_rows]
    in_front = torch.arange(sent.shape[1]) < escapes[:, None] * (mode.escape_bytes // 2)
    q = mode.values(rows, sent[in_front].view(torch.uint8))
    tile = torch.arange(num_blocks)[has_rows] // work.tile_blocks_each
    is_coded = (work.infos.cpu() & 1).bool()
    is_coded[kept:] = False
    in_coded = is_coded[tile].repeat_interleave(mode.rows_per_block)
    counts = torch.bincount(rows[in_coded].view(-1), minlength=256)
    frequency = work.entries.view(torch.int64).cpu() & 0xFFFF
    stored = int(work.tile_values.cpu()[:kept][~is_coded[:kept]].sum())
    num_escapes = int(escapes.sum())
    stats.order0_bits = order0_bits(torch.bincount(q.clamp(-_MAX_Q, _MAX_Q).view(-1) + _MAX_Q))
    stats.model_bits = model_bits(counts, frequency) + 8.0 * (stored + mode.escape_bytes * num_escapes)
    stats.scale_bits = 8.0 * num_blocks
    stats.header_bits = 8.0 * (_HEAD_BYTES + table_bytes + 8 * work.num_tiles)
    stats.escapes = num_escapes
    stats.empty_blocks = int((codes == 0).sum())
    stats.nonfinite_blocks = int((codes == 255).sum())
    stats.dropped_blocks = int(work.tile_blocks[kept:].sum())
    stats.relative_step = float(STEPS[integers(work.index)[0] - FIRST_STEP_INDEX])
