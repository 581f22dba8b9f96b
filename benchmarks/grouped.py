"""Does the cost model hold at 2, 4 and 8 hosts, and what do groups of ranks save there?

python -m benchmarks.grouped --out benchmarks/results/grouped.jsonl
Emulates hosts of one rank each behind shaped links (see cluster/); all ranks all-reduce one bucket of gradients natively,
flat at 2 bits, and in groups at 2 bits, in turn. Links, codecs and packets are measured on two hosts, and how long
processors take because ranks share this machine's cores on as many hosts as are predicted; no exchange of the kinds that
are predicted goes into the prediction, but that of plain bytes between two hosts.
"""

from __future__ import annotations

import json
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
from efficient_dl.codec import make_codec
from efficient_dl.comm import (
    BucketLayout,
    Compressor,
    Levels,
    Plan,
    ProcessGroupTransport,
    Topology,
    all_reduce,
    gather_json,
    grouped_all_reduce,
)
from efficient_dl.comm.measurements import Line, Measurements, extrapolated, merged
from efficient_dl.comm.planner import PlannerOptions, Shapes, predict
from efficient_dl.comm.probe import codec_speed, exchange_line, native_line, packet_cost
from efficient_dl.comm.topology import group_sizes

BENCH = "grouped"
CODEC = "bits:2.0"
_NAMES = ["weight", "bias"]
_CONTENTION_SECONDS = 0.4
_TIMEOUT_SECONDS = 120.0


def worker(numels: list[int], repeats: int) -> None:
    """One rank: measures what predictions need, then times every system on every size. Rank 0 prints one JSON line."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=_TIMEOUT_SECONDS))
    group = dist.group.WORLD
    assert group is not None
    control = ProcessGroupTransport(group, timeout=_TIMEOUT_SECONDS)
    found: dict[str, Any] = {"contention": _contention(gradient(1 << 17, control.rank), control)}
    if control.world_size == 2:
        found["measurements"] = _measured(gradient(max(numels), control.rank), control).to_json()
    levels = {
        size: Levels.of(Topology.in_groups(control.world_size, size), control)
        for size in group_sizes(control.world_size)
    }
    found["seconds"] = {
        numel: _timed(gradient(numel, control.rank), control, levels, repeats) for numel in numels
    }
    if control.rank == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def gradient(numel: int, seed: int) -> Tensor:
    """Normal values in blocks of different sizes, as in gradients."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(numel // 256 + 1, generator=generator).exp().repeat_interleave(256)[:numel]
    return torch.randn(numel, generator=generator) * scale


def _contention(x: Tensor, control: ProcessGroupTransport) -> float:
    """Wall-clock seconds a second of processor time, while all ranks encode at once; the mean of the ranks."""
    codec = make_codec(CODEC)
    room = torch.empty(codec.max_bytes(x.numel(), x.dtype), dtype=torch.uint8)
    codec.encode_into(x, room)
    gather_json(0, control)
    wall, processor = time.perf_counter(), time.thread_time()
    while time.perf_counter() - wall < _CONTENTION_SECONDS:
        codec.encode_into(x, room)
    ratio = (time.perf_counter() - wall) / (time.thread_time() - processor)
    return statistics.mean(gather_json(ratio, control))


def _measured(x: Tensor, control: ProcessGroupTransport) -> Measurements:
    packet = packet_cost(CODEC, x)
    speed = codec_speed(CODEC, x, _segments(x.numel()), control.world_size, packet)
    return Measurements(
        (1,) * control.world_size,
        native=native_line(lambda tensor: dist.all_reduce(tensor), control, x.dtype),
        exchange=exchange_line(control, control),
        between=None,
        inside=None,
        links=(),
        codecs=merged([[speed]]),
        backward_seconds=0.0,
        contended=True,
        packet=packet,
    )


