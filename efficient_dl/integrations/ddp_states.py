"""Which of the saved states that a rank is given it goes on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from efficient_dl.comm import ProcessGroupTransport, handshake
from efficient_dl.errors import CheckpointError, EdlError


def own_state(states: Sequence[Mapping[str, Any]], control: ProcessGroupTransport) -> Mapping[str, Any]:
    """This rank's, or at another world size the first one. Raises CheckpointError for another rank's."""
    if not states:
        raise CheckpointError("no compression state was given", fix="pass this rank's state_dict()")
    rank = control.rank
    if states[0]["world_size"] != control.world_size:
        return states[0]
    own = states[rank] if len(states) > rank else states[0]
    if own["rank"] != rank:
        raise CheckpointError(
            f"rank {rank} was given the compression state of rank {own['rank']}",
            fix="save state_dict() on every rank, and load each rank's own",
        )
    return own


def own_of_the_same_run(
    states: Sequence[Mapping[str, Any]], control: ProcessGroupTransport
) -> Mapping[str, Any]:
    """`own_state`, if all ranks were given states of the same plan, step and number of ranks; all call it together.

    A rank that is refused alone, or goes on from another step, would leave the others waiting.
    """
    failure: EdlError | None = None
    facts: dict[str, Any] = {}
    own: Mapping[str, Any] = {}
    try:
        own = own_state(states, control)
        replanner = own.get("replanner") or {}
        facts = {
            "auto": str(replanner.get("chosen", [None])[-1]),
            "ranks": own["world_size"],
            "step": own["optimizer_steps"],
            "plan": str(own["compressor"]["plan"]),
        }
    except EdlError as error:
        failure = error
    handshake({"checkpoint": facts}, control, failure)
    return own


def are_of_all_ranks(states: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are all ranks' states, by rank. Raises CheckpointError for some of them."""
    count = states[0]["world_size"]
    complete = [one["rank"] for one in states] == list(range(count))
    if len(states) > 1 and not complete:
        raise CheckpointError(
            "the compression states are not those of all ranks, in order",
            expected=f"{count} states, of the ranks 0 to {count - 1}",
            found=f"ranks {', '.join(str(one['rank']) for one in states)}",
            fix="pass every old rank's state_dict()",
        )
    return complete
