"""Watches the entropy of a network's weights, gradients, optimizer moments and activations while it trains."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from efficient_dl.entropy.estimators import (
    RULES,
    Sampler,
    exponent_entropy,
    quantized_entropy,
    range_step,
    rms_step,
    unchanged_share,
)
from efficient_dl.errors import ConfigError

KINDS = ("weights", "gradients", "moments", "activations")
MAX_COLUMNS = 512  # measurements kept for the heat map; of a longer run every second one, and so on
_MAX_BITS = 12  # quantized_entropy tells 2^13 symbols apart
_COLUMNS = (*RULES, "unchanged", "unchanged_bf16")
_log = logging.getLogger(__name__)


class Writer(Protocol):
    """What a TensorBoard SummaryWriter has, and many other loggers."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


@dataclass(frozen=True)
class Row:
    """One tensor at one step; entropies in bits a value; NaN of a tensor with a NaN or an infinity, and of frozen
    as long as the tensor has had no range.

    step: optimizer steps taken. numel: values of the tensor. range, frozen, rms, exponent: the rules of RULES.
    unchanged, unchanged_bf16: of weights, the share of values that the step left as they were, in their own dtype and
    rounded to bfloat16; NaN for other kinds.
    """

    step: int
    kind: str
    name: str
    numel: int
    range: float
    frozen: float
    rms: float
    exponent: float
    unchanged: float
    unchanged_bf16: float


