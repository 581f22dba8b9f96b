"""A small transformer under FSDP2, with dimensions that no number of ranks divides."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import efficient_dl as edl

VOCABULARY, WIDTH, STEPS = 61, 36, 4


class Block(nn.Module):
    """Attention and a network of an odd width; `spare` takes part only if asked to."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.up = nn.Linear(WIDTH, inner)
        self.down = nn.Linear(inner, WIDTH)
        self.spare = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, spare: bool) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.down(F.gelu(self.up(x)))
        return x + self.spare(x) if spare else x


class Transformer(nn.Module):
    """Two blocks, a tied head, one parameter of a single value."""

    def __init__(self, inner: int = 101) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(inner) for _ in range(2))
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, spare: bool = True) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, spare)
        return self.head(x * self.gain)


@dataclass(frozen=True)
class Case:
    """How a run differs from the plain one."""

    reshard: bool = True
    accumulate: int = 1
    clip: float | None = None
    frozen: bool = False
    bfloat16: bool = False
    reduce_bfloat16: bool = False
    unused: bool = False
    keep_zeros: bool = False
    prefetch: bool = False
    steps: int = STEPS


def sharded(case: Case = Case(), **options: Any) -> Transformer:
    """The documented pattern: every layer, then the model."""
    torch.manual_seed(7)
    model = Transformer()
    model.layers[0].up.requires_grad_(not case.frozen)
    options["reshard_after_forward"] = case.reshard
    if case.bfloat16:
        reduce = torch.bfloat16 if case.reduce_bfloat16 else torch.float32
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce)
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    assert isinstance(model, FSDPModule)
    if case.prefetch:
        model.set_modules_to_forward_prefetch([model.layers[0]])
        model.layers[0].set_modules_to_forward_prefetch([model.layers[1]])
        for module in (model, *model.layers):
            module._set_unshard_async_op(True)
    return model


def batch(rank: int, number: int) -> Tensor:
    """Tokens that repeat with a period, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1000 * number + rank)
    start = torch.randint(0, VOCABULARY, (4, 1), generator=generator)
    return (start + 7 * torch.arange(17)) % VOCABULARY


def loss_of(model: nn.Module, tokens: Tensor, spare: bool = True) -> Tensor:
    """The next token's cross entropy."""
    logits = model(tokens[:, :-1], spare)
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def step(rank: int, number: int, model: Any, optimizer: torch.optim.Optimizer, case: Case = Case()) -> float:
    """One step of the optimizer; returns the last loss."""
    optimizer.zero_grad(set_to_none=not case.keep_zeros)
    for turn in range(case.accumulate):
        model.set_requires_gradient_sync(turn == case.accumulate - 1)
        loss = loss_of(model, batch(rank, case.accumulate * number + turn), spare=not case.unused)
        loss.backward()
    if case.clip:
        nn.utils.clip_grad_norm_(model.parameters(), case.clip)
    optimizer.step()
    return float(loss.detach())


def full(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, whole, on every rank; plain copies."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def train(
    rank: int, bits: str | float | None, case: Case = Case(), **options: Any
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any], list[float]]:
    """Parameters, this rank's and all ranks' stats, losses; bits None leaves FSDP2 alone."""
    model = sharded(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)  # else slow with DTensors
    compression: Any = None
    if bits is not None:
        compression = edl.compress(model, optimizer, bits, check_every=2, **options)
    losses = [step(rank, number, model, optimizer, case) for number in range(case.steps)]
    parameters = full(model)
    if compression is None:
        return parameters, {}, {}, losses
    stats, total = compression.stats(), compression.stats(all_ranks=True)
    with contextlib.closing(compression):
        return parameters, stats, total, losses


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of parameters are equal, bit by bit."""
    return a.keys() == b.keys() and all(
        torch.equal(a[name].view(-1).view(torch.uint8), b[name].view(-1).view(torch.uint8)) for name in a
    )
