"""What does a hierarchy save where several ranks share a node's link?

python -m benchmarks.hierarchy --out benchmarks/results/hierarchy.jsonl
Emulates hosts behind shaped links (see cluster/), several ranks on each, which share its link. All ranks all-reduce
one bucket of gradients: natively, flat, and in two levels. Also times the two ways to reduce inside a node, where
nothing is compressed: torch's own reduce-scatter, and raw shards over our transport.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.rows import Row, RowFile
from cluster.emulate import EmulatedNetwork
from efficient_dl.comm import (
    BucketLayout,
    Compressor,
    Levels,
    Plan,
    ProcessGroupTransport,
    Topology,
    all_reduce,
    hierarchical_all_reduce,
)

BENCH = "hierarchy"
MIB = 2**20
BITS = ("identity", "lossless", "2.0")
_NAMES = ["weight", "bias"]


class Timings:
    """Runs a collective on all ranks a few times; seconds of the slowest rank, and what the host's interface sent."""

    def __init__(self, repeats: int) -> None:
        self._repeats = repeats

    def measure(self, system: str, run: Callable[[], object], compressor: Compressor | None = None) -> None:
        """Prints one JSON line on rank 0: medians over the repetitions; bytes a collective, of host 0 and rank 0."""
        run()
        counted = compressor.meter.state_dict()["totals"] if compressor else {}
        dist.barrier()
        before, seconds = _sent("eth0"), []
        loopback = _sent("lo")
        for _ in range(self._repeats):
            dist.barrier()
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        dist.barrier()
        found: dict[str, Any] = {
            "system": system,
            "seconds": _slowest(statistics.median(seconds)),
            "nic_bytes": (_sent("eth0") - before) / self._repeats,
            "lo_bytes": (_sent("lo") - loopback) / self._repeats,
        }
        if compressor:
            now = compressor.meter.state_dict()["totals"]
            for key in ("wire_bytes", "local_bytes"):
                found[key] = (now[key] - counted[key]) / self._repeats
        if dist.get_rank() == 0:
            print(json.dumps(found), flush=True)


