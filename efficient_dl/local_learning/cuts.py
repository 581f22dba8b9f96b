"""Where a chain of pieces is cut: in front of named pieces, or so that the dearest partition is cheapest."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from efficient_dl.config import suggestion
from efficient_dl.coordinator.costs import PartitionCosts
from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.balance import best_cuts
from efficient_dl.local_learning.measure import PieceCosts
from efficient_dl.local_learning.pieces import Piece

COPIES = 4  # of the bytes of parameters in training: themselves, gradients, and Adam's two moments


def named_cuts(pieces: Sequence[Piece], names: Sequence[str]) -> list[int]:
    """The indices of the pieces with these names, which begin partitions 1 to K - 1."""
    index_of = {piece.name: index for index, piece in enumerate(pieces)}
    begins: list[int] = []
    for name in names:
        if name not in index_of:
            raise ConfigError(
                f"the model has no piece {name!r}", where="partition: n", fix=suggestion(str(name), index_of)
            )
        begins.append(index_of[name])
    if begins != sorted(set(begins)) or 0 in begins:
        raise ConfigError(
            "the names of the pieces that begin partitions 1 to K - 1 are out of order",
            expected=f"each once, in the model's order, without the first, {pieces[0].name!r}",
            found=", ".join(names),
            where="partition: n",
            fix=", ".join(pieces[index].name for index in sorted(set(begins) - {0})) or "n=1, for no cut",
        )
    return begins


def balanced_cuts(
    pieces: Sequence[Piece],
    n: int,
    balance: str,
    measured: Sequence[PieceCosts],
    heads: Sequence[PartitionCosts] = (),
) -> list[int]:
    """The first pieces of partitions 1 to n - 1, by measured "time" or "memory" or by "parameters".

    Memory is that of training with Adam: COPIES of the parameters, and what is saved for backward.

    heads: the costs of n partitions, of which those of their heads count, too.
    """
    trainable = [any(True for _ in piece.module.parameters()) for piece in pieces]
    if isinstance(n, bool) or not 1 <= n <= max(1, sum(trainable)):
        raise ConfigError(
            "the model cannot be cut into so many partitions",
            expected=f"1 to {sum(trainable)}, the number of its pieces with parameters",
            found=str(n),
            where="partition: n",
            fix="pieces: " + ", ".join(piece.name for piece in pieces),
        )
    cuts = best_cuts(
        len(pieces),
        n,
        _cost(pieces, balance, measured),
        allowed=lambda first, end: any(trainable[first:end]),
        cut_cost=[0, *(one.output_bytes for one in measured[:-1])] if measured else None,
        added=[_of_head(one, balance) for one in heads],
    )
    if cuts is None:
        raise ConfigError("the model has no parameters, so that nothing of it can be trained")
    return cuts


def parameter_bytes(pieces: Sequence[Piece]) -> int:
    """Bytes of the parameters of these pieces, each once."""
    held = {id(one): one for piece in pieces for one in piece.module.parameters()}
    return sum(one.numel() * one.element_size() for one in held.values())


def saved_bytes(measured: Sequence[PieceCosts]) -> int:
    """Bytes that these pieces keep for backward, each storage once."""
    storages: dict[Hashable, int] = {}
    for one in measured:
        storages.update(one.saved)
    return sum(storages.values())


def again_bytes(measured: Sequence[PieceCosts]) -> int:
    """Of the piece that needs most of them when it runs again."""
    return max((one.again_bytes for one in measured), default=0)


def dearness(costs: PartitionCosts, balance: str) -> int:
    """What is balanced of a partition with its head."""
    own = _nanoseconds(costs.forward_seconds + costs.backward_seconds)
    if balance == "parameters":
        own = costs.parameter_bytes
    if balance == "memory":
        own = COPIES * costs.parameter_bytes + costs.activation_bytes + costs.again_bytes
    return own + _of_head(costs, balance)


def _of_head(costs: PartitionCosts, balance: str) -> int:
    if balance == "parameters":
        return costs.head_parameter_bytes
    if balance == "memory":  # a head is done before a layer runs again
        more = max(0, costs.head_activation_bytes - costs.again_bytes)
        return COPIES * costs.head_parameter_bytes + more
    return _nanoseconds(costs.head_seconds)


def _nanoseconds(seconds: float) -> int:
    return round(1e9 * seconds)


def _cost(pieces: Sequence[Piece], balance: str, measured: Sequence[PieceCosts]) -> Callable[[int, int], int]:
    if balance == "parameters":
        return lambda first, end: parameter_bytes(pieces[first:end])
    if balance == "memory":
        return lambda first, end: (
            COPIES * parameter_bytes(pieces[first:end])
            + saved_bytes(measured[first:end])
            + again_bytes(measured[first:end])
        )
    nanoseconds = [_nanoseconds(one.forward_seconds + one.backward_seconds) for one in measured]
    return lambda first, end: sum(nanoseconds[first:end])
