"""How far does the one-shot exchange carry? The planner's predictions from 2 to 10,000 hosts, on paper.

python -m benchmarks.scaling --out benchmarks/results/scaling.jsonl --plot benchmarks/results/scaling.svg
python -m benchmarks.scaling --plot ... --measured benchmarks/results/grouped.jsonl        # and how well they hold
python -m benchmarks.scaling --plan plan.json           # codecs and backward as `edl probe --json plan.json` found them
Without --plan codecs, packets and backward are measured here, alone on this machine; links are imagined. The model of a
step is docs/planner.md's; what it leaves out is said there.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import matplotlib
import typer
from rich.console import Console
from rich.table import Table

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.rows import Row, RowFile
from efficient_dl.comm.codec_timing import codec_speed, packet_cost
from efficient_dl.comm.measurements import Line, Measurements, assumed_network, merged
from efficient_dl.comm.planner import PlannerOptions, Prediction, Shapes, plan_for
from efficient_dl.comm.probe import codecs_for, sample_gradient
from efficient_dl.comm.topology import group_sizes
from efficient_dl.config import Config, with_overrides
from efficient_dl.data import load_data
from efficient_dl.models import build_model
from efficient_dl.training.measure import compute
from efficient_dl.training.task import task_for

BENCH = "scaling"
HOSTS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 5000, 10_000)
_SHARDS = 2  # that codecs are timed on; what more of them cost is the packets'


def measured_here(model: str, batch: int) -> tuple[Measurements, Shapes]:
    """Codecs, packets and backward on this machine; a network to be replaced."""
    import torch

    torch.set_num_threads(1)
    settings = ["model.name=gpt", f"model.size={model}", "data.name=stdlib", f"data.batch_size={batch}"]
    config = with_overrides(Config(), settings)
    data = load_data(config.data, context=config.model.context, seed=0)
    network = build_model(config.model, data.spec, seed=0)
    loss = task_for(data.spec.kind).loss
    inputs, targets = data.train_batch(0, 0, 1, batch)
    alone = compute(network, torch.device("cpu"), lambda: loss(network(inputs), targets).backward())
    loss(network(inputs), targets).backward()
    named = dict(network.named_parameters())
    parameters = list(named.values())
    sample, segments = sample_gradient(parameters)
    names = codecs_for(2.0)
    packet = packet_cost(names[-1], sample)
    speeds = [codec_speed(name, sample, segments, _SHARDS, packet) for name in names]
    line = Line(0.0, 1.0)
    ready = tuple(alone.ready[name] for name in named)
    found = Measurements(
        (1, 1), line, line, None, None, (), merged([speeds]), alone.seconds, True, packet, ready=ready
    )
    return found, Shapes(tuple(p.numel() for p in parameters))


def predictions(
    found: Measurements, model: Shapes, rate: float, latency: float, hosts: int, workers: int
) -> tuple[Prediction, ...]:
    """Native, flat and hierarchical or, with one worker a host, in groups.

    rate: bytes per second of a host's link, latency: seconds of a message.
    """
    network = assumed_network(found, rate, hosts, workers, latency)
    flat = plan_for(network, model).predictions
    if network.between is not None:
        options = PlannerOptions(flat=False, hierarchy=True, native=False)
    elif group_sizes(hosts):
        options = PlannerOptions(flat=False, groups=True, native=False)
    else:
        return flat
    return (*flat, *plan_for(network, model, options=options).predictions)


def main(
    plan: Annotated[Path | None, typer.Option(help="what edl probe --json wrote", exists=True)] = None,
    rate: Annotated[float, typer.Option(help="Mbit/s of a host's link")] = 1000.0,
    latency: Annotated[float, typer.Option(help="µs of a message")] = 50.0,
    workers: Annotated[
        str, typer.Option(help="ranks on each host, which share its link; several: 1,8")
    ] = "1,8",
    size: Annotated[str, typer.Option(help="of the gpt that is measured without --plan")] = "base",
    batch: Annotated[int, typer.Option(help="sequences of 128 tokens on a rank", min=1)] = 4,
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw it: .svg, .png or .pdf")] = None,
    measured: Annotated[
        Path | None, typer.Option(help="draw the rows of benchmarks.grouped beside it", exists=True)
    ] = None,
) -> None:
    """Predicts a step's exposed communication for growing clusters."""
    if plan is not None:
        content = json.loads(plan.read_text())
        found = Measurements.from_json(content["measurements"])
        model = Shapes(tuple(content["values"]), content["itemsize"])
    else:
        found, model = measured_here(size, batch)
    found = replace(found, inside=None)  # imagined, too
    file = RowFile(out)
    all_curves: dict[str, Curves] = {}
    for count in map(int, workers.split(",")):
        network = f"{rate:g} Mbit/s, {latency:g} us, {count} rank{'s' * (count > 1)} a host"
        case = f"{model.numel / 1e6:.1f} M values, {network}"
        curves = all_curves[case] = _curves(found, model, rate, latency, count)
        for name, by_hosts in curves.items():
            for hosts, one in by_hosts.items():
                where = f"{case}, {hosts} hosts"
                file.add(Row(BENCH, where, name, "exposed_seconds", one.exposed_seconds, "s", False))
                if one.group_size:
                    file.add(Row(BENCH, where, name, "group_size", one.group_size, "ranks", False))
        _print(case, found, curves)
    if plot is not None:
        _draw(all_curves, measured, plot)


