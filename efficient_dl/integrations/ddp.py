"""DistributedDataParallel with entropy-coded gradients: `compress_ddp`, and the `Compression` it returns."""

# No `from __future__ import annotations` here: DDP compares the hook's annotations with classes.

import dataclasses
import logging
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from efficient_dl.codec import FORMAT_VERSION
from efficient_dl.comm import (
    DEFAULT_TIMEOUT_SECONDS,
    BucketLayout,
    Compressor,
    Plan,
    ProcessGroupTransport,
    Residuals,
    Topology,
    Transport,
    check_equal,
    combined,
    gather_json,
    handshake,
    native_tally,
    summary,
)
from efficient_dl.comm.plan import Scale
from efficient_dl.errors import CheckpointError, ConfigError, EdlError, UnsupportedTensor
from efficient_dl.integrations.ddp_buckets import (
    BucketEngine,
    BucketRecord,
    CompressedEngine,
    HeldStep,
    ShadowEngine,
)
from efficient_dl.integrations.ddp_transport import check_transport, make_transport, transport_name
from efficient_dl.integrations.nodes import Hierarchy, NodesWish
from efficient_dl.integrations.second_moment import SecondMoment

_log = logging.getLogger(__name__)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EXIT_SECONDS = 2.0  # how long a process that ends without close() waits for its own threads


