"""A model as a chain of pieces: the smallest units that it can be cut into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.adapters import BUILT_IN, Adapter, NamedModules
from efficient_dl.local_learning.adapters_outside import OUTSIDE
from efficient_dl.local_learning.diagnosis import why_no_chain


@dataclass(frozen=True)
class Piece:
    """One unit of a model: one tensor in, one tensor out.

    name: where it comes from, "blocks.3". module: its parameters are the model's own objects. names: the model's key
    of every entry of module.state_dict().
    """

    name: str
    module: nn.Module
    names: Mapping[str, str]


_registered: list[Adapter] = []


def register_adapter(
    matches: Callable[[nn.Module], bool] | type[nn.Module],
    pieces: Callable[[nn.Module], NamedModules],
    name: str,
) -> None:
    """Teach `partition` to cut models of a kind.

    matches: the models' class, or a function that recognizes them; the adapter registered last is asked first, and
    all of them before the built-in ones. pieces: from a model to (name, module) in the order in which forward runs
    them. The modules are the model's own submodules, or modules of yours that hold some of them; each takes one
    tensor and returns one, all of them hold every parameter of the model, and they copy none. name: for messages.

        class Tagger(nn.Module):
            def __init__(self):
                ...
            def forward(self, x):
                x = self.embedding(x) * self.scale          # a parameter of the model itself
                for layer in self.layers:
                    x = layer(x)[0]                         # a layer that returns a tuple
                return self.classifier(x)

        class Entry(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.embedding, self.scale = model.embedding, model.scale
            def forward(self, x):
                return self.embedding(x) * self.scale

        class First(nn.Module):
            def __init__(self, layer):
                super().__init__()
                self.layer = layer
            def forward(self, x):
                return self.layer(x)[0]

        def pieces(model):
            yield "embedding", Entry(model)
            for index, layer in enumerate(model.layers):
                yield f"layers.{index}", First(layer)
            yield "classifier", model.classifier

        register_adapter(Tagger, pieces, name="Tagger")
        partition(Tagger(), 3, example=x)                   # verifies the pieces against the model

    A module of yours must not depend on its own `training` flag, which follows the partition's mode and not the
    model's; the submodules' flags are right either way.
    """
    recognizes = (lambda model: isinstance(model, matches)) if isinstance(matches, type) else matches
    _registered.insert(0, Adapter(name, recognizes, pieces))


def pieces_of(model: nn.Module) -> list[Piece]:
    """The chain that the model is, by the adapter for its kind. Raises ConfigError that says why there is none."""
    adapter = _adapter_for(model)
    paths = {id(module): path for path, module in model.named_modules()}
    tensors = {id(tensor): key for key, tensor in reversed(model.state_dict(keep_vars=True).items())}
    pieces: list[Piece] = []
    for name, module in adapter.pieces(model):
        if not isinstance(module, nn.Module):
            raise ConfigError(
                f"the adapter {adapter.name} gave a piece that is not a module",
                expected="(name, nn.Module)",
                found=f"({name!r}, {type(module).__name__})",
            )
        _follow_mode(module, model, paths)
        pieces.append(Piece(name, module, _names(name, module, paths, tensors, adapter)))
    _check(model, pieces, adapter)
    return pieces


def _adapter_for(model: nn.Module) -> Adapter:
    for adapter in (*_registered, *BUILT_IN, *OUTSIDE):
        if adapter.matches(model):
            return adapter
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    for wrapper, attribute in (("DistributedDataParallel", "module"), ("OptimizedModule", "_orig_mod")):
        if type(model).__name__ == wrapper:
            fix = f"partition the model inside: partition(model.{attribute}, ...)"
            raise ConfigError(f"a {wrapper} cannot be cut", found=kind, fix=fix)
    obstacles = why_no_chain(model)
    raise ConfigError(
        f"{type(model).__name__} cannot be cut: nothing says that its forward is a chain of pieces",
        expected="one of " + ", ".join(adapter.name for adapter in (*_registered, *BUILT_IN, *OUTSIDE)),
        found=kind + (f", in which {obstacles}" if obstacles else ""),
        fix="efficient_dl.local_learning.pieces.register_adapter names pieces, one tensor in and one out, with every "
        "skip connection inside a piece; its documentation has an example",
    )


def _follow_mode(module: nn.Module, model: nn.Module, paths: Mapping[int, str]) -> None:
    """Modules that an adapter made start in the model's mode; the model's own keep theirs."""
    for part in module.modules():
        if id(part) not in paths:
            part.training = model.training


def _names(
    name: str, module: nn.Module, paths: Mapping[int, str], tensors: Mapping[int, str], adapter: Adapter
) -> dict[str, str]:
    """module's key -> model's key: by the submodule that holds the entry, else by the tensor itself."""
    submodules = dict(module.named_modules(remove_duplicate=False))
    names: dict[str, str] = {}
    for key, tensor in module.state_dict(keep_vars=True).items():
        prefix, _, entry = key.rpartition(".")
        holder = submodules.get(prefix)
        if holder is not None and id(holder) in paths:
            path = paths[id(holder)]
            names[key] = f"{path}.{entry}" if path else entry
        elif id(tensor) in tensors:
            names[key] = tensors[id(tensor)]
        else:
            raise ConfigError(
                f"the piece {name!r} holds {key!r}, which is not the model's",
                where=f"the adapter {adapter.name}",
                fix="pieces hold the model's own submodules and parameters, not copies or new ones",
            )
    return names


def _check(model: nn.Module, pieces: Iterable[Piece], adapter: Adapter) -> None:
    where = f"the adapter {adapter.name}"
    seen: set[str] = set()
    for piece in pieces:
        if piece.name in seen:
            raise ConfigError(f"two pieces are named {piece.name!r}", where=where)
        seen.add(piece.name)
    held = {id(parameter) for piece in pieces for parameter in piece.module.parameters()}
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in held]
    if missing:
        raise ConfigError(
            f"no piece holds {len(missing)} of the model's parameters: {', '.join(missing[:5])}",
            where=where,
            fix="every parameter belongs to the piece that uses it, or it would never be trained",
        )
    if not seen:
        raise ConfigError("the model has no pieces", where=where)
