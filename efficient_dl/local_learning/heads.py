"""Auxiliary heads: from a partition's features to logits for its local loss. They are dropped at export."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from efficient_dl.config import suggestion
from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.head_layers import classifier, fitting, new_copy, shapes_along
from efficient_dl.local_learning.pieces import Piece

AUGLOCAL_DEPTH = 2
CAUSAL_BLOCKS = 1
# Of the flattened features that predsim's linear layer sees: --dim-in-decoder of the published runs of VGG8B on
# Fashion-MNIST (Nøkland & Eidnes 2019, arXiv 1901.06656).
PREDSIM_FEATURES = 1024


class CutModel(Protocol):
    """What a head must know of a model that has been cut: partition.Partitions is one."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def pieces(self) -> Sequence[Piece]: ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class HeadCosts:
    """What a head adds to its partition. flops: of one batch, a multiplication and an addition counted as two."""

    parameters: int
    parameter_bytes: int
    forward_flops: int
    backward_flops: int


@dataclass(frozen=True)
class _Request:
    """All that a builder may use: the pieces of the partition and those after it but the last, which classifies."""

    kind: str
    number: int | None  # after the colon
    model: nn.Module
    own: Sequence[nn.Module]
    rest: Sequence[nn.Module]
    remaining: float  # 1.0 for the first partition, then falling linearly to 0.0 for the last
    features: Tensor  # two samples
    classes: int
    unit: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.features.shape[1:])


def make_head(
    kind: str, index: int, partitions: CutModel, features: Tensor, classes: int, unit: str, seed: int
) -> nn.Module:
    """The auxiliary head of partition `index`, on the features' device, in training mode.

    kind:
      "linear"    norm, global pooling for images, a linear layer.
      "auglocal"  or "auglocal:DEPTH": up to DEPTH (2) layers sampled evenly from the rest of the network, fewer the
                  later the partition, then as "linear". The layers are new copies of later pieces, with pooling and a
                  1 × 1 or linear projection in front where shapes differ. After AugLocal, Ma et al., ICLR 2024.
      "predsim"   logits by pooling to at most 1,024 features and a linear layer, and features for similarity matching;
                  needs objectives.PredSim. After Nøkland & Eidnes 2019.
      "causal:N"  for tokens: N (1) new blocks like the model's own, norm and output layer.
      "deep"      none: the partition learns from the last one's loss alone.
    features: a batch that the partition has put out, (batch, ...). unit: "tokens", logits at every position, or
    "samples". The last partition has no head, whatever the kind: its output are logits.

    The initial values depend on (kind, index, seed, shapes) alone; torch's generator is neither read nor changed, nor
    is the model. Raises ConfigError for a kind that does not exist or does not fit.
    """
    name, number = _parse(kind)
    if unit not in ("tokens", "samples"):
        raise ConfigError("unknown unit of predictions", expected="tokens | samples", found=unit)
    if index == len(partitions) - 1 or name == "deep":
        return nn.Identity()
    own, rest = _split(partitions, index)
    dtype = next((p.dtype for p in partitions.model.parameters() if p.is_floating_point()), features.dtype)
    request = _Request(
        kind=kind,
        number=number,
        model=partitions.model,
        own=own,
        rest=rest[:-1],
        remaining=(len(partitions) - 1 - index) / (len(partitions) - 1),
        features=features[:2].detach().to(dtype),
        classes=classes,
        unit=unit,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_seed(kind, index, seed))
        head = _KINDS[name](request).to(features.device, dtype).train()
        if unit == "tokens":
            _check_causal(head, request)
    return head


def head_costs(head: nn.Module, features: Tensor) -> HeadCosts:
    """Counted on a copy of the head, forward and backward over these features; the head stays as it is."""
    probe = copy.deepcopy(head)
    parameters = list(head.parameters())
    inputs = features.detach().clone().requires_grad_(True)
    if parameters:
        inputs = inputs.to(parameters[0].dtype)
    devices = [features.device] if features.device.type == "cuda" else []
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        with forward:
            out = probe(inputs)
            total = sum(one.float().sum() for one in (out if isinstance(out, tuple) else (out,)))
        with backward:
            if isinstance(total, Tensor):
                total.backward()
    return HeadCosts(
        parameters=sum(p.numel() for p in parameters),
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        forward_flops=forward.get_total_flops(),
        backward_flops=backward.get_total_flops(),
    )