Curves = dict[str, dict[int, Prediction]]


def _curves(found: Measurements, model: Shapes, rate: float, latency: float, workers: int) -> Curves:
    curves: Curves = {}
    for hosts in HOSTS:
        for one in predictions(found, model, rate * 1e6 / 8, latency * 1e-6, hosts, workers):
            way = " between hosts" if one.hierarchy else " in groups" if one.group_size else ""
            name = "native" if one.bits == "none" else one.bits + way
            curves.setdefault(name, {})[hosts] = one
    return curves


def _print(case: str, found: Measurements, curves: Curves) -> None:
    cost = found.packet
    table = Table(
        title=f"Exposed milliseconds a step: {case}",
        caption=f"backward {1000 * found.backward_seconds:.0f} ms; a packet costs {1e6 * cost.encode_seconds:.0f} and "
        f"{1e6 * cost.decode_seconds:.0f} µs and {cost.num_bytes:.0f} bytes beside its values",
    )
    table.add_column("hosts", justify="right")
    for name in curves:
        table.add_column(name, justify="right")
    for hosts in HOSTS:
        cells = [
            f"{1000 * by_hosts[hosts].exposed_seconds:,.0f}" if hosts in by_hosts else ""
            for by_hosts in curves.values()
        ]
        table.add_row(f"{hosts:,}", *cells)
    Console(width=max(110, Console().width)).print(table)


_STYLES = {"between": "--", "groups": "-.", "native": "-"}


def _draw(all_curves: dict[str, Curves], measured: Path | None, out: Path) -> None:
    panels = len(all_curves) + (measured is not None)
    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 4), squeeze=False)
    for axis, (case, curves) in zip(axes[0], all_curves.items(), strict=False):
        for name, by_hosts in curves.items():
            style = next((style for word, style in _STYLES.items() if word in name), ":")
            axis.plot(list(by_hosts), [one.exposed_seconds for one in by_hosts.values()], style, label=name)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("hosts")
        axis.set_ylabel("exposed seconds a step, predicted")
        axis.set_title(case, fontsize=8)
        axis.legend(fontsize=7)
    if measured is not None:
        _draw_measured(axes[0][-1], measured)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def _draw_measured(axis: Axes, rows: Path) -> None:
    """Exchanges as predicted, against as measured; the band is 15 %."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        if row["bench"] == "grouped" and row["metric"] in ("time of an exchange", "predicted"):
            found.setdefault(row["metric"], {})[row["case"], row["system"]] = row["value"]
    times, guesses = found["time of an exchange"], found["predicted"]
    for hosts in dict.fromkeys(case.split(" ")[0] for case, _ in times):
        keys = [key for key in times if key[0].startswith(f"{hosts} hosts")]
        axis.plot(
            [times[key] for key in keys],
            [guesses[key] for key in keys],
            "o",
            label=f"{hosts} hosts",
            alpha=0.7,
        )
    ends = [min(times.values()), max(times.values())]
    axis.plot(ends, ends, "k-", linewidth=0.7)
    axis.fill_between(ends, [0.85 * end for end in ends], [1.15 * end for end in ends], color="k", alpha=0.1)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("ms of an exchange, measured on emulated hosts")
    axis.set_ylabel("ms, predicted")
    axis.set_title("gloo, flat and in groups at 2 bits; band: 15 %", fontsize=8)
    axis.legend(fontsize=7)


if __name__ == "__main__":
    typer.run(main)
