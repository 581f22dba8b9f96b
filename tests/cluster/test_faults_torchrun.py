"""Torchrun's agents on emulated hosts: what is killed or cut comes back, or ends, and the result is the same.

Some of the cases of benchmarks/faults.py, which has them all; the others would take minutes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.fault_cases import TORCHRUN
from benchmarks.faults import measure, undisturbed

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return undisturbed(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("name", ["rank-0-killed", "link-cut-5-s"])
def test_the_weights_are_those_of_an_undisturbed_run_and_no_process_is_left(
    name: str, tmp_path: Path, reference: dict[str, torch.Tensor]
) -> None:
    found = measure(TORCHRUN[name], tmp_path / "case", reference, "torchrun")
    assert found.is_equal
    assert found.left == 0
    assert found.outcome.lost_steps is not None and found.outcome.lost_steps < 40


def test_a_rank_with_another_version_is_refused_before_the_first_step(tmp_path: Path) -> None:
    found = measure(TORCHRUN["version"], tmp_path / "case", {}, "torchrun")
    assert found.is_equal is None
    assert found.left == 0