class PredSimHead(nn.Module):
    """Features to (logits, features for similarity matching): two branches, both trained by objectives.PredSim.

    Images: a 3 × 3 convolution without bias that keeps the channels, beside pooling to at most 1,024 numbers and a
    linear layer. Vectors: a linear layer of the same width, beside a linear layer. Those to the logits begin at zero.
    """

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.pool: nn.Module = nn.Identity()
        numel = shape[0]
        if len(shape) == 3:
            self.matching: nn.Module = nn.Conv2d(shape[0], shape[0], 3, padding=1, bias=False)
            side = max(1, math.isqrt(PREDSIM_FEATURES // shape[0]))
            pooled = (min(side, shape[1]), min(side, shape[2]))
            self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(pooled), nn.Flatten())
            numel *= pooled[0] * pooled[1]
        else:
            self.matching = nn.Linear(numel, numel, bias=False)
        self.output = nn.Linear(numel, classes)
        nn.init.zeros_(self.output.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.output(self.pool(x)), self.matching(x)


def _linear(request: _Request) -> nn.Module:
    return nn.Sequential(*classifier(request.shape, request.classes, request.unit))


def _auglocal(request: _Request) -> nn.Module:
    # The last piece of the model is left out: it classifies, as the head's own last layers do. So are pieces without
    # parameters: the pooling in front of a sampled layer brings the sides to what the layer sees in the network.
    shapes = shapes_along(request.rest, request.features)
    layered = [
        (piece, shapes[position], shapes[position + 1])
        for position, piece in enumerate(request.rest)
        if any(True for _ in piece.parameters())
    ]
    depth = AUGLOCAL_DEPTH if request.number is None else request.number
    depth = min(len(layered), math.ceil(depth * request.remaining))
    layers: list[nn.Module] = []
    shape = request.shape
    for step in range(depth):
        piece, wanted, put_out = layered[int((step + 0.5) * len(layered) / depth)]
        layers += [*fitting(shape, wanted), new_copy(piece, request.model)]
        shape = put_out
    return nn.Sequential(*layers, *classifier(shape, request.classes, request.unit))


def _predsim(request: _Request) -> nn.Module:
    if request.unit != "samples" or len(request.shape) not in (1, 3):
        raise ConfigError(
            "predsim compares the samples of a batch, and these features are no samples' vectors or images",
            expected="samples with features (channels, height, width) or (width,)",
            found=f"{request.unit} with features {request.shape}",
            fix='take the head "causal:1" for language models, "linear" otherwise',
        )
    return PredSimHead(request.shape, request.classes)


def _causal(request: _Request) -> nn.Module:
    if request.unit != "tokens":
        raise ConfigError(
            "a causal head is one for language models",
            expected="tokens",
            found=request.unit,
            fix='take the head "auglocal" or "predsim"',
        )
    number = CAUSAL_BLOCKS if request.number is None else request.number
    block = _block_like(request)
    blocks = [new_copy(block, request.model) for _ in range(number)]
    return nn.Sequential(*blocks, *classifier(request.shape, request.classes, request.unit))


def _block_like(request: _Request) -> nn.Module:
    """The nearest piece that keeps the features' shape: behind the cut, else before it."""
    for piece in (*request.rest, *reversed(request.own)):
        if any(isinstance(part, nn.Embedding) for part in piece.modules()):
            continue
        has_parameters = any(True for _ in piece.parameters())
        if has_parameters and shapes_along([piece], request.features)[1] == request.shape:
            return piece
    raise ConfigError(
        "the model has no block that a causal head could be made like",
        expected=f"a piece from features of shape {request.shape} to the same shape, near the cut",
        found=f"{len(request.rest)} pieces behind the cut, {len(request.own)} before it",
        fix='take the head "linear"',
    )


_KINDS: dict[str, Callable[[_Request], nn.Module]] = {
    "linear": _linear,
    "auglocal": _auglocal,
    "predsim": _predsim,
    "causal": _causal,
    "deep": _linear,  # never built: see make_head
}
_TAKE_NUMBER = ("auglocal", "causal")


def _parse(kind: str) -> tuple[str, int | None]:
    """("auglocal", 3) of "auglocal:3"."""
    name, colon, text = kind.partition(":")
    if name not in _KINDS:
        raise ConfigError(f"unknown head {kind!r}", fix=suggestion(name, _KINDS))
    if not colon:
        return name, None
    if name not in _TAKE_NUMBER or not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"the head {kind!r} cannot be read",
            expected="auglocal:DEPTH or causal:BLOCKS, a whole number from 1 on; the others take none",
            found=kind,
        )
    return name, int(text)


def _split(partitions: CutModel, index: int) -> tuple[list[nn.Module], list[nn.Module]]:
    """(modules of the partition's pieces, of all pieces after it)."""
    inside = {id(module) for module in partitions[index].module.modules()}
    modules = [piece.module for piece in partitions.pieces]
    own = [position for position, module in enumerate(modules) if id(module) in inside]
    return [modules[position] for position in own], modules[own[-1] + 1 :]


def _seed(kind: str, index: int, seed: int) -> int:
    digest = hashlib.sha256(f"head {kind} of partition {index}, seed {seed}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _check_causal(head: nn.Module, request: _Request) -> None:
    """Raise ConfigError if a position's logits depend on a later one: the head would copy its answer from there."""
    features = request.features[:1]
    if features.shape[1] < 2:
        return
    changed = features.clone()
    changed[:, -1] = -changed[:, -1] + 1
    head.eval()
    with torch.no_grad():
        before, after = head(features)[:, :-1], head(changed)[:, :-1]
    head.train()
    if not torch.allclose(before, after, rtol=1e-4, atol=1e-5):
        raise ConfigError(
            "the head looks ahead: the logits at a position change with the features of a later one",
            expected="causal layers, as in the model's blocks",
            found=f"the head {request.kind!r} of {type(request.model).__name__}",
            fix='take the head "linear", or blocks that mask later positions by themselves',
        )
