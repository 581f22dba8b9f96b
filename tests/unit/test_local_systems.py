"""The systems that the benchmark of local learning compares: equal where they must be, different where they should."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.local_learning import CASES, Study
from benchmarks.local_systems import (
    _ATTENTION,
    SAME,
    SYSTEMS,
    Case,
    Trainer,
    _Flops,
    _live_peak,
    evaluate,
    measure_costs,
    shrunk,
)
from benchmarks.rows import RowFile
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


@pytest.mark.parametrize("system", SAME)
def test_checkpointing_changes_no_bit(case: Case, data: Dataset, system: str) -> None:
    expected = trained(case, data, SAME[system])[0].model.state_dict()
    same = trained(case, data, system)[0].model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in same.items())


def test_accumulation_is_backprop_up_to_rounding(case: Case, data: Dataset) -> None:
    expected = trained(case, data, "backprop")[0].model.state_dict()
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
    attention: dict[Any, Any] = {cpu: partial(flop_registry[gpu]) for cpu, gpu in _ATTENTION.items()}
    for formula in attention.values():
        formula._get_raw = True  # takes tensors, as the registry's own do
    with FlopCounterMode(display=False, custom_mapping=attention) as theirs:
        trainer.step(*trainer.batch(1))
    assert ours.total == theirs.get_total_flops() > 0


def test_one_partition_at_a_time_needs_less_than_all(case: Case, data: Dataset) -> None:
    whole, one = (measure_costs(case, data, name) for name in ("backprop", "simultaneous, window 1"))
    again = measure_costs(case, data, "simultaneous, window 1, checkpointing")
    assert 0 < one.saved_bytes < 0.7 * whole.saved_bytes
    assert 0 < again.live_bytes < one.live_bytes < whole.live_bytes
    assert again.flops > one.flops
    assert one.state_bytes == again.state_bytes > whole.state_bytes  # heads


def test_what_a_step_needs_is_what_its_tensors_take() -> None:
    """Backprop through one linear layer: its output, what cross-entropy keeps, and gradients."""

    def live(rows: int) -> float:
        layer, x = nn.Linear(256, 1024, bias=False), torch.randn(rows, 256)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            layer(x).square().sum().backward()
        return _live_peak(profiled)

    weights = 256 * 1024 * 4
    assert weights + 512 * 1024 * 4 <= live(512) < weights + 5 * 512 * 1024 * 4


def test_a_rate_is_chosen_on_a_seed_of_its_own_and_only_once(case: Case) -> None:
    rows = RowFile(None)
    known: dict[tuple[str, str, str], float] = {}
    tuned = replace(case, tuned=True, lr=1e-6, steps=6)  # too small: larger ones are tried
    study = Study(rows, known)
    rate = study._rate(tuned, "backprop")
    assert rate == pytest.approx(1e-6 * 27)
    count = len(rows.rows)
    assert study._rate(tuned, "backprop, checkpointing") == rate and len(rows.rows) == count
