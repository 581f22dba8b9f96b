"""What one rank does in a pass: its partitions on its micro-batches, in order, activations handed on."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_dl.coordinator.assignment import Assignment
from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.held import Frozen, Held, Trained, body_of
from efficient_dl.local_learning.selection import Selection
from efficient_dl.local_learning.streams import Streams

Batches = Callable[[int], tuple[Tensor, Tensor]]
"""(inputs, targets) of a micro-batch of the pass, on the device; on every rank the same for the same number."""
Features = Callable[[Tensor], Tensor]
"""What partitions make of a batch's inputs."""


@dataclass
class _Pending:
    """A partition whose backward pass is due, with window 2 after the next one has given its gradient.

    outputs, gradients: of a micro-batch, from which the backward pass begins; the gradient of a loss is None.
    """

    held: Trained
    features: Tensor
    outputs: list[Tensor]
    gradients: list[Tensor | None]
    last: bool


class Host:
    """The partitions that one rank holds, for as long as an assignment holds.

    held: in ascending order; which partitions, says the assignment. streams: None where no activation changes ranks.
    window: 1, every partition learns from its own loss alone; 2, also from the next partition's if that trains, whose
    gradient reaches back over one cut. That needs both on one rank: raises ConfigError otherwise.
    selection: which examples a partition in training hands on to the next; None: all.
    """

    def __init__(
        self,
        rank: int,
        assignment: Assignment,
        held: Sequence[Held],
        streams: Streams | None = None,
        window: int = 1,
        autocast: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
        selection: Selection | None = None,
    ) -> None:
        assert tuple(one.index for one in held) == assignment.of_rank(rank)
        if window == 2 and any(ranks != assignment.ranks[0] for ranks in assignment.ranks if ranks):
            raise ConfigError(
                "window 2 needs neighbouring partitions on the same ranks",
                expected="one set of ranks for all partitions",
                found=", ".join(str(list(ranks)) for ranks in assignment.ranks),
                fix="window=1, or train all partitions on all ranks",
            )
        self._rank = rank
        self._assignment = assignment
        self._held = list(held)
        self._streams = streams
        self._window = window
        self._autocast = autocast
        self._selection = selection
        self._frozen_features: Features | None = None
        if window == 2:
            for one in held:
                if isinstance(one, Trained):
                    one.block.part()
        if selection is not None:
            self._check_selection()

    def read_frozen(self, features: Features) -> None:
        """From now on training takes what the frozen partitions before the first that trains make of a batch from here.

        features: of a batch's inputs, such as `FeatureCache.features` of those partitions; all on this rank.
        """
        self._frozen_features = features

    def _check_selection(self) -> None:
        if self._window == 2 or any(
            ranks != self._assignment.ranks[0] for ranks in self._assignment.ranks if ranks
        ):
            raise ConfigError(
                "examples are left out where all partitions are on the same ranks and learn by their own losses alone",
                expected="window 1, one set of ranks for all partitions",
                found=f"window {self._window}, ranks {', '.join(str(list(r)) for r in self._assignment.ranks)}",
                fix="keep_examples=1.0, or window=1 and layer-wise training, simultaneous",
            )
        for one in self._held[:-1]:
            if isinstance(one, Trained) and self._selection is not None and self._selection.by == "loss":
                one.block.keep_logits()

    def train_step(
        self, step: int, num_micro_batches: int, batches: Batches, lr: Callable[[int], float]
    ) -> dict[int, Tensor]:
        """One optimizer step of every trained partition; the mean local losses of this rank's micro-batches.

        num_micro_batches: of all ranks together; every partition's number of ranks divides it. lr: a partition's
        learning rate.
        """
        losses: dict[int, Tensor] = {}
        mine = {one.index: self._micro_batches(one.index, num_micro_batches) for one in self._held}
        for micro_batch in range(num_micro_batches):
            here = [one for one in self._held if micro_batch in mine[one.index]]
            if here:
                self._train_micro_batch(step, micro_batch, here, mine, batches, lr, losses)
        return losses

    @torch.no_grad()
    def evaluate(
        self, step: int, num_micro_batches: int, batches: Batches
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Pass micro-batches through in eval mode: (number, logits, targets) on the ranks of the last partition held.

        Where that is not the model's last one, its auxiliary head makes the logits.
        """
        for one in self._held:
            (one.block if isinstance(one, Trained) else one.body).eval()
        last = max(index for index, ranks in enumerate(self._assignment.ranks) if ranks)
        for micro_batch in range(num_micro_batches):
            made: Tensor | None = None
            for one in self._held:
                if self._assignment.rank_for(one.index, micro_batch) != self._rank:
                    made = None
                    continue
                inputs, targets = batches(micro_batch)
                with self._autocast():
                    features: Tensor = body_of(one)(self._inputs(one.index, micro_batch, inputs, made))
                if one.index == last:
                    yield micro_batch, self._logits(one, features), targets
                else:
                    self._hand_on(one.index, micro_batch, features, step)
                made = features
        for one in self._held:
            if isinstance(one, Trained):
                one.block.train()

    def _logits(self, held: Held, features: Tensor) -> Tensor:
        if isinstance(held, Frozen):
            return features
        with self._autocast():
            made = held.block.head(features)
        return made[0] if isinstance(made, tuple) else made

    def _micro_batches(self, partition: int, num_micro_batches: int) -> range:
        ranks = self._assignment.ranks[partition]
        assert num_micro_batches % len(ranks) == 0
        return range(ranks.index(self._rank), num_micro_batches, len(ranks))

    def _train_micro_batch(
        self,
        step: int,
        micro_batch: int,
        here: Sequence[Held],
        mine: dict[int, range],
        batches: Batches,
        lr: Callable[[int], float],
        losses: dict[int, Tensor],
    ) -> None:
        inputs, targets = batches(micro_batch)
        made: tuple[int, Tensor] | None = None  # by which partition, and what
        pending: _Pending | None = None
        if self._frozen_features is not None and isinstance(here[0], Frozen):
            here = list(itertools.dropwhile(lambda one: isinstance(one, Frozen), here))
            with self._autocast():
                made = here[0].index - 1, self._frozen_features(inputs)
        for position, one in enumerate(here):
            index = one.index
            before = made[1] if made is not None and made[0] == index - 1 else None
            features: Tensor = self._inputs(index, micro_batch, inputs, before)
            if isinstance(one, Frozen):
                with self._autocast():
                    features = one(features)
            else:
                count = len(mine[index])
                waits = self._waits(here[position + 1 : position + 2])
                last = micro_batch == mine[index][-1]
                features, loss, pending = self._train(one, features, targets, count, last, waits, pending, lr)
                losses[index] = losses.get(index, 0.0) + loss
                if self._selection is not None and position + 1 < len(here):
                    chosen = self._selection.of(one, targets)
                    if chosen is not None:
                        features, targets = features[chosen], targets[chosen]
            made = (index, features)
            if index + 1 < len(self._assignment.ranks) and self._assignment.ranks[index + 1]:
                self._hand_on(index, micro_batch, features, step)

    def _train(
        self,
        held: Trained,
        features: Tensor,
        targets: Tensor,
        count: int,
        last: bool,
        waits: bool,
        pending: _Pending | None,
        lr: Callable[[int], float],
    ) -> tuple[Tensor, Tensor, _Pending | None]:
        """One partition on one of `count` micro-batches: its output, its share of the mean loss, what is pending then.

        waits: whether its backward pass does. pending: that of the partition before, which is done in any case.
        """
        entering = features.detach().requires_grad_(pending is not None)
        with held.reducing(last):
            with self._autocast():
                features, loss, seen = held.forward(entering, targets)
            share = loss / count
            now = self._due(held, features, share, seen, last)
            if not waits:
                self._backward(now, lr, reached=[entering] if pending is not None else [])
                if pending is not None:
                    self._backward(pending, lr, entering.grad)
            elif pending is not None:
                (back,) = torch.autograd.grad(now.outputs, entering, now.gradients, retain_graph=True)
                self._backward(pending, lr, back)
        return features.detach(), share.detach(), now if waits else None

    def _waits(self, following: Sequence[Held]) -> bool:
        """Whether a partition's backward pass waits for the gradient of the one that follows here, if that trains."""
        return self._window == 2 and any(isinstance(one, Trained) for one in following)

    def _due(self, held: Trained, features: Tensor, loss: Tensor, seen: Tensor, last: bool) -> _Pending:
        if seen is features:
            return _Pending(held, features, [loss], [None], last)
        loss.backward()  # through the head, of which nothing is kept while the body waits
        return _Pending(held, features, [features], [seen.grad], last)

    def _backward(
        self,
        pending: _Pending,
        lr: Callable[[int], float],
        gradient: Tensor | None = None,
        reached: Sequence[Tensor] = (),
    ) -> None:
        """gradient: of the features, by the next partition's loss. reached: what gets gradients beside parameters."""
        outputs, gradients = pending.outputs, pending.gradients
        if gradient is not None and pending.features.requires_grad:
            outputs, gradients = [*outputs, pending.features], [*gradients, gradient]
        inputs = None if pending.held.reached is None else [*pending.held.reached, *reached]
        torch.autograd.backward(outputs, gradients, inputs=inputs)  # type: ignore[arg-type]
        if pending.last:
            pending.held.step(lr(pending.held.index))

    def _inputs(self, partition: int, micro_batch: int, inputs: Tensor, features: Tensor | None) -> Tensor:
        """The batch itself, what the partition before made of it here, or what another rank sends."""
        if partition == 0:
            return inputs
        if features is not None:
            return features
        assert self._streams is not None
        return self._streams.receive(partition, micro_batch)

    def _hand_on(self, partition: int, micro_batch: int, features: Tensor, step: int) -> None:
        if self._assignment.rank_for(partition + 1, micro_batch) != self._rank:
            assert self._streams is not None
            self._streams.send(partition, micro_batch, features, step)
