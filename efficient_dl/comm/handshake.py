"""Before the first collective: all ranks compare what they are about to do, and stop if it differs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from efficient_dl.comm.transport import Transport
from efficient_dl.errors import EdlError, PlanMismatch

_ABSENT = "absent"
_FIX = "start every rank with the same code, configuration and data"


def gather_json(value: Any, transport: Transport) -> list[Any]:
    """Every rank's value, by rank, on every rank. Values are what JSON can hold."""
    text = bytearray(json.dumps(value).encode())
    packet = torch.frombuffer(text, dtype=torch.uint8).to(transport.device)
    return [json.loads(_bytes(received)) for received in transport.gather(packet).wait()]


def handshake(facts: Mapping[str, Any], transport: Transport, failure: EdlError | None = None) -> None:
    """Raises PlanMismatch on every rank unless all ranks give the same facts.

    facts: nested mappings of JSON values; a difference is named by its dotted path, both values and their ranks.
    failure: why this rank cannot start; it is raised here, and the others learn of it instead of waiting.
    """
    own = {"failure": f"{type(failure).__name__}: {failure.problem}"} if failure else {"facts": _flat(facts)}
    everyone: list[dict[str, Any]] = gather_json(own, transport)
    if failure:
        raise failure
    for rank, theirs in enumerate(everyone):
        if "failure" in theirs:
            raise PlanMismatch(
                f"rank {rank} cannot start: {theirs['failure']}", fix=f"see rank {rank}'s own message"
            )
    first: dict[str, Any] = everyone[0]["facts"]
    differing = [rank for rank, theirs in enumerate(everyone) if theirs["facts"] != first]
    if differing:
        rank = differing[0]
        raise PlanMismatch(
            f"rank {rank} is set up differently from rank 0",
            differs=_first_difference(first, everyone[rank]["facts"], rank),
            where=f"different from rank 0: {_listed(differing)}, of {len(everyone)} ranks",
            fix=_FIX,
        )


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")  # pyright: ignore[reportUnknownArgumentType]
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _first_difference(first: dict[str, Any], other: dict[str, Any], rank: int) -> str:
    keys = [key for key in {**first, **other} if first.get(key, _ABSENT) != other.get(key, _ABSENT)]
    key = keys[0]
    more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
    return f"{key} = {other.get(key, _ABSENT)} (rank {rank}), {first.get(key, _ABSENT)} (rank 0){more}"


def _listed(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _bytes(packet: Tensor) -> bytes:
    return packet.cpu().numpy().tobytes()
