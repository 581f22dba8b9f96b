"""The tensors that the codec benchmark measures: gradients, weights and weight updates of short training runs.

They are real and not drawn from a distribution, because a codec's ratio and speed depend on how values cluster and on
exact zeros. Training takes about two minutes; the result is kept in a file, under a key made of its settings.
"""

from __future__ import annotations

import hashlib
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from efficient_dl.codec import Side
from efficient_dl.config import Config, with_overrides
from efficient_dl.data import Dataset, load_data
from efficient_dl.errors import DataError
from efficient_dl.models import build_model
from efficient_dl.models.build import count_parameters

MOMENTS = ("start", "middle", "end")
GAUSSIAN_STD = 0.02  # of the weights that GPT-2 starts from
CACHE_VERSION = 1  # to be raised when this file trains differently


@dataclass(frozen=True)
class Recipe:
    """Settings of the two runs.

    stream: gradients of so many last GPT steps are also kept, one behind the other, where a single one is too short.
    """

    gpt_size: str = "mini"
    gpt_steps: int = 200
    cnn_steps: int = 400
    stream: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.gpt_steps, self.cnn_steps) < 4:
            raise ValueError("start, middle and end of a training are three steps: at least 4 are needed")

    def key(self, data: Dataset, images: Dataset) -> str:
        """Hash of what the tensors depend on; torch's and Python's versions move their last bits."""
        versions = (CACHE_VERSION, torch.__version__, platform.python_version(), platform.machine())
        content = f"{asdict(self)} {data.fingerprint} {images.name} {images.fingerprint} {versions}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class NamedTensor:
    """A flat tensor and the lengths of the parameters in it."""

    name: str
    values: Tensor
    segments: tuple[int, ...]

    @property
    def side(self) -> Side:
        """What a codec is told about it."""
        return Side(segments=self.segments)

    def to(self, dtype: torch.dtype) -> NamedTensor:
        """The same in another precision, which the name then says."""
        short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        return NamedTensor(f"{self.name}, {short}", self.values.to(dtype), self.segments)

    def first(self, numel: int) -> NamedTensor:
        """At most its first numel values."""
        left, segments = numel, list[int]()
        for length in self.segments:
            if left > 0:
                segments.append(min(length, left))
            left -= length
        return NamedTensor(self.name, self.values[:numel], tuple(segments))

    def tiled(self, num_bytes: int) -> NamedTensor:
        """Repeated or cut to num_bytes, for timing only: never for a ratio, because repeats compress.

        The full run's tensors repeat after 3 MB and more, beyond what LZ4 and zstd up to level 3 look back (2 MiB).
        """
        numel = num_bytes // self.values.element_size()
        repeats = -(-numel // self.values.numel())
        whole = NamedTensor(self.name, self.values.repeat(repeats), self.segments * repeats)
        return whole.first(numel)


@dataclass(frozen=True)
class Delta:
    """bfloat16 weights before and after an optimizer step, and the lengths of the parameters in them."""

    name: str
    before: Tensor
    after: Tensor
    segments: tuple[int, ...]

    @property
    def changed(self) -> Tensor:
        """bool, where the two differ in any bit."""
        return self.before.view(torch.int16) != self.after.view(torch.int16)


class Trained:
    """What the runs left: float32 tensors by "model, what, moment"."""

    def __init__(
        self, tensors: dict[str, Tensor], segments: dict[str, tuple[int, ...]], labels: dict[str, str]
    ) -> None:
        self._tensors = tensors
        self._segments = segments
        self._labels = labels

    def gradient(self, model: str, moment: str) -> NamedTensor:
        """model: "gpt" or "cnn"; moment: of MOMENTS, or "stream" for the gpt's last steps."""
        return self._named(model, "gradient", moment)

    def weight(self, model: str, moment: str) -> NamedTensor:
        """The weights before the step of that moment."""
        return self._named(model, "weight", moment)

    def delta(self, model: str, moment: str) -> Delta:
        """The weights around the step of that moment, each rounded to bfloat16 from fp32 master weights."""
        before, after = (self._named(model, what, moment) for what in ("weight", "weight after"))
        name = f"{self._labels[model]} step, {moment}"
        return Delta(name, before.values.bfloat16(), after.values.bfloat16(), before.segments)

    def delta_of_density(self, density: float, numel: int, seed: int = 0) -> Delta:
        """The gpt's last weights after an update so small that bfloat16 rounding decides which of them change.

        density: share of the values that change, 0 to 1. The weights are repeated to numel values; the updates are
        the last step's real ones (AdamW), in each repeat rotated by another offset and with other signs, and times
        one factor, found by bisection. At density 1 the factor changes nine in ten, and the rest is moved to the
        next bfloat16: updates near zero never change a weight, so no factor reaches all.
        """
        weight = self._named("gpt", "weight", "end")
        update = self._named("gpt", "weight after", "end").values - weight.values
        generator = torch.Generator().manual_seed(seed)
        repeats = -(-numel // update.numel())
        offsets = torch.randint(0, update.numel(), (repeats,), generator=generator).tolist()
        signs = torch.randint(0, 2, (repeats * update.numel(),), generator=generator, dtype=torch.int8)
        updates = torch.cat([update.roll(offset) for offset in offsets]) * (signs * 2 - 1)
        before = weight.tiled(4 * numel)
        after = _move(before.values, updates[:numel], density)
        name = f"{self._labels['gpt']} weights, {100 * density:g} % changed"
        return Delta(name, before.values.bfloat16(), after, before.segments)

    def _named(self, model: str, what: str, moment: str) -> NamedTensor:
        values = self._tensors[f"{model}, {what}, {moment}"]
        segments = self._segments[model]
        name = f"{self._labels[model]} {what}, {moment}"
        return NamedTensor(name, values, segments * (values.numel() // sum(segments)))


def gaussian_weights(num_bytes: int, seed: int = 0) -> NamedTensor:
    """bfloat16 values of a normal distribution: the usual stand-in for weights."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_bytes // 2, generator=generator).mul_(GAUSSIAN_STD).bfloat16()
    return NamedTensor(f"gaussian {num_bytes / 2**20:g} MiB, bf16", values, (values.numel(),))


def trained_tensors(recipe: Recipe, cache: Path | None) -> Trained:
    """Trains the two models, or reads what an earlier call with the same settings left in the file `cache`."""
    gpt = with_overrides(Config(), [f"model.size={recipe.gpt_size}", f"train.seed={recipe.seed}"])
    data = load_data(gpt.data, context=gpt.model.context, seed=recipe.seed)
    images = _images(recipe.seed)
    key = recipe.key(data, images)
    labels = {"gpt": f"gpt-{recipe.gpt_size}", "cnn": f"cnn ({images.name})"}
    if cache is not None and cache.is_file():
        found = torch.load(cache, weights_only=True)
        if found["key"] == key:
            return Trained(found["tensors"], found["segments"], labels)
    tensors, segments = dict[str, Tensor](), dict[str, tuple[int, ...]]()
    runs = (
        ("gpt", build_model(gpt.model, data.spec, recipe.seed), data, recipe.gpt_steps, recipe.stream),
        ("cnn", PlainCNN(images.spec.shape, images.spec.classes, recipe.seed), images, recipe.cnn_steps, 1),
    )
    for name, model, batches, steps, stream in runs:
        tensors |= _train(name, model, batches, steps, stream)
        segments[name] = tuple(p.numel() for p in model.parameters())
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"key": key, "tensors": tensors, "segments": segments}, cache)
    return Trained(tensors, segments, labels)


class PlainCNN(nn.Module):
    """Two convolutions and two linear layers with ReLU between, without batch norm: 1.6 M parameters on 28 × 28.

    Its gradients have the exact zeros of ReLU networks: weights behind an input that was zero in the whole batch. The
    embedded vgg8b and resnet18 have almost none (0 to 0.3 % after 100 steps), because batch norm keeps every
    unit alive.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, seed: int) -> None:
        super().__init__()
        channels, height, width = shape
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.features = nn.Sequential(
                nn.Conv2d(channels, 32, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(32, 64, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )
            self.hidden = nn.Linear(64 * (height // 4) * (width // 4), 512)
            self.head = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: float (batch, channels, height, width). Returns logits (batch, classes)."""
        return self.head(F.relu(self.hidden(self.features(x).flatten(1))))


def _images(seed: int) -> Dataset:
    """Fashion-MNIST where it is on this machine, scikit-learn's digits where not; tables and rows say which."""
    config = with_overrides(Config(), ["data.name=fashion-mnist", "data.download=false"])
    try:
        return load_data(config.data, seed=seed)
    except DataError:
        return load_data(with_overrides(Config(), ["data.name=digits"]).data, seed=seed)


def _train(name: str, model: nn.Module, data: Dataset, steps: int, stream: int) -> dict[str, Tensor]:
    """AdamW at 1e-3, cosine to a tenth, 32 images or 8 texts a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    batch_size = 8 if data.spec.kind == "tokens" else 32
    moments = dict(zip((1, steps // 2, steps), MOMENTS, strict=True))
    taken, last = dict[str, Tensor](), list[Tensor]()
    label = f"train {name}, {count_parameters(model):,} parameters"
    with typer.progressbar(range(1, steps + 1), label=label) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (0.55 + 0.45 * math.cos(math.pi * step / steps))
            inputs, targets = data.train_batch(step - 1, 0, 1, batch_size, 1, 0)
            optimizer.zero_grad()
            logits = model(inputs)
            F.cross_entropy(logits.flatten(0, -2), targets.flatten()).backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            if step > steps - stream:
                last.append(gradient)
            if step not in moments:
                optimizer.step()
                continue
            taken[f"{name}, gradient, {moments[step]}"] = gradient
            taken[f"{name}, weight, {moments[step]}"] = _flat_weights(model)
            optimizer.step()
            taken[f"{name}, weight after, {moments[step]}"] = _flat_weights(model)
    if stream > 1:
        taken[f"{name}, gradient, stream"] = torch.cat(last)
    return taken


def _flat_weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _move(weights: Tensor, updates: Tensor, density: float) -> Tensor:
    """bfloat16 of weights + factor * updates, the factor such that a share `density` of them changes."""
    before = weights.bfloat16().view(torch.int16)
    every = max(1, weights.numel() // 2**20)
    some, some_updates, some_before = weights[::every], updates[::every], before[::every]
    wanted = 0.9 if density >= 1 else density
    low, high = -30.0, 30.0
    for _ in range(40):
        middle = (low + high) / 2
        moved = torch.add(some, some_updates, alpha=2.0**middle).bfloat16().view(torch.int16)
        share = float((moved != some_before).float().mean())
        low, high = (middle, high) if share < wanted else (low, middle)
    after = torch.add(weights, updates, alpha=2.0**high).bfloat16()
    if density >= 1:
        bits = after.view(torch.int16)
        bits += (bits == before).to(
            torch.int16
        )  # the next bit pattern is the next value: none is near infinity
    return after
