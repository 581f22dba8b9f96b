"""The bytes that the meter counts are those that leave the network interface."""

from __future__ import annotations

import json
import sys
from pathlib import Path

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

dist.init_process_group("gloo")
model = DistributedDataParallel(nn.Sequential(*[nn.Linear(700, 700) for _ in range(4)]))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
hierarchy = sys.argv[2] if len(sys.argv) > 2 else None
compression = edl.compress(model, optimizer, bits=sys.argv[1], hierarchy=hierarchy)

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
print(json.dumps(sent))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("bits", ["identity", "lossless", "2.0"])
def test_the_meter_agrees_with_the_kernel_within_five_percent(tmp_path: Path, bits: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    with EmulatedNetwork(hosts=2, rate="1gbit") as network:
        run = network.run(
            [sys.executable, str(script), bits],
            environment={"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
            quiet=True,
            timeout_seconds=100,
        )
    assert run.exit_code == 0, run.output
    for output in run.output:
        sent = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
        assert sent["meter"] == pytest.approx(sent["kernel"], rel=0.05)


@pytest.mark.parametrize("bits", ["lossless", "2.0"])
def test_what_a_hierarchy_counts_is_what_leaves_the_host(tmp_path: Path, bits: str) -> None:
    """Two ranks share a host's interface; what they send each other does not pass it, and is not counted."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    with EmulatedNetwork(hosts=2, rate="1gbit") as network:
        run = network.run(
            [sys.executable, str(script), bits, "auto"],
            workers_per_host=2,
            environment={"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
            quiet=True,
            timeout_seconds=100,
        )
    assert run.exit_code == 0, run.output
    lines = [line for output in run.output for line in output.splitlines() if '{"kernel"' in line]
    ranks = [json.loads(line[line.index("{") :]) for line in lines]
    assert all(rank["nodes"]["ranks_per_node"] == [2, 2] for rank in ranks)
    counted, left = sum(rank["meter"] for rank in ranks), sum(rank["kernel"] for rank in ranks) / 2
    assert counted == pytest.approx(left, rel=0.05)
