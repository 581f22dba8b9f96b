"""What a run's settings of compression mean for one of its partitions."""

from __future__ import annotations

import pytest
from torch import nn

from efficient_dl.config import Config, with_overrides
from efficient_dl.errors import ConfigError
from efficient_dl.training.partition_wishes import check_overrides, wishes_of


class Block(nn.Module):
    """Named as a partition with its head is."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), head


NAMES = {
    "0.weight": "blocks.1.weight",
    "0.bias": "blocks.1.bias",
    "1.weight": "norm.weight",
    "1.bias": "norm.bias",
}
MODEL = ["embedding.weight", *NAMES.values(), "head.weight"]


def config_of(overrides: str, budget: int = 0) -> Config:
    settings = [f"compression.overrides={overrides}", f"compression.bytes_per_step={budget}"]
    return with_overrides(Config(), ["local.mode=layerwise", *settings])


def test_overrides_go_by_the_model_s_names_and_the_first_that_matches_counts() -> None:
    config = config_of("norm.*=none, *.bias=4.0, head.*=lossless, auxiliary.*=int8")
    check_overrides(config, MODEL)
    found = wishes_of(config, Block(nn.Linear(4, 2)), NAMES, 10, 10).compression.overrides_by_pattern()
    assert found == {
        "body.0.bias": "4.0", "body.1.weight": "none", "body.1.bias": "none",
        "head.weight": "int8", "head.bias": "4.0",
    }  # fmt: skip
    assert "head.weight" not in wishes_of(config, Block(nn.Identity()), NAMES, 10, 10).compression.overrides


@pytest.mark.parametrize("mode", ["layerwise", "end-to-end"])
def test_a_pattern_that_matches_nothing_is_refused_before_anything_is_cut(mode: str) -> None:
    config = with_overrides(config_of("body.*=4.0"), [f"local.mode={mode}"])
    with pytest.raises(ConfigError, match="matches no parameter"):
        check_overrides(config, MODEL)


def test_partitions_that_train_side_by_side_share_a_worker_s_bytes() -> None:
    config, block = config_of("", 1000), Block(nn.Identity())
    shares = [wishes_of(config, block, NAMES, values, 100).compression.bytes_per_step for values in (60, 40)]
    assert shares == [600, 400]
    assert wishes_of(config_of(""), block, NAMES, 60, 100).compression.bytes_per_step == 0
