"""How indices, bytes and seconds are said in reasons and errors."""

from __future__ import annotations

from collections.abc import Sequence


def indices_text(indices: Sequence[int]) -> str:
    """ "0–3, 6" for 0, 1, 2, 3, 6."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def counted(noun: str, indices: Sequence[int]) -> str:
    """ "rank 1", "ranks 0–3, 6" """
    return f"{noun}{'' if len(indices) == 1 else 's'} {indices_text(indices)}"


def size_text(num_bytes: float) -> str:
    """ "1.50 GB" """
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} bytes" if unit == "bytes" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} GB"


def time_text(seconds: float) -> str:
    """ "1.2 s", "240 ms" """
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
