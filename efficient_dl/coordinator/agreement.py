"""Whether all ranks state the same facts, each of which a rank may also not know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from efficient_dl.coordinator.wording import counted
from efficient_dl.errors import PlanMismatch


def require_agreement(stated: Sequence[Mapping[str, Any]]) -> None:
    """stated: by rank. A rank that lacks a key agrees with whatever others say of it.

    Raises PlanMismatch that names the first difference, and all ranks that state something else than the first one
    that states it.
    """
    differing: dict[str, tuple[int, list[int]]] = {}
    for key in dict.fromkeys(key for facts in stated for key in facts):
        knowing = [rank for rank, facts in enumerate(stated) if key in facts]
        others = [rank for rank in knowing if stated[rank][key] != stated[knowing[0]][key]]
        if others:
            differing[key] = (knowing[0], others)
    if not differing:
        return
    key, (first, others) = next(iter(differing.items()))
    everyone = sorted({rank for _, ranks in differing.values() for rank in ranks})
    more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    raise PlanMismatch(
        f"{counted('rank', others)} would plan from other facts than rank {first}",
        differs=f"{key} = {stated[others[0]][key]} (rank {others[0]}), {stated[first][key]} (rank {first}){more}",
        where=f"different: {counted('rank', everyone)}, of {len(stated)} ranks",
        fix="start every rank with the same code, model, options and checkpoint",
    )
