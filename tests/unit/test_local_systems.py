"""The systems that the benchmark of local learning compares: equal where they must be, different where they should."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.local_learning import CASES
from benchmarks.local_systems import SYSTEMS, Case, Trainer, _Flops, evaluate, measure_costs, shrunk
from efficient_dl.data import Dataset, load_data

STEPS = 4


@pytest.fixture(scope="module")
def case() -> Case:
    return shrunk(CASES["gpt"])


@pytest.fixture(scope="module")
def data(case: Case) -> Dataset:
    return load_data(case.data, context=case.model.context)


def trained(case: Case, data: Dataset, system: str) -> tuple[Trainer, dict[str, Tensor]]:
    trainer = SYSTEMS[system](case, data, 0)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert len(trainer.train(STEPS)) == STEPS
    return trainer, before


def test_checkpointing_is_backprop_bit_for_bit_and_accumulation_up_to_rounding(
    case: Case, data: Dataset
) -> None:
    expected = trained(case, data, "backprop")[0].model.state_dict()
    same = trained(case, data, "backprop, checkpointing")[0].model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in same.items())
    close = trained(case, data, "backprop, accumulation")[0].model.state_dict()
    for name, value in close.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "system",
    ["deep supervision", "frozen random", "sequential", "simultaneous, window 1", "simultaneous, window 2"],
)
def test_each_system_trains_the_partitions_that_it_should(case: Case, data: Dataset, system: str) -> None:
    trainer, before = trained(case, data, system)
    moved = {
        name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])
    }
    expected = {name for name, _ in trainer.model.named_parameters()}
    if system == "frozen random":
        expected = {name for name in expected if name.startswith(("blocks.3", "norm", "head"))}
    assert moved == expected
    assert 0 < evaluate(trainer)["bits_per_byte"] < 9


def test_the_benchmark_counts_flops_as_torch_does(case: Case, data: Dataset) -> None:
    trainer = SYSTEMS["backprop"](case, data, 0)
    with _Flops() as ours:
        trainer.step(*trainer.batch(0))
    with FlopCounterMode(display=False) as theirs:
        trainer.step(*trainer.batch(1))
    assert ours.total == theirs.get_total_flops() > 0


def test_one_partition_at_a_time_saves_less_than_all(case: Case, data: Dataset) -> None:
    whole = measure_costs(case, data, "backprop")
    one = measure_costs(case, data, "simultaneous, window 1")
    assert 0 < one.saved_bytes < 0.7 * whole.saved_bytes
