"""Which way of exchanging messages over gloo uses a link best?

python -m benchmarks.exchange --out benchmarks/results/exchange.jsonl
Emulates hosts behind shaped links (see cluster/), one rank on each. Every rank sends a message of the given size to
every other one: each way with torch's own operations, and with our transport, which adds the messages' sizes.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.rows import Row, RowFile
from cluster.emulate import EmulatedNetwork
from cluster.shaping import parse_rate
from efficient_dl.comm import ProcessGroupTransport

BENCH = "exchange"
MIB = 2**20

Exchange = Callable[[list[Tensor], list[Tensor]], None]


def all_to_all_single(outgoing: list[Tensor], incoming: list[Tensor]) -> None:
    """One collective; it wants the messages in one tensor."""
    joined = torch.cat(incoming)
    sizes = [message.numel() for message in outgoing]
    dist.all_to_all_single(joined, torch.cat(outgoing), [part.numel() for part in incoming], sizes)


def all_gather(outgoing: list[Tensor], incoming: list[Tensor]) -> None:
    """The same message to all, as in the second phase of an all-reduce; equal sizes only."""
    dist.all_gather(incoming, outgoing[0])


def batch_sends_first(outgoing: list[Tensor], incoming: list[Tensor]) -> None:
    """All operations at once, as torch's documentation shows them."""
    _finish(dist.batch_isend_irecv(_sends(outgoing) + _receives(incoming)))


def batch_receives_first(outgoing: list[Tensor], incoming: list[Tensor]) -> None:
    """All operations at once, the receives posted first."""
    _finish(dist.batch_isend_irecv(_receives(incoming) + _sends(outgoing)))


def rounds_sends_first(outgoing: list[Tensor], incoming: list[Tensor]) -> None:
    """Round k: send to rank + k, receive from rank − k."""
    for source, target in _rounds():
        _finish([dist.isend(outgoing[target], target), dist.irecv(incoming[source], source)])


def rounds_receives_first(outgoing: list[Tensor], incoming: list[Tensor]) -> None:
    """Round k: receive from rank − k, posted before the send to rank + k."""
    for source, target in _rounds():
        _finish([dist.irecv(incoming[source], source), dist.isend(outgoing[target], target)])


def transport(outgoing: list[Tensor], incoming: list[Tensor]) -> None:
    """ProcessGroupTransport.exchange: sizes, then rounds with receives first."""
    group = dist.group.WORLD
    assert group is not None
    ProcessGroupTransport(group).exchange(outgoing).wait()


WAYS: dict[str, Exchange] = {
    "all_to_all_single": all_to_all_single,
    "all_gather": all_gather,
    "batch_isend_irecv, sends first": batch_sends_first,
    "batch_isend_irecv, receives first": batch_receives_first,
    "pairwise rounds, sends first": rounds_sends_first,
    "pairwise rounds, receives first": rounds_receives_first,
    "efficient_dl": transport,
}


def worker(sizes_mib: list[float], repeats: int) -> None:
    """One rank: times every way for every size; rank 0 prints the slowest rank's median as JSON lines."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for size in sizes_mib:
        outgoing = [torch.randint(0, 256, (int(size * MIB),), dtype=torch.uint8) for _ in range(world_size)]
        incoming = [torch.empty_like(message) for message in outgoing]
        for name, exchange in WAYS.items():
            exchange(outgoing, incoming)
            seconds = []
            for _ in range(repeats):
                dist.barrier()
                start = time.perf_counter()
                exchange(outgoing, incoming)
                seconds.append(time.perf_counter() - start)
            slowest = torch.tensor(statistics.median(seconds))
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if rank == 0:
                print(json.dumps({"size_mib": size, "way": name, "seconds": float(slowest)}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    hosts: Annotated[str, typer.Option(help="numbers of ranks")] = "2,4",
    rates: Annotated[str, typer.Option(help="link speeds")] = "100mbit,1gbit",
    sizes: Annotated[str, typer.Option(help="message sizes in MiB")] = "0.125,1,4,10",
    repeats: Annotated[int, typer.Option(help="timed exchanges of each kind", min=1)] = 5,
    quick: Annotated[bool, typer.Option(help="two ranks, 1 Gbit/s, 1 and 4 MiB")] = False,
    as_worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Compares ways to exchange messages over gloo, as the share of the link's rate that each way reaches."""
    if quick:
        hosts, rates, sizes = "2", "1gbit", "1,4"
    if as_worker:
        return worker([float(size) for size in sizes.split(",")], repeats)
    rows = RowFile(out)
    for ranks in map(int, hosts.split(",")):
        for rate in rates.split(","):
            with EmulatedNetwork(hosts=ranks, rate=rate) as network:
                command = [sys.executable, "-m", "benchmarks.exchange", "--worker"]
                command += ["--sizes", sizes, "--repeats", str(repeats)]
                environment = {"OMP_NUM_THREADS": "1"}
                result = network.run(command, environment=environment, timeout_seconds=600, quiet=True)
            if result.exit_code != 0:
                print("\n".join(result.output), file=sys.stderr)
                raise typer.Exit(result.exit_code)
            measured = [json.loads(line) for line in result.output[0].splitlines() if line.startswith("{")]
            _report(rows, ranks, rate, measured)


def _report(rows: RowFile, ranks: int, rate: str, measured: list[dict[str, float]]) -> None:
    sizes = list(dict.fromkeys(m["size_mib"] for m in measured))
    table = Table(
        "% of the link, each way", *(f"{size:g} MiB" for size in sizes), title=f"{ranks} ranks, {rate}"
    )
    rate_bits = parse_rate(rate)
    assert rate_bits is not None  # the benchmark is about shaped links
    shares: dict[str, list[str]] = {str(m["way"]): [] for m in measured}
    for m in measured:
        ideal = m["size_mib"] * MIB * (ranks - 1) * 8 / rate_bits
        share = 100 * ideal / m["seconds"]
        shares[str(m["way"])].append(f"{share:.0f}")
        system = "efficient_dl" if m["way"] == "efficient_dl" else f"gloo: {m['way']}"
        case = f"{ranks} ranks, {rate}, {m['size_mib']:g} MiB"
        rows.add(Row(BENCH, case, system, "share of the link", share, "%", True))
    for way, cells in shares.items():
        table.add_row(way, *cells)
    Console().print(table)


def _rounds() -> list[tuple[int, int]]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return [((rank - k) % world_size, (rank + k) % world_size) for k in range(1, world_size)]


def _sends(outgoing: list[Tensor]) -> list[dist.P2POp]:
    return [dist.P2POp(dist.isend, outgoing[target], target) for _, target in _rounds()]


def _receives(incoming: list[Tensor]) -> list[dist.P2POp]:
    return [dist.P2POp(dist.irecv, incoming[source], source) for source, _ in _rounds()]


def _finish(works: list[dist.Work | None] | list[dist.Work]) -> None:
    for work in works:
        if work is not None:
            work.wait()


if __name__ == "__main__":
    typer.run(main)
