"""torch.distributed joins on emulated hosts by its usual variables, and its bytes go over the shaped link."""

from __future__ import annotations

import sys

import pytest

from cluster.emulate import EmulatedNetwork

pytestmark = [pytest.mark.netns, pytest.mark.slow]

ALL_REDUCE = """
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
x = torch.full((250_000,), 1.0 + dist.get_rank())
dist.all_reduce(x)
assert (x == 3).all()
dist.barrier()
dist.destroy_process_group()
"""


def test_gloo_finds_its_peer_and_the_counters_see_its_bytes() -> None:
    with EmulatedNetwork(hosts=2, rate="1gbit") as network:
        run = network.run([sys.executable, "-c", ALL_REDUCE], quiet=True)
        sent = network.tx_bytes(0), network.tx_bytes(1)
    assert run.exit_code == 0, run.output
    # With two ranks each sends half of its 1 MB for the sum and half of the sum.
    assert all(1_000_000 < host_bytes < 1_120_000 for host_bytes in sent)
