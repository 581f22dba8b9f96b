"""Slurm's compressed lists of nodes, "gpu[01-03,7],login", as names."""

from __future__ import annotations

import re
from collections.abc import Iterator

from efficient_dl.errors import LaunchError

_PART = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def expand(nodelist: str) -> Iterator[str]:
    """The names one by one, in Slurm's order; repeated ones as often as named.

    The last bracket turns fastest, of the others the first one does.

    A number is padded with zeros to the length of its range's first. Raises LaunchError, when it comes to the broken
    part. Source: Slurm's src/common/hostlist.c; the same as `scontrol show hostnames`, without Slurm's configuration.
    """
    for entry in _entries(nodelist):
        yield from _combined(entry, nodelist)


def first_node(nodelist: str) -> str:
    """The first name; raises LaunchError where there is none. Nothing else is expanded."""
    for name in expand(nodelist):
        return name
    raise _broken(nodelist, "no name")


def _entries(nodelist: str) -> Iterator[str]:
    """What the commas outside of brackets separate, without the blanks around it."""
    depth, start = 0, 0
    for position, letter in enumerate(nodelist + ","):
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            raise _broken(nodelist, f"{letter!r} at position {position}")
        if letter == "," and depth == 0:
            if entry := nodelist[start:position].strip():
                yield entry
            start = position + 1
    if depth:
        raise _broken(nodelist, "'[' without ']'")


def _combined(entry: str, nodelist: str) -> Iterator[str]:
    parts = [(match[1], match[2]) for match in _PART.finditer(entry)]
    brackets = [place for place, (ranges, _) in enumerate(parts) if ranges is not None]
    return _filled(parts, [*reversed(brackets[:-1]), *brackets[-1:]], nodelist)


def _filled(parts: list[tuple[str | None, str]], brackets: list[int], nodelist: str) -> Iterator[str]:
    """brackets: the places in `parts` that still hold ranges, the slowest first."""
    if not brackets:
        yield "".join(text for _, text in parts)
        return
    place, *rest = brackets
    ranges = parts[place][0]
    assert ranges is not None
    for number in _numbers(ranges, nodelist):
        yield from _filled([*parts[:place], (None, number), *parts[place + 1 :]], rest, nodelist)


def _numbers(ranges: str, nodelist: str) -> Iterator[str]:
    for one in ranges.split(","):
        match = _RANGE.fullmatch(one)
        low, high = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(low) > int(high):
            raise _broken(nodelist, f"the range {one!r}")
        for number in range(int(low), int(high) + 1):
            yield str(number).zfill(len(low))


def _broken(nodelist: str, found: str) -> LaunchError:
    return LaunchError(
        "this is no list of Slurm's nodes",
        expected="names and ranges, as in gpu[01-03,7],login",
        found=f"{found} in {nodelist!r}",
        where="SLURM_STEP_NODELIST or SLURM_JOB_NODELIST",
        fix="leave Slurm's variables as srun sets them, or set MASTER_ADDR to the first node's name",
    )
