"""Weights that two partitions use: a copy for the later one, or one owner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.pieces import Piece


@dataclass(frozen=True)
class TiedWeight:
    """A weight of the model that was one with another across a cut.

    name: the later user's key in model.state_dict(); shared_with: the owner's. partition, owner: the indices of
    theirs. untied: whether the later user has a copy of its own now.
    """

    name: str
    shared_with: str
    partition: int
    owner: int
    untied: bool

    def __str__(self) -> str:
        both = f"{self.name} (partition {self.partition}) was {self.shared_with} (partition {self.owner})"
        if self.untied:
            return f"{both}: now a weight of its own; load the state_dict into a model without tied weights"
        return f"{both} and stays it: the owner, partition {self.owner}, trains it"


def resolve_tied(
    model: nn.Module, groups: Sequence[Sequence[Piece]], *, untie: bool
) -> tuple[list[TiedWeight], list[frozenset[int]]]:
    """Find what earlier groups of pieces share with later ones and, to untie, give the later ones copies.

    Returns what was found, and for each group the ids of the tensors that an earlier one owns (none after untying).
    Raises ConfigError if a module with state, or a buffer, is on both sides of a cut and is to be untied.
    """
    owners: dict[int, tuple[int, str]] = {}  # id of a tensor -> its first group, and its key there
    found: list[TiedWeight] = []
    borrowed: list[frozenset[int]] = []
    uses: list[tuple[Tensor, list[tuple[nn.Module, str]]]] = []
    for index, pieces in enumerate(groups):
        entries: dict[int, tuple[Tensor, str]] = {}
        for piece in pieces:
            for key, tensor in piece.module.state_dict(keep_vars=True).items():
                if isinstance(tensor, Tensor):
                    entries.setdefault(id(tensor), (tensor, piece.names[key]))
        shared = {key: entry for key, entry in entries.items() if key in owners}
        for key, (tensor, name) in shared.items():
            owner, owners_name = owners[key]
            if untie:
                _check_separable(tensor, name, owners_name, index, owner)
                uses.append((tensor, _uses(model, pieces, tensor)))
            found.append(TiedWeight(name, owners_name, index, owner, untie))
        borrowed.append(frozenset() if untie else frozenset(shared))
        owners.update({key: (index, name) for key, (_, name) in entries.items() if key not in shared})
    for tensor, places in uses:  # only now that nothing can be refused any more
        copy = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
        for module, attribute in places:
            setattr(module, attribute, copy)
    config = getattr(model, "config", None)
    if untie and found and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # pyright: ignore[reportOptionalMemberAccess]  # else saving ties again
    return found, borrowed


def _check_separable(tensor: Tensor, name: str, owners_name: str, index: int, owner: int) -> None:
    if name == owners_name:
        raise ConfigError(
            f"the module that holds {name!r} is used on both sides of a cut",
            where=f"partitions {owner} and {index}",
            fix="cut so that one partition holds all its uses, or tied='share' on one device",
        )
    if not isinstance(tensor, nn.Parameter):
        raise ConfigError(
            f"the buffer {name!r} is also {owners_name!r}, on the other side of a cut",
            where=f"partitions {owner} and {index}",
            fix="cut so that one partition holds both, or tied='share' on one device",
        )


def _uses(model: nn.Module, pieces: Sequence[Piece], tensor: Tensor) -> list[tuple[nn.Module, str]]:
    """The model's modules in these pieces that hold the parameter, and their attributes for it."""
    own = {id(module) for module in model.modules()}
    found: list[tuple[nn.Module, str]] = []
    for module in {id(one): one for piece in pieces for one in piece.module.modules()}.values():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter is tensor and id(module) not in own:
                raise ConfigError(
                    f"an adapter's {type(module).__name__} holds the tied weight {name!r} itself",
                    fix="let it hold the model's submodule that has the weight, or cut with tied='share'",
                )
            if parameter is tensor:
                found.append((module, name))
    return found
