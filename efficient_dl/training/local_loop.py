"""Layer-wise and partition-wise training: partitions with losses of their own, on the ranks that a coordinator chose."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efficient_dl.comm import ProcessGroupTransport
from efficient_dl.config import Config
from efficient_dl.coordinator.assignment import Assignment, Decision
from efficient_dl.coordinator.coordinator import Coordinator
from efficient_dl.coordinator.costs import PartitionCosts
from efficient_dl.coordinator.facts import PartitionState, RankFacts, ScheduleOptions
from efficient_dl.coordinator.history import History
from efficient_dl.coordinator.plateau import PlateauRule, smoothed
from efficient_dl.data import Dataset
from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.block import LocalBlock
from efficient_dl.local_learning.heads import make_head
from efficient_dl.local_learning.objectives import make_objective
from efficient_dl.local_learning.partition import Partitions, partition
from efficient_dl.models import build_model
from efficient_dl.training import measure, resume
from efficient_dl.training.checkpoint import Checkpoint
from efficient_dl.training.console import Progress
from efficient_dl.training.run_loop import RunLoop
from efficient_dl.training.schedule import learning_rate
from efficient_dl.training.stage import Groups, Parts, Stage, Traffic, wanted_from
from efficient_dl.training.task import evaluate_batch, predictions

_AUTO_HEADS = {"tokens": "causal:1", "samples": "auglocal"}
_OPTIMIZER_BYTES = {"adamw": 2.0, "sgd": 1.0, "muon": 1.0}  # for each of a parameter
_STAGES = 10  # of a run, unless local.stage_steps says otherwise
_EXAMPLES = 2  # samples that a head is made for: the fewest that batch norm takes


class LocalTrainer(RunLoop):
    """Each rank holds the partitions that the coordinator gives it, and does its share of their micro-batches.

    A step takes `accumulate` micro-batches for each rank, the same samples as end-to-end training. Metrics of a step
    are gathered when a stage ends or an evaluation comes, so that no rank waits for another in between.
    """

    def __init__(self, config: Config, data: Dataset, device: torch.device, progress: Progress) -> None:
        super().__init__(config, data, device, progress)
        local = config.local
        self.label = f"{local.mode}, {local.partitions} partitions"
        self.micro_batches = self.world_size * config.train.accumulate
        self.heads = _AUTO_HEADS[self.task.unit] if local.heads == "auto" else local.heads
        self.options = ScheduleOptions(
            kind="pipelined" if local.mode == "partitionwise" else _KINDS[local.schedule],
            micro_batches=self.micro_batches,
            stage_steps=local.stage_steps or max(1, config.train.steps // _STAGES),
            total_steps=config.train.steps,
            plateau=PlateauRule(local.freeze_below) if local.freeze_below > 0 else None,
            optimizer_bytes_per_parameter_byte=_OPTIMIZER_BYTES[config.optimizer.name],
            queue_micro_batches=local.queue,
        )
        self.history = History()
        self.stage: Stage | None = None
        self.steps_trained = [0] * local.partitions
        self.frozen = [False] * local.partitions
        self.stage_losses: list[list[float]] = [[] for _ in range(local.partitions)]  # of ended stages
        self.losses: dict[int, list[float]] = {}  # of this stage's steps, on this rank
        self.rows: list[dict[str, Any]] = []  # not gathered yet
        self.traffic_before = Traffic()  # of ended stages

    def _prepare(self) -> None:
        """Cut the model as rank 0 measures it; nothing is placed before the first decision."""
        self._check()
        timeout = self.config.run.timeout_seconds
        self.groups = Groups(timeout)
        self.transport = ProcessGroupTransport(_gloo_group(), timeout=timeout)
        self.coordinator = Coordinator(timeout_seconds=timeout)
        cut: list[Any] = [self._measured_cut() if self.rank == 0 else None]
        dist.broadcast_object_list(cut, src=0)
        self.cuts, self.costs = cut[0]
        measure.reset_peak_memory(self.device)
        torch.manual_seed(self.config.train.seed + 1_000_003 * (self.rank + 1))  # dropout differs between ranks

    def _check(self) -> None:
        config = self.config
        if config.local.window == 2 and self.options.kind != "simultaneous":
            raise ConfigError(
                "window 2 needs all partitions on the same ranks",
                expected="local.mode=layerwise, local.schedule=simultaneous",
                found=f"local.mode={config.local.mode}, local.schedule={config.local.schedule}",
                fix="--window 1, or --mode layerwise",
            )
        if config.compression.shadow and config.local.activations != "identity":
            raise ConfigError(
                "compression.shadow applies uncompressed results, local.activations would be compressed",
                fix="local.activations=identity, or compression.shadow=false",
            )

    def _measured_cut(self) -> tuple[tuple[str, ...], list[PartitionCosts]]:
        model = build_model(self.config.model, self.data.spec, self.config.train.seed).to(self.device)
        inputs, _ = self._micro_batch(0)
        cut = partition(model, self.config.local.partitions, inputs, balance=_BALANCE[self.config.local.balance])
        for line in str(cut).splitlines():
            self.progress.note(line)
        return cut.cuts, [one.costs for one in cut]

    def _fresh(self) -> Partitions:
        """The model's partitions with the values of the run's start; who holds none of them keeps no memory for it."""
        model = build_model(self.config.model, self.data.spec, self.config.train.seed).to(self.device)
        return partition(model, self.cuts)

    def _train_step(self) -> dict[str, Tensor | float]:
        if self.stage is None or self.step >= self.stage.decision.until_step:
            self._next_stage()
        assert self.stage is not None
        step = self.step
        with self.clock.step():
            losses = self.stage.host.train_step(step, self.micro_batches, self._micro_batch, self._lr)
        for index, loss in losses.items():
            self.losses.setdefault(index, []).append(loss.item())
        for index, trained in enumerate(self.stage.decision.training):
            self.steps_trained[index] += trained
        self.step += 1
        return {f"loss_partition_{index}": loss for index, loss in losses.items()}

    def _lr(self, index: int) -> float:
        budget = self.options.budget(index, len(self.costs))
        return learning_rate(self.config.optimizer, self.steps_trained[index], budget)

    def _micro_batch(self, number: int) -> tuple[Tensor, Tensor]:
        """The samples that rank number // accumulate would take end to end as its part number % accumulate."""
        config, accumulate = self.config, self.config.train.accumulate
        inputs, targets = self.data.train_batch(
            self.step,
            number // accumulate,
            self.world_size,
            config.data.batch_size,
            accumulate,
            number % accumulate,
        )
        return self._on_device(inputs), self._on_device(targets)

    def _next_stage(self) -> None:
        """At a stage's end: checkpoint, ask the coordinator, move what moves, go on."""
        state: Mapping[str, Tensor] | None = None
        if self.stage is not None:
            self._end_losses()
            if self.checkpoints.latest() != self.step:
                self._save()
            self._end_stage()
            decision = self._decide()
            wanted = wanted_from(decision, self._names)
            state = self.checkpoints.load(self.step, wanted).tensors
        else:
            decision = self._decide()
        self._begin(decision, state)

    def _decide(self) -> Decision:
        """Ask the coordinator; what it says of converged partitions is kept."""
        states = [
            PartitionState(
                self.steps_trained[index],
                tuple(self.stage_losses[index]),
                self.frozen[index],
                self.history[-1].decision.assignment.ranks[index] if len(self.history) else (),
            )
            for index in range(len(self.costs))
        ]
        memory = self.config.local.memory_bytes or None
        decision = self.coordinator.decide(
            self.costs, RankFacts(memory_bytes=memory), states, self.options, self.step, self.history
        )
        for index, trained in enumerate(decision.training):
            was_training = self.steps_trained[index] > 0
            self.frozen[index] |= was_training and not trained
        self._note_decision()
        return decision

    def _note_decision(self) -> None:
        entry = self.history[-1]
        self.progress.note(f"step {entry.step}: {entry.decision.reason}")
        self.folder.log_decision(entry.to_row())

    def _begin(self, decision: Decision, state: Mapping[str, Tensor] | None) -> None:
        parts = _Parts(self)
        self.stage = Stage(
            self.config,
            decision,
            Parts(parts.block, self._names, parts.example),
            self.groups,
            self.transport,
            state,
            self._passes(decision.until_step),
            self.device,
            self.data.fingerprint,
            self._autocast,
        )
        held = [self.costs[one.index] for one in self.stage.held]
        trained = [self.costs[index] for index in self._trained_here()]
        share = self.micro_batches / max(
            1, *(len(decision.assignment.ranks[one.index]) for one in self.stage.held), 1
        )
        self.compute_seconds = share * (
            sum(one.forward_seconds for one in held) + sum(one.backward_seconds for one in trained)
        )

    def _passes(self, until_step: int) -> list[int]:
        """The micro-batches of every pass from here to until_step: steps, and the evaluations among them."""
        passes: list[int] = []
        for step in range(self.step + 1, until_step + 1):
            passes.append(self.micro_batches)
            every = self.config.train.eval_every
            if step == self.config.train.steps or (every > 0 and step % every == 0):
                passes.append(len(self._eval_batches()))
        return passes

    def _eval_batches(self) -> list[tuple[Tensor, Tensor]]:
        config = self.config
        return list(self.data.eval_batches(config.train.eval_batches, config.data.batch_size))

    def _end_losses(self) -> None:
        """The smoothed loss of every partition trained in this stage, the same on all ranks."""
        per_rank: list[dict[int, list[float]]] = self._over_ranks(self.losses)
        for index in range(len(self.costs)):
            found = [one[index] for one in per_rank if one.get(index)]
            if found:
                means = [sum(values) / len(values) for values in zip(*found, strict=True)]
                self.stage_losses[index].append(smoothed(means))
        self.losses = {}

    def _end_stage(self) -> None:
        assert self.stage is not None
        self._flush()
        self.traffic_before = self.traffic_before.plus(self.stage.traffic())
        self.stage.finish()
        self.stage = None

    def _trained_here(self) -> list[int]:
        assert self.stage is not None
        training = self.stage.decision.training
        return [one.index for one in self.stage.held if training[one.index]]

    def _log(self, row: dict[str, Tensor | float]) -> None:
        shown = {"step": self.step, **{key: float(value) for key, value in row.items()}}
        for index in self._trained_here():
            shown[f"lr_partition_{index}"] = self._lr(index)
        shown["step_seconds"] = self.clock.median(last=self.config.train.log_every)
        self.rows.append(shown)

    def _flush(self) -> None:
        """Gather the rows that have not been, and write them, means over the ranks that know a number."""
        assert self.stage is not None
        leads = {f"lead_partition_{index}": mean for index, (mean, _) in self.stage.leads().items()}
        if self.rows:
            self.rows[-1] |= leads
        per_rank: list[list[dict[str, float]]] = self._over_ranks(self.rows)
        self.rows = []
        for same_step in zip(*per_rank, strict=True):
            merged = _mean_row(same_step)
            losses = [merged[key] for key in sorted(merged) if key.startswith("loss_partition_")]
            row = {"step": int(merged.pop("step")), "loss": losses[-1] if losses else float("nan"), **merged}
            self.folder.log(row)
            self.progress.row(row)

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Pass validation data through all partitions; before the last one has begun, the last head so far answers."""
        if self.stage is None:
            self._begin(self._for_evaluation(), self._latest_state())
        assert self.stage is not None
        self._flush()
        self.stage.sync_buffers()
        batches = self._eval_batches()
        sums: dict[str, float] = {}

        def batch(number: int) -> tuple[Tensor, Tensor]:
            inputs, targets = batches[number]
            return self._on_device(inputs), self._on_device(targets)

        for _, outputs, targets in self.stage.host.evaluate(self.step, len(batches), batch):
            count = predictions(targets)
            means = evaluate_batch(self.task, outputs, targets)
            for name, value in {"count": count, **{k: v.item() * count for k, v in means.items()}}.items():
                sums[name] = sums.get(name, 0.0) + value
        per_rank = [one for one in self._over_ranks(sums) if one]
        total = {name: sum(one[name] for one in per_rank) for name in per_rank[0]}
        count = total.pop("count")
        row = {"step": self.step, **{f"val_{name}": value / count for name, value in total.items()}}
        self.val_loss = row["val_loss"]
        self.folder.log(row)
        self.progress.row(row)

    def _for_evaluation(self) -> Decision:
        """All partitions as they lay last, none trained."""
        ranks = self.history[-1].decision.assignment.ranks if len(self.history) else ()
        known = ranks and self.history[-1].world_size == self.world_size
        everyone = (tuple(range(self.world_size)),) * len(self.costs)
        return Decision(
            Assignment(ranks if known else everyone), (False,) * len(self.costs), self.step, "to evaluate"
        )

    def _latest_state(self) -> Mapping[str, Tensor] | None:
        latest = self.checkpoints.latest()
        return None if latest is None else self.checkpoints.load(latest).tensors

    def _save(self) -> None:
        assert self.stage is not None
        self._flush()
        self.stage.sync_buffers()
        tensors = self.stage.tensors()
        held = {index for index, ranks in enumerate(self.stage.decision.assignment.ranks) if ranks}
        if self.rank == 0 and len(held) < len(self.costs):  # so that the checkpoint holds the whole model
            waiting = [one for one in self._fresh() if one.index not in held]
            tensors |= {
                f"model/{one.names[key]}": value
                for one in waiting
                for key, value in one.module.state_dict().items()
            }
        state = {
            **resume.generator_state(self.device),
            "compression": {k: one.state_dict() for k, one in self.stage.compressions.items()},
            "losses": self.losses,
            "traffic": asdict(self.traffic_before.plus(self.stage.traffic())),
        }
        local = {
            "cuts": list(self.cuts),
            "costs": [asdict(one) for one in self.costs],
            "steps_trained": self.steps_trained,
            "frozen": self.frozen,
            "stage_losses": self.stage_losses,
            "history": self.history.to_rows(),
        }
        self.checkpoints.save(self.step, tensors, state, self._about() | {"local": local})

    def _restore(self, checkpoint: Checkpoint) -> None:
        local = checkpoint.about["local"]
        self.step = checkpoint.step
        self.cuts = tuple(local["cuts"])
        self.costs = [PartitionCosts(**one) for one in local["costs"]]
        self.steps_trained, self.frozen = local["steps_trained"], local["frozen"]
        self.stage_losses = local["stage_losses"]
        self.history = History.from_rows(local["history"])
        same_ranks = checkpoint.about["ranks"] == self.world_size
        if same_ranks:
            state = checkpoint.rank_states[0]
            resume.restore_generators(state, self.device)
            self.losses = state["losses"]
            self.traffic_before = Traffic(**state["traffic"])
        if self.step >= self.config.train.steps:
            return
        entry = self.history[-1]
        if same_ranks and self.step < entry.decision.until_step:
            decision = entry.decision  # in the middle of a stage: what was decided holds
        else:
            if not same_ranks:
                self._forget_losses(checkpoint)
            decision = self._decide()
        self._begin(decision, checkpoint.tensors)
        assert self.stage is not None
        if same_ranks and decision is entry.decision and self._same_plan(checkpoint):
            for index, state in checkpoint.rank_states[0]["compression"].items():
                self.stage.compressions[index].load_state_dict(state)
            self.stage.count_from_here()

    def _forget_losses(self, checkpoint: Checkpoint) -> None:
        """The losses of a stage that was cut short count as a stage of their own."""
        per_rank = [state["losses"] for state in checkpoint.rank_states]
        for index in range(len(self.costs)):
            found = [one[index] for one in per_rank if one.get(index)]
            if found:
                means = [sum(values) / len(values) for values in zip(*found, strict=True)]
                self.stage_losses[index].append(smoothed(means))

    def _traffic(self) -> dict[str, Any]:
        own = self.traffic_before if self.stage is None else self.traffic_before.plus(self.stage.traffic())
        total = Traffic()
        for one in self._over_ranks(asdict(own)):
            total = total.plus(Traffic(**one))
        steps = max(self.step, 1)
        source = "analytic" if self.config.compression.bits == "none" else "counted"
        return {
            "bits_per_value": 8 * (total.wire_bytes - total.activation_bytes) / max(total.values_sent, 1),
            "raw_bytes_per_step": total.raw_bytes / steps,
            "wire_bytes_per_step": total.wire_bytes / steps,
            "ratio": total.raw_bytes / total.wire_bytes if total.wire_bytes else 1.0,
            "codec_seconds_per_step": total.codec_seconds / steps / self.world_size,
            "bytes_source": source,
        }

    def _close(self) -> None:
        if self.stage is not None:
            self.traffic_before = self.traffic_before.plus(self.stage.traffic())
            self.stage.finish()
            self.stage = None

    def _names(self, index: int) -> Mapping[str, str]:
        if not hasattr(self, "_all_names"):
            self._all_names = [dict(one.names) for one in self._fresh()]
        return self._all_names[index]


class _Parts:
    """Blocks and examples from one fresh copy of the model, as long as a stage is being built."""

    def __init__(self, trainer: LocalTrainer) -> None:
        self._trainer = trainer
        self._partitions = trainer._fresh()
        inputs, targets = trainer._micro_batch(0)
        self._targets = targets[:_EXAMPLES]
        self._features = list(_features(self._partitions, inputs[:_EXAMPLES]))

    def block(self, index: int) -> LocalBlock:
        trainer, local = self._trainer, self._trainer.config.local
        head = make_head(
            trainer.heads,
            index,
            self._partitions,
            self._features[index + 1],
            trainer.data.spec.classes,
            trainer.task.unit,
            trainer.config.train.seed,
        )
        body = self._partitions[index].module
        objective = make_objective(trainer.heads, local.penalty, self._partitions, index)
        return LocalBlock(body, head, objective).train()

    def example(self, index: int) -> tuple[Tensor, Tensor]:
        return self._features[index], self._targets


@torch.no_grad()
def _features(partitions: Partitions, inputs: Tensor) -> Iterable[Tensor]:
    """What goes into the first partition, and what comes out of each, in evaluation mode."""
    features = inputs
    yield features
    for one in partitions:
        one.module.eval()
        features = one.module(features)
        one.module.train()
        yield features


def _mean_row(rows: tuple[dict[str, float], ...]) -> dict[str, float]:
    keys = dict.fromkeys(key for row in rows for key in row)
    known = {key: [row[key] for row in rows if key in row] for key in keys}
    return {key: sum(values) / len(values) for key, values in known.items()}


def _gloo_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group
