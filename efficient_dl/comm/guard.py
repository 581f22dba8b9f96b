"""During the run: all ranks compare their parameters, bit by bit, and stop loudly if they differ."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor

from efficient_dl.comm.transport import Transport
from efficient_dl.errors import RanksDiverged


def check_equal(
    parameters: Mapping[str, Tensor], transport: Transport, step: int, flag: bool = False
) -> list[bool]:
    """Raises RanksDiverged on every rank unless all ranks hold the same bits in every parameter.

    It sends 8 bytes a parameter, and 8 for the flag, to every rank, and reads every parameter once (from a GPU: copies
    it to the host).

    flag: what this rank tells the others on the way. Returns the flags of all ranks, by rank.
    """
    hashes = torch.tensor([*(_hash(p) for p in parameters.values()), int(flag)], dtype=torch.int64)
    packet = hashes.view(torch.uint8).to(transport.device)
    received = [message.cpu().view(torch.int64) for message in transport.gather(packet).wait()]
    everyone = [theirs[:-1] for theirs in received]
    differing = [rank for rank, theirs in enumerate(everyone) if not torch.equal(theirs, everyone[0])]
    if not differing:
        return [bool(theirs[-1]) for theirs in received]
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
