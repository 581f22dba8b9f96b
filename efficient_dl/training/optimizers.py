"""SGD, AdamW and Muon behind one object whose state is keyed by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from efficient_dl.config import OptimizerConfig
from efficient_dl.errors import CheckpointError, ConfigError

NamedParameters = dict[str, nn.Parameter]


class Optimizer:
    """One or two torch optimizers that together step every parameter of a model.

    `parts` are the torch optimizers. The learning rate is set before each step and is no part of the state.
    of_part: the model is a part of another one, and may consist of what Muon leaves to AdamW.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, of_part: bool = False) -> None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        builder = _BUILDERS[config.name]
        if of_part and builder is _muon and not hidden_matrices(model):
            builder = _adamw
        self.parts = builder(model, parameters, config)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}

    def step(self, lr: float) -> None:
        """Take one step with this learning rate in every part."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """{"parameter's name/field": tensor}, not copied. Empty before the first step."""
        return {
            f"{self._names[parameter]}/{field}": value
            for part in self.parts
            for parameter, fields in part.state.items()
            for field, value in fields.items()
            if isinstance(value, Tensor)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over copies of a `state_dict()`'s tensors, each on its parameter's device.

        As in torch, a count of steps stays where it is unless the optimizer is fused or capturable. Raises
        CheckpointError for an unknown parameter.
        """
        owners = {
            self._names[parameter]: (part, parameter, bool(group.get("fused") or group.get("capturable")))
            for part in self.parts
            for group in part.param_groups
            for parameter in group["params"]
        }
        for part in self.parts:
            part.state.clear()
        for key, value in state.items():
            name, _, field = key.rpartition("/")
            if name not in owners:
                raise CheckpointError(
                    "the checkpoint's optimizer has a parameter that the model lacks",
                    found=name,
                    fix="resume with the model of the run's config.toml, or start a new run in another --out",
                )
            part, parameter, counts_on_device = owners[name]
            stays = field == "step" and not counts_on_device
            device = value.device if stays else parameter.device
            part.state[parameter][field] = value.detach().to(device, copy=True)


def _sgd(
    model: nn.Module, parameters: NamedParameters, config: OptimizerConfig
) -> list[torch.optim.Optimizer]:
    groups = _decay_groups(parameters, config)
    return [torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)]


def _adamw(
    model: nn.Module, parameters: NamedParameters, config: OptimizerConfig
) -> list[torch.optim.Optimizer]:
    groups = _decay_groups(parameters, config)
    return [torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)]


def _muon(
    model: nn.Module, parameters: NamedParameters, config: OptimizerConfig
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between the first and the last layer, AdamW for the rest.

    Muon's updates are scaled to AdamW's root mean square, so that one learning rate serves both.
    Source: Jordan et al. 2024; the scaling, Liu et al. 2025 (Moonlight).
    """
    hidden = hidden_matrices(model)
    if not hidden:
        raise ConfigError(
            "muon finds no hidden matrix in this model",
            expected="2-D weights between the embedding and the output layer, as in gpt or mlp",
            fix="--optimizer adamw",
        )
    rest = {name: parameter for name, parameter in parameters.items() if name not in hidden}
    muon = torch.optim.Muon(
        [parameters[name] for name in hidden],
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, *_adamw(model, rest, config)]


_BUILDERS: dict[str, Callable[[nn.Module, NamedParameters, OptimizerConfig], list[torch.optim.Optimizer]]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "muon": _muon,
}


def hidden_matrices(model: nn.Module) -> list[str]:
    """Names of the 2-D weights of linear layers, without embeddings (tied ones too) and the last linear layer."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linears = [
        f"{name}.weight" if name else "weight"
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    weights = dict(model.named_parameters())
    return [
        name
        for name in linears[:-1]
        if name in weights and weights[name].requires_grad and id(weights[name]) not in embeddings
    ]


def _decay_groups(parameters: NamedParameters, config: OptimizerConfig) -> list[dict[str, object]]:
    """Weight decay for weights of two dimensions and more, none for biases and norms."""
    decayed = [p for p in parameters.values() if p.ndim >= 2]
    others = [p for p in parameters.values() if p.ndim < 2]
    groups = [(decayed, config.weight_decay), (others, 0.0)]
    return [{"params": members, "weight_decay": decay} for members, decay in groups if members]
