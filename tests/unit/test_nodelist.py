"""Slurm's lists of nodes as names."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path
from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_dl.errors import LaunchError
from efficient_dl.launching.nodelist import expand, first_node

# What `scontrol show hostnames` of Slurm 22.05 prints.
FROM_SCONTROL = {
    "a[1-3,05-07]b[1-2]": "a1b1 a1b2 a2b1 a2b2 a3b1 a3b2 a05b1 a05b2 a06b1 a06b2 a07b1 a07b2",
    "n[08-11],m,x-y[1]": "n08 n09 n10 n11 m x-y1",
    "a[8-011]": "a8 a9 a10 a11",
    "a[008-11]": "a008 a009 a010 a011",
    "a[1,1]": "a1 a1",
    "a,,b": "a b",
    " a , b": "a b",
    "a[01,1]": "a01 a1",
    "a[0-00]": "a0",
    "a[99-101]": "a99 a100 a101",
    "a[1-2][3-4]": "a13 a14 a23 a24",
    "a[0-1]b[0-1]c[0-1]": "a0b0c0 a0b0c1 a1b0c0 a1b0c1 a0b1c0 a0b1c1 a1b1c0 a1b1c1",
    "": "",
}
BROKEN = ["a[3-1]", "a[]", "a[x]", "a[1-2", "a[1,]", "a[[1]]", "a]1", "a[1-2-3]", "a[-1]"]


@pytest.mark.parametrize("nodelist", FROM_SCONTROL)
def test_lists_expand_as_by_scontrol(nodelist: str) -> None:
    assert " ".join(expand(nodelist)) == FROM_SCONTROL[nodelist]


@pytest.mark.parametrize("nodelist", BROKEN)
def test_broken_lists_are_an_error_that_shows_them(nodelist: str) -> None:
    with pytest.raises(LaunchError) as caught:
        list(expand(nodelist))
    assert repr(nodelist) in str(caught.value)


def test_the_first_node_of_a_huge_list_is_found_at_once() -> None:
    assert first_node("r[0-999999999999]n[01-64],z") == "r0n01"
    with pytest.raises(LaunchError, match="no name"):
        first_node(" ,")


Pieces: TypeAlias = list[
    tuple[str, list[tuple[int, int, int]] | None]
]  # word, then (low, more, width) of ranges

words = st.text("abcxyz-_", min_size=1, max_size=4).filter(lambda text: not text.startswith("-"))
ranges = st.lists(
    st.tuples(st.integers(0, 120), st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=3
)
entries = st.lists(st.tuples(words, st.none() | ranges), min_size=1, max_size=3)


def written(pieces: Pieces) -> tuple[str, list[str]]:
    """An entry as Slurm writes it, and its names by the plainest means."""
    text, columns, words = "", [], []
    for word, numbers in pieces:
        text += word
        words.append(word)
        if numbers is not None:
            text += (
                "[" + ",".join(f"{low:0{width}}-{low + more:0{width}}" for low, more, width in numbers) + "]"
            )
            words.append(None)
            columns.append(
                [
                    f"{one:0{max(width, len(str(low)))}}"
                    for low, more, width in numbers
                    for one in range(low, low + more + 1)
                ]
            )
    slowest_first = [*reversed(columns[:-1]), *columns[-1:]]
    names = []
    for row in itertools.product(*slowest_first):
        in_order = iter([*reversed(row[:-1]), *row[-1:]])
        names.append("".join(next(in_order) if word is None else word for word in words))
    return text, names


@given(st.lists(entries, min_size=1, max_size=3))
def test_any_list_expands_to_the_product_of_its_ranges(
    pieces: list[Pieces],
) -> None:
    both = [written(one) for one in pieces]
    assert list(expand(",".join(text for text, _ in both))) == [name for _, names in both for name in names]


def plain(pieces: Pieces) -> Pieces:
    """What Slurm 22.05 expands right: two brackets at most, nothing after the second, numbers of one width in each."""
    first = [(word, numbers and [(low, more, 2) for low, more, _ in numbers]) for word, numbers in pieces[:1]]
    return [*first, ("x", [(1, 2, 2)])]


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="this machine lacks scontrol")
@settings(max_examples=40)
@given(pieces=st.lists(entries.map(plain), min_size=1, max_size=2))
def test_scontrol_agrees(tmp_path_factory: pytest.TempPathFactory, pieces: list[Pieces]) -> None:
    conf = Path(tmp_path_factory.getbasetemp()) / "slurm.conf"
    conf.write_text("ClusterName=x\nSlurmctldHost=localhost\nNodeName=n1 CPUs=1\nPartitionName=p Nodes=n1\n")
    text = ",".join(written(one)[0] for one in pieces)
    shown = subprocess.run(
        ["scontrol", "show", "hostnames", text],
        env={**os.environ, "SLURM_CONF": str(conf)}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.split() == list(expand(text))
