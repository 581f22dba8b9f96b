"""The `Compression` of a DistributedDataParallel model: its hook, its statistics and its state."""

# No `from __future__ import annotations` here: DDP compares the hook's annotations with classes.

import dataclasses
import logging
import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from efficient_dl.comm import (
    Compressor,
    ProcessGroupTransport,
    Topology,
    Transport,
    combined,
    gather_json,
    native_tally,
    parameter_scalars,
    since,
    summary,
    total_scalars,
)
from efficient_dl.errors import ConfigError
from efficient_dl.integrations.auto import log_saved_plan
from efficient_dl.integrations.ddp_backward import Backward
from efficient_dl.integrations.ddp_buckets import bucket_names
from efficient_dl.integrations.ddp_engines import Engines
from efficient_dl.integrations.ddp_native import CODED, left_to_torch, log_left_to_torch
from efficient_dl.integrations.ddp_replanning import Replanner
from efficient_dl.integrations.ddp_setup import averaged_parameters, join_check
from efficient_dl.integrations.ddp_states import are_of_all_ranks, own_of_the_same_run
from efficient_dl.integrations.ddp_transport import transport_kind
from efficient_dl.integrations.group_guards import GroupGuards
from efficient_dl.integrations.plan_watch import ChosenPlan
from efficient_dl.integrations.second_moment import SecondMoment

_log = logging.getLogger(__name__)
_EXIT_SECONDS = 2.0  # how long a process that ends without close() waits for its own threads


