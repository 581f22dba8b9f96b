"""The motion of a product of balanced factors, without the factors: a preconditioner in front of an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efficient_dl.depth.selection import chosen_layers
from efficient_dl.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Basis:
    """W = u · diag(s) · vᵀ, in float64: the eigenvectors of W Wᵀ and Wᵀ W at once, s the roots of the eigenvalues."""

    u: Tensor
    s: Tensor
    v: Tensor

    @staticmethod
    def of(weight: Tensor) -> Basis:
        u, s, vh = torch.linalg.svd(weight.detach().double().flatten(1), full_matrices=False)
        return Basis(u, s, vh.T)


def precondition(grad: Tensor, basis: Basis, n: int) -> Tensor:
    """Σ_{j=1..n} (W Wᵀ)^{(n−j)/n} · grad · (Wᵀ W)^{(j−1)/n}, in grad's shape and dtype; W as in `basis`.

    The first and the last term also move directions outside W's row and column space: the power 0 is the identity.
    Exact in float64 up to rounding. Source: Arora, Cohen & Hazan 2018, theorem 1.
    """
    if n == 1:
        return grad
    u, s, v = basis.u, basis.s, basis.v
    g = grad.double().flatten(1)
    left, right = u.T @ g, g @ v  # (k, columns), (rows, k)
    outer = s ** (2 * (n - 1) / n)
    moved = u @ (outer[:, None] * left) + (right * outer) @ v.T
    if n > 2:
        scale = torch.stack(
            [torch.outer(s ** (2 * (n - j) / n), s ** (2 * (j - 1) / n)) for j in range(2, n)]
        )
        moved += u @ (scale.sum(0) * (left @ v)) @ v.T
    return moved.to(grad.dtype).view_as(grad)


class EndToEndPreconditioner:
    """Before each optimizer.step(), replaces the gradient of each weight W by that of n balanced factors' product.

    optimizer: any of torch.optim that steps some of the model's weights; the others' gradients stay. It remains the
    object that schedulers, GradScaler and checkpoints know; p.grad is the preconditioned gradient after the step, so
    call zero_grad() as ever.
    n: factors; 1 changes nothing. include, exclude: as for `factorize`.
    every: steps between two decompositions of a weight, min(rows, columns)³ work each; 1 is exact.

        preconditioner = EndToEndPreconditioner(model, torch.optim.SGD(model.parameters(), 0.1), n=3)

    With SGD without momentum a step of rate η moves W as one step of rate η on the factors does, up to O(η²); the
    factors' weight decay λ is then n·λ of this optimizer, up to O(η²). With momentum the average is of preconditioned
    gradients, which the factors' own momentum is not. Adam-like optimizers divide by the gradient's size element by
    element, which takes most of the effect away: it runs, but it is no longer this flow.
    A singular value σ moves at a rate of n·σ^{2−2/n}: weights near zero stay there, and a good learning rate is
    another one. Raises ConfigError; a step with a closure too, as it computes gradients of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        n: int = 2,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        every: int = 1,
    ) -> None:
        if n < 1 or every < 1:
            raise ConfigError(
                "the preconditioner cannot be set up so",
                expected="n ≥ 1, every ≥ 1",
                found=f"n {n}, every {every}",
            )
        stepped = {id(one) for group in optimizer.param_groups for one in group["params"]}
        layers = chosen_layers(model, include, exclude)
        self.weights = {name: layer.weight for name, layer in layers.items() if id(layer.weight) in stepped}
        if not self.weights:
            raise ConfigError(
                "the optimizer steps none of these weights",
                expected=", ".join(list(layers)[:3]),
                fix="give the optimizer model.parameters()",
            )
        self.n, self.every = n, every
        self._steps = 0
        self._bases: dict[str, Basis] = {}
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Settings, the step count, and with every > 1 the decompositions in use, by the layers' names."""
        kept = self._bases if self.every > 1 else {}
        bases = {name: {"u": one.u, "s": one.s, "v": one.v} for name, one in kept.items()}
        return {"n": self.n, "every": self.every, "steps": self._steps, "bases": bases}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the object whose state this is. Raises CheckpointError for other settings or layers."""
        try:
            found = {"n": state["n"], "every": state["every"]}
            bases = {name: Basis(**one) for name, one in state["bases"].items()}
            steps = int(state["steps"])
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError("this is not a state of a preconditioner", found=str(error)) from error
        wanted = {"n": self.n, "every": self.every}
        strangers = [
            name
            for name, one in bases.items()
            if name not in self.weights
            or (one.u.shape[0], one.v.shape[0]) != tuple(self.weights[name].flatten(1).shape)
        ]
        if found != wanted or strangers:
            raise CheckpointError(
                "this is the state of another preconditioner",
                expected=f"{wanted}, layers {', '.join(list(self.weights)[:3])} …",
                found=f"{found}" + (f", layer {strangers[0]} of another model" if strangers else ""),
                fix="make it with the same model and settings as before",
            )
        self._steps = steps
        self._bases = {
            name: Basis(*(part.to(self.weights[name].device) for part in (one.u, one.s, one.v)))
            for name, one in bases.items()
        }

    @torch.no_grad()
    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if any(one is not None and one is not optimizer for one in (*args, *kwargs.values())):
            raise ConfigError(
                "the preconditioner cannot see gradients that a closure computes inside of step()",
                expected="loss.backward(), then step() without a closure",
                found=type(optimizer).__name__,
            )
        if self._steps % self.every == 0:
            self._bases = {}
        for name, weight in self.weights.items():
            if weight.grad is None or not bool(weight.grad.isfinite().all()):
                continue  # nothing to do, or for the optimizer (and the user) to see
            if name not in self._bases:
                self._bases[name] = Basis.of(weight)
            weight.grad.copy_(precondition(weight.grad, self._bases[name], self.n))
        self._steps += 1