def compress_ddp(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    bits: str | float = "auto",
    *,
    overrides: Mapping[str, str | float] | None = None,
    max_error: float | None = None,
    bytes_per_step: int | None = None,
    error_feedback: bool | Literal["auto"] = "auto",
    scale: Scale | Literal["auto"] = "auto",
    scaler: torch.amp.GradScaler | None = None,
    shadow: bool = False,
    group: dist.ProcessGroup | None = None,
    transport: Transport | Literal["mpi"] | None = None,
    check_every: int = 50,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    kernel: str = "auto",
    extra: Mapping[str, Any] | None = None,
    hierarchy: Hierarchy = None,
) -> "Compression":
    """Compresses the gradients that a DistributedDataParallel model averages over its ranks.

    Call it once, on every rank, after wrapping the model and before the first backward pass; the ranks compare what
    they are about to do first. The training script stays as it is: gradient accumulation with `no_sync()`, frozen
    and unused parameters, `static_graph`, clipping and bf16 autocast work as before.

    model: a DistributedDataParallel over dense float32, bfloat16 or float16 parameters, without a hook of its own.
    optimizer: its steps trigger the comparison of parameters between ranks; without one, call `check()` yourself.
    bits: "none" (the native collective, untouched), "identity" (our reduction, uncompressed), "lossless", a number
        of bits a value (2.0), a codec's name ("grid:0.5", "int8", ...), or "auto".
    overrides: other wishes for parameters by shell-style patterns of their names, the first match counts:
        {"*.bias": "none", "lm_head.*": 4.0}. "none" sends them uncompressed in the same messages.
    max_error: instead of bits: as many as keep the relative error of every packet, ‖decoded − x‖ / ‖x‖, within this
        (0.0125 to 1). Encodes up to a few times where gradients change, and measures every packet.
    bytes_per_step: instead of bits: as many as let this rank send so many bytes in a step, on average.
    scale: what the quantizer's step sizes follow. "local": blocks of 256 values, for Adam-like optimizers. "global":
        one step for all values of a packet, the least squared error for a rate, for SGD. "second_moment": one step
        after division by the optimizer's √v, which all ranks know. "auto": "global" for torch.optim.SGD on a CPU,
        else "local" (on a GPU "global" has no kernel of its own yet, and runs in torch).
    error_feedback: add what a packet leaves out to the parameter's next one; takes 8 bytes a value on every rank.
        "auto": where scale is "global" and the optimizer is torch.optim.SGD. With Adam residuals come back as
        rare large values, which inflate its second moment (docs/experiments.md).
    scaler: your GradScaler, for error feedback: residuals follow its scale. A step that it skips leaves no trace.
    shadow: apply the native result, bit for bit, and only report what compression would have sent, cost and erred.
    group: the process group to reduce over, by default the model's. Two more groups of its ranks are made.
    transport: what carries the compressed bytes: None, the process group; "mpi", MPI between all processes that mpirun
        started (see efficient_dl.comm.mpi, also for its `init_process_group`); or a Transport between the group's
        ranks, which stays yours to close. The process group carries the rest: DDP's own, comparisons, statistics.
    check_every: compare all parameters of all ranks, bit by bit, after every so many optimizer steps; 0: never, as
        with bits="none".
    timeout: seconds after which an unfinished transfer, the wait for the slowest rank included, raises TransportError
        and names the rank: longer than anything one rank does alone, such as an evaluation.
    kernel: which kernels code CPU tensors, as in `make_codec`.
    extra: further facts that must agree on all ranks, for example {"data": hash}; compared as text.
    hierarchy: None: all ranks reduce as equals. The number of ranks on each node, a DeviceMesh of nodes × ranks, or
        "auto" (the launcher's variables, else host names): full precision inside a node, compressed between nodes; see
        `HierarchicalReduction`. Bytes and ratio are then of what leaves the node, local_bytes of what stays inside.
        Nodes with different numbers of ranks, or with one each, reduce flat, which is logged.

    DDP's join() is not supported. With one rank there is nothing to send: nothing is encoded or quantized.

    Raises ConfigError, PackageMissing, UnsupportedTensor, PlanMismatch (ranks differ), TransportError.

    Example:
        compression = edl.compress(DistributedDataParallel(model), optimizer, bits=2.0)
        ...                                # train as before
        print(compression.stats()["ratio"])
    """
    if not isinstance(model, DistributedDataParallel):
        raise ConfigError(
            f"compress_ddp() cannot take a {type(model).__name__}",
            expected="a torch.nn.parallel.DistributedDataParallel",
            fix="compress(DistributedDataParallel(model), optimizer)",
        )
    parameters = _averaged_parameters(model)
    device = next(iter(parameters.values())).device
    reducing_group = group or model.process_group
    assert reducing_group is not None  # DDP has one
    control = ProcessGroupTransport(reducing_group, device, timeout)
    facts = _facts(parameters, shadow, check_every if optimizer else 0, extra or {})
    try:
        _check_supported(model, parameters, check_every)
        wish = NodesWish(hierarchy, control)
        is_sgd = isinstance(optimizer, torch.optim.SGD)
        scale = ("global" if is_sgd and device.type == "cpu" else "local") if scale == "auto" else scale
        plan = Plan.of(
            bits,
            overrides=overrides,
            max_error=max_error,
            bytes_per_step=bytes_per_step,
            values_per_step=_values_sent(parameters, wish.sent_share()),
            error_feedback=error_feedback is True,
            scale=scale,
        )
        if error_feedback == "auto" and is_sgd and plan.scale == "global" and plan.is_lossy:
            plan = dataclasses.replace(plan, error_feedback=True)
        _check_hierarchy(hierarchy, plan, shadow, transport)
        second_moment = SecondMoment(optimizer, parameters, plan) if scale == "second_moment" else None
        compressor = Compressor(plan, list(parameters), kernel, _residuals(plan, parameters, device))
        check_transport(transport, control, native=shadow or plan.codec == "none")
    except EdlError as error:
        handshake(facts, control, failure=error)
        raise
    facts["plan"] = {"bits": plan.bits, **plan.facts()}
    facts["kernel"] = compressor.codec.kernel_for(device).partition("-")[0]
    facts["transport"] = transport_name(transport)
    facts["hierarchy"] = wish.fact()
    handshake(facts, control)
    topology = wish.topology()
    carrier = make_transport(transport, control)
    try:
        return Compression(
            model,
            optimizer,
            compressor,
            control,
            shadow,
            check_every,
            carrier,
            scaler,
            second_moment,
            topology,
        )
    finally:
        if isinstance(transport, str):
            carrier.close()  # its siblings, which the compression has, stay open


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
        scaler: torch.amp.GradScaler | None = None,
        second_moment: SecondMoment | None = None,
        topology: Topology | None = None,
    ) -> None:
        # It keeps no reference to the model, whose C++ reducer keeps the hook and with it this object: a cycle that
        # no garbage collector would see.
        self.plan = compressor.plan
        self.shadow = shadow
        self._compressor = compressor
        self._control = control
        self._topology = topology
        self._check_every = check_every
        self._scaler = scaler
        self._second_moment = second_moment
        self._commits_itself = optimizer is None
        self._in_backward = False
        self._parameters = _averaged_parameters(model)
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._optimizer_steps = 0
        self._checks = 0
        self._pending: list[Future[Any]] = []
        self._record = BucketRecord()
        self._held: HeldStep | None = None
        self._engine = self._make_engine(carrier)
        if self._engine is not None:
            self._finalizer = weakref.finalize(self, self._engine.stop, _EXIT_SECONDS)
            try:
                model.register_comm_hook(self, _reduce_bucket)
            except RuntimeError as error:  # torch's built-in hooks leave no trace to look for before
                self._finalizer.detach()
                self._engine.close(_EXIT_SECONDS)
                raise ConfigError(
                    "the model's communication hook cannot be registered",
                    found=str(error).splitlines()[0],
                    fix="call compress() once, and no other hook",
                ) from error
        self._step_hook = optimizer.register_step_post_hook(self._after_step) if optimizer else None

    def stats(self, all_ranks: bool = False) -> dict[str, Any]:
        """What was sent, what it cost and how much it erred, since the start or the restored checkpoint.

        all_ranks: sums of all ranks, instead of this rank's; then every rank must call it.

        Returns bits, codec, kernel, exact, shadow, world_size, hierarchy, checks, and `summary` of the meter:
        wire_bytes (what left, size messages included; with a hierarchy: what left the node), raw_bytes (the same with
        the identity codec), local_bytes (what a hierarchy sent inside the node), all three per step, ratio,
        bits_per_value, entropies, seconds, relative_error and a row for each parameter. A step is one synchronized
        backward pass. bytes_source says where the bytes come from: "counted"; "shadow" (would have been sent); or
        "analytic" (bits="none": 2 (n − 1) / n of the gradients' bytes for each optimizer step).
        """
        state = self._compressor.meter.state_dict()
        if all_ranks:
            state = combined(gather_json(state, self._control))
        kernel, source = self._compressor.codec.kernel_for(self._control.device), "counted"
        if self.plan.codec == "none":
            kernel, source = "none", "analytic"
        elif self.shadow:
            source = "shadow"
        return {
            "bits": self.plan.bits,
            "codec": self.plan.codec,
            "reason": self.plan.reason,
            "overrides": dict(self.plan.overrides),
            "scale": self.plan.scale,
            "error_feedback": self.plan.error_feedback,
            "kernel": kernel,
            "exact": self._compressor.exact,
            "shadow": self.shadow,
            "world_size": self._control.world_size,
            "hierarchy": self._topology.summary() if self._topology else None,
            "checks": self._checks,
            "bytes_source": source,
            **summary(state),
        }

    def check(self) -> None:
        """Compares all parameters of all ranks, bit by bit; every rank must call it. Raises RanksDiverged."""
        check_equal(self._parameters, self._control, self._optimizer_steps)
        self._checks += 1

    def state_dict(self) -> dict[str, Any]:
        """This rank's state: plain numbers and strings, keyed by parameter name. Save one for each rank."""
        return {
            "rank": self._control.rank,
            "world_size": self._control.world_size,
            "optimizer_steps": self._optimizer_steps,
            "shadow": self.shadow,
            "nodes": self._topology.reduced_by if self._topology else None,
            "buckets": [list(names) for names in self._record.buckets],
            "buckets_settled": self._record.settled,
            "compressor": self._compressor.state_dict(),
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
        """
        control = self._control
        states = [state] if isinstance(state, Mapping) else list(state)
        resized = states[0]["world_size"] != control.world_size
        own = states[0] if resized or len(states) == 1 else states[control.rank]
        if not resized and own["rank"] != control.rank:
            raise CheckpointError(
                f"rank {control.rank} was given the compression state of rank {own['rank']}",
                fix="save state_dict() on every rank, and load each rank's own",
            )
        if resized:
            self._load_resized(states)
            self._optimizer_steps = own["optimizer_steps"]
            return
        fresh = self._compressor.meter.state_dict()
        self._compressor.load_state_dict(own["compressor"])
        self._optimizer_steps = own["optimizer_steps"]
        self._continue_in([list(names) for names in own["buckets"]], own["buckets_settled"])
        if own.get("nodes") != (self._topology.reduced_by if self._topology else None):
            _log.warning("saved on other nodes: sums are taken in another order, lossy packets cut elsewhere")
        if not own["buckets_settled"] and not self._compressor.exact:
            _log.warning("saved before DDP had rebuilt its buckets: a lossy run goes on in other shards")
        if own["shadow"] != self.shadow:
            self._compressor.meter.load_state_dict(fresh)
            _log.warning(
                "compression state of %s: the byte counters start again from zero",
                "a shadow run, restored in a real one"
                if own["shadow"]
                else "a real run, restored in a shadow",
            )

    def _load_resized(self, states: Sequence[Mapping[str, Any]]) -> None:
        before = states[0]["world_size"]
        complete = [one["rank"] for one in states] == list(range(before))
        if len(states) > 1 and not complete:
            raise CheckpointError(
                "the compression states are not those of all ranks, in order",
                expected=f"{before} states, of the ranks 0 to {before - 1}",
                found=f"ranks {', '.join(str(one['rank']) for one in states)}",
                fix="pass every old rank's state_dict()",
            )
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
        if not buckets or self.shadow or self._engine is None:
            return
        trained = {name for name, parameter in self._parameters.items() if parameter.requires_grad}
        if trained == {name for names in buckets for name in names}:
            self._record.hold(buckets, settled)
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
        if self._engine is not None and self._finalizer.detach():
            self._engine.close(timeout)

    def _make_engine(self, carrier: Transport) -> BucketEngine | None:
        if self.plan.codec == "none":
            return None
        if self.shadow:
            return ShadowEngine(self._compressor, self._control)
        if self._topology is not None and self._topology.flat_reason() is None:
            return CompressedEngine.by_nodes(self._compressor, self._control, self._topology)
        return CompressedEngine.flat(self._compressor, carrier)

    def _reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        parameters = bucket.parameters()
        names = [self._names[id(parameter)] for parameter in parameters]
        if not self._in_backward:
            self._in_backward = True
            scaler = self._scaler
            self._compressor.begin_step(scaler.get_scale() if scaler and scaler.is_enabled() else 1.0)
        self._record.add(names)
        if self._control.world_size == 1:
            result: torch.futures.Future[Tensor] = torch.futures.Future()
            result.set_result(bucket.buffer())
        elif self._record.holds:
            self._held = self._held or HeldStep(self._record.buckets)
            result = self._held.hold(bucket.buffer(), self._layout(names, [p.numel() for p in parameters]))
        else:
            result = self._start(bucket.buffer(), names, [p.numel() for p in parameters])
        if bucket.is_last():
            if self._held is not None:
                self._held.start(self._start)
                self._wait()
                self._held.finish()
                self._held = None
            # Runs at the end of backward, before DDP's own: raises what a stage raised, with its own type.
            try:
                torch.autograd.Variable._execution_engine.queue_callback(self._finish_backward)
            except RuntimeError as error:
                raise EdlError(
                    "gradients are reduced outside of a backward pass, as DDP's join() does",
                    fix="give every rank the same number of steps; join() needs bits='none'",
                ) from error
        return result

    def _start(self, x: Tensor, names: Sequence[str], numels: Sequence[int]) -> torch.futures.Future[Tensor]:
        assert self._engine is not None
        moment = self._second_moment
        divisors = None if moment is None else moment.of(names, numels, x)
        result, done = self._engine.start(x, self._layout(names, numels), divisors)
        self._pending.append(done)
        return result

    def _layout(self, names: Sequence[str], numels: Sequence[int]) -> BucketLayout:
        return BucketLayout.of(names, numels, self._control.world_size)

    def _finish_backward(self) -> None:
        start = time.perf_counter()
        self._wait()
        self._pending = []
        self._record.end_step()
        self._in_backward = False
        self._compressor.end_step(time.perf_counter() - start)
        if self._commits_itself:
            self._compressor.commit_step()

    def _wait(self) -> None:
        try:
            for done in self._pending:
                done.result()
        except BaseException:
            assert self._engine is not None
            self._engine.abort()  # the peers learn of it now, not after a time-out
            raise

    def _after_step(self, *_: Any) -> None:
        self._optimizer_steps += 1
        self._compressor.commit_step()
        if self._engine is None:
            trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
            numels = {name: p.numel() for name, p in trained.items()}
            itemsizes = {name: p.element_size() for name, p in trained.items()}
            self._compressor.meter.add(native_tally(numels, itemsizes, self._control.world_size))
            self._compressor.meter.stepped(exposed_seconds=0.0)
        elif self._check_every and self._optimizer_steps % self._check_every == 0:
            self.check()


def _reduce_bucket(state: Compression, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The hook that DDP calls, in the autograd thread, when a bucket's gradients are ready."""
    return state._reduce(bucket)


def _averaged_parameters(model: DistributedDataParallel) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for name, parameter in model.module.named_parameters()
        if name not in model.parameters_to_ignore
    }


