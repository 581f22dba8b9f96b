"""During the run: all ranks compare their parameters, bit by bit, and stop loudly if they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import xxhash
from torch import Tensor

from efficient_dl.comm.transport import Transport
from efficient_dl.errors import RanksDiverged


def check_equal(
    parameters: Mapping[str, Tensor], transport: Transport, step: int, notes: Sequence[int] = ()
) -> list[list[int]]:
    """Raises RanksDiverged on every rank unless all ranks hold the same bits in every parameter.

    It sends 8 bytes a parameter and a note to every rank, and reads every parameter once (from a GPU: copies it to the
    host).

    notes: what this rank tells the others on the way, as many int64 on every rank. Returns all ranks' notes, by rank.
    """
    hashes = torch.tensor([*(_hash(p) for p in parameters.values()), *notes], dtype=torch.int64)
    packet = hashes.view(torch.uint8).to(transport.device)
    received = [message.cpu().view(torch.int64) for message in transport.gather(packet).wait()]
    everyone = [theirs[: len(parameters)] for theirs in received]
    differing = [rank for rank, theirs in enumerate(everyone) if not torch.equal(theirs, everyone[0])]
    if not differing:
        return [[int(note) for note in theirs[len(parameters) :]] for theirs in received]
    names = [
        name
        for position, name in enumerate(parameters)
        if any(theirs[position] != everyone[0][position] for theirs in everyone)
    ]
    raise RanksDiverged(
        f"parameters differ between ranks after step {step}",
        differs=f"rank{'s' if len(differing) > 1 else ''} {', '.join(map(str, differing))} from rank 0",
        where=f"first in {names[0]!r}; in {len(names)} of {len(parameters)} parameters",
        fix="go back to the last checkpoint; look for updates that one rank makes alone, or for faulty memory",
    )


def _hash(parameter: Tensor) -> int:
    """64 bits of the parameter's bytes, as a signed integer."""
    content = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return int.from_bytes(xxhash.xxh3_64_digest(content), "little", signed=True)
