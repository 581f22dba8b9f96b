"""The rules that hold everywhere, with DDP, FSDP2 and HSDP at 2, 3 and 4 ranks; test_deepspeed.py has them, too."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.rule_rigs import rules_of
from tests.distributed.rules import RULES

JOBS = [("DDP", 2), ("DDP", 3), ("DDP", 4), ("FSDP2", 2), ("FSDP2", 3), ("FSDP2", 4), ("HSDP", 4)]


@pytest.fixture(scope="module", params=JOBS, ids=[f"{name} on {size}" for name, size in JOBS])
def ranks(request: Any) -> list[dict[str, str]]:
    """Each rank's verdicts; all rules are checked in one group of processes."""
    integration, size = request.param
    return run_ranks(rules_of, size, integration)


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_holds(ranks: list[dict[str, str]], rule: str) -> None:
    for rank, found in enumerate(ranks):
        assert not found[rule], f"on rank {rank}: {found[rule]}"
