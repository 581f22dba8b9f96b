"""Case loss: how many bits packets have beyond what their model, or the entropy of their symbols, allows.

coding_loss.py asks the same of whole gradients as ranks send them; here packets have given sizes, and tensors of
1 KiB come last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import typer
from rich.table import Table
from torch import Tensor

from benchmarks.codec_run import OURS, Run, our_codec
from benchmarks.codec_tensors import NamedTensor
from efficient_dl.codec import Codec, PacketStats

SPECS = ("bits:0.5", "bits:1.0", "bits:2.0", "bits:4.0", "lossless")
PACKET_KIB = (1024, 64)
SMALL_BYTES = 1024
MAX_SMALL = 256  # tensors of SMALL_BYTES, spread over the gradient


@dataclass(frozen=True)
class Loss:
    """Bits of a packet beyond an ideal, as a fraction of it; scales count to the ideal, headers and tables do not."""

    over_model: float
    over_order0: float

    @staticmethod
    def of(stats: PacketStats) -> Loss:
        """The loss of one packet."""
        bits = 8.0 * stats.packet_bytes
        return Loss(
            bits / (stats.model_bits + stats.scale_bits) - 1,
            bits / (stats.order0_bits + stats.scale_bits) - 1,
        )


def loss(run: Run) -> None:
    """Packets of 1 MiB and 64 KiB, then tensors of 1 KiB."""
    packets = Table(title="bits beyond the ideal, scales included in both")
    small = Table(title=f"packets of tensors of {SMALL_BYTES} bytes: growth in bytes over the raw tensor")
    for name in ("tensor", "codec", "packet bytes", "bits/value", "over model", "over order 0"):
        packets.add_column(name, justify="left" if name in ("tensor", "codec") else "right")
    for name in ("tensor", "codec", "mean", "largest", "share that grows"):
        small.add_column(name, justify="left" if name in ("tensor", "codec") else "right")
    gradients = [run.trained.gradient("gpt", "stream"), run.trained.gradient("cnn", "end")]
    tensors = [
        gradients[0],
        gradients[1],
        *(one.to(torch.bfloat16) for one in gradients),
        run.trained.weight("gpt", "end").to(torch.bfloat16),
    ]
    with typer.progressbar(tensors, label="loss") as bar:
        for tensor in bar:
            _packets_of(run, tensor, packets)
            _small(run, tensor.name, _spread(tensor.values), small)
    _small(run, "random bits, fp32", _random_bits(), small)
    run.console.print(packets)
    run.console.print(small)


def _packets_of(run: Run, tensor: NamedTensor, table: Table) -> None:
    too_short = list[str]()
    for spec in SPECS:
        codec = our_codec(spec)
        whole = PacketStats()
        codec.encode(tensor.values, tensor.side, whole)
        for kib in PACKET_KIB:
            # As many values as should give that packet; real ones only, so a short tensor has no large packet.
            numel = round(kib * 1024 * whole.numel / whole.packet_bytes)
            if numel > tensor.values.numel():
                too_short.append(f"{kib} KiB at {spec}")
                continue
            part = tensor.first(numel)
            stats = PacketStats()
            codec.encode(part.values, part.side, stats)
            found = Loss.of(stats)
            case = f"loss, {tensor.name}, {spec}, packet of about {kib} KiB"
            unit = "fraction of the ideal bits, scales included"
            run.row(case, OURS, "packet_bytes", stats.packet_bytes, "bytes", False)
            run.row(case, OURS, "loss_over_model", found.over_model, unit, False)
            run.row(case, OURS, "loss_over_order0", found.over_order0, unit, False)
            bits = f"{8 * stats.packet_bytes / stats.numel:.3f}"
            losses = (f"{100 * found.over_model:.2f} %", f"{100 * found.over_order0:.2f} %")
            table.add_row(tensor.name, spec, f"{stats.packet_bytes:,}", bits, *losses)
    table.add_section()
    if too_short:
        run.say(f"{tensor.name} is too short for a packet of {', '.join(too_short)}")


def _small(run: Run, name: str, tensors: list[Tensor], table: Table) -> None:
    for spec in SPECS:
        codec = our_codec(spec)
        growths = [_growth(codec, tensor) for tensor in tensors]
        mean, grown = sum(growths) / len(growths), sum(g > 0 for g in growths) / len(growths)
        case = f"loss, {name}, {spec}, tensors of {SMALL_BYTES} bytes"
        for metric, value in (("mean_growth", mean), ("largest_growth", max(growths))):
            run.row(case, OURS, metric, value, "bytes over the raw tensor", False)
        table.add_row(name, spec, f"{mean:+.0f}", f"{max(growths):+d}", f"{100 * grown:.0f} %")
    table.add_section()


def _growth(codec: Codec, tensor: Tensor) -> int:
    return codec.encode(tensor).numel() - tensor.numel() * tensor.element_size()


def _spread(values: Tensor) -> list[Tensor]:
    numel = SMALL_BYTES // values.element_size()
    parts = values[: values.numel() // numel * numel].view(-1, numel)
    return list(parts[:: max(1, len(parts) // MAX_SMALL)])


def _random_bits() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (MAX_SMALL, SMALL_BYTES // 4)
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64)
    return list(bits.to(torch.int32).view(torch.float32))
