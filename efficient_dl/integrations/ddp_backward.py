"""The backward pass of a DistributedDataParallel model: which way each bucket goes, and what ends with the last one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efficient_dl.comm import BucketLayout, Compressor, ProcessGroupTransport
from efficient_dl.comm.transport import telling_peers
from efficient_dl.errors import ConfigError, EdlError
from efficient_dl.integrations.ddp_buckets import BucketEngine, BucketRecord, HeldStep
from efficient_dl.integrations.ddp_engines import Engines
from efficient_dl.integrations.ddp_native import NativeReducer
from efficient_dl.integrations.ddp_replanning import Replanner
from efficient_dl.integrations.group_guards import GroupGuards
from efficient_dl.integrations.second_moment import SecondMoment


class Backward:
    """Sends DDP's buckets: by an engine, by torch's own all-reduce, or held back until a saved run's are complete.

    parameters: that DDP averages, by name. left_to_torch: names that are never compressed. joins: whether DDP is inside
    of its join(). commits: whether a step ends with the backward pass, for want of an optimizer.
    engine: set by the owner; None: all goes natively. samples: whether the next pass is sampled for the replanner.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        left_to_torch: Mapping[str, Any],
        compressor: Compressor,
        control: ProcessGroupTransport,
        engines: Engines,
        guards: GroupGuards,
        joins: Callable[[], bool],
        scaler: torch.amp.GradScaler | None,
        second_moment: SecondMoment | None,
        replanner: Replanner | None,
        commits: bool,
    ) -> None:
        self.engine: BucketEngine | None = None
        self.record = BucketRecord()
        self.samples = False
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
        self._left_to_torch = left_to_torch
        self._compressor, self._control, self._engines, self._guards = compressor, control, engines, guards
        self._joins, self._scaler, self._second_moment = joins, scaler, second_moment
        self._replanner, self._commits = replanner, commits
        self._native = NativeReducer(control, compressor.meter)
        self._begun = False
        self._drains = False  # whether this step goes natively, with the residuals added
        self._pending: list[Future[Any]] = []
        self._held: HeldStep | None = None

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Starts on a bucket; returns what DDP waits for. In the autograd thread."""
        if self._joins():
            raise ConfigError(
                "gradients cannot be compressed inside of DDP's join()",
                fix="give every rank the same number of steps, without join(); or use bits='none'",
            )
        parameters = bucket.parameters()
        names = [self._names[id(parameter)] for parameter in parameters]
        numels = [parameter.numel() for parameter in parameters]
        if not self._begun:
            self._begun = True
            self._begin()
        native = not self._compresses or any(name in self._left_to_torch for name in names)
        if not native:
            self.record.add(names)
            if self._replanner is not None and self.samples:
                self._replanner.keep_sample(bucket.buffer(), numels)
        if self._control.world_size == 1:
            result: torch.futures.Future[Tensor] = torch.futures.Future()
            result.set_result(bucket.buffer())
        elif native:
            if self._drains and not any(name in self._left_to_torch for name in names):
                self._drain(bucket.buffer(), names, numels)
            result, done = self._native.start(bucket.buffer(), dict(zip(names, parameters, strict=True)))
            self._pending.append(done)
        elif self.record.holds:
            self._held = self._held or HeldStep(self.record.buckets)
            result = self._held.hold(bucket.buffer(), self._layout(names, numels))
        else:
            result = self._start(bucket.buffer(), names, numels)
        if bucket.is_last():
            if self._held is not None:
                self._held.start(self._start)
                self._wait()
                self._held.finish()
                self._held = None
            # Runs at the end of backward, before DDP's own: raises what a stage raised, with its own type.
            try:
                torch.autograd.Variable._execution_engine.queue_callback(self._finish)
            except RuntimeError as error:
                raise EdlError(
                    "gradients are reduced outside of a backward pass, as DDP's join() does",
                    fix="give every rank the same number of steps; join() needs bits='none'",
                ) from error
        return result

    @property
    def _compresses(self) -> bool:
        return self._guards.off is None and self.engine is not None and not self._drains

    def _begin(self) -> None:
        if self._replanner is not None:
            self._replanner.forget_sample()  # of a step that a GradScaler has skipped
        scaler, residuals = self._scaler, self._compressor.residuals
        follows = residuals is not None and scaler is not None and scaler.is_enabled()
        scale = scaler.get_scale() if follows and scaler is not None else 1.0
        if self._second_moment is None:
            self._compressor.begin_step(scale)
        else:
            self._second_moment.begin_step()
            self._compressor.begin_step(scale, self._second_moment.unscaled)
        self._drains = self._guards.off is None and residuals is not None and residuals.draining

    def _finish(self) -> None:
        start = time.perf_counter()
        self._wait()
        self._pending = []
        self._begun = False
        compressed = self._compresses
        if compressed:
            self.record.end_step()
        with telling_peers(self._engines):
            self._compressor.end_step(time.perf_counter() - start)
        if compressed:
            self._compressor.agree(self._control)
        if self._commits:
            self._compressor.commit_step()
        self._check_unfrozen()
        self._guards.stepped()

    def _start(self, x: Tensor, names: Sequence[str], numels: Sequence[int]) -> torch.futures.Future[Tensor]:
        assert self.engine is not None
        moment = self._second_moment
        divisors = None if moment is None else moment.of(names, numels, x)
        result, done = self.engine.start(x, self._layout(names, numels), divisors)
        self._pending.append(done)
        return result

    def _drain(self, x: Tensor, names: Sequence[str], numels: Sequence[int]) -> None:
        assert self._compressor.residuals is not None
        for name, part in zip(names, x.split(list(numels)), strict=True):
            self._compressor.residuals.drain(name, part)

    def _layout(self, names: Sequence[str], numels: Sequence[int]) -> BucketLayout:
        return BucketLayout.of(names, numels, self._control.world_size)

    def _wait(self) -> None:
        try:
            for done in self._pending:
                done.result()
        except BaseException:
            self._engines.abort()  # the peers learn of it now, not after a time-out
            raise

    def _check_unfrozen(self) -> None:
        for name, parameter in self._frozen.items():
            if parameter.requires_grad and parameter.grad is not None and self._control.world_size > 1:
                raise ConfigError(
                    f"parameter {name!r} was frozen when DDP was made, which does not average its gradients now",
                    fix="after unfreezing it, wrap the bare model again, and call compress() again",
                )