def _segments(numel: int) -> list[int]:
    return [numel - numel // 64, numel // 64]


def _timed(
    x: Tensor, control: ProcessGroupTransport, levels: dict[int, Levels], repeats: int
) -> dict[str, list[float]]:
    """Of every system the seconds of each repetition, on the slowest rank."""
    layout = BucketLayout.of(_NAMES, _segments(x.numel()), control.world_size)
    systems: dict[str, Callable[[], None]] = {"native": lambda: dist.all_reduce(x.clone())}

    def ours(name: str, reduce: Callable[[Compressor], None]) -> None:
        compressor = Compressor(Plan.of(2.0), _NAMES)
        compressor.meter.stepped(0.0)  # in steps of which errors and entropies are not sampled
        systems[name] = lambda: reduce(compressor)

    ours("flat", lambda compressor: all_reduce(x.clone(), layout, compressor, control))
    for size, found in levels.items():
        ours(
            f"groups of {size}",
            lambda compressor, found=found: grouped_all_reduce(x.clone(), layout, compressor, found),
        )
    own: dict[str, list[float]] = {name: [] for name in systems}
    for repetition in range(repeats + 1):
        for name, run in systems.items():
            dist.barrier()
            start = time.perf_counter()
            run()
            if repetition:
                own[name].append(time.perf_counter() - start)
    everyone = gather_json(own, control)
    return {
        name: [max(column) for column in zip(*(theirs[name] for theirs in everyone), strict=True)]
        for name in own
    }


def predicted(two: Measurements, hosts: int, contention: float, numel: int) -> dict[str, float]:
    """Seconds of an exchange by every system, on paper. contention: as a multiple of that of the two hosts."""
    found = extrapolated(two, hosts, contention)
    seconds = {one.bits: one.step_seconds for one in predict(found, Shapes((numel,)))}
    result = {"native": seconds["none"], "flat": seconds["2.0"]}
    for size in group_sizes(hosts):
        options = PlannerOptions(native=False, flat=False, groups=True, group_size=size)
        (one,) = predict(found, Shapes((numel,)), options=options)
        result[f"groups of {size}"] = one.step_seconds
    return result


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    hosts: Annotated[str, typer.Option(help="numbers of hosts; the first must be 2")] = "2,4,8",
    rates: Annotated[str, typer.Option(help="link speeds")] = "30mbit,100mbit",
    sizes: Annotated[str, typer.Option(help="values in the bucket")] = "65536,1048576",
    repeats: Annotated[int, typer.Option(help="timed exchanges of each kind", min=1)] = 9,
    quick: Annotated[bool, typer.Option(help="2 and 4 hosts, 100 Mbit/s, 3 repetitions")] = False,
    as_worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Times one bucket's all-reduce natively, flat and in groups, beside what the cost model predicts."""
    numels = [int(size) for size in sizes.split(",")]
    if as_worker:
        return worker(numels, repeats)
    if quick:
        hosts, rates, repeats = "2,4", "100mbit", 3
    rows = RowFile(out)
    for rate in rates.split(","):
        two, alone = None, 1.0
        for count in map(int, hosts.split(",")):
            measured = _emulated(count, rate, sizes, repeats)
            if two is None:
                two, alone = Measurements.from_json(measured["measurements"]), measured["contention"]
                _inputs(rows, rate, two)
            case = f"{count} hosts, {rate}"
            rows.add(Row(BENCH, case, "machine", "contention", measured["contention"], "x", False))
            for numel in numels:
                paper = predicted(two, count, measured["contention"] / alone, numel)
                _report(rows, f"{case}, {numel} values", measured["seconds"][str(numel)], paper)


def _emulated(hosts: int, rate: str, sizes: str, repeats: int) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.grouped",
        "--worker",
        "--sizes",
        sizes,
        "--repeats",
        str(repeats),
    ]
    with EmulatedNetwork(hosts=hosts, rate=rate) as network:
        result = network.run(command, environment={"OMP_NUM_THREADS": "1"}, timeout_seconds=400, quiet=True)
    if result.exit_code != 0:
        print("\n".join(result.output), file=sys.stderr)
        raise typer.Exit(result.exit_code)
    lines = [line for output in result.output for line in output.splitlines()]
    (found,) = [json.loads(line[line.index("{") :]) for line in lines if '{"contention"' in line]
    return found


def _inputs(rows: RowFile, rate: str, two: Measurements) -> None:
    """What predictions were made from."""
    (codec,), case = two.codecs, f"2 hosts, {rate}"
    lines: dict[str, Line] = {"native": two.native, "exchange": two.exchange}
    for name, line in lines.items():
        rows.add(Row(BENCH, case, name, "latency", 1e6 * line.latency_seconds, "us", False))
        rows.add(Row(BENCH, case, name, "bandwidth", 8e-6 * line.bytes_per_second, "Mbit/s", True))
    rows.add(Row(BENCH, case, CODEC, "encode", 4e-9 / codec.encode_seconds, "GB/s of fp32", True))
    rows.add(Row(BENCH, case, CODEC, "decode, add", 4e-9 / codec.decode_seconds, "GB/s of fp32", True))
    rows.add(Row(BENCH, case, CODEC, "bits a value", 8 * codec.bytes_per_value, "bits", False))
    rows.add(Row(BENCH, case, CODEC, "encode of a packet", 1e6 * two.packet.encode_seconds, "us", False))
    rows.add(Row(BENCH, case, CODEC, "decode of a packet", 1e6 * two.packet.decode_seconds, "us", False))
    rows.add(Row(BENCH, case, CODEC, "bytes of a packet", two.packet.num_bytes, "B", False))


def _report(rows: RowFile, case: str, seconds: dict[str, list[float]], paper: dict[str, float]) -> None:
    table = Table("all-reduce", "ms", "predicted", "predicted / measured", "least and most ms", title=case)
    for system, tries in seconds.items():
        name = "gloo, fp32" if system == "native" else f"{system}, 2.0 bits"
        median, guess = statistics.median(tries), paper[system]
        rows.add(Row(BENCH, case, name, "time of an exchange", 1e3 * median, "ms", False))
        rows.add(Row(BENCH, case, name, "predicted", 1e3 * guess, "ms", False))
        rows.add(Row(BENCH, case, name, "predicted / measured", guess / median, "x", False))
        table.add_row(
            name,
            f"{1e3 * median:.1f}",
            f"{1e3 * guess:.1f}",
            f"{guess / median:.2f}",
            f"{1e3 * min(tries):.1f} {1e3 * max(tries):.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