def _values_sent(parameters: Mapping[str, nn.Parameter], share: float) -> int:
    """Values that a rank sends in a step: the other ranks' shards, and its own to each of them."""
    return int(share * sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad))


def _residuals(plan: Plan, parameters: Mapping[str, nn.Parameter], device: torch.device) -> Residuals | None:
    if not plan.error_feedback:
        return None
    return Residuals({name: parameter.numel() for name, parameter in parameters.items()}, device)


def _facts(
    parameters: Mapping[str, nn.Parameter], shadow: bool, check_every: int, extra: Mapping[str, Any]
) -> dict[str, Any]:
    shapes = {
        name: f"{p.dtype} {list(p.shape)} on {p.device.type}{'' if p.requires_grad else ', frozen'}"
        for name, p in parameters.items()
    }
    return {
        "wire format": FORMAT_VERSION,
        "torch": torch.__version__.partition("+")[0],
        "shadow": shadow,
        "check_every": check_every,
        "parameters": shapes,
        "order of parameters": xxhash.xxh3_64_hexdigest("\n".join(shapes).encode()),
        "extra": {name: str(value) for name, value in extra.items()},
    }


def _check_hierarchy(
    hierarchy: Hierarchy, plan: Plan, shadow: bool, transport: Transport | Literal["mpi"] | None
) -> None:
    if hierarchy is not None and transport is not None:
        raise ConfigError(
            "a hierarchy makes its own groups of ranks, out of the process group",
            found=f"transport={transport!r}",
            fix="leave one of the two out",
        )
    if hierarchy is not None and (shadow or plan.codec == "none"):
        raise ConfigError(
            "a hierarchy needs our own reduction",
            found="shadow=True" if shadow else 'bits="none"',
            fix='leave hierarchy out, or use bits="identity" as the yardstick',
        )


def _check_supported(
    model: DistributedDataParallel, parameters: Mapping[str, nn.Parameter], check_every: int
) -> None:
    if getattr(model, "_comm_hooks", None):
        raise ConfigError(
            "the model has a communication hook already", fix="call compress() once, and no other hook"
        )
    if check_every < 0:
        raise ConfigError("check_every is negative", expected="optimizer steps, or 0", found=str(check_every))
    devices = sorted({str(parameter.device) for parameter in parameters.values()})
    if len(devices) > 1:
        raise UnsupportedTensor("the model's parameters must be on one device", found=", ".join(devices))
    for name, parameter in parameters.items():
        if parameter.requires_grad and parameter.dtype not in _DTYPES:
            raise UnsupportedTensor(
                f"the gradients of parameter {name!r} cannot be compressed",
                expected="float32, bfloat16 or float16",
                found=str(parameter.dtype),
                fix="convert the model, or exclude the parameter from DDP",
            )
    for name, child in model.module.named_modules():
        if getattr(child, "sparse", False):
            raise UnsupportedTensor(
                f"module {name!r} has sparse gradients",
                expected="dense gradients",
                fix="build the embedding with sparse=False",
            )
