"""How far are packets of real gradients from what their model and the entropy allow?

python -m benchmarks.coding_loss --out benchmarks/results/coding_loss.jsonl
Trains a GPT in one process, takes its whole gradient at the start, in the middle and at the end, and cuts it into the
shards that the ranks of a job would send.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rows import Row, RowFile
from efficient_dl.codec import PacketStats, make_codec
from efficient_dl.comm import BucketLayout
from efficient_dl.config import Config, with_overrides
from efficient_dl.data import load_data
from efficient_dl.models import build_model

BENCH = "coding_loss"


def gradients(config: Config, steps: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Flat gradients by the moment they were taken at, and the parameters' names and lengths, in order."""
    data = load_data(config.data, context=config.model.context, seed=config.train.seed)
    model = build_model(config.model, data.spec, config.train.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, betas=config.optimizer.betas)
    numels = {name: p.numel() for name, p in model.named_parameters()}
    moments = {1: "start", steps // 2: "middle", steps: "end"}
    taken: dict[str, Tensor] = {}
    with typer.progressbar(range(1, steps + 1), label=f"train {config.model.size}") as bar:
        for step in bar:
            inputs, targets = data.train_batch(step - 1, 0, 1, config.data.batch_size, 1, 0)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
            if step in moments:
                taken[moments[step]] = torch.cat(
                    [p.grad.flatten() for p in model.parameters() if p.grad is not None]
                )
            optimizer.step()
    return taken, numels


def measure(flat: Tensor, numels: dict[str, int], spec: str, ranks: int) -> PacketStats:
    """The packets of all shards of a gradient, added up."""
    codec = make_codec(spec, checksum=False)
    layout = BucketLayout.of(tuple(numels), tuple(numels.values()), ranks)
    total = PacketStats()
    for shard in layout.shards:
        stats = PacketStats()
        codec.encode(flat[shard.start : shard.stop], shard.side, stats)
        for name in (
            "numel",
            "order0_bits",
            "model_bits",
            "scale_bits",
            "header_bits",
            "packet_bytes",
            "escapes",
        ):
            setattr(total, name, getattr(total, name) + getattr(stats, name))
    return total


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    size: Annotated[str, typer.Option(help="the GPT's size")] = "micro",
    steps: Annotated[int, typer.Option(help="training steps", min=4)] = 200,
    ranks: Annotated[int, typer.Option(help="shards that the gradient is cut into", min=1)] = 2,
    quick: Annotated[bool, typer.Option(help="a tiny model, seconds")] = False,
) -> None:
    """Packet sizes of real gradients against model_bits + scales + headers, and against the order-0 entropy."""
    if quick:
        size, steps = "nano", 10
    taken, numels = gradients(with_overrides(Config(), [f"model.size={size}"]), steps)
    file = RowFile(out)
    table = Table(title=f"gpt-{size}, {sum(numels.values()):,} values, {ranks} shards")
    for name in (
        "gradient",
        "codec",
        "bits/value",
        "model",
        "order 0",
        "scales",
        "headers",
        "coding loss",
        "ratio",
    ):
        table.add_column(name, justify="right")
    for moment, flat in taken.items():
        for spec in ("lossless", "bits:1.0", "bits:2.0", "bits:4.0"):
            s = measure(flat, numels, spec, ranks)
            bits = 8.0 * s.packet_bytes
            loss = bits / (s.model_bits + s.scale_bits + s.header_bits) - 1
            case = f"gpt-{size} gradient, {moment} of {steps} steps, {ranks} shards, {spec}"
            for metric, value, unit in (
                ("bits_per_value", bits / s.numel, "bits"),
                ("model_bits_per_value", s.model_bits / s.numel, "bits"),
                ("order0_bits_per_value", s.order0_bits / s.numel, "bits"),
                ("coding_loss", loss, "fraction over model_bits + scales + headers"),
            ):
                file.add(Row(BENCH, case, "efficient_dl", metric, value, unit, False))
            each = [x / s.numel for x in (bits, s.model_bits, s.order0_bits, s.scale_bits, s.header_bits)]
            row = [f"{x:.3f}" for x in each] + [f"{100 * loss:.2f} %", f"{32 / each[0]:.2f}"]
            table.add_row(moment, spec, *row)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
