"""Error feedback: what lossy packets left out, kept by parameter name until the next packet takes it along.

Every rank holds one float32 residual for each value: of its own contribution where another rank owns the shard, of
the result where it is the owner itself (times the number of ranks when results are averages, so that the mean over
ranks of all residuals is what the parameters still lack). Source: Seide et al. 2014, 1-bit SGD; Karimireddy et al.
2019 (1901.09847); both directions: Tang et al. 2019, DoubleSqueeze (1905.05957).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from efficient_dl.comm.layout import Shard
from efficient_dl.comm.sections import Section
from efficient_dl.errors import CheckpointError


class Residuals:
    """The residuals of one rank, in units of the scaled loss; they change only when the optimizer has stepped.

    numels: values of each parameter. device: where they live. Takes 4 bytes a value, 8 from the first step on, 12 where
    a step has several synchronized backward passes.

    A step is: `begin`, then `take` and `give` for each packet, then `commit`. Where `commit` did not come, the step was
    either skipped by a GradScaler, whose scale has then fallen: it is forgotten, as if it had not run. Or it was one of
    several synchronized backward passes before one optimizer step: the next one goes on from it.
    """

    def __init__(self, numels: Mapping[str, int], device: torch.device) -> None:
        self._numels = dict(numels)
        self._device = device
        self._committed: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}  # what was committed before the first of this step's passes
        self._before_scale = 1.0
        self._spare: dict[str, Tensor] = {}
        self._written: set[str] = set()
        self._committed_scale = 1.0
        self._scale = 1.0
        self.draining = False
        self._drained: set[str] = set()
        self._sent: set[str] = set()  # drained in an earlier backward pass of this step
        self._waiting: set[str] = set()  # what is drained by itself, and was not yet
        self._lock = threading.Lock()

    def begin(self, scale: float = 1.0) -> None:
        """Starts a step whose gradients are scaled by `scale` (of a GradScaler)."""
        if scale < self._scale:
            self.discard()  # skipped
        self._sent |= self._drained  # they count when the optimizer has stepped, and go out once until then
        self._drained.clear()
        self._go_on()
        self._scale = scale

    def take(self, section: Section, units: float, out: Tensor) -> None:
        """Copies the residuals of a section's values into out, float32, in the units of the values to encode.

        units: residuals are kept times this: 1 for contributions, the number of ranks for their average.
        """
        factor = self._scale / self._committed_scale / units
        parts = out.split_with_sizes(section.segments)
        for name, offset, part in zip(section.names, section.offsets, parts, strict=True):
            torch.mul(self._part(self._committed, name, offset, part.numel()), factor, out=part)

    def give(self, section: Section, residual: Tensor, units: float) -> None:
        """Keeps what a section's packet left out."""
        parts = residual.split_with_sizes(section.segments)
        for name, offset, part in zip(section.names, section.offsets, parts, strict=True):
            torch.mul(part, units, out=self._part(self._pending, name, offset, part.numel()))
        with self._lock:
            self._written.update(section.names)

    def start_draining(
        self,
        each: bool = False,
        keep: Callable[[str], bool] = lambda name: False,
        names: Iterable[str] | None = None,
    ) -> None:
        """From the next step on no packet takes residuals along: `drain` is to put them into gradients instead.

        It ends by itself with the first step that drained and was committed; then nothing is kept. each: for every
        parameter by itself of which something is kept, where not all have gradients in every step (see `waits`), and
        without those that packets still take along, as keep(name) says. names: of which any rank keeps something;
        None: this one.
        """
        kept = self.kept if names is None else names
        self._waiting = {name for name in kept if not keep(name)} if each else set()
        self.draining = bool(self._waiting) or not each

    @property
    def kept(self) -> list[str]:
        """The parameters of which something may be kept."""
        with self._lock:
            return list(self._committed)

    def waits(self, names: Iterable[str]) -> bool:
        """Whether any of these parameters is to be drained by itself; the same on ranks with the same names."""
        return not self._waiting.isdisjoint(names)

    def drain(self, name: str, x: Tensor) -> None:
        """Adds what is kept of a parameter to x, its 1-D gradient on this rank, which then goes out uncompressed.

        The mean over ranks of what they add is what the parameter still lacks: nothing is lost but the rounding of one
        addition in x's dtype. As with packets it counts once the optimizer has stepped.
        """
        kept = self._to_drain(name)
        if kept is not None:
            factor = self._scale / self._committed_scale
            x.add_((kept * factor if factor != 1.0 else kept).to(x.dtype))

    def drain_shard(self, shard: Shard, x: Tensor) -> None:
        """The same for the values of a shard, x, 1-D; every shard of its parameters must follow in the same step."""
        factor = self._scale / self._committed_scale
        for name, offset, part in zip(
            shard.names, shard.offsets, x.split_with_sizes(shard.segments), strict=True
        ):
            kept = self._to_drain(name)
            if kept is not None:
                values = kept[offset : offset + part.numel()]
                part.add_((values * factor if factor != 1.0 else values).to(part.dtype))

    def _to_drain(self, name: str) -> Tensor | None:
        """What is kept of a parameter, once in a step."""
        self._drained.add(name)
        return None if name in self._sent else self._committed.get(name)

    def commit(self) -> None:
        """Makes the step's residuals those of the next; in a step without packets, does nothing."""
        if drained := self._drained | self._sent:
            with self._lock:
                for name in drained:
                    self._committed.pop(name, None)
                    self._pending.pop(name, None)
            self._waiting -= drained
            self._drained.clear()
            self._sent.clear()
            self.draining = bool(self._waiting)
        self._swap()
        self._spare |= self._before
        self._before.clear()

    def unapplied(self, names: Iterable[str]) -> None:
        """Of these parameters what was sent in this step changed nothing, as no rank has used them: they keep what they
        had, whatever its passes left. To be called before `commit`."""
        unused = set(names)
        with self._lock:
            factor = self._committed_scale / self._before_scale
            for name in unused & self._before.keys():
                self._spare[name], self._committed[name] = self._committed[name], self._before.pop(name)
                if factor != 1.0:
                    self._committed[name].mul_(factor)
        self._written -= unused
        self._drained -= unused

    def _go_on(self) -> None:
        """Another pass of the same step takes along what the last one left; what was committed may be needed again."""
        if not self._written:
            return
        if not self._before:
            self._before_scale = self._committed_scale
        fresh = self._written - self._before.keys()
        self._swap()
        with self._lock:
            for name in fresh:
                before = self._before[name] = self._pending[name]
                spare = self._spare.pop(name, None)
                self._pending[name] = before.clone() if spare is None else spare.copy_(before)

    def _swap(self) -> None:
        if not self._written:
            return
        if self._scale != self._committed_scale:
            for name in self._committed.keys() - self._written:
                self._committed[name].mul_(self._scale / self._committed_scale)
            self._committed_scale = self._scale
        for name in self._written:
            self._committed[name], self._pending[name] = self._pending[name], self._committed[name]
        self._written.clear()

    def discard(self) -> None:
        """Forgets the packets since the last `commit`: the optimizer has skipped the step."""
        with self._lock:
            if self._before and self._before_scale != self._committed_scale:
                for name in self._committed.keys() - self._before.keys():
                    self._committed[name].mul_(self._before_scale / self._committed_scale)
                self._committed_scale = self._before_scale
            for name, values in self._before.items():
                self._spare[name], self._committed[name] = self._committed[name], values
            self._before.clear()
        self._written.clear()
        self._drained.clear()
        self._sent.clear()

    def norm(self, name: str) -> float:
        """The Euclidean norm of a parameter's residual."""
        with self._lock:
            kept = self._committed.get(name)
        return 0.0 if kept is None else math.sqrt(float(kept.dot(kept)))

    def state_dict(self) -> dict[str, Any]:
        """What was committed: float32 tensors on the CPU, by name, and their scale; and what is to be drained."""
        with self._lock:
            kept = {name: values.to("cpu", copy=True) for name, values in self._committed.items()}
        return {
            "scale": self._committed_scale,
            "parameters": kept,
            "draining": self.draining,
            "waiting": sorted(self._waiting),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict` of the same parameters. Raises CheckpointError for other sizes."""
        for name, values in state["parameters"].items():
            if values.numel() != self._numels[name]:
                raise CheckpointError(
                    f"the residual of parameter {name!r} is of another model",
                    expected=f"{self._numels[name]} values",
                    found=f"{values.numel()}",
                )
        with self._lock:
            self._written.clear()
            self._drained.clear()
            self._sent.clear()
            self._pending.clear()
            self._before.clear()
            self.draining = state.get("draining", False)
            self._waiting = set(state.get("waiting", ()))
            self._committed_scale = self._scale = state["scale"]
            self._committed = {
                name: values.to(self._device, torch.float32, copy=True)
                for name, values in state["parameters"].items()
            }

    def _part(self, kept: dict[str, Tensor], name: str, offset: int, numel: int) -> Tensor:
        with self._lock:
            for one in (self._committed, self._pending):
                if name not in one:
                    one[name] = torch.zeros(self._numels[name], dtype=torch.float32, device=self._device)
        return kept[name][offset : offset + numel]


def redistributed(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The residuals that each of a new number of ranks starts with: the mean of the old ones'.

    states: `Residuals.state_dict` of every old rank, by rank. What the parameters lack in all stays the same.
    """
    scale = states[0]["scale"]
    total = {
        name: torch.zeros_like(values) for state in states for name, values in state["parameters"].items()
    }
    for state in states:
        for name, values in state["parameters"].items():
            total[name] += values * (scale / state["scale"])
    mean = {name: values / len(states) for name, values in total.items()}
    return {"scale": scale, "parameters": mean, "draining": states[0].get("draining", False)}
