"""A linear layer and its loss in one, chunk by chunk: the logits of a large vocabulary are never all in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from efficient_dl.errors import ConfigError
from efficient_dl.objectives.formulas import Formula
from efficient_dl.objectives.rows import Options, computed, divisor, row_losses

CHUNK_BYTES = (
    2**25
)  # of float32 logits: large enough to keep a GPU busy, small beside a large model's activations


def linear_objective(
    formula: Formula,
    hidden: Tensor,
    projection: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """objective(formula, hidden @ projectionᵀ + bias, target, ...) without rows × K numbers in memory.

    hidden: (..., width), as a model's last norm returns it. projection: (K, width), the unembedding. bias: (K).
    target: classes (...), or probabilities (..., K). The other arguments are those of `functional.objective`, except
    that reduction is "mean" or "sum". chunk_rows: rows whose logits exist at once (default: CHUNK_BYTES of them).
    Returns a 0-dim float32 (float64 for float64). The gradients are computed in the forward pass, with one matrix
    product for each chunk, and kept until backward: as much as hidden, and K × width in float32, in which the
    chunks' gradients are added up. Under autocast the products are in its dtype. Gradients of gradients are an error.
    """
    options = Options(weight, ignore_index, reduction, label_smoothing)
    _check(hidden, projection, target, reduction, chunk_rows)
    hidden = hidden.flatten(0, -2)
    target = target.reshape(-1, projection.shape[0]) if target.is_floating_point() else target.reshape(-1)
    rows = chunk_rows or max(1, CHUNK_BYTES // (4 * projection.shape[0]))
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, projection = hidden.to(dtype), projection.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        if not torch.is_grad_enabled():
            one_pass = _Pass(formula, options, rows, hidden, projection, bias, target)
            return one_pass.sum((False, False, False)) / one_pass.divisor
        return _LinearObjective.apply(formula, options, rows, target, hidden, projection, bias)


class _Pass:
    """One pass over all chunks: the sum of the rows' losses and its gradients, not yet divided by the divisor.

    Undivided, the logits' gradients are of order 1, and float16 holds them without a GradScaler's help.
    """

    def __init__(
        self,
        formula: Formula,
        options: Options,
        rows: int,
        hidden: Tensor,
        projection: Tensor,
        bias: Tensor | None,
        target: Tensor,
    ) -> None:
        self.formula, self.options, self.rows = formula, options, rows
        self.hidden, self.projection, self.bias, self.target = hidden, projection, bias, target
        self.exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.divisor = divisor(target, options, self.exact)
        self.grads: list[Tensor | None] = [None, None, None]  # of hidden, projection, bias

    def sum(self, needed: tuple[bool, bool, bool]) -> Tensor:
        """The sum of the rows' losses; `grads` becomes its gradients, those that are needed."""
        if needed[0]:
            self.grads[0] = torch.empty_like(self.hidden)
        if needed[1]:
            self.grads[1] = torch.zeros_like(self.projection, dtype=self.exact)
        if needed[2] and self.bias is not None:
            self.grads[2] = torch.zeros_like(self.bias, dtype=self.exact)
        total = self.hidden.new_zeros((), dtype=self.exact)
        for start in range(0, self.hidden.shape[0], self.rows):
            total += self._chunk(slice(start, start + self.rows), any(needed))
        return total

    def _chunk(self, part: slice, differentiate: bool) -> Tensor:
        hidden = self.hidden[part]
        logits = F.linear(hidden, self.projection, self.bias).detach()
        with torch.set_grad_enabled(differentiate):
            logits.requires_grad_(differentiate)
            loss = row_losses(self.formula, computed(logits), self.target[part], self.options).sum()
        if differentiate:
            (grad,) = torch.autograd.grad(loss, logits)
            of_hidden, of_projection, of_bias = self.grads
            if of_hidden is not None:
                torch.mm(grad, self.projection, out=of_hidden[part])
            if of_projection is not None:
                of_projection += grad.t() @ hidden
            if of_bias is not None:
                of_bias += grad.sum(0, dtype=self.exact)
        return loss.detach()


class _LinearObjective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        formula: Formula,
        options: Options,
        rows: int,
        target: Tensor,
        hidden: Tensor,
        projection: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        one_pass = _Pass(formula, options, rows, hidden, projection, bias, target)
        _, _, _, _, *needed = ctx.needs_input_grad
        total = one_pass.sum((needed[0], needed[1], needed[2]))
        ctx.save_for_backward(one_pass.divisor, *one_pass.grads)
        ctx.dtypes = [None if one is None else one.dtype for one in (hidden, projection, bias)]
        return total / one_pass.divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        divisor, *saved = ctx.saved_tensors
        scale = grads[0] / divisor
        scaled = [
            None if one is None else (one * scale).to(dtype)
            for one, dtype in zip(saved, ctx.dtypes, strict=True)
        ]
        return None, None, None, None, *scaled


def _check(
    hidden: Tensor, projection: Tensor, target: Tensor, reduction: str, chunk_rows: int | None
) -> None:
    if reduction == "none":
        raise ConfigError(
            "a fused loss has no gradient for each row apart",
            expected="mean | sum",
            found="none",
            fix="reduction='sum', or compute the logits and use `objective`",
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise ConfigError("a chunk needs rows", expected="chunk_rows >= 1", found=str(chunk_rows))
    if hidden.dim() < 2 or projection.dim() != 2 or hidden.shape[-1] != projection.shape[1]:
        raise ValueError(
            f"hidden of shape {tuple(hidden.shape)} for a projection of shape {tuple(projection.shape)}: "
            "expected (..., width) and (classes, width)"
        )
    expected = (*hidden.shape[:-1], projection.shape[0]) if target.is_floating_point() else hidden.shape[:-1]
    if target.shape != torch.Size(expected):
        raise ValueError(f"targets of shape {tuple(target.shape)}, expected {tuple(expected)}")
