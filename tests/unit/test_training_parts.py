"""The pure parts of training: schedule, tasks, optimizers, checkpoints, run folders, the command line's settings."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from efficient_dl.cli import app
from efficient_dl.commands.train import TrainFlags, settled_config
from efficient_dl.config import Config, DataSpec, ModelConfig, OptimizerConfig, with_overrides
from efficient_dl.errors import CheckpointError, ConfigError, DiskFull, LaunchError
from efficient_dl.models import build_model
from efficient_dl.training import optimizers
from efficient_dl.training.checkpoint import CheckpointFolder
from efficient_dl.training.console import byte_text, row_text
from efficient_dl.training.demo import BITS, MARKER, _make_room, demo_configs, run_demo
from efficient_dl.training.disk import disk_full
from efficient_dl.training.measure import untouched
from efficient_dl.training.optimizers import Optimizer, hidden_matrices
from efficient_dl.training.probing import WhatIf
from efficient_dl.training.resume import check_same_training
from efficient_dl.training.run_folder import RunFolder, Summary, default_name, locked, new_folder
from efficient_dl.training.schedule import learning_rate
from efficient_dl.training.task import task_for

TEXT = DataSpec("tokens", classes=256, shape=(16,))


# ------------------------------------------------------------------------------------------------ schedule and tasks
def test_the_learning_rate_warms_up_and_follows_a_cosine_to_its_share() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=10, final_lr_share=0.1)
    rates = [learning_rate(config, step, 111) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == max(rates) == 1.0
    assert rates[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[110] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_constant_rate_does_not_depend_on_the_number_of_steps() -> None:
    config = OptimizerConfig(lr=0.5, warmup_steps=2, schedule="constant")
    assert [learning_rate(config, step, steps) for step, steps in ((1, 5), (4, 5), (4, 500))] == [
        0.5,
        0.5,
        0.5,
    ]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_run_shorter_than_its_warm_up_has_finite_rates(steps: int) -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=3)
    assert all(0 < learning_rate(config, step, steps) <= 1 for step in range(steps))


def test_an_untrained_model_has_the_loss_of_guessing() -> None:
    logits, targets = torch.zeros(4, 16, 256), torch.randint(256, (4, 16))
    assert task_for("tokens").loss(logits, targets).item() == pytest.approx(math.log(256))
    images = task_for("images")
    assert images.loss(torch.zeros(4, 10), torch.arange(4)).item() == pytest.approx(math.log(10))
    assert images.metrics(torch.eye(4), torch.tensor([0, 1, 2, 2]))["accuracy"].item() == 0.75


def test_unknown_data_has_no_task() -> None:
    with pytest.raises(ConfigError, match="no training task"):
        task_for("sounds")


# -------------------------------------------------------------------------------------------------------- optimizers
def trained(name: str, steps: int = 3) -> tuple[nn.Module, Optimizer]:
    model = build_model(ModelConfig(size="nano", context=16), TEXT, seed=1)
    optimizer = Optimizer(model, OptimizerConfig(name=name))
    continue_training(model, optimizer, range(steps))
    return model, optimizer


def continue_training(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        model(torch.randint(256, (2, 16))).square().mean().backward()
        optimizer.step(lr=0.01)
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_an_optimizer_continues_bit_for_bit_from_its_named_state(name: str) -> None:
    whole, _ = trained(name, steps=5)
    model, optimizer = trained(name, steps=3)
    other = Optimizer(model, OptimizerConfig(name=name))
    other.load_state_dict(optimizer.state_dict())
    continue_training(model, other, range(3, 5))
    for expected, found in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize(("fused", "count_device"), [(False, "cpu"), (True, "meta")])
def test_restored_state_lies_where_its_parameter_does(
    fused: bool, count_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, saved = trained("adamw")
    monkeypatch.setitem(
        optimizers._BUILDERS,
        "adamw",
        lambda model, parameters, config: [torch.optim.AdamW(parameters.values())],
    )
    moved = build_model(ModelConfig(size="nano", context=16), TEXT).to("meta")
    optimizer = Optimizer(moved, OptimizerConfig(name="adamw"))
    optimizer.parts[0].param_groups[0]["fused"] = fused
    optimizer.load_state_dict(saved.state_dict())
    devices = {(key.rpartition("/")[2], value.device.type) for key, value in optimizer.state_dict().items()}
    assert devices == {("exp_avg", "meta"), ("exp_avg_sq", "meta"), ("step", count_device)}


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    model, optimizer = trained("muon", steps=0)
    hidden = hidden_matrices(model)
    assert hidden and not any("embedding" in name or "head" in name or "norm" in name for name in hidden)
    assert [type(part).__name__ for part in optimizer.parts] == ["Muon", "AdamW"]
    counts = [sum(len(group["params"]) for group in part.param_groups) for part in optimizer.parts]
    assert counts == [len(hidden), len(list(model.parameters())) - len(hidden)]


def test_muon_refuses_a_model_without_hidden_matrices() -> None:
    with pytest.raises(ConfigError, match="no hidden matrix"):
        Optimizer(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2)), OptimizerConfig(name="muon"))


def test_only_matrices_decay() -> None:
    _, optimizer = trained("adamw", steps=0)
    decays = {
        p.ndim >= 2: group["weight_decay"]
        for group in optimizer.parts[0].param_groups
        for p in group["params"]
    }
    assert decays == {True: 0.1, False: 0.0}


def test_state_of_an_unknown_parameter_is_refused() -> None:
    _, optimizer = trained("sgd", steps=0)
    with pytest.raises(CheckpointError, match="lacks"):
        optimizer.load_state_dict({"nowhere/momentum_buffer": torch.zeros(1)})


# ------------------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
class TestCheckpoints:
    def test_a_checkpoint_comes_back_and_old_ones_go(self, tmp_path: Path) -> None:
        folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
        for step in (1, 2, 3):
            folder.save(
                step, {"model/w": torch.full((3,), step)}, {"generator": torch.arange(4)}, {"seed": step}
            )
        assert folder.steps() == [2, 3]
        loaded = folder.load(3)
        assert loaded.tensors["model/w"].tolist() == [3, 3, 3]
        assert loaded.rank_states[0]["generator"].tolist() == [0, 1, 2, 3]
        assert (loaded.step, loaded.about["seed"], loaded.about["ranks"]) == (3, 3, 1)

    def test_a_checkpoint_that_was_being_written_does_not_count(self, tmp_path: Path) -> None:
        folder = CheckpointFolder(tmp_path)
        folder.save(1, {"w": torch.ones(2)}, None, {})
        folder.folder(1).rename(tmp_path / ".step-000002.partial")
        assert folder.latest() is None
        folder.save(3, {"w": torch.ones(2)}, None, {})
        assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]

    def test_a_damaged_checkpoint_says_which_folder_to_remove(self, tmp_path: Path) -> None:
        folder = CheckpointFolder(tmp_path)
        path = folder.save(1, {"w": torch.ones(2)}, None, {})
        next(path.glob("*.distcp")).write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"step-000001"):
            folder.load(1)
        with pytest.raises(CheckpointError):
            folder.load(2)


def test_only_a_lack_of_room_is_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(DiskFull), disk_full(tmp_path):
        raise OSError(28, "No space left on device")
    with pytest.raises(PermissionError), disk_full(tmp_path):
        raise PermissionError(13, "Permission denied")


# -------------------------------------------------------------------------------------------------------- run folder
SUMMARY = Summary(1.0, 3, 48, 2.0, 10.0, 5.0, 2.0, 0.1, 0.1, 0.0, 1, 2.0, 0, 2)


def test_metrics_go_on_after_the_resumed_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, writes=True)
    folder.open(Config(), 0)
    for step in (1, 2, 3):
        folder.log({"step": step, "loss": math.nan if step == 2 else 0.5})
    folder.finish(SUMMARY)
    folder.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    folder.open(Config(), 2)
    folder.log({"step": 3, "loss": 0.25})
    folder.close()
    assert folder.rows() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}, {"step": 3, "loss": 0.25}]
    assert folder.summary() is None, "it was of the earlier, longer run"


def test_a_summary_comes_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, writes=True)
    folder.finish(SUMMARY)
    assert folder.summary() == SUMMARY
    assert json.loads((tmp_path / "summary.json").read_text()) == asdict(SUMMARY)


def test_what_is_not_finite_is_null_in_the_summary(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, writes=True)
    folder.finish(replace(SUMMARY, val_loss=math.inf, step_seconds_median=math.nan))
    values = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert (values["val_loss"], values["step_seconds_median"], values["ratio"]) == (None, None, 2.0)
    read = folder.summary()
    assert read and math.isnan(read.val_loss)


def test_the_median_of_a_step_is_known_from_the_rows(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, writes=True)
    assert math.isnan(folder.step_seconds_median())
    folder.open(Config(), 0)
    for step, seconds in enumerate((0.1, 0.3, 0.2)):
        folder.log({"step": step, "step_seconds": seconds})
    folder.log({"step": 3, "val_loss": 1.0})
    folder.close()
    assert folder.step_seconds_median() == 0.2


def test_a_rank_that_does_not_write_leaves_no_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", writes=False)
    folder.open(Config(), 0)
    folder.log({"step": 1, "loss": 0.5})
    folder.finish(SUMMARY)
    assert not (tmp_path / "run").exists()


def test_a_default_folder_is_not_used_twice(tmp_path: Path) -> None:
    name = default_name(with_overrides(Config(), ["compression.bits=2", "data.name=tokens:a/b"]))
    assert name == "gpt-micro-tokens-adamw-2.0-seed0"
    made = [new_folder(tmp_path / "runs", name).name for _ in range(3)]
    assert made == [name, f"{name}-2", f"{name}-3"]


def test_a_folder_is_locked_until_its_run_ends(tmp_path: Path) -> None:
    with locked(tmp_path / "run", resumed=False):
        with pytest.raises(ConfigError, match="another run writes here"):
            locked(tmp_path / "run", resumed=True)
    folder = RunFolder(tmp_path / "run", writes=True)
    folder.open(Config(), 0)
    folder.close()
    with pytest.raises(ConfigError, match="holds a run already"):
        locked(tmp_path / "run", resumed=False)
    locked(tmp_path / "run", resumed=True).close()


# ------------------------------------------------------------------------------------------------------------ resume
def test_a_resume_names_what_changed_and_refuses_another_training() -> None:
    before = with_overrides(Config(), ["data.fingerprint=xxh3:1"])
    changed = with_overrides(
        before, ["train.steps=9", "train.log_every=1", "run.workers=4", "optimizer.lr=0.5"]
    )
    notes = check_same_training(before, changed)
    assert [note.split(" = ")[0].split()[-1] for note in notes] == ["optimizer.lr", "train.steps"]
    tokens = with_overrides(before, ["data.name=tokens:/old"])
    assert check_same_training(tokens, with_overrides(tokens, ["data.name=tokens:/new"])) == []
    for setting in (
        "model.size=mini",
        "data.name=digits",
        "data.holdout=0.2",
        "optimizer.name=sgd",
        "train.seed=1",
        "data.fingerprint=x",
    ):
        with pytest.raises(CheckpointError, match=setting.split("=")[0]):
            check_same_training(before, with_overrides(before, [setting]))


# ------------------------------------------------------------------------------------------------------ measurements
def test_measuring_leaves_the_model_and_the_generator_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    with untouched(model, torch.device("cpu")):
        model(torch.randn(8, 4)).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------------------------ command line
def test_flags_win_over_files_and_set_wins_over_flags(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[train]\nsteps = 7\nseed = 7\n[optimizer]\nlr = 7.0\n")
    flags = TrainFlags(
        ["train.steps=8", "train.seed=8", "train.seed=9"], out=tmp_path / "run", config=tmp_path / "c.toml"
    )
    config = settled_config(flags)
    assert (config.optimizer.lr, config.train.steps, config.train.seed) == (7.0, 8, 9)


def test_workers_must_match_the_launcher_only_if_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    out = [f"run.out={tmp_path / 'run'}"]
    settled_config(TrainFlags(out))
    settled_config(TrainFlags([*out, "run.workers=4"], workers=4))
    with pytest.raises(LaunchError, match=r"found: 4 \(WORLD_SIZE\)"):
        settled_config(TrainFlags([*out, "run.workers=3"], workers=3))


@pytest.mark.parametrize("command", ["train", "probe", "demo", "doctor"])
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"edl {command}" in result.output


NO_NETWORKS = ["", "rate=fast,hosts=2", "rate=1mbit", "rate=1mbit,hosts=1", "rate=1mbit,hosts=2,x=1"]


@pytest.mark.parametrize("text", NO_NETWORKS)
def test_a_network_that_cannot_be_imagined_is_an_error_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="--what-if rate=400mbit,hosts=16"):
        WhatIf.of(text)


def test_train_takes_the_flags_that_scripts_rely_on() -> None:
    flags = ["model", "data", "optimizer", "bits", "workers", "steps", "batch-size", "lr", "seed", "out"]
    output = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    assert all(f"--{flag} " in output for flag in [*flags, "resume", "config", "set"])


def test_doctor_names_versions_kernels_and_data() -> None:
    output = CliRunner().invoke(app, ["doctor"]).output
    assert all(word in output for word in ("torch", "codec kernels", "cores", "data stdlib", "namespaces"))


def test_the_demo_trains_the_same_three_times(tmp_path: Path) -> None:
    configs = demo_configs(40, 2, tmp_path)
    assert [config.compression.bits for config in configs] == ["none", "lossless", 2.0]
    assert len({config.fingerprint(ignore=("run", "compression")) for config in configs}) == 1


def test_the_demo_replaces_nothing_but_a_demo(tmp_path: Path) -> None:
    folders = [tmp_path / bits for bits in BITS]
    _make_room(folders)
    (folders[0] / "config.toml").touch()
    _make_room(folders)
    assert [[one.name for one in folder.iterdir()] for folder in folders] == [[MARKER]] * 3
    (folders[1] / MARKER).rename(folders[1] / "config.toml")
    with pytest.raises(ConfigError, match="not a demo's"):
        _make_room(folders)
    assert (folders[1] / "config.toml").exists() and (folders[0] / MARKER).exists()


def test_the_demo_checks_its_settings_before_it_removes_anything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _make_room([tmp_path / "none"])
    (tmp_path / "none" / "kept").touch()
    with pytest.raises(ConfigError, match=r"train\.steps"):
        run_demo(steps=0, out=tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(LaunchError, match="starts its own workers"):
        run_demo(out=tmp_path)
    assert (tmp_path / "none" / "kept").exists()


@pytest.mark.parametrize("model", ["", "-nano", "gpt-"])
def test_a_model_needs_a_name_and_a_size_after_its_dash(model: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", f"--model={model}", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2


def test_numbers_are_short() -> None:
    assert [byte_text(one) for one in (12, 1234, 1.2e6, 3.4e9)] == ["12 B", "1.23 kB", "1.20 MB", "3.40 GB"]
    row = {"step": 3, "lr": 0.1, "loss": 1.5, "wire_bytes_per_step": 2e6, "step_seconds": 0.0123}
    assert row_text(row) == "step 3  loss 1.5000  2.00 MB/step  12 ms"
