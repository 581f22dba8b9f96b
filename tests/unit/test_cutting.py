"""Where a run's model is cut, given what the partitions' heads cost; and how fast a rank finds itself."""

from __future__ import annotations

import gc
import itertools
import time
import weakref
from typing import Any

import pytest
import torch

from efficient_dl.config import Config, DataSpec, with_overrides
from efficient_dl.coordinator import PartitionCosts
from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.cuts import dearness
from efficient_dl.local_learning.measure import least_seconds
from efficient_dl.local_learning.partition import partition
from efficient_dl.local_learning.pieces import pieces_of
from efficient_dl.models import build_model
from efficient_dl.training.cutting import Cutter
from efficient_dl.training.run_model import build_run_model

SPEC = DataSpec("tokens", 256, (16,))
TOKENS = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))
BATCH = (TOKENS[:, :-1], TOKENS[:, 1:])


def cutter(*settings: str) -> Cutter:
    base = ["model.name=gpt", "model.size=nano", "model.context=16", "model.tie_weights=false"]
    return Cutter(with_overrides(Config(), [*base, *settings]), SPEC, "tokens", torch.device("cpu"))


@pytest.mark.parametrize("partitions", [2, 3])
@pytest.mark.parametrize("balance", ["parameters", "memory"])
@pytest.mark.parametrize("heads", ["causal:2", "linear"])
def test_no_other_cut_has_a_cheaper_dearest_partition_with_its_head(
    partitions: int, balance: str, heads: str
) -> None:
    settings = [f"local.heads={heads}", f"local.balance={balance}"]

    def dearest(costs: list[PartitionCosts]) -> int:
        return max(dearness(one, balance) for one in costs)

    cut, costs = cutter(*settings, f"local.partitions={partitions}").measured(BATCH)
    names = [piece.name for piece in cut.pieces]
    others = [
        dearest(cutter(*settings, f"local.cuts={','.join(cuts)}").measured(BATCH)[1])
        for cuts in itertools.combinations(names[1:], partitions - 1)
    ]
    assert dearest(costs) == min(others)
    assert [one.head_parameter_bytes > 0 for one in costs] == [True] * (partitions - 1) + [False]


def test_a_slow_head_moves_the_cut_to_the_front() -> None:
    plain, _ = cutter("local.partitions=2", "local.heads=linear", "local.balance=parameters").measured(BATCH)
    heavy, _ = cutter("local.partitions=2", "local.heads=causal:3", "local.balance=parameters").measured(
        BATCH
    )
    names = [piece.name for piece in plain.pieces]
    assert names.index(heavy.cuts[0]) < names.index(plain.cuts[0])


def test_named_pieces_begin_the_partitions_whatever_their_heads_cost() -> None:
    config = with_overrides(Config(), ["local.cuts=blocks.1,head", "local.partitions=2"])
    assert config.local.count == 3
    cut, costs = cutter("local.cuts=blocks.1, head").measured(BATCH)
    assert cut.cuts == ("blocks.1", "head") and len(costs) == 3
    with pytest.raises(ConfigError, match=r"no piece 'block\.1'"):
        cutter("local.cuts=block.1").measured(BATCH)


def test_work_takes_longer_on_a_slower_rank_and_changes_nothing() -> None:
    model = build_model(with_overrides(Config(), ["model.size=nano"]).model, SPEC, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    fast = least_seconds(model, pieces_of(model), BATCH[0])
    for piece in pieces_of(model):
        piece.module.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    assert least_seconds(model, pieces_of(model), BATCH[0]) > fast > 0.0
    assert torch.equal(torch.rand(1), drawn)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(one.grad is None for one in model.parameters())


@pytest.mark.parametrize("name", ["gpt", "vgg8b", "resnet18"])
def test_checkpointed_blocks_save_less_and_what_they_need_again_is_counted(name: str) -> None:
    spec, inputs = SPEC, BATCH[0]
    if name != "gpt":
        spec, inputs = DataSpec("images", 10, (1, 28, 28)), torch.rand(4, 1, 28, 28)
    costs, again = [], []
    for checkpointing in ("false", "true"):
        settings = [
            f"model.name={name}",
            "model.size=nano",
            f"train.activation_checkpointing={checkpointing}",
        ]
        model = build_run_model(with_overrides(Config(), settings), spec, torch.device("cpu"))
        cut = partition(model, 1, inputs)
        costs.append(cut[0].costs.activation_bytes)
        again.append([one.again_bytes > 0 for one in cut.measured])
    assert costs[1] < 0.9 * costs[0]
    assert not any(again[0])
    assert again[1][-1] is False and any(again[1])


def test_only_one_model_exists_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 tries several cuts, and may have memory for one model alone."""
    living: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
    most = 0

    def counted(*arguments: Any) -> torch.nn.Module:
        nonlocal most
        gc.collect()
        most = max(most, len(living) + 1)
        model = build_run_model(*arguments)
        living.add(model)
        return model

    monkeypatch.setattr("efficient_dl.training.cutting.build_run_model", counted)
    cut, _ = cutter("local.partitions=2", "local.heads=causal:3", "local.balance=parameters").measured(BATCH)
    assert most == 1 and len(living) == 1
    assert cut.model in living
