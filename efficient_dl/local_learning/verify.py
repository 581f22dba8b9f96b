"""Checks on an example that a chain of pieces computes what its model computes, and finds where they part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.measure import set_mode, unchanged
from efficient_dl.local_learning.pieces import Piece

Calls = dict[int, list[tuple[Tensor | None, Tensor | None]]]  # by module: the input and output of each call


def verify(model: nn.Module, pieces: Sequence[Piece], example: Tensor, *, training: bool) -> None:
    """Raise ConfigError, naming the first piece that differs, unless the chain gives exactly what the model gives.

    training: in training mode, both from the same state of the random generators, so that dropout is compared too; a
    model that even so gives two results for one input is then not compared, in evaluation mode it is refused. Modes,
    buffers and random generators are afterwards what they were.
    """

    def run(forward: Callable[[Tensor], Tensor]) -> Tensor:
        with unchanged(model, pieces, example.device), torch.no_grad():
            set_mode(model, pieces, training=training)
            return forward(example.clone()).clone()

    def whole(x: Tensor) -> Tensor:
        return tensor_of(model(x))

    def chained(x: Tensor) -> Tensor:
        return _chain(pieces, x)

    expected, found = run(whole), run(chained)
    if same(expected, found):
        return
    if not same(expected, run(whole)):
        if training:
            return
        raise ConfigError(
            "the model gives two results for one input, so that its pieces cannot be compared with it",
            fix="make its forward repeatable in evaluation mode, or partition without an example",
        )
    own = {id(module): name for name, module in model.named_modules() if module is not model}
    inside = {
        id(module): module for piece in pieces for module in piece.module.modules() if id(module) in own
    }
    with _recorded(inside) as in_model:
        run(whole)
    with _recorded(inside) as in_chain:
        run(chained)
    raise ConfigError(
        f"the chain of pieces does not compute what {type(model).__name__} computes"
        + (" in training" if training else ""),
        expected=f"the same {tuple(expected.shape)} {expected.dtype}, bit for bit",
        found=_difference(expected, found),
        where=_parting(pieces, own, in_model, in_chain),
        fix="an adapter whose pieces do all that forward does: efficient_dl.local_learning.pieces.register_adapter",
    )


def tensor_of(output: object) -> Tensor:
    """The one tensor that a model computes; of an output with names its logits or last hidden state."""
    for value in (output, getattr(output, "logits", None), getattr(output, "last_hidden_state", None)):
        if isinstance(value, Tensor):
            return value
    raise ConfigError(
        "a model that is cut into a chain returns one tensor",
        expected="a tensor, or an object with `logits` or `last_hidden_state`",
        found=type(output).__name__,
    )


def same(one: Tensor, other: Tensor) -> bool:
    """Equal in shape, dtype and every value; NaN equals NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _chain(pieces: Sequence[Piece], x: Tensor) -> Tensor:
    for piece in pieces:
        before = tuple(x.shape)
        try:
            x = piece.module(x)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ConfigError(
                f"the piece {piece.name!r} cannot take what the pieces before it give",
                found=f"{before}: {type(error).__name__}: {error}",
                fix="the pieces must do all that the model's forward does between its submodules",
            ) from error
        if not isinstance(x, Tensor):
            raise ConfigError(f"the piece {piece.name!r} returns {type(x).__name__}", expected="one tensor")
    return x


def _difference(whole: Tensor, chained: Tensor) -> str:
    if whole.shape != chained.shape or whole.dtype != chained.dtype:
        return f"{tuple(chained.shape)} {chained.dtype}"
    largest = (whole.double() - chained.double()).abs().max().item()
    return f"values that differ by up to {largest:.3g}"


def _parting(pieces: Sequence[Piece], own: Mapping[int, str], in_model: Calls, in_chain: Calls) -> str:
    """The first piece with a submodule that is called otherwise in the model than in the chain."""
    for piece in pieces:
        for module in piece.module.modules():
            if id(module) not in own:
                continue
            name, expected, found = own[id(module)], in_model[id(module)], in_chain[id(module)]
            if len(expected) != len(found):
                return (
                    f"{piece.name}: {name} runs {len(expected)} times in the model, {len(found)} in the chain"
                )
            for (model_in, model_out), (chain_in, chain_out) in zip(expected, found, strict=True):
                if not _both(model_in, chain_in):
                    return f"{piece.name}: {name} is given another input than in the model"
                if not _both(model_out, chain_out):
                    return f"{piece.name}: {name} gives another output for the same input"
    return f"{pieces[-1].name}: after its last submodule"


def _both(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other is None or (one is not None and other is not None and same(one, other))


@contextmanager
def _recorded(modules: dict[int, nn.Module]) -> Iterator[Calls]:
    """Records the first tensor that every call of the modules takes and gives."""
    calls: Calls = {key: [] for key in modules}

    def recorder(key: int) -> Callable[..., None]:
        return lambda module, args, kwargs, output: calls[key].append(
            (_first((*args, *kwargs.values())), _first(output))
        )

    handles = [
        module.register_forward_hook(recorder(key), with_kwargs=True) for key, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _first(values: object) -> Tensor | None:
    for value in values if isinstance(values, tuple) else (values,):
        if isinstance(value, Tensor):
            return value.clone()
    return None
