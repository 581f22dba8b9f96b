"""End-to-end training: backprop through the whole model, gradients averaged over all ranks by DDP."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from efficient_dl.comm import parameter_scalars, total_scalars
from efficient_dl.comm.measurements import Measurements
from efficient_dl.comm.plan import Messages, Scale
from efficient_dl.comm.planner import PlannerOptions
from efficient_dl.config import Config
from efficient_dl.config.schema import BITS_WORDS
from efficient_dl.data import Dataset
from efficient_dl.integrations.auto import AutoOptions, planned_bucket_bytes
from efficient_dl.integrations.ddp import compress_ddp
from efficient_dl.integrations.ddp_compression import Compression
from efficient_dl.integrations.feedback import automatic_scale
from efficient_dl.integrations.nodes import ways
from efficient_dl.training import measure, resume
from efficient_dl.training.checkpoint import Checkpoint
from efficient_dl.training.console import Progress
from efficient_dl.training.entropy_log import EntropyLog
from efficient_dl.training.fused import fused_head
from efficient_dl.training.optimizers import Optimizer
from efficient_dl.training.run_loop import RunLoop
from efficient_dl.training.run_model import build_run_model
from efficient_dl.training.schedule import learning_rate
from efficient_dl.training.task import evaluate_batch, predictions


class Trainer(RunLoop):
    """Every rank holds the whole model and takes its share of each batch."""

    def __init__(self, config: Config, data: Dataset, device: torch.device, progress: Progress) -> None:
        super().__init__(config, data, device, progress)
        self.label = f"bits {config.compression.bits}"
        self.model = build_run_model(config, data.spec, device)
        self.optimizer = Optimizer(self.model, config.optimizer)
        self.fused = fused_head(config, data.spec, self.task)
        persistent = self.model.state_dict().keys()
        self.trained_buffers = [one for name, one in self.model.named_buffers() if name in persistent]

    def _prepare(self) -> None:
        """Measure the computation alone, then wrap the model: DDP, and the compression in its all-reduce."""
        measure.reset_peak_memory(self.device)
        self.compute_seconds = self.measured_compute().seconds
        self.ddp = DistributedDataParallel(
            self.model, device_ids=[self.device] if self._on_gpu else None, **self._ddp_arguments()
        )
        self._settle_buckets()
        self.compression = self._compress()
        self.entropy = EntropyLog(self.config, self.model, self.optimizer, self.folder)
        torch.manual_seed(
            self.config.train.seed + 1_000_003 * (self.rank + 1)
        )  # dropout differs between ranks

    def measured_compute(self) -> measure.Compute:
        """A step's forward and backward passes without communication; all ranks measure together."""
        return measure.compute(self.model, self.device, lambda: self.backward(self.model))

    def _ddp_arguments(self) -> dict[str, Any]:
        # DDP sends rank 0's buffers in every forward pass; only those that training changes are worth that.
        arguments: dict[str, Any] = sync_buffers_argument(bool(self.trained_buffers))
        if self.measurements is not None and (size := self._bucket_bytes(self.measurements)):
            arguments["bucket_cap_mb"] = size / 2**20
        return arguments

    def _bucket_bytes(self, measurements: Measurements) -> int:
        """What the planner wants, 0: DDP's own. A resumed run has the same measurements, and so the same buckets."""
        if not measurements.ready:
            return 0  # recorded by a version that left buckets to DDP
        scale = scale_of(self.config, self.optimizer, self.device)
        planner = planner_options(self.config, hierarchy_wish(self.config), self.world_size, scale)
        options = AutoOptions(self.config.compression.floor_bits, planner=planner)
        return planned_bucket_bytes(dict(self.model.named_parameters()), measurements, options)

    def _settle_buckets(self) -> None:
        """Let DDP arrange its buckets before the first step, so that every step of every run has the same ones.

        DDP rebuilds its buckets in the order in which gradients arrived in the first backward pass. A quantizer's
        shards follow the buckets, so without this the first step after a resume would differ in its bits.
        """
        with measure.untouched(self.model, self.device):
            self.backward(self.ddp)

    def _compress(self) -> Compression:
        """Put the compression into DDP's all-reduce; for bits = "none" it only counts."""
        extra = {"data": self.data.fingerprint}
        compression = compressed(self.ddp, self.optimizer, self.config, extra, self.measurements)
        self._plans_logged = len(compression.plans)  # the first one is in plan.json
        return compression

    def _train_step(self) -> dict[str, Tensor | float]:
        """One optimizer step on accumulate × batch_size samples of this rank; returns a row of metrics."""
        lr = learning_rate(self.config.optimizer, self.step, self.config.train.steps)
        row: dict[str, Tensor | float] = {"lr": lr}
        with self.clock.step():
            row["loss"] = self.backward(self.ddp)
            self.watch.at("update", self.step + 1)
            if self.config.optimizer.clip > 0:
                row["grad_norm"] = clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip)
            self.optimizer.step(lr)
            self.optimizer.zero_grad()
        self.step += 1
        self.entropy.write(self.step)
        return row

    def _between_steps(self) -> None:
        """Log a change of plan, before a checkpoint of the same step is written."""
        plans = self.compression.plans
        for one in plans[self._plans_logged :]:
            self.folder.log_event(PLAN_EVENT, one)
        self._plans_logged = len(plans)

    def backward(self, model: nn.Module) -> Tensor:
        """Forward and backward over this rank's batches of the step; DDP reduces after the last one. The mean loss."""
        accumulate = self.config.train.accumulate
        total = torch.zeros((), device=self.device)
        for part in range(accumulate):
            self.watch.at(f"forward {part}" if accumulate > 1 else "forward", self.step + 1)
            inputs, targets = self._batch(part)
            waiting = part < accumulate - 1 and isinstance(model, DistributedDataParallel)
            with self.ddp.no_sync() if waiting else contextlib.nullcontext():
                loss = self._loss(model, inputs, targets) / accumulate
                self.watch.at(
                    "backward, with gradients' all-reduce" if not waiting else "backward", self.step + 1
                )
                loss.backward()
            total += loss.detach()
        return total

    def _loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        with self._autocast():
            if self.fused is not None:
                return self.fused.loss(model, inputs, targets)
            outputs = model(inputs)
        return self.task.loss(outputs, targets)

    def _batch(self, part: int) -> tuple[Tensor, Tensor]:
        config = self.config
        inputs, targets = self.data.train_batch(
            self.step, self.rank, self.world_size, config.data.batch_size, config.train.accumulate, part
        )
        return self._on_device(inputs), self._on_device(targets)

    @torch.no_grad()
    def _evaluate(self) -> None:
        """The mean loss and metrics over the evaluation's batches, dealt out to the ranks in turn."""
        config = self.config
        self._sync_buffers()
        self.model.eval()
        sums: dict[str, float] = {}
        for index, batch in enumerate(
            self.data.eval_batches(config.train.eval_batches, config.data.batch_size)
        ):
            if index % self.world_size != self.rank:
                continue
            self.watch.at(f"evaluation, batch {index}", self.step)
            inputs, targets = (self._on_device(one) for one in batch)
            count = predictions(targets)
            means = self._evaluated(inputs, targets)
            for name, value in {"count": count, **{k: v.item() * count for k, v in means.items()}}.items():
                sums[name] = sums.get(name, 0.0) + value
        self.model.train()
        per_rank = [one for one in self._over_ranks(sums) if one]
        total = {name: sum(one[name] for one in per_rank) for name in per_rank[0]}
        count = total.pop("count")
        row = {"step": self.step, **{f"val_{name}": value / count for name, value in total.items()}}
        self.val_loss = row["val_loss"]
        self.folder.log(row)
        self.folder.log_parameters(
            self.step, parameter_scalars(self.compression.interval(all_ranks=True, name="parameters"))
        )
        self.progress.row(row)

    def _evaluated(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        with self._autocast():
            if self.fused is not None:
                return self.fused.evaluate(self.model, inputs, targets)
            outputs = self.model(inputs)
        return evaluate_batch(self.task, outputs, targets)

    def _per_rank(self, key: str, value: float) -> float:
        """Bytes are summed over ranks, seconds averaged."""
        return value / self.world_size if "seconds" in key else value

    def _log(self, row: dict[str, Tensor | float]) -> None:
        shown = {"step": self.step, **{key: float(value) for key, value in row.items()}}
        shown["loss"] = self._mean_over_ranks(shown["loss"])
        shown["step_seconds"] = self.clock.median(last=self.config.train.log_every)
        traffic = total_scalars(self.compression.interval(all_ranks=True, name="metrics"))
        shown |= {key: self._per_rank(key, value) for key, value in traffic.items()}
        self.folder.log(shown)
        self.progress.row(shown)

    def _sync_buffers(self) -> None:
        """Take rank 0's running statistics everywhere, as the next training step would do anyway."""
        for buffer in self.trained_buffers:
            dist.broadcast(buffer, src=0)

    def _save(self) -> None:
        self._sync_buffers()
        state = resume.rank_state(self.compression, self.device) | {"entropy": self.entropy.state_dict()}
        self.checkpoints.save(self.step, resume.tensors(self.model, self.optimizer), state, self._about())

    def _restore(self, checkpoint: Checkpoint) -> None:
        resume.restore_tensors(checkpoint.tensors, self.model, self.optimizer)
        self.entropy.load_state_dict(checkpoint.rank_states[0].get("entropy"), checkpoint.step)
        compression = self.compression if self._same_plan(checkpoint) else None
        if compression is None:
            self.compression.begin_at(checkpoint.step)
        if checkpoint.about["ranks"] == self.world_size:
            resume.restore_rank_state(checkpoint.rank_states[0], compression, self.device)
            self._plans_logged = len(self.compression.plans)
            if compression is not None and compression.replans:
                self._replay(compression, checkpoint.step)
                return
        elif compression is not None:
            compression.load_state_dict([state["compression"] for state in checkpoint.rank_states])
            self._plans_logged = len([one for one in compression.plans if one["step"] < checkpoint.step])
        self.folder.forget_ahead()

    def _replay(self, compression: Compression, step: int) -> None:
        """Change plans where the run did that went on from this checkpoint before, as far as it came."""
        found = self.folder.ahead(step, PLAN_EVENT) if self.rank == 0 else None
        rows, until = self._over_ranks(found)[0]
        compression.replay(rows, until)

    def _close(self) -> None:
        self.compression.close()
        self.entropy.close()
        self.entropy.draw()

    def _bits(self) -> float | str:
        if not self.compression.plans:
            return self.config.compression.bits
        bits = self.compression.plan.bits
        return bits if bits in BITS_WORDS else float(bits)

    def _abort(self) -> None:
        compression: Compression | None = getattr(self, "compression", None)  # none before `_prepare` is done
        if compression is not None:
            compression.abort()

    def _traffic(self) -> dict[str, Any]:
        """Bytes a step, summed over ranks, and the codec's seconds, averaged over them; since the run's start."""
        stats = self.compression.stats(all_ranks=True)
        kept = ("bits_per_value", "raw_bytes_per_step", "wire_bytes_per_step", "ratio", "bytes_source")
        codec_seconds = stats["codec_seconds_per_step"] / self.world_size
        return {**{key: stats[key] for key in kept}, "codec_seconds_per_step": codec_seconds}


def scale_of(config: Config, optimizer: Optimizer, device: torch.device) -> str:
    """What step sizes follow in a run."""
    wish = config.compression
    if wish.scale != "auto":
        return wish.scale
    return automatic_scale(is_sgd(optimizer), device, wish.messages == "bounded")


def is_sgd(optimizer: Optimizer) -> bool:
    """Whether a training step ends with a step of plain SGD."""
    return isinstance(optimizer.parts[-1], torch.optim.SGD)


def planner_options(
    config: Config, hierarchy: int | str | None, world_size: int, scale: str
) -> PlannerOptions:
    """What "auto" may choose in a run; hierarchy: as `compress_ddp` takes it; scale: as `scale_of` says."""
    settings = config.compression
    bounded = settings.messages == "auto" and config.local.mode == "end-to-end"
    bounded = bounded and scale == "local" and not settings.overrides
    return dataclasses.replace(ways(hierarchy, world_size), bounded=bounded)


def hierarchy_wish(config: Config) -> int | str | None:
    """What `compress_ddp` takes as hierarchy; where the planner decides, nodes are looked for if one can be had."""
    settings = config.compression
    if settings.hierarchy == "plan":
        plans = settings.bits == "auto" and not (settings.max_error or settings.bytes_per_step)
        return "auto" if plans and settings.transport == "process_group" and not settings.shadow else None
    if settings.hierarchy == "groups" and settings.group_size:
        return f"groups:{settings.group_size}"
    return None if settings.hierarchy == "none" else settings.hierarchy


def compressed(
    model: DistributedDataParallel,
    optimizer: Optimizer,
    config: Config,
    extra: Mapping[str, Any],
    measurements: Measurements | None = None,
) -> Compression:
    """Compression as the configuration says, in DDP's all-reduce. extra: facts that must agree on all ranks.

    measurements: what "auto" is planned with.
    """
    settings = config.compression
    return compress_ddp(
        model,
        optimizer.parts[-1],  # whose step ends a training step
        bits=settings.bits,
        overrides=settings.overrides_by_pattern(),
        max_error=settings.max_error or None,
        bytes_per_step=settings.bytes_per_step or None,
        error_feedback=_ERROR_FEEDBACK[settings.error_feedback],
        scale=_SCALES[settings.scale],
        messages=_MESSAGES[settings.messages],
        hierarchy=hierarchy_wish(config),
        transport="mpi" if settings.transport == "mpi" else None,
        shadow=settings.shadow,
        check_every=settings.check_every,
        max_relative_error=settings.max_relative_error,
        on_alarm="disable" if settings.on_alarm == "disable" else "warn",
        timeout=config.run.timeout_seconds,
        extra=extra,
        floor_bits=settings.floor_bits,
        replan=settings.replan,
        measurements=measurements,
    )


def sync_buffers_argument(wanted: bool) -> dict[str, bool]:
    """DDP's argument by its name in this torch: whether each forward pass sends the first rank's buffers."""
    return {_SYNC_BUFFERS: wanted}


# torch 2.13 renamed the argument.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if _RENAMED else "broadcast_buffers"
PLAN_EVENT = "plan"  # of rows of metrics.jsonl: bits = "auto" goes over to another plan after their step
_SCALES: dict[str, Scale | Literal["auto"]] = {"auto": "auto", **{scale: scale for scale in get_args(Scale)}}
_MESSAGES: dict[str, Messages | Literal["auto"]] = {
    "auto": "auto",
    **{one: one for one in get_args(Messages)},
}
_ERROR_FEEDBACK: dict[str, bool | Literal["auto"]] = {"auto": "auto", "on": True, "off": False}
