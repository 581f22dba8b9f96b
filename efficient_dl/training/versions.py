"""What must be the same program on all ranks, compared before anything of it is relied upon."""

from __future__ import annotations

from pathlib import Path

import torch
import xxhash

from efficient_dl.errors import PlanMismatch

_PACKAGE = Path(__file__).parents[1]


def versions() -> dict[str, str]:
    """Of torch, and a hash of this package's Python files: two checkouts rarely have two version numbers."""
    digest = xxhash.xxh3_64()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(_PACKAGE)).encode())
        digest.update(path.read_bytes())
    return {"efficient_dl": digest.hexdigest(), "torch": torch.__version__.partition("+")[0]}


def check_versions(per_rank: list[dict[str, str]]) -> None:
    """Raise PlanMismatch unless all ranks' `versions` are the same."""
    for rank, theirs in enumerate(per_rank):
        differing = [key for key in per_rank[0] if theirs.get(key) != per_rank[0][key]]
        if differing:
            lines = [f"{key} = {theirs.get(key)}, {per_rank[0][key]}" for key in differing]
            raise PlanMismatch(
                f"rank {rank} runs another version than rank 0",
                differs="; ".join(lines) + f" (rank {rank}, rank 0; of efficient_dl a hash of its files)",
                fix="install the same version on every host",
            )