def worker(size_mib: float, local_size: int, repeats: int) -> None:
    """One rank: times every system."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    group = dist.group.WORLD
    assert group is not None
    control = ProcessGroupTransport(group, timeout=120.0)
    topology = Topology.discover(control, os.environ, os.uname().nodename)
    assert topology.local_size == local_size, topology
    levels = Levels.of(topology, control)
    numel = int(size_mib * MIB / 4)
    numels = [numel - numel // 100, numel // 100]
    layout = BucketLayout.of(_NAMES, numels, control.world_size)
    generator = torch.Generator().manual_seed(control.rank)
    # Blocks of different sizes, as in gradients.
    scale = torch.randn(numel // 256 + 1, generator=generator).exp().repeat_interleave(256)[:numel]
    x = torch.randn(numel, generator=generator) * scale
    timings = Timings(repeats)
    timings.measure("gloo: all_reduce, fp32", lambda: dist.all_reduce(x.clone()))
    for bits in BITS:
        plan = Plan.of(bits)
        flat, two = Compressor(plan, _NAMES), Compressor(plan, _NAMES)
        timings.measure(f"flat, {bits}", _bind(all_reduce, x, layout, flat, control), flat)
        timings.measure(f"hierarchical, {bits}", _bind(hierarchical_all_reduce, x, layout, two, levels), two)
    _inside(timings, x, levels)
    dist.barrier()
    dist.destroy_process_group()


def _bind(reduce: Callable[..., None], x: Tensor, *arguments: Any) -> Callable[[], None]:
    return lambda: reduce(x.clone(), *arguments)


def _inside(timings: Timings, x: Tensor, levels: Levels) -> None:
    """The first phase alone: a sum over the ranks of one node, of which each keeps its part."""
    scatter = levels.scatter
    assert isinstance(scatter, ProcessGroupTransport)
    size = scatter.world_size
    x = x[: x.numel() // size * size]
    part = torch.empty(x.numel() // size)

    def native() -> None:
        dist.reduce_scatter(part, list(x.chunk(size)), group=scatter.group)

    def raw() -> None:
        shards = x.view(torch.uint8).chunk(size)
        incoming = scatter.exchange(list(shards)).wait()
        part.copy_(incoming[0].view(torch.float32))
        for message in incoming[1:]:
            part.add_(message.view(torch.float32))

    timings.measure("inside: gloo's reduce_scatter", native)
    timings.measure("inside: raw shards", raw)


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    hosts: Annotated[int, typer.Option(help="number of hosts", min=2)] = 2,
    local: Annotated[int, typer.Option(help="ranks on each host", min=2)] = 2,
    rates: Annotated[str, typer.Option(help="link speeds")] = "100mbit,1gbit",
    size: Annotated[float, typer.Option(help="MiB of fp32 in the bucket")] = 8.0,
    repeats: Annotated[int, typer.Option(help="timed collectives of each kind", min=1)] = 5,
    quick: Annotated[bool, typer.Option(help="1 Gbit/s, 2 MiB, 3 repetitions")] = False,
    as_worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Times the all-reduce of one bucket over hosts of several ranks: native, flat and hierarchical."""
    if as_worker:
        return worker(size, local, repeats)
    if quick:
        rates, size, repeats = "1gbit", 2.0, 3
    rows = RowFile(out)
    for rate in rates.split(","):
        with EmulatedNetwork(hosts=hosts, rate=rate) as network:
            command = [sys.executable, "-m", "benchmarks.hierarchy", "--worker"]
            command += ["--size", str(size), "--local", str(local), "--repeats", str(repeats)]
            result = network.run(
                command,
                workers_per_host=local,
                environment={"OMP_NUM_THREADS": "1"},
                timeout_seconds=600,
                quiet=True,
            )
        if result.exit_code != 0:
            print("\n".join(result.output), file=sys.stderr)
            raise typer.Exit(result.exit_code)
        lines = [line for output in result.output for line in output.splitlines()]
        measured = [json.loads(line[line.index("{") :]) for line in lines if '{"system"' in line]
        _report(rows, f"{hosts} hosts × {local} ranks, {rate}, {size:g} MiB", measured)


def _report(rows: RowFile, case: str, measured: list[dict[str, Any]]) -> None:
    table = Table("all-reduce", "ms", "MB out of host 0", "MB inside it", title=case)
    for m in measured:
        system = (
            m["system"]
            if m["system"].startswith(("gloo", "inside: gloo"))
            else f"efficient_dl: {m['system']}"
        )
        rows.add(Row(BENCH, case, system, "time of a collective", 1e3 * m["seconds"], "ms", False))
        rows.add(Row(BENCH, case, system, "sent by a host's interface", m["nic_bytes"] / 1e6, "MB", False))
        rows.add(Row(BENCH, case, system, "sent inside a host", m["lo_bytes"] / 1e6, "MB", False))
        if "wire_bytes" in m:
            rows.add(
                Row(BENCH, case, system, "wire bytes of rank 0, counted", m["wire_bytes"] / 1e6, "MB", False)
            )
            rows.add(
                Row(
                    BENCH, case, system, "local bytes of rank 0, counted", m["local_bytes"] / 1e6, "MB", False
                )
            )
        table.add_row(
            system, f"{1e3 * m['seconds']:.0f}", f"{m['nic_bytes'] / 1e6:.2f}", f"{m['lo_bytes'] / 1e6:.2f}"
        )
    Console().print(table)


def _sent(interface: str) -> int:
    path = Path(f"/sys/class/net/{interface}/statistics/tx_bytes")
    return int(path.read_text())


def _slowest(seconds: float) -> float:
    slowest = torch.tensor(seconds)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


if __name__ == "__main__":
    typer.run(main)
