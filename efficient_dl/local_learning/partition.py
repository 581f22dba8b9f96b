"""Cuts a model into partitions: contiguous pieces of about the same cost, which can be trained apart."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args, overload

from rich.console import Console, Group, RenderableType
from rich.table import Table
from torch import Tensor, nn

from efficient_dl.coordinator.costs import PartitionCosts
from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.cuts import (
    again_bytes,
    balanced_cuts,
    named_cuts,
    parameter_bytes,
    saved_bytes,
)
from efficient_dl.local_learning.measure import PieceCosts, measure
from efficient_dl.local_learning.pieces import Piece, pieces_of
from efficient_dl.local_learning.tied import TiedWeight, resolve_tied
from efficient_dl.local_learning.verify import verify

Balance = Literal["time", "memory", "parameters"]


@dataclass(frozen=True)
class Partition:
    """Contiguous pieces of a model that are trained together.

    name: "embedding..blocks.1". module: the pieces in order, in the model's mode; its parameters are the model's own
    objects, so that model.state_dict() is always current. names: the model's key of every entry of
    module.state_dict(). costs: measured on the example, zeros without one. borrowed: keys of module.state_dict() that
    an earlier partition owns; empty unless tied weights are shared.
    """

    index: int
    name: str
    module: nn.Module
    names: Mapping[str, str]
    costs: PartitionCosts
    borrowed: frozenset[str] = field(default=frozenset())

    def owned_parameters(self) -> list[nn.Parameter]:
        """What this partition's optimizer steps: its parameters without those an earlier partition owns."""
        return [one for name, one in self.module.named_parameters() if name not in self.borrowed]


class Partitions(Sequence[Partition]):
    """All partitions of a model, in its order; print it for a table.

    model: the model that was cut; its state_dict() is the result of training. pieces: all of them. cuts: the names of
    the pieces that begin partitions 1 to K - 1; partition(model, cuts) cuts so again, on another rank too.
    balance: what the cuts balance, "names" if they were given. tied: weights that were shared across a cut.
    measured: of every piece, () without an example.
    """

    def __init__(
        self,
        model: nn.Module,
        pieces: Sequence[Piece],
        partitions: Sequence[Partition],
        cuts: Sequence[str],
        balance: str,
        tied: Sequence[TiedWeight],
        measured: Sequence[PieceCosts] = (),
    ) -> None:
        self.model = model
        self.pieces = tuple(pieces)
        self.cuts = tuple(cuts)
        self.balance = balance
        self.tied = tuple(tied)
        self.measured = tuple(measured)
        self._partitions = tuple(partitions)

    @overload
    def __getitem__(self, index: int) -> Partition: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Partition]: ...
    def __getitem__(self, index: int | slice) -> Partition | Sequence[Partition]:
        return self._partitions[index]

    def __len__(self) -> int:
        return len(self._partitions)

    def __rich__(self) -> RenderableType:
        """One row a partition, times and bytes those of the example; then what was tied."""
        return Group(self._table(), *(str(one) for one in self.tied))

    def _table(self) -> Table:
        table = Table(title=f"{type(self.model).__name__} in {len(self)} partitions, cut by {self.balance}")
        table.add_column("")
        table.add_column("pieces")
        for heading in ("parameters", "time", "forward", "backward", "saved", "output"):
            table.add_column(heading, justify="right")
        seconds = [one.costs.forward_seconds + one.costs.backward_seconds for one in self]
        for one, own in zip(self, seconds, strict=True):
            costs = one.costs
            table.add_row(
                str(one.index),
                one.name,
                f"{sum(parameter.numel() for parameter in one.owned_parameters()):,}",
                f"{own / sum(seconds):.0%}" if any(seconds) else "–",
                *(_milliseconds(value) for value in (costs.forward_seconds, costs.backward_seconds)),
                *(_kilobytes(value) for value in (costs.activation_bytes, costs.output_bytes)),
            )
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def partition(
    model: nn.Module,
    n: int | str | Sequence[str],
    example: Tensor | None = None,
    *,
    balance: Balance | None = None,
    tied: Literal["untie", "share"] = "untie",
) -> Partitions:
    """Cut a model that is a chain of pieces into partitions that can be trained apart.

    n: how many partitions, or the names of the pieces that begin partitions 1 to K - 1.
    example: a batch of inputs on the model's device. With it the chain is verified against the model, bit for bit, in
    evaluation and in training mode, and costs are measured, under autocast if it is on; random generators, buffers,
    gradients and modes are afterwards what they were.
    balance: "time" (forward and backward, median of 5; the default with an example), "memory" (of training with Adam:
    parameters four times, and what is saved for backward) or "parameters" (the default without one). The dearest
    partition is as cheap as cuts between pieces allow. Measured times differ from run to run and from rank to rank:
    ranks that must agree take the `cuts` of one of them as n.
    tied: weights that two partitions use. "untie": the later partition gets a copy of its own, in the model itself;
    "share": they stay one parameter, owned by the first, which works on one device only.

    Works for nn.Sequential, the models of efficient_dl.models, torchvision's ResNets, Hugging Face's GPT-2 and Llama,
    and what local_learning.pieces.register_adapter names. Raises ConfigError that says what cannot be cut and why.
    """
    by = _check_choices(model, example, balance, tied)
    pieces = pieces_of(model)
    measured: list[PieceCosts] = []
    if example is not None:
        verify(model, pieces, example, training=False)
        measured = measure(model, pieces, example)
        verify(model, pieces, example, training=True)
    if isinstance(n, int):
        begins = balanced_cuts(pieces, n, by, measured)
    else:
        begins = named_cuts(pieces, (n,) if isinstance(n, str) else n)
    return _cut(model, pieces, begins, by if isinstance(n, int) else "names", tied, measured)


