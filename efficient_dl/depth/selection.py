"""Which layers of a model take part: every nn.Linear and nn.Conv2d, or those that patterns name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from efficient_dl.errors import ConfigError

Plain = nn.Linear | nn.Conv2d


def chosen_layers(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, Plain]:
    """Layers by module name, each object once; names are shell patterns such as "blocks.*.mlp".

    Without `include` these are all layers of the two classes. Raises ConfigError for a pattern that matches no
    module, for a module that cannot take part, and where nothing is left.
    """
    modules = dict(model.named_modules())
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise ConfigError(
                f"no module is called {pattern!r}",
                expected="a name of named_modules(), or a pattern",
                found=", ".join(list(modules)[1:6]) or "a model without submodules",
            )
    chosen: dict[str, Plain] = {}
    for name, module in modules.items():
        if any(fnmatchcase(name, pattern) for pattern in exclude):
            continue
        named = any(fnmatchcase(name, pattern) for pattern in include)
        if named or (not include and isinstance(module, Plain)):
            chosen[name] = _supported(name, module)
    if not chosen:
        raise ConfigError(
            "the model has no layer to work on",
            expected="nn.Linear or nn.Conv2d among its modules",
            found=type(model).__name__,
        )
    _refuse_tied(model, chosen)
    return chosen


def _supported(name: str, module: nn.Module) -> Plain:
    reason = _objection(module)
    if reason is not None or not isinstance(module, Plain):
        raise ConfigError(
            f"{name or 'the model'} ({type(module).__name__}) cannot be factored: {reason}",
            expected="nn.Linear, or nn.Conv2d with groups=1",
            where=name or "the model itself",
            fix=f"exclude=[{name!r}]",
        )
    return module


def _objection(module: nn.Module) -> str | None:
    if parametrize.is_parametrized(module):
        return "it has a parametrization of its own"
    if type(module) not in (nn.Linear, nn.Conv2d):
        return "only these two classes are known, not what others make of their weights"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"its weight is {module.groups} matrices, one a group"
    if hasattr(module.weight, "placements"):
        return "its weight is sharded already (factor the model first, then shard it)"
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if any(hooks):
        return "it has hooks"
    return None


def _refuse_tied(model: nn.Module, chosen: dict[str, Plain]) -> None:
    owners = Counter(
        id(one) for module in model.modules() for one in module.parameters(recurse=False)
    )  # modules() has every module once
    for name, layer in chosen.items():
        if owners[id(layer.weight)] > 1:
            raise ConfigError(
                f"{name} shares its weight with another module",
                expected="a weight of its own",
                where=name,
                fix=f"exclude=[{name!r}], or untie the weights first",
            )
