"""The bytes that the meter counts are those that leave the network interface."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.emulate import EmulatedNetwork

pytestmark = [pytest.mark.netns, pytest.mark.slow]

TRAIN = """
import json, sys
import torch
import torch.distributed as dist
from pathlib import Path
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import efficient_dl as edl

def left():
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())

def measure(bits):
    model = DistributedDataParallel(nn.Sequential(*[nn.Linear(700, 700) for _ in range(4)]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    hierarchy = "auto" if "hierarchy" in sys.argv else None
    compression = edl.compress(model, optimizer, bits=bits, hierarchy=hierarchy)

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.randn(8, 700)).square().mean().backward()
            optimizer.step()

    steps(2)   # DDP tells the ranks its new buckets
    dist.barrier()
    before, counted = left(), compression.stats()["wire_bytes"]
    steps(8)
    dist.barrier()
    stats = compression.stats()
    sent = {"kernel": left() - before, "meter": stats["wire_bytes"] - counted, "nodes": stats["hierarchy"]}
    compression.close()
    return sent

dist.init_process_group("gloo")
print(json.dumps({bits: measure(bits) for bits in sys.argv[1].split(",")}))
dist.destroy_process_group()
"""


def measured(
    folder: Path, bits: tuple[str, ...], *words: str, workers_per_host: int = 1
) -> list[dict[str, Any]]:
    """What each rank on two hosts has measured, by bits; starting them takes longer than measuring."""
    script = folder / "train.py"
    script.write_text(TRAIN)
    with EmulatedNetwork(hosts=2, rate="1gbit") as network:
        run = network.run(
            [sys.executable, str(script), ",".join(bits), *words],
            workers_per_host=workers_per_host,
            environment={"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
            quiet=True,
            timeout_seconds=250,
        )
    assert run.exit_code == 0, run.output
    lines = [line for output in run.output for line in output.splitlines() if '{"kernel"' in line]
    ranks = [json.loads(line[line.index("{") :]) for line in lines]
    assert len(ranks) == 2 * workers_per_host
    assert all(rank.keys() == set(bits) for rank in ranks)
    return ranks


def test_the_meter_agrees_with_the_kernel_within_five_percent(tmp_path: Path) -> None:
    for rank in measured(tmp_path, ("identity", "lossless", "2.0")):
        for bits, sent in rank.items():
            assert sent["meter"] == pytest.approx(sent["kernel"], rel=0.05), bits


def test_what_a_hierarchy_counts_is_what_leaves_the_host(tmp_path: Path) -> None:
    """Two ranks share a host's interface; what they send each other does not pass it, and is not counted."""
    by_rank = measured(tmp_path, ("lossless", "2.0"), "hierarchy", workers_per_host=2)
    for bits in ("lossless", "2.0"):
        ranks = [rank[bits] for rank in by_rank]
        assert all(rank["nodes"]["ranks_per_node"] == [2, 2] for rank in ranks)
        counted, left = sum(rank["meter"] for rank in ranks), sum(rank["kernel"] for rank in ranks) / 2
        assert counted == pytest.approx(left, rel=0.05), bits
