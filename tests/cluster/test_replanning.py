"""A run notices on shaped links that its plan no longer pays, and chooses a hierarchy where workers share a link."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.emulate import EmulatedNetwork

pytestmark = [pytest.mark.netns, pytest.mark.slow]

EDL = [sys.executable, "-m", "efficient_dl.cli", "train", "--model", "mlp-mini", "--data", "digits"]
ENVIRONMENT = {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}

# Planned for a fast link, trains until its plan has changed, at most 400 steps; asks for a slow link after the 30th.
# Looks may cost half of the time here, and plans may be young, so that all of it happens soon.
RUN = """
import json, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
import efficient_dl as edl
from efficient_dl.comm.look import Allowance
from efficient_dl.comm.measurements import CodecSpeed, Line, Measurements
from efficient_dl.comm.replanning import Hysteresis
from efficient_dl.integrations.plan_watch import ReplanOptions

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
model = nn.parallel.DistributedDataParallel(net)
optimizer = torch.optim.AdamW(model.parameters())
replan = ReplanOptions(hysteresis=Hysteresis(distance_steps=20), allowance=Allowance(share=0.5))
fast = Line(1e-5, 1e10)
sizes = {"lossless": 3.4, "bits:4.0": 0.5, "bits:2.0": 0.25}
codecs = tuple(CodecSpeed(name, 1e-9, 1e-9, size) for name, size in sizes.items())
known = Measurements((1, 1), fast, fast, None, None, (), codecs, 0.05, True)
compression = edl.compress(model, optimizer, "auto", check_every=10, replan=replan, measurements=known)
generator = torch.Generator().manual_seed(rank)
sent = []
for step in range(1, 401):
    before = compression.stats()["wire_bytes"]
    optimizer.zero_grad()
    model(torch.randn(32, 64, generator=generator)).square().mean().backward()
    time.sleep(0.05)  # what a larger network would compute
    optimizer.step()
    sent.append(compression.stats()["wire_bytes"] - before)
    plans = [(one["step"], one["bits"]) for one in compression.plans]
    if rank == 0 and step == 30:
        (folder / "slow").touch()
    if len(plans) == 2 and step >= plans[1][0] + 5:
        break
(folder / f"{rank}.json").write_text(json.dumps({"plans": plans, "sent": sent, "looks": compression.stats()["looks"]}))
compression.close()
dist.barrier()
dist.destroy_process_group()
"""


@contextmanager
def reshaped(network: EmulatedNetwork, folder: Path, rates: dict[str, str]) -> Iterator[None]:
    """Gives all links another rate when a run asks for it, by making a file of the rate's name."""

    def wait() -> None:
        for name, rate in rates.items():
            while not (folder / name).exists():
                if ended.wait(0.05):
                    return
            network.set_rate(rate)

    ended = threading.Event()
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.timeout(300)
def test_a_native_run_on_a_link_that_becomes_slow_begins_to_compress(tmp_path: Path) -> None:
    """Nothing of ours is in its all-reduce. It notices that steps take longer, and decides on two short looks."""
    rates = {"slow": "40mbit"}
    with EmulatedNetwork(hosts=2, rate="none") as network, reshaped(network, tmp_path, rates):
        run = network.run(
            [sys.executable, "-c", RUN, str(tmp_path)],
            environment=ENVIRONMENT,
            quiet=True,
            timeout_seconds=270,
        )
    assert run.exit_code == 0, run.output
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one["plans"] == other["plans"]
    (_, first), (step, then) = one["plans"]
    assert first == "none" and then in ("lossless", "4.0", "2.0")
    sent = one["sent"]
    assert len({*sent[:step]}) == 1
    assert max(sent[step:]) < sent[0]


@pytest.mark.timeout(300)
def test_two_workers_behind_one_slow_link_reduce_between_hosts_if_nobody_says_otherwise(
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    with EmulatedNetwork(hosts=2, rate="20mbit") as network:
        before = network.tx_bytes(0)
        run = network.run(
            [*EDL, "--steps", "3", "--out", str(out)],
            workers_per_host=2,
            environment=ENVIRONMENT,
            quiet=True,
            timeout_seconds=240,
        )
        assert network.tx_bytes(0) > before
    assert run.exit_code == 0, run.output
    plan = json.loads((out / "plan.json").read_text())
    assert plan["measurements"]["ranks_per_node"] == [2, 2]
    assert plan["measurements"]["between"] and plan["measurements"]["inside"]
    assert plan["decision"]["hierarchy"] is True
    assert plan["decision"]["bits"] != "none"