class EntropyObserver:
    """Attach to a model and its optimizer; rows come by themselves at the first step and at every `every`-th.

    model: its parameters and modules are watched; DDP, FSDP2 (each rank its own shard) and plain modules. Activations
        are outputs of modules without children, in the first forward pass of a step that records gradients; inside
        torch.compile'd code they cannot be seen.
    optimizer: one, or several that step one after the other. None: call `before_step` and `after_step` by hand.
    every: optimizer steps between measurements. bits: of the quantizers whose step the rules set, 2 to 12.
    kinds: of KINDS. sample: values looked at in each tensor, always the same ones; range and rms are those of all.
    min_numel: smaller tensors are left out, as too few values have no entropy to speak of.
    writer: gets each row, and each kind's mean over values, by add_scalar. path: a JSON Lines file that grows by a line
        for each row. seed: of the sample.

        with edl.entropy.EntropyObserver(model, optimizer, path="entropy.jsonl") as observer:
            train()
        observer.heat_map("entropy.svg")

    Nothing of the model, its gradients or torch's random state changes. Raises ConfigError.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        every: int = 500,
        bits: int = 8,
        kinds: Iterable[str] = KINDS,
        sample: int = 4096,
        min_numel: int = 1024,
        writer: Writer | None = None,
        path: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        self.kinds = tuple(kinds)
        _check(self.kinds, every, bits, sample)
        self.every, self.bits, self.min_numel = every, bits, min_numel
        self.step = 0  # optimizer steps taken
        self.seconds = 0.0  # that the observer took in all, as the host sees it
        self.rows: list[Row] = []  # of the latest measurement
        self.history: list[list[Row]] = []  # at most MAX_COLUMNS measurements, thinned evenly
        self.skipped: dict[tuple[str, str], str] = {}  # (kind, name): why it has no rows
        self._model, self._writer = model, writer
        self._optimizers = _as_tuple(optimizer)
        self._sampler = Sampler(sample, seed)
        self._frozen: dict[tuple[str, str], Tensor] = {}  # steps, 0-dim, on the tensors' devices
        self._before: dict[str, Tensor] = {}  # samples of weights
        self._found: dict[tuple[str, str], tuple[int, Tensor]] = {}  # numel, _COLUMNS; not fetched yet
        self._file: IO[str] | None = None
        if path is not None:
            self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        self._handles: list[Any] = []
        self._attach()
        if "weights" in self.kinds:
            for name, weight in self._weights():
                self._freeze(("weights", name), *_extremes(weight))

    # ------------------------------------------------------------ the course of a step
    def before_step(self) -> None:
        """Right before the optimizer's step, when the gradients are complete."""
        if not self._due():
            return
        with self._measuring():
            if "gradients" in self.kinds:
                for name, parameter in self._model.named_parameters():
                    if parameter.grad is not None:
                        self._measure("gradients", name, parameter.grad)
            if "weights" in self.kinds:
                self._before = {name: self._sampler(weight) for name, weight in self._weights()}

    def after_step(self) -> None:
        """Right after the optimizer's step."""
        due = self._due()
        self.step += 1
        if not due:
            return
        with self._measuring():
            if "weights" in self.kinds:
                for name, weight in self._weights():
                    self._measure("weights", name, weight, self._before.get(name))
                self._before = {}
            if "moments" in self.kinds:
                for name, moment in self._moments():
                    self._measure("moments", name, moment)
            self._finish()

    def _due(self) -> bool:
        return self.step == 0 or (self.step + 1) % self.every == 0

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        begin = time.perf_counter()
        with torch.no_grad():
            yield
        self.seconds += time.perf_counter() - begin

    # ------------------------------------------------------------ what is watched
    def _attach(self) -> None:
        if self._optimizers:
            first, last = self._optimizers[0], self._optimizers[-1]
            self._handles.append(first.register_step_pre_hook(lambda *_: self.before_step()))
            self._handles.append(last.register_step_post_hook(lambda *_: self.after_step()))
        if "activations" in self.kinds:
            for name, module in self._model.named_modules():
                if not any(module.children()) and not isinstance(module, (nn.Dropout, nn.Identity)):
                    self._handles.append(module.register_forward_hook(self._hook(name, module)))

    def _hook(self, name: str, watched: nn.Module) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if torch.compiler.is_compiling() or not self._due() or not torch.is_grad_enabled():
                return
            if (
                module is not watched or ("activations", name) in self._found
            ):  # a copy carries the hooks along
                return
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(first, Tensor):
                with self._measuring():
                    self._measure("activations", name, first)

        return observe

    def _weights(self) -> list[tuple[str, Tensor]]:
        named = ((name, _local(one)) for name, one in self._model.named_parameters())
        return [(name, one) for name, one in named if self._fits("weights", name, one)]

    def _moments(self) -> Iterable[tuple[str, Tensor]]:
        for name, parameter in self._model.named_parameters():
            for optimizer in self._optimizers:
                state: Mapping[str, Any] = optimizer.state.get(parameter, {})
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        yield f"{name}.{key}", value

    def _fits(self, kind: str, name: str, x: Tensor) -> bool:
        """Whether x is a tensor with an entropy; if not because of what it is, the reason is kept and logged once."""
        reason = None
        if x.layout != torch.strided:
            reason = f"its layout is {x.layout}"
        elif not x.is_floating_point() or x.dtype.itemsize < 2:
            reason = f"its dtype is {x.dtype}"
        if reason is not None and (kind, name) not in self.skipped:
            self.skipped[kind, name] = reason
            _log.warning("entropy of %s of %s is not observed: %s", kind, name, reason)
        return reason is None and x.numel() >= self.min_numel and x.device.type != "meta"

    # ------------------------------------------------------------ measuring
    def _measure(self, kind: str, name: str, x: Tensor, before: Tensor | None = None) -> None:
        """Queue the entropies of x; nothing here waits for a GPU."""
        x = _local(x)
        if not self._fits(kind, name, x):
            return
        numel, values = x.numel(), self._sampler(x)
        population = numel if len(values) < numel else None
        low, high = _extremes(x)
        rms = torch.linalg.vector_norm(x, dtype=torch.float32) / math.sqrt(numel)
        frozen = self._freeze((kind, name), low, high)
        steps = torch.stack([range_step(low, high, self.bits), frozen, rms_step(rms, self.bits)])
        zero = torch.zeros_like(low)
        entropies = quantized_entropy(values, steps, population, torch.stack([low, zero, zero]))
        constant = torch.stack([low == high, zero > 0, rms == 0])  # one symbol, whatever the step
        entropies = entropies.masked_fill(constant, 0.0)
        entropies = torch.cat([entropies, exponent_entropy(values, population).reshape(1)])
        entropies = torch.where(rms.isfinite(), entropies, math.nan)
        if before is None:
            unchanged = entropies.new_full((2,), math.nan)
        else:
            rounded = before.to(torch.bfloat16), values.to(torch.bfloat16)
            unchanged = torch.stack([unchanged_share(before, values), unchanged_share(*rounded)])
        self._found[kind, name] = numel, torch.cat([entropies, unchanged])

    def _freeze(self, key: tuple[str, str], low: Tensor, high: Tensor) -> Tensor:
        """The step of the tensor's first range that is one: a bias of zeros has none at initialization."""
        step = range_step(low, high, self.bits)
        if key in self._frozen:
            known = self._frozen[key].to(step.device)
            step = torch.where((known > 0) & known.isfinite(), known, step)
        self._frozen[key] = step
        return step

    def _finish(self) -> None:
        """Fetch what was measured, all at once, and hand it out."""
        fetched = _fetch({key: values for key, (_, values) in self._found.items()})
        order = {kind: position for position, kind in enumerate(KINDS)}
        self.rows = [
            Row(self.step, kind, name, self._found[kind, name][0], *fetched[kind, name])
            for kind, name in sorted(fetched, key=lambda key: order[key[0]])
        ]
        self._found = {}
        self._miss_activations()
        self._remember()
        self._write()

    def _miss_activations(self) -> None:
        """Say once that there are none, though they are wanted."""
        key = ("activations", "")
        if "activations" not in self.kinds or any(row.kind == "activations" for row in self.rows):
            return
        if key not in self.skipped:
            self.skipped[key] = "no module was seen running"
            _log.warning(
                "no activations were observed at step %d: no watched module ran with gradients recorded "
                "(torch.compile hides them), or none has %d values",
                self.step,
                self.min_numel,
            )

    def _remember(self) -> None:
        if len(self.history) >= MAX_COLUMNS:
            self.history = self.history[::2]
        self.history.append(self.rows)

    def _write(self) -> None:
        if self._file is not None:
            for row in self.rows:
                finite = {key: value if _is_known(value) else None for key, value in asdict(row).items()}
                self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
        if self._writer is not None:
            for row in self.rows:
                for column in _COLUMNS:
                    if _is_known(value := getattr(row, column)):
                        self._writer.add_scalar(f"entropy_{row.kind}_{column}/{row.name}", value, self.step)
            for kind, means in self.means().items():
                for column, value in means.items():
                    self._writer.add_scalar(f"entropy/{kind}_{column}", value, self.step)

    # ------------------------------------------------------------ results
    def means(self) -> dict[str, dict[str, float]]:
        """Of the latest measurement, each kind's means over all its tensors' values, by column."""
        found: dict[str, dict[str, float]] = {}
        for kind in self.kinds:
            rows = [row for row in self.rows if row.kind == kind]
            for column in _COLUMNS:
                known = [(getattr(row, column), row.numel) for row in rows if _is_known(getattr(row, column))]
                if known:
                    total = sum(numel for _, numel in known)
                    mean = sum(value * numel for value, numel in known) / total
                    found.setdefault(kind, {})[column] = mean
        return found

    def heat_map(self, path: str | Path, rule: str = "range") -> None:
        """Draw each tensor's entropy over the steps: a panel for each kind. path: .svg, .png or .pdf."""
        from efficient_dl.entropy.heat_map import draw_heat_map  # matplotlib is slow to import

        draw_heat_map(self.history, path, rule)

    def state_dict(self) -> dict[str, Any]:
        """The steps taken, and the steps that the frozen rule keeps."""
        frozen = _fetch(self._frozen)
        return {
            "step": self.step,
            "bits": self.bits,
            "frozen": [[kind, name, *values] for (kind, name), values in frozen.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another observer of the same model was. Raises ConfigError if it had other bits."""
        if state["bits"] != self.bits:
            raise ConfigError(
                "the observer's state is of another quantizer",
                expected=f"bits = {self.bits}",
                found=f"bits = {state['bits']}",
                fix=f"EntropyObserver(..., bits={state['bits']})",
            )
        self.step = state["step"]
        self._frozen = {(kind, name): torch.tensor(value) for kind, name, value in state["frozen"]}

    def close(self) -> None:
        """Remove all hooks and close the file; results stay. May be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._before, self._found = {}, {}
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> EntropyObserver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check(kinds: tuple[str, ...], every: int, bits: int, sample: int) -> None:
    if unknown := [one for one in kinds if one not in KINDS]:
        raise ConfigError(
            f"there is no kind of tensors {unknown[0]!r}", expected=" | ".join(KINDS), found=unknown[0]
        )
    for name, value, low, high in (
        ("every", every, 1, 2**40),
        ("bits", bits, 2, _MAX_BITS),
        ("sample", sample, 2, 2**30),
    ):
        if not low <= value <= high:
            raise ConfigError(
                f"{name} cannot be {value}", expected=f"at least {low}, at most {high}", found=str(value)
            )


def _as_tuple(optimizer: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    if optimizer is None:
        return ()
    return (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)


def _local(x: Tensor) -> Tensor:
    """This rank's part of a DTensor; other tensors as they are."""
    part = getattr(x, "to_local", None)
    return x.detach() if part is None else part().detach()


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    low, high = x.detach().aminmax()
    return low.float(), high.float()


def _is_known(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _fetch(tensors: Mapping[tuple[str, str], Tensor]) -> dict[tuple[str, str], list[float]]:
    """The tensors' numbers on the host, with one transfer from each device."""
    by_device: dict[torch.device, list[tuple[str, str]]] = {}
    for key, tensor in tensors.items():
        by_device.setdefault(tensor.device, []).append(key)
    fetched: dict[tuple[str, str], list[float]] = {}
    for keys in by_device.values():
        numbers = torch.stack([tensors[key].reshape(-1) for key in keys]).tolist()
        fetched.update(zip(keys, numbers, strict=True))
    return {key: fetched[key] for key in tensors}