class Compression:
    """Compressed averaging of one model's gradients, as `compress` set it up."""

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: torch.optim.Optimizer | None,
        compressor: Compressor,
        control: ProcessGroupTransport,
        shadow: bool,
        check_every: int,
        carrier: Transport,
        guards: GroupGuards,
        scaler: torch.amp.GradScaler | None = None,
        second_moment: SecondMoment | None = None,
        topology: Topology | None = None,
        replanner: Replanner | None = None,
        owns_carrier: bool = False,
    ) -> None:
        # It keeps no reference to the model, whose C++ reducer keeps the hook and with it this object: a cycle that
        # no garbage collector would see.
        self.plan = compressor.plan
        self.shadow = shadow
        self._model = weakref.ref(model)
        self._compressor = compressor
        self._control = control
        self._carrier, self._owns_carrier = carrier, owns_carrier
        self._replanner = replanner
        self._nodes = topology
        self._topology = topology if replanner is None else self._topology_of(replanner.now)
        self._transport = transport_kind(carrier)
        self._check_every = check_every
        self._parameters = averaged_parameters(model)
        self._left_to_torch = left_to_torch(model, self._parameters)
        self._guards = guards
        # What left some behind: packets of a hierarchy, or others; None: nothing.
        self._residuals_of: bool | None = None
        self._marks: dict[str, dict[str, Any]] = {}
        self._checks = 0
        self._engines = Engines(
            compressor, control, carrier, shadow, replanner.levels if replanner is not None else None
        )
        self._finalizer = weakref.finalize(self, self._engines.stop, _EXIT_SECONDS)
        self._backward = Backward(
            self._parameters,
            self._left_to_torch,
            compressor,
            control,
            self._engines,
            guards,
            join_check(model),
            scaler,
            second_moment,
            replanner,
            commits=optimizer is None,
        )
        self._hooked = False
        self._count(0)
        self._choose_engine()
        if self._compresses:
            self._register_hook()
        if replanner is not None:
            self._residuals_of = None if compressor.exact else replanner.now.hierarchy
            self.plan = dataclasses.replace(self.plan, reason=replanner.now.reason)
        self._step_hook = optimizer.register_step_post_hook(self._after_step) if optimizer else None
        self._watch_anew()

    def disable(self, reason: str) -> None:
        """Turns compression off on all ranks: from then on gradients go by torch's own all-reduce.

        One rank is enough. It takes effect on all ranks at once, after the next comparison of their parameters: the
        next optimizer step whose number is a multiple of check_every, or the next `check()`. It costs no message until
        then. It is logged on all ranks, told by `stats()["disabled"]`, and kept by `state_dict`. What error feedback
        had kept until then is not sent any more.

        reason: for the logs.
        """
        if not self._compresses and not self.replans:
            _log.warning('there is nothing to disable: bits="none"')
        else:
            self._guards.wish(reason)

    def interval(self, all_ranks: bool = False, name: str = "interval") -> dict[str, Any]:
        """`stats` of the time since the last call with this name, or since the start; the marks are saved, too.

        all_ranks: as for `stats`.
        """
        now = self._compressor.meter_state()
        state, self._marks[name] = since(now, self._marks.get(name)), now
        return self._stats(state, all_ranks)

    def log_to(self, writer: Any, step: int, all_ranks: bool = False) -> None:
        """Writes the time since its last call to TensorBoard, under compression/ and compression/<parameter>/.

        writer: a torch.utils.tensorboard.SummaryWriter, or None on ranks that write nothing.
        all_ranks: sums of all ranks, instead of this rank's; then every rank must call it.
        """
        stats = self.interval(all_ranks, "log_to")
        if writer is None:
            return
        for key, value in total_scalars(stats).items():
            writer.add_scalar(f"compression/{key}", value, step)
        for name, row in parameter_scalars(stats).items():
            for key, value in row.items():
                writer.add_scalar(f"compression/{name}/{key}", value, step)

    def stats(self, all_ranks: bool = False) -> dict[str, Any]:
        """What was sent, what it cost and how much it erred, since the start or the restored checkpoint.

        all_ranks: sums of all ranks, instead of this rank's; then every rank must call it.

        Returns bits, codec, reason, overrides, scale, messages, error_feedback, kernel, exact, shadow, world_size,
        transport (what carries compressed bytes: "process_group", "mpi" or a class), hierarchy (None, or the nodes or
        groups in use), checks, and `summary` of the meter: wire_bytes (what left, size messages included; with a
        hierarchy: what left the node), raw_bytes (the same with the identity codec), local_bytes (what a hierarchy sent
        inside the node), all three per step, ratio, bits_per_value, entropies, seconds, relative_error and a row for
        each parameter, with order0_bits and model_bits of a sample (one step in 20, at most 32 blocks of 256 values),
        and with error feedback residual_norm, Euclidean; the alarms so far; disabled, None or {"step", "reason"} (see
        `disable`); and with bits="auto" the plans that came into force, each {"step", "bits", "hierarchy", "reason",
        "group_size", "bounded"}, and how many looks there were. A step is one synchronized backward pass.

        bytes_source says where the bytes come from: "counted", but for native_bytes, which torch's own collectives
        sent and which are calculated; "shadow" (would have been sent); or "analytic" (bits="none": 2 (n − 1) / n of
        the dense gradients' bytes for each optimizer step).
        """
        return self._stats(self._compressor.meter_state(), all_ranks)

    def _stats(self, state: dict[str, Any], all_ranks: bool) -> dict[str, Any]:
        if all_ranks:
            state = combined(gather_json(state, self._control))
        kernel, source = self._compressor.codec.kernel_for(self._control.device), "counted"
        if self.plan.codec == "none":
            kernel, source = "none", "counted" if self._hooked else "analytic"
        elif self.shadow:
            source = "shadow"
        figures, residuals = summary(state), self._compressor.residuals
        if residuals is not None:
            norms = {name: residuals.norm(name) for name in figures["parameters"]}
            everyone = gather_json(norms, self._control) if all_ranks else [norms]
            for name, row in figures["parameters"].items():
                row["residual_norm"] = math.hypot(*(theirs[name] for theirs in everyone))
        return {
            "bits": self.plan.bits,
            "codec": self.plan.codec,
            "reason": self.plan.reason,
            "overrides": dict(self.plan.overrides),
            "scale": self.plan.scale,
            "messages": "bounded" if self.plan.is_bounded else "exact",
            "error_feedback": self.plan.error_feedback,
            "kernel": kernel,
            "exact": self._compressor.exact,
            "shadow": self.shadow,
            "world_size": self._control.world_size,
            "transport": self._transport,
            "hierarchy": self._topology.summary() if self._topology else None,
            "checks": self._checks,
            "bytes_source": source,
            "disabled": self._guards.off,
            "alarms": self._guards.alarms,
            "plans": self.plans,
            "looks": self._replanner.looks if self._replanner else 0,
            **figures,
        }

    def check(self) -> None:
        """Compares all parameters of all ranks, bit by bit; every rank must call it. Raises RanksDiverged.

        With bits="auto" the plan may change here: what is decided holds from the next step on, on all ranks.
        """
        self._check(self._parameters)

    def _check(self, parameters: Mapping[str, Tensor]) -> None:
        planner, meter, step = self._replanner, self._compressor.meter, self._optimizer_steps
        told = self._guards.compare(parameters, step, planner.notes(meter) if planner is not None else ())
        self._checks += bool(parameters)
        if planner is not None and self._guards.off is None:
            if not self._compresses:
                self._sample_averages(planner)
            if (chosen := planner.judge(told, meter, step)) is not None:
                self._follow(chosen)
                if self._control.rank == 0:
                    _log.warning("bits auto, from step %d on: %s", step + 1, chosen.reason)
            planner.forget_sample()

    def replay(self, plans: Sequence[Mapping[str, Any]], until_step: int) -> None:
        """With bits="auto": goes over to these plans after the same steps again, up to a step, and measures nothing.

        plans: rows of `stats()["plans"]`. For a run that goes on from before decisions that were recorded, and is to
        come to the same bits as before. All ranks call it with the same arguments, before the next step. Raises
        ConfigError where plans do not change (`replans`).
        """
        if self._replanner is None:
            return
        if not self.replans:
            raise ConfigError(
                "this run does not change its plans, and so cannot repeat changes",
                fix="replan=True, an optimizer and check_every as in the run that is repeated",
            )
        self._replanner.replay([ChosenPlan.from_json(one) for one in plans], until_step)

    @property
    def plans(self) -> list[dict[str, Any]]:
        """With bits="auto" the plans in force so far, as in `stats`, the present one last; else []."""
        return [one.to_json() for one in self._replanner.chosen] if self._replanner else []

    def _sample_averages(self, planner: Replanner) -> None:
        for parameter in reversed(self._parameters.values()):
            gradient = parameter.grad
            if gradient is not None and gradient.layout == torch.strided and gradient.dtype in CODED:
                planner.keep_sample(gradient.detach().reshape(-1), [gradient.numel()])

    def _follow(self, chosen: ChosenPlan) -> None:
        """Goes over to a plan between two steps; on all ranks together.

        Residuals stay where the new plan's packets take them along. Else the next step goes by torch's own all-reduce
        with them added to the gradients, so that nothing is lost.
        """
        assert self._replanner is not None
        plan = dataclasses.replace(self._replanner.plan(chosen), reason=chosen.reason)
        self._guards.rest()
        self._compressor.follow(plan)
        self.plan = plan
        self._topology = self._topology_of(chosen)
        first_engine = not self._hooked
        self._choose_engine()
        if first_engine and self._compresses:
            self._register_hook()
            model = self._model()
            if self._optimizer_steps and model and (found := bucket_names(model, self._parameters)):
                self._backward.record.know(
                    [one for one in found if not self._left_to_torch.keys() & set(one)]
                )
        residuals, left_by = self._compressor.residuals, self._residuals_of
        if residuals is not None:
            lossy = not self._compressor.exact
            kept = {name for theirs in gather_json(residuals.kept, self._control) for name in theirs}
            taken = lossy and all(map(self._compressor.feeds_back, kept))
            if left_by is not None and not (taken and left_by == chosen.hierarchy):
                residuals.start_draining()
            self._residuals_of = chosen.hierarchy if lossy else None
        self._watch_anew()
        self._replanner.restarted(self._compressor.meter)

    def _register_hook(self) -> None:
        model = self._model()
        assert model is not None
        log_left_to_torch(self._left_to_torch)
        try:
            model.register_comm_hook(self, _reduce_bucket)
        except RuntimeError as error:  # torch's built-in hooks leave no trace to look for before
            self._finalizer.detach()
            self._engines.close(_EXIT_SECONDS)
            raise ConfigError(
                "the model's communication hook cannot be registered",
                found=str(error).splitlines()[0],
                fix="call compress() once, and no other hook",
            ) from error
        self._hooked = True

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, keyed by parameter name: plain numbers and strings, and with error feedback a float32
        tensor for each parameter. Save one for each rank."""
        return {
            "rank": self._control.rank,
            "world_size": self._control.world_size,
            "optimizer_steps": self._optimizer_steps,
            "shadow": self.shadow,
            "nodes": self._topology.reduced_by if self._topology else None,
            "buckets": [list(names) for names in self._backward.record.buckets],
            "buckets_settled": self._backward.record.settled,
            "compressor": self._compressor.state_dict(),
            **self._guards.state_dict(),
            "marks": dict(self._marks),
            "replanner": self._replanner.state_dict() if self._replanner else None,
        }

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Continues exactly from this rank's `state_dict`; every rank must call it, with its own.

        After a change of the world size pass the list of all old ranks' states, by rank: residuals are redistributed
        (every rank gets the mean of all), and rates are taken over; with one state alone, residuals start from zero.

        The next steps are reduced in the buckets that the saved run had, until DDP has rebuilt its own; they do not
        overlap backward. A state from before DDP had rebuilt them (the first three steps) cannot tell them: a lossy run
        then goes on with other shards, which is logged. At another world size, or between a shadow run and a real
        one, the counters of bytes, values and seconds start again from zero, which is logged, too. Raises
        PlanMismatch for another plan, CheckpointError for another rank, model or version.

        With bits="auto" the saved plan is taken over, whatever was measured at this start; at another world size, or
        where it is under the floor, this start's plan takes over from it, as after a look.
        """
        control = self._control
        states = [state] if isinstance(state, Mapping) else list(state)
        planner = self._replanner
        own = own_of_the_same_run(states, control)
        resized = own["world_size"] != control.world_size
        before: dict[str, Any] = own.get("replanner") or {} if planner is not None else {}
        if planner is not None and before:
            self._follow(planner.resumable(before))
        if resized:
            self._load_resized(states)
            self._count(own["optimizer_steps"])
            self._guards.load_state_dict(own)
            self._marks = {}
            if planner is not None and before:
                self._follow(planner.continued(before, self._optimizer_steps))
                self._drain_natively()
            return
        self._compressor.load_state_dict(own["compressor"])
        self._marks = dict(own["marks"])
        if own["shadow"] != self.shadow:
            self._compressor.start_afresh()
            self._marks = {}
            _log.warning(
                "compression state of %s: the byte counters and residuals start again from zero",
                "a shadow run, restored in a real one"
                if own["shadow"]
                else "a real run, restored in a shadow",
            )
        self._count(own["optimizer_steps"])
        self._guards.load_state_dict(own)
        if planner is not None and before and planner.is_under_floor(before):
            self._follow(planner.continued(before, self._optimizer_steps))
        elif planner is not None and before:
            measured = planner.chosen[0].bits  # this start's own
            planner.load_state_dict(before)
            if planner.now.bits != measured and self._control.rank == 0:
                log_saved_plan(planner.now.bits, measured)
            planner.restarted(self._compressor.meter)
            self._drain_natively()
        self._continue_in([list(names) for names in own["buckets"]], own["buckets_settled"])
        if own.get("nodes") != (self._topology.reduced_by if self._topology else None):
            _log.warning("saved on other nodes: sums are taken in another order, lossy packets cut elsewhere")
        if not own["buckets_settled"] and not self._compressor.exact:
            _log.warning("saved before DDP had rebuilt its buckets: a lossy run goes on in other shards")

    def begin_at(self, step: int) -> None:
        """Counts optimizer steps from here on, for a run that goes on without the state it had; on all ranks."""
        self._count(step)
        if self._replanner is not None:
            self._replanner.begin_at(step)

    def _drain_natively(self) -> None:
        """Residuals that a state brings along go out with the next step, by torch's all-reduce as that may be."""
        residuals = self._compressor.residuals
        if residuals is not None and residuals.draining and not self._hooked:
            self._register_hook()

    def _load_resized(self, states: Sequence[Mapping[str, Any]]) -> None:
        before, complete = states[0]["world_size"], are_of_all_ranks(states)
        self._compressor.load_state_dicts([one["compressor"] for one in states], residuals=complete)
        kept = ""
        if self._compressor.residuals is not None:
            kept = (
                "; residuals are redistributed"
                if complete
                else "; residuals start from zero: not all were given"
            )
        _log.warning(
            "compression state of %d ranks, restored on %d: the byte counters start again from zero%s",
            before,
            self._control.world_size,
            kept,
        )

    def _continue_in(self, buckets: list[list[str]], settled: bool) -> None:
        if not buckets or self.shadow or not self._compresses:
            return
        trained = {name for name, p in self._parameters.items() if p.requires_grad} - set(self._left_to_torch)
        if trained == {name for names in buckets for name in names}:
            self._backward.record.hold(buckets, settled)
        else:
            _log.warning(
                "other parameters are trained than before the restart: a lossy run goes on differently"
            )

    def close(self, timeout: float = 10.0) -> None:
        """Ends the threads and destroys the groups it made; the model cannot train on with this hook.

        timeout: seconds that a peer may keep the threads waiting; then the connections are broken. A process that ends
        without close() ends its threads in the same way.
        """
        if self._step_hook is not None:
            self._step_hook.remove()
        if self._finalizer.detach():
            self._engines.close(timeout)
            if self._owns_carrier:
                self._carrier.close()

    def abort(self) -> None:
        """Breaks the connections: the peers get a TransportError that names this rank now, not after a time-out."""
        self._engines.abort()

    def _watch_anew(self) -> None:
        if self._compresses and self._control.world_size > 1:
            self._guards.watch(self._compressor, self._replanner.now.label if self._replanner else "")

    def _choose_engine(self) -> None:
        """What carries the plan out; all ranks choose together."""
        self._backward.engine = None if self.plan.codec == "none" else self._engines.get(self._topology)

    @property
    def _compresses(self) -> bool:
        return self._backward.engine is not None

    @property
    def replans(self) -> bool:
        """Whether plans can change while it trains."""
        return self._replanner is not None and self._replanner.active

    def _topology_of(self, plan: ChosenPlan) -> Topology | None:
        if plan.group_size:
            return Topology.in_groups(self._control.world_size, plan.group_size)
        return self._nodes if plan.hierarchy else None

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._count(self._optimizer_steps + 1)
        # A fused optimizer runs in a step that its GradScaler skips, and skips inside.
        found_inf = getattr(optimizer, "found_inf", None)
        residuals = self._compressor.residuals
        if residuals is not None and not (found_inf is not None and float(found_inf) > 0):
            residuals.unapplied(name for name, one in self._parameters.items() if one.grad is None)
            self._compressor.commit_step()
        if not self._hooked:
            dense = {n: p for n, p in self._parameters.items() if p.grad is None or not p.grad.is_sparse}
            trained = {name: p for name, p in dense.items() if p.requires_grad}
            numels = {name: p.numel() for name, p in trained.items()}
            itemsizes = {name: p.element_size() for name, p in trained.items()}
            self._compressor.meter.add(native_tally(numels, itemsizes, self._control.world_size))
            self._compressor.meter.stepped(exposed_seconds=0.0)
        if self._replanner is not None:
            self._replanner.stepped()
        if self._is_due(self._optimizer_steps) and (self._hooked or self.replans):
            self._check(self._parameters if self._compresses else {})

    def _count(self, steps: int) -> None:
        self._optimizer_steps = steps
        looks = self.replans and self._guards.off is None
        self._backward.samples = looks and self._is_due(steps + 1)

    def _is_due(self, step: int) -> bool:
        return bool(self._check_every) and step % self._check_every == 0


def _reduce_bucket(state: Compression, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The hook that DDP calls, in the autograd thread, when a bucket's gradients are ready."""
    return state._backward.reduce(bucket)
