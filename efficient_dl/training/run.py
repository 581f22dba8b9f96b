"""From configurations to summaries: what every worker does, and what benchmarks call inside their own workers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from efficient_dl.config import Config
from efficient_dl.data import Dataset, load_data
from efficient_dl.errors import ConfigError, EdlError
from efficient_dl.models import build_model, check_model
from efficient_dl.training import resume
from efficient_dl.training.console import Progress, progress_for, result_text
from efficient_dl.training.end_to_end import Trainer
from efficient_dl.training.local_loop import LocalTrainer
from efficient_dl.training.optimizers import Optimizer
from efficient_dl.training.partition_wishes import check_overrides
from efficient_dl.training.planning import decided, is_planned
from efficient_dl.training.run_folder import (
    SUMMARY,
    Summary,
    check_free,
    default_name,
    locked,
    new_folder,
    recorded_config,
    write_plan,
)
from efficient_dl.training.setting_checks import check_settings
from efficient_dl.training.watch import Unwatched, Watch, watched
from efficient_dl.training.worker import Worker

T = TypeVar("T")

RUNS = Path("runs")
_ENDING_SECONDS = (
    30.0  # beyond a collective's time-out, for the ranks of the run before to end, cut off ones too
)
FETCH_SECONDS = 1800.0  # ranks wait at least so long for the one that downloads


def run_worker(
    worker: Worker, configs: Sequence[Config], resumed: bool = False, restarted: bool = False
) -> list[Summary]:
    """Run configurations one after the other in these workers; the main function for `launch`.

    They share the process group, so all take the first one's [run] settings but for `out`. Every rank returns the
    summaries; every rank raises if one finds an error in its configuration or data. restarted: a resume that no user
    watches over. It divides a step's samples anew for another number of workers whatever the settings say, and waits
    for the run that it continues to have ended everywhere.
    """
    device = worker.start(configs[0].run)
    worker.agree(list(configs))
    summaries = []
    for config in configs:
        settled, notes = worker.together("settle", partial(_settled, config, resumed, restarted))
        fetch = partial(_data, settled) if worker.local_rank == 0 else lambda: None
        patience = max(settled.run.timeout_seconds, FETCH_SECONDS)
        data = worker.together("fetch", fetch, patience)  # a download happens once a machine
        prepared = worker.together("prepare", partial(_prepared, settled, notes, data))
        wait_seconds = settled.run.timeout_seconds + _ENDING_SECONDS if restarted else 0.0
        with (
            worker.together("lock", partial(_locked, prepared.config, resumed, wait_seconds), wait_seconds),
            watched(
                worker.store,
                worker.rank,
                worker.size,
                f"watch/{next(worker.calls)}",
                config.run,
                in_step=config.local.mode != "partitionwise",
            ) as watch,
        ):
            summaries.append(_train(prepared, device, resumed, watch=watch))
    return summaries


def run(config: Config, resumed: bool = False, progress: Progress | None = None) -> Summary:
    """Run one configuration inside processes that have a default process group: the loop as a library.

    Every rank calls it with the same configuration. progress: None shows it on rank 0.
    """
    local = dist.get_rank() % max(1, torch.cuda.device_count()) if torch.cuda.is_available() else 0
    on_gpu = config.run.device == "cuda" or (config.run.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    prepared = _on_all(lambda: _prepared(*_settled(config, resumed)))  # nobody writes before all have read
    with _on_all(lambda: _locked(prepared.config, resumed)):
        return _train(prepared, device, resumed, progress)


def _on_all(step: Callable[[], T]) -> T:
    """What a step gives this rank; if it raises an EdlError on any rank, every rank raises one."""
    result, error = None, None
    try:
        result = step()
    except EdlError as caught:
        error = caught
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else str(error))
    if error is not None:
        raise error
    for rank, text in enumerate(errors):
        if text is not None:
            raise ConfigError(f"rank {rank} cannot begin", found=text)
    return result  # type: ignore[return-value]  # there was no error, so it is step's


@dataclasses.dataclass(frozen=True)
class _Prepared:
    config: Config
    data: Dataset
    notes: list[str]


def _settled(config: Config, resumed: bool, restarted: bool = False) -> tuple[Config, list[str]]:
    """The configuration with its folder, fit for a resume; and what the user should know of that."""
    notes: list[str] = []
    config.compression.overrides_by_pattern()  # fails here, before any data is read
    config = _with(_with_shared_folder(config, resumed), "run", workers=dist.get_world_size())
    if resumed:
        before = recorded_config(Path(config.run.out))
        taken = before.compression.bits
        if is_planned(config) and taken != "auto" and before.run.workers == config.run.workers:
            config = _with(config, "compression", bits=before.compression.bits)
            notes.append(
                f"bits auto: {before.compression.bits} as before; a resumed run measures nothing again"
            )
        notes += resume.check_same_training(before, config)
        config, changes = resume.same_samples(before, config, config.run.workers, always=restarted)
        notes += changes
        if not config.data.fingerprint:
            config = _with(config, "data", fingerprint=before.data.fingerprint)
    return config, notes


def _prepared(config: Config, notes: list[str], data: Dataset | None = None) -> _Prepared:
    """The data loaded, if it is not yet, and its fingerprint recorded.

    Raises ConfigError where model, data, batch size and optimizer do not go together.
    """
    data = data or _data(config)
    check_settings(config, data.spec.kind)
    check_model(config.model, data.spec, config.data.batch_size)
    model = build_model(config.model, data.spec, config.train.seed)
    Optimizer(model, config.optimizer)
    check_overrides(config, [name for name, one in model.named_parameters() if one.requires_grad])
    return _Prepared(_with(config, "data", fingerprint=data.fingerprint), data, notes)


def _train(
    prepared: _Prepared,
    device: torch.device,
    resumed: bool,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Summary:
    shown = progress or progress_for(dist.get_rank())
    for note in prepared.notes:
        shown.note(note)
    shown.note(f"run folder: {prepared.config.run.out}")
    config, measurements, auto = prepared.config, None, None
    try:
        if is_planned(config):
            auto = decided(config, prepared.data, device, shown, resumed, watch or Unwatched())
            config, measurements = auto.config, auto.measurements
            shown.note(auto.note)
            if auto.planned is not None and dist.get_rank() == 0:
                write_plan(Path(config.run.out), auto.planned.to_json())
        kind = Trainer if config.local.mode == "end-to-end" else LocalTrainer
        loop = kind(config, prepared.data, device, shown)
        loop.watch = watch or Unwatched()
        loop.measurements = measurements
        loop.recorded = prepared.config if auto is not None and auto.is_measured else config
        summary = loop.train(resumed)
    finally:
        shown.stop()
    path = Path(config.run.out) / SUMMARY
    shown.note(result_text(summary, path))
    return summary


def with_folder(config: Config, resumed: bool) -> Config:
    """The configuration with its folder, a new one if it names none; one process of a run calls it.

    Raises ConfigError if a run lies there that is not resumed.
    """
    if not config.run.out:
        return _with(config, "run", out=str(new_folder(RUNS, default_name(config))))
    if not resumed:
        check_free(Path(config.run.out))
    return config


def _with_shared_folder(config: Config, resumed: bool) -> Config:
    """`with_folder` on rank 0, its result or error on all ranks."""
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [with_folder(config, resumed).run.out]
        except EdlError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], EdlError):
        raise outcome[0]
    return _with(config, "run", out=outcome[0])


def _locked(
    config: Config, resumed: bool, wait_seconds: float = 0.0
) -> contextlib.AbstractContextManager[Any]:
    """The folder locked against other runs while the result is open, by rank 0."""
    if dist.get_rank() != 0:
        return contextlib.nullcontext()
    return locked(Path(config.run.out), resumed, wait_seconds)


def _data(config: Config) -> Dataset:
    return load_data(config.data, context=config.model.context, seed=config.train.seed)


def _with(config: Config, section: str, **values: Any) -> Config:
    changed: Any = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: changed})