def cut_again(
    model: nn.Module,
    n: int | Sequence[str],
    measured: Sequence[PieceCosts],
    balance: Balance,
    heads: Sequence[PartitionCosts] = (),
) -> Partitions:
    """`partition` of a model like one whose `measured` these are, without measuring again.

    heads: the costs of n partitions with those of their heads, which are taken to be the same elsewhere.
    """
    pieces = pieces_of(model)
    if isinstance(n, int):
        return _cut(
            model, pieces, balanced_cuts(pieces, n, balance, measured, heads), balance, "untie", measured
        )
    return _cut(model, pieces, named_cuts(pieces, n), balance, "untie", measured)


def _cut(
    model: nn.Module,
    pieces: Sequence[Piece],
    begins: Sequence[int],
    balance: str,
    tied: str,
    measured: Sequence[PieceCosts],
) -> Partitions:
    spans = list(zip((0, *begins), (*begins, len(pieces)), strict=True))
    groups = [pieces[first:end] for first, end in spans]
    for index, group in enumerate(groups):
        _check_trainable(group, index, frozenset())
    weights, borrowed = resolve_tied(model, groups, untie=tied == "untie")
    partitions = [
        _make(model, index, groups[index], borrowed[index], measured[first:end] if measured else ())
        for index, (first, end) in enumerate(spans)
    ]
    cuts = [pieces[first].name for first in begins]
    return Partitions(model, pieces, partitions, cuts, balance, weights, measured)


def _check_choices(model: nn.Module, example: Tensor | None, balance: str | None, tied: str) -> str:
    """What to balance, once all the choices are possible ones."""
    if tied not in ("untie", "share"):
        raise ConfigError(f"tied cannot be {tied!r}", expected="'untie' or 'share'", where="partition: tied")
    if balance is None:
        balance = "parameters" if example is None else "time"
    if balance not in get_args(Balance):
        expected = "'time', 'memory' or 'parameters'"
        raise ConfigError(f"balance cannot be {balance!r}", expected=expected, where="partition: balance")
    if example is None and balance != "parameters":
        raise ConfigError(
            f"{balance} is measured on a batch, and there is none",
            where="partition: example",
            fix="give a batch of inputs as example, or balance='parameters'",
        )
    device = next((one.device for one in model.parameters()), None)
    if example is not None and device not in (None, example.device):
        raise ConfigError(
            "the example is on another device than the model",
            expected=str(device),
            found=str(example.device),
            where="partition: example",
        )
    return balance


def _make(
    model: nn.Module,
    index: int,
    pieces: Sequence[Piece],
    borrowed: frozenset[int],
    measured: Sequence[PieceCosts],
) -> Partition:
    module = nn.Sequential(*(piece.module for piece in pieces))
    module.training = model.training
    names = {
        f"{place}.{key}": name for place, piece in enumerate(pieces) for key, name in piece.names.items()
    }
    state = module.state_dict(keep_vars=True)
    not_owned = frozenset(key for key, tensor in state.items() if id(tensor) in borrowed)
    name = _check_trainable(pieces, index, borrowed)
    costs = PartitionCosts(
        name=name,
        forward_seconds=sum(one.forward_seconds for one in measured),
        backward_seconds=sum(one.backward_seconds for one in measured),
        parameter_bytes=parameter_bytes(pieces),
        activation_bytes=saved_bytes(measured),
        output_bytes=measured[-1].output_bytes if measured else 0,
        again_bytes=again_bytes(measured),
    )
    return Partition(index, name, module, names, costs, not_owned)


def _check_trainable(pieces: Sequence[Piece], index: int, borrowed: frozenset[int]) -> str:
    """The name of the partition of these pieces, if it has parameters of its own."""
    name = pieces[0].name if len(pieces) == 1 else f"{pieces[0].name}..{pieces[-1].name}"
    if all(id(one) in borrowed for piece in pieces for one in piece.module.parameters()):
        raise ConfigError(
            f"the partition {name!r} has no parameters of its own to train",
            where=f"partition {index}",
            fix="cut elsewhere, so that it holds a layer with parameters",
        )
    return name


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms" if seconds else "–"


def _kilobytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e3:,.1f} kB" if num_bytes else "–"
