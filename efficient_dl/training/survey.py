"""What ranks measure of a model and of themselves before the coordinator decides."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from efficient_dl.comm import Transport, gather_json
from efficient_dl.comm.probe import exchange_line
from efficient_dl.comm.transport import telling_peers
from efficient_dl.coordinator.costs import PartitionCosts
from efficient_dl.training.cutting import Cutter


class FromRank0(Protocol):
    """`from_rank_0` of one run."""

    def __call__(self, make: Callable[[], Any]) -> Any: ...


class Survey:
    """All ranks call its methods together. batch: the same on all ranks, on the device. transport: idle."""

    def __init__(
        self,
        cutter: Cutter,
        batch: Callable[[], tuple[Tensor, Tensor]],
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
        transport: Transport,
        from_rank_0: FromRank0,
    ) -> None:
        self._cutter, self._batch, self._autocast = cutter, batch, autocast
        self._transport, self._from_rank_0 = transport, from_rank_0

    def cut(
        self, note: Callable[[str], None]
    ) -> tuple[tuple[str, ...], tuple[str, ...], list[PartitionCosts]]:
        """Where to cut the model, the partitions' names, and their costs, as rank 0 measures them and notes it."""

        def measured() -> tuple[tuple[str, ...], tuple[str, ...], list[PartitionCosts]]:
            with self._autocast():
                cut, costs = self._cutter.measured(self._batch())
            for line in str(cut).splitlines():
                note(line)
            seconds = ", ".join(f"{1e3 * one.seconds(True):.1f} ms" for one in costs)
            note(
                f"with their heads, of which that table does not know, partitions take {seconds} a micro-batch"
            )
            return cut.cuts, tuple(one.name for one in cut), costs

        return self._from_rank_0(measured)

    def costs(self, cuts: Sequence[str]) -> list[PartitionCosts]:
        """The costs of partitions that are cut already, as rank 0 measures them."""

        def measured() -> list[PartitionCosts]:
            with self._autocast():
                return self._cutter.costs(cuts, self._batch())

        return self._from_rank_0(measured)

    def here(self, work: bool, link: bool) -> tuple[float | None, float | None]:
        """Of this rank, while all ranks do the same: seconds of equal work, and bytes a second of the link, if wanted.

        Raises TransportError on the others where one fails.
        """
        seconds = rate = None
        with telling_peers(self._transport):
            if work:
                with self._autocast():
                    seconds = self._cutter.work_seconds(self._batch())
                gather_json(None, self._transport)  # who has failed has told by now
            if link:
                rate = exchange_line(self._transport, self._transport, glance=True).bytes_per_second
        return seconds, rate
