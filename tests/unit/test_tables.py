"""12-bit frequency tables: always valid, close to the entropy, and exact on the wire."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efficient_dl.codec.entropy import model_bits, order0_bits
from efficient_dl.codec.kernels.reference import tables
from efficient_dl.errors import CorruptPacket

counts_strategy = st.lists(
    st.one_of(st.just(0), st.integers(0, 50), st.integers(0, 2**31 // 256)), min_size=1, max_size=256
).filter(any)


@given(counts_strategy)
def test_frequencies_sum_to_4096_and_cover_every_symbol(counts: list[int]) -> None:
    count = torch.tensor(counts)
    frequency = tables.normalize(count)
    assert int(frequency.sum()) == 4096
    assert torch.equal(frequency > 0, count > 0)


@given(counts_strategy)
def test_a_table_survives_the_wire(counts: list[int]) -> None:
    frequency = tables.normalize(torch.tensor(counts))
    data = tables.serialize(frequency)
    assert data.numel() % 4 == 0 and data.numel() <= 416
    assert torch.equal(tables.parse(data, len(counts)), frequency)


def test_a_table_costs_little_more_than_the_entropy() -> None:
    counts = (1e6 * torch.exp(-0.3 * torch.arange(25.0))).long() + 1
    excess = model_bits(counts, tables.normalize(counts)) / order0_bits(counts)
    assert 1.0 <= excess < 1.002


@pytest.mark.parametrize("position", [0, 1, 20, -1])
def test_a_damaged_table_is_refused(position: int) -> None:
    data = tables.serialize(tables.normalize(torch.arange(1, 100)))
    data[position] ^= 0xFF
    with pytest.raises(CorruptPacket):
        tables.parse(data, 99)
    with pytest.raises(CorruptPacket):
        tables.parse(data[:-4], 99)
