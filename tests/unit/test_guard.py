"""Parameters that drift apart stop the run on every rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from efficient_dl.comm import Transport, check_equal
from efficient_dl.errors import RanksDiverged
from tests.unit.ranks import on_ranks


def divergences(change: Callable[[int, dict[str, Tensor]], None]) -> list[RanksDiverged | None]:
    """What each of three ranks raises after change(rank, parameters)."""

    def rank(transport: Transport) -> RanksDiverged | None:
        generator = torch.Generator().manual_seed(0)
        parameters = {
            "conv": torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last),
            "scale": torch.tensor(1.5),
            "half": torch.randn(7, generator=generator).bfloat16(),
        }
        change(transport.rank, parameters)
        try:
            check_equal(parameters, transport, step=50)
        except RanksDiverged as error:
            return error
        return None

    return on_ranks(3, rank)


def test_equal_parameters_pass() -> None:
    assert divergences(lambda rank, parameters: None) == [None] * 3


def test_minus_zero_is_not_zero() -> None:
    def change(rank: int, parameters: dict[str, Tensor]) -> None:
        parameters["scale"].fill_(-0.0 if rank == 1 else 0.0)

    assert all(isinstance(error, RanksDiverged) for error in divergences(change))


@pytest.mark.parametrize("name", ["conv", "scale", "half"])
def test_all_ranks_name_the_rank_and_the_parameter(name: str) -> None:
    def change(rank: int, parameters: dict[str, Tensor]) -> None:
        if rank == 2:
            parameters[name].view(-1)[-1:].mul_(1.01) if name != "conv" else parameters[name][
                3, 2, 2, 2
            ].add_(1e-6)

    raised = divergences(change)
    assert len({str(error) for error in raised}) == 1
    assert isinstance(raised[0], RanksDiverged)
    assert "rank 2 from rank 0" in str(raised[0])
    assert f"first in '{name}'; in 1 of 3 parameters" in str(raised[0])
    assert "after step 50" in str(raised[0])
