"""Links that exist in numbers alone, for what "auto" decides; codecs are as fast as no machine's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from efficient_dl.comm.measurements import CodecSpeed, Line, Measurements
from efficient_dl.comm.routes import gradual
from efficient_dl.integrations import auto


def network(
    nodes: tuple[int, ...], megabits: float, backward: float = 0.05, family: str = "grid"
) -> Measurements:
    line = Line(1e-4, megabits * 1e6 / 8)
    local = Line(1e-5, 1e10) if nodes[0] > 1 else None
    codecs = tuple(
        CodecSpeed(name, 1e-10, 1e-10, size)
        for name, size in (("lossless", 3.0), (f"{family}:4.0", 0.51), (f"{family}:2.0", 0.26))
    )
    return Measurements(nodes, line, line, local and line, local, (), codecs, backward, contended=True)


@contextmanager
def measuring(found: Measurements) -> Iterator[None]:
    """What a start measures meanwhile: no test can rely on what the machine's own loopback interface is like."""
    probe = auto.probe

    def told(
        carrier: Any, native: Any, topology: Any, codecs: Sequence[str], *rest: Any, **_: Any
    ) -> Measurements:
        codecs_told = tuple(one for one in found.codecs if one.codec in codecs)
        # Where times of gradients were measured, here, they are as on no machine, too, and alike on all ranks.
        return replace(found, codecs=codecs_told, ready=gradual((1,) * len(rest[-1]), 1 / 3))

    auto.probe = told
    try:
        yield
    finally:
        auto.probe = probe
