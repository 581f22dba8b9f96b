"""The tile coder: 128 interleaved rANS lanes, many tiles at a time.

Source: asymmetric numeral systems, Duda 2013 (arXiv 1311.2540); interleaved rANS, Giesen 2014 (arXiv 1402.3392).
"""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_dl.codec.kernels.reference.tables import PROBABILITY_BITS, TOTAL, starts
from efficient_dl.errors import CorruptPacket

LANES = 128
STATE_BYTES = 4 * LANES
_LOW = 1 << 16
_SLOT_MASK = TOTAL - 1


def encode(
    symbols: Tensor, num_rows: Tensor, frequency: Tensor, carry: Tensor, table: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Codes N tiles of up to R rows.

    symbols: integer (N, R, 128). num_rows: int64 (N,), the rows of each tile that are coded (the first ones).
    frequency: int64 (A,), or (tables, A) with table, int64 (N, R): which of them each row is coded with.
    carry: int64 (N, 128) in [0, 2**16). Returns the final states, int64 (N, 128), and per tile its words in stream
    order, int64 1-D.
    """
    tiles, max_rows, _ = symbols.shape
    symbol = symbols.to(torch.int64)
    if table is not None:
        symbol = symbol + frequency.shape[1] * table[:, :, None]
    start = starts(frequency).view(-1)
    frequency = frequency.reshape(-1)
    state = carry + _LOW
    words = torch.zeros((tiles, max_rows, LANES), dtype=torch.int64, device=symbols.device)
    emitted = torch.zeros((tiles, max_rows, LANES), dtype=torch.bool, device=symbols.device)
    for row in range(max_rows - 1, -1, -1):
        active = (row < num_rows)[:, None]
        f = frequency[symbol[:, row]].clamp(min=1)
        emit = active & ((state >> 20) >= f)
        words[:, row] = state & 0xFFFF
        emitted[:, row] = emit
        shifted = torch.where(emit, state >> 16, state)
        coded = ((shifted // f) << PROBABILITY_BITS) + shifted % f + start[symbol[:, row]]
        state = torch.where(active, coded, state)
    return state, [words[i][emitted[i]] for i in range(tiles)]


def decode(
    states: Tensor,
    words: list[Tensor],
    num_rows: Tensor,
    frequency: Tensor,
    table: Tensor | None = None,
    padded: bool = True,
) -> tuple[Tensor, Tensor]:
    """The inverse of `encode`: symbols, int64 (N, max rows, 128), and carry, int64 (N, 128).

    words: per tile its words; padded: with the zero word that pads an odd number of them.
    """
    tiles, device = states.shape[0], states.device
    max_rows = int(num_rows.max()) if tiles else 0
    alphabet = frequency.shape[-1]
    start = starts(frequency).view(-1)
    frequency = frequency.reshape(-1)
    symbol_of_slot = torch.repeat_interleave(torch.arange(frequency.numel(), device=device), frequency)
    num_words = torch.tensor([w.numel() for w in words], dtype=torch.int64, device=device)
    stream = torch.zeros(
        (tiles, int(num_words.max()) + LANES if tiles else 0), dtype=torch.int64, device=device
    )
    for i, tile_words in enumerate(words):
        stream[i, : tile_words.numel()] = tile_words
    symbols = torch.zeros((tiles, max_rows, LANES), dtype=torch.int64, device=device)
    position = torch.zeros(tiles, dtype=torch.int64, device=device)
    state = states
    for row in range(max_rows):
        active = (row < num_rows)[:, None]
        slot = state & _SLOT_MASK
        symbol = symbol_of_slot[slot if table is None else slot + TOTAL * table[:, row, None]]
        symbols[:, row] = torch.where(active, symbol % alphabet, 0)
        advanced = frequency[symbol] * (state >> PROBABILITY_BITS) + slot - start[symbol]
        needs = active & (advanced < _LOW)
        rank = torch.cumsum(needs.to(torch.int64), 1) - 1
        index = (position[:, None] + rank).clamp(min=0, max=max(stream.shape[1] - 1, 0))
        refilled = (advanced << 16) | torch.gather(stream, 1, index)
        state = torch.where(active, torch.where(needs, refilled, advanced), state)
        position = (position + needs.sum(1)).clamp(max=stream.shape[1] - 1)
    # Behind a stream of an even number of words, gather reads the zeros that `stream` was allocated with.
    padding = stream.gather(1, position[:, None])[:, 0] if tiles else position
    end = position + position % 2 if padded else position
    complete = (end == num_words) & (padding == 0)
    if not bool((complete & ((state >= _LOW) & (state < 2 * _LOW)).all(1)).all()):
        raise CorruptPacket(
            "a tile's entropy-coded words do not end where its directory says",
            fix="the bytes were damaged on the way; send the packet again",
        )
    return symbols, state - _LOW
