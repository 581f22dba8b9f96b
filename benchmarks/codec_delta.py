"""Case delta: exact differences of bfloat16 weights to what the receiver has, beside what is sent today."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import typer
from rich.table import Table
from torch import Tensor

from benchmarks.codec_peers import INSTALL, byte_view, load
from benchmarks.codec_run import MIB, OURS, SPEED_COLUMNS, Run, our_codec, speed_table
from benchmarks.codec_tensors import Delta
from benchmarks.codec_timing import Ours, System, check_exact, measure
from efficient_dl.codec import Side

DENSITIES = (0.001, 0.01, 0.024, 0.1, 1.0)
GAP_BITS, VALUE_BITS = 16, 16


class XorZstd:
    """XOR with the reference, then zstandard on the bytes; the XOR is part of both times, in kept memory."""

    def __init__(self, pair: Delta, level: int) -> None:
        zstandard = load("zstandard")
        self.name = f"xor + zstd -{level}"
        self._compressor = zstandard.ZstdCompressor(level=level)
        self._decompressor = zstandard.ZstdDecompressor()
        self._before, self._after = (
            byte_view(x).view(np.uint64 if x.nbytes % 8 == 0 else np.uint8) for x in (pair.before, pair.after)
        )
        self._room = np.zeros_like(self._before)
        self._packet = b""

    def prepare(self) -> None:
        """Nothing."""

    def encode(self) -> None:
        """See System."""
        np.bitwise_xor(self._before, self._after, out=self._room)
        self._packet = self._compressor.compress(self._room)

    def decode(self) -> None:
        """See System."""
        content = self._decompressor.decompress(self._packet)
        np.bitwise_xor(self._before, np.frombuffer(content, dtype=self._before.dtype), out=self._room)

    def packet_bytes(self) -> int:
        """See System."""
        return len(self._packet)

    def decoded(self) -> Tensor:
        """See System."""
        self.decode()
        return torch.from_numpy(self._room.view(np.uint8).copy()).view(torch.bfloat16)


class OurDelta(Ours):
    """Our codec with a new Side for each call, as after each step: the reference's fingerprint is part of the times."""

    def __init__(self, pair: Delta) -> None:
        super().__init__(OURS, our_codec("delta"), pair.after)
        self._pair = pair

    def encode(self) -> None:
        """See System."""
        self._side = self._new_side()
        super().encode()

    def decode(self) -> None:
        """See System."""
        self._side = self._new_side()
        super().decode()

    def _new_side(self) -> Side:
        return Side(segments=self._pair.segments, reference=self._pair.before)


def delta(run: Run) -> None:
    """One optimizer step of the two models, then updates of given densities."""
    numel = MIB if run.quick else 16 * MIB
    makers: list[Callable[[], Delta]] = []
    for model in ("gpt", "cnn"):
        makers += [lambda m=model, when=when: run.trained.delta(m, when) for when in run.moments]
    makers += [lambda d=density: run.trained.delta_of_density(d, numel) for density in DENSITIES]
    columns = ("changed", "bits/value", "bits/changed", "dense / its")
    table = speed_table("exact weight deltas, bf16, one core", *columns)
    with typer.progressbar(makers, label="delta") as bar:
        for make in bar:
            _measure(run, make(), table)
            table.add_section()
    run.console.print(table)
    run.console.print(
        "dense: the packet of the codec `lossless` for the new weights; coo: 16-bit gap and 16-bit value of each "
        "changed weight, as many gaps of 65,535 as longer ones need, counted and not coded."
    )


def coo_bits(changed: Tensor) -> int:
    """Bits of (gap, value) pairs for the true places of a flat bool tensor.

    A gap of 65,535 or more takes, for every 65,535 in it, one more pair that changes nothing.
    """
    places = torch.nonzero(changed).flatten()
    gaps = torch.diff(places, prepend=torch.tensor([-1])) - 1
    pairs = places.numel() + int((gaps // (2**GAP_BITS - 1)).sum())
    return pairs * (GAP_BITS + VALUE_BITS)


def _measure(run: Run, pair: Delta, table: Table) -> None:
    case = f"delta, {pair.name}"
    num_changed, numel = int(pair.changed.sum()), pair.after.numel()
    run.row(case, "the weights themselves", "changed", num_changed / numel, "share of the values", False)
    dense = our_codec("lossless").encode(pair.after, Side(segments=pair.segments)).numel()
    systems = _systems(run, pair)
    for system in systems:
        check_exact(system, pair.after)
    cells = run.speeds(case, pair.after.nbytes, measure(systems, run.rounds), systems)
    packets = [(system.name, system.packet_bytes()) for system in systems]
    packets += [("coo 16 + 16 bits", -(-coo_bits(pair.changed) // 8)), ("dense lossless", dense)]
    for i, (name, num_bytes) in enumerate(packets):
        per_value, per_changed = 8 * num_bytes / numel, 8 * num_bytes / max(1, num_changed)
        run.row(case, name, "bits_per_value", per_value, "bits", False)
        run.row(case, name, "bits_per_changed_value", per_changed, "bits", False)
        run.row(case, name, "dense_over_delta", dense / num_bytes, "bytes of lossless / bytes", True)
        table.add_row(
            pair.name if i == 0 else "",
            name,
            f"{100 * num_changed / numel:.2f} %",
            f"{per_value:.4f}",
            f"{per_changed:.2f}",
            f"{dense / num_bytes:.2f}",
            *cells.get(name, [""] * len(SPEED_COLUMNS)),
        )


def _systems(run: Run, pair: Delta) -> list[System]:
    systems: list[System] = [OurDelta(pair)]
    try:
        systems += [XorZstd(pair, level) for level in (1, 3)]
    except ImportError as error:
        run.say(f"missing peer: zstd: {error}; {INSTALL}")
    return systems
