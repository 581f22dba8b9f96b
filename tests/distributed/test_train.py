"""Training runs on several ranks: what is written, what is resumed, and how what goes wrong is reported."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from efficient_dl.config import Config, load_config, with_overrides
from efficient_dl.training import run
from efficient_dl.training.checkpoint import CheckpointFolder
from efficient_dl.training.run_folder import RunFolder, locked
from tests.distributed.edl_ranks import EdlRanks, edl
from tests.distributed.launch import run_ranks

SUMMARY_KEYS = {
    "val_loss", "steps", "tokens_or_samples", "bits_per_value", "raw_bytes_per_step", "wire_bytes_per_step", "ratio",
    "step_seconds_median", "compute_seconds_median", "codec_seconds_per_step", "peak_memory_bytes", "bits", "seed",
    "world_size",
}  # fmt: skip
DIGITS = ("train", "--model", "mlp-nano", "--data", "digits")


def tiny(out: Path, *settings: str) -> Config:
    base = ["model.name=mlp", "model.size=nano", "data.name=digits", "train.eval_batches=2", f"run.out={out}"]
    return with_overrides(Config(), [*base, *settings])


# What a resume must reproduce: exact and lossy codecs, all optimizers, dropout's generator, batch norm's buffers,
# several buckets' order, accumulation.
RESUMED = {
    "native-adamw": ["compression.bits=none"],
    "native-sgd": ["compression.bits=none", "optimizer.name=sgd", "train.accumulate=2"],
    "lossless-adamw-dropout": ["compression.bits=lossless", "model.dropout=0.2"],
    "lossless-sgd": ["compression.bits=lossless", "optimizer.name=sgd"],
    "2bit-adamw": ["compression.bits=2.0"],
    "2bit-sgd-dropout": ["compression.bits=2.0", "optimizer.name=sgd", "model.dropout=0.2"],
    "feedback-sgd-overrides": [
        "compression.bits=0.5", "optimizer.name=sgd", "compression.overrides=*.bias=none",
    ],
    "bounded-error-adamw": ["compression.max_error=0.2"],
    "second-moment-adamw": ["compression.bits=2.0", "compression.scale=second_moment"],
    "2bit-muon-gpt": [
        "compression.bits=2.0", "optimizer.name=muon", "model.name=gpt", "model.context=32", "data.name=stdlib",
        "model.dropout=0.1", "train.precision=bf16",
    ],
    "2bit-resnet": ["compression.bits=2.0", "model.name=resnet18", "data.batch_size=4"],
}  # fmt: skip


def resume_each(rank: int, folder: Path) -> dict[str, list[str]]:
    """For every case, what differs between 6 steps in one go and 3 steps, a crash at step 5, and a resume."""
    return {name: resume_differences(rank, folder / name, settings) for name, settings in RESUMED.items()}


def resume_differences(rank: int, folder: Path, settings: list[str]) -> list[str]:
    intervals = ["train.steps=6", "train.checkpoint_every=3", "train.log_every=1", "train.eval_every=2"]
    whole, crashed = folder / "whole", folder / "crashed"
    run(tiny(whole, *intervals, *settings))
    if rank == 0:
        shutil.copytree(whole, crashed)
        shutil.rmtree(crashed / "checkpoints" / "step-000006")
        metrics = crashed / "metrics.jsonl"
        rows = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= 5]
        metrics.write_text("\n".join(rows) + '\n{"step": 6, "lo')  # cut off by the crash
    torch.distributed.barrier()
    torch.manual_seed(99)
    run(tiny(crashed, *intervals, *settings), resumed=True)

    ends = [CheckpointFolder(one / "checkpoints").load(6) for one in (whole, crashed)]
    differences = [
        key for key in ends[0].tensors if not torch.equal(ends[0].tensors[key], ends[1].tensors[key])
    ]
    if ends[0].tensors.keys() != ends[1].tensors.keys():
        differences.append("names of tensors")
    if not torch.equal(ends[0].rank_states[0]["torch"], ends[1].rank_states[0]["torch"]):
        differences.append("generator")
    rows = [[without_times(row) for row in RunFolder(one, writes=False).rows()] for one in (whole, crashed)]
    if rows[0] != rows[1] or len(rows[0]) != 9:
        differences.append(f"metrics: {rows}")
    rows = [RunFolder(one, writes=False).rows("parameters.jsonl") for one in (whole, crashed)]
    if rows[0] != rows[1] or len(rows[0]) != 3:
        differences.append(f"parameters: {rows}")
    return differences


def without_times(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if "seconds" not in key}


@pytest.mark.slow
def test_resume_continues_bit_for_bit(tmp_path: Path) -> None:
    for differences in run_ranks(resume_each, 2, tmp_path, timeout=110):
        assert differences == {name: [] for name in RESUMED}


def bytes_by_hierarchy(rank: int, folder: Path) -> list[float]:
    settings = ["train.steps=2", "compression.bits=identity"]
    return [
        run(tiny(folder / nodes, *settings, f"compression.hierarchy={nodes}")).wire_bytes_per_step
        for nodes in ("none", "2")
    ]


def test_the_hierarchy_of_a_run_sends_a_third_out_of_two_nodes_of_two(tmp_path: Path) -> None:
    flat, by_nodes = run_ranks(bytes_by_hierarchy, 4, tmp_path)[0]
    assert by_nodes == pytest.approx(flat / 3, rel=0.02)


def test_ranks_of_a_launcher_train_and_write_a_run_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    ended = edl(tmp_path, *DIGITS, "--bits", "2.0", "--steps", "4", "--out", str(out), "--workers", "2")
    assert [one.code for one in ended] == [0, 0], ended
    assert ended[1].out == ended[1].err == ""
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() == SUMMARY_KEYS | {"bytes_source"}
    assert (summary["steps"], summary["world_size"], summary["bits"]) == (4, 2, 2.0)
    assert summary["tokens_or_samples"] == 4 * 2 * 8
    assert summary["wire_bytes_per_step"] < summary["raw_bytes_per_step"] / 4
    assert load_config(out / "config.toml").data.fingerprint.startswith("xxh3:")
    assert list((out / "tensorboard").iterdir())
    assert CheckpointFolder(out / "checkpoints").steps() == [4]


@pytest.mark.slow
def test_auto_is_decided_once_recorded_with_its_reason_and_not_measured_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [*DIGITS, "--bits", "auto", "--out", str(out)]
    first = edl(tmp_path / "a", *words, "--steps", "2")
    assert [one.code for one in first] == [0, 0], first
    shown = " ".join(first[0].out.split())
    assert all(text in shown for text in ("bits auto: ", "is predicted", "the floor is 2 bits"))
    plan = json.loads((out / "plan.json").read_text())
    bits = plan["decision"]["bits"]
    assert load_config(out / "config.toml").compression.bits == "auto"
    assert f"{json.loads((out / 'summary.json').read_text())['bits']}" == bits
    assert plan["measurements"]["backward_seconds"] > 0
    assert [one["bits"] for one in plan["decision"]["predictions"]] == ["none", "lossless", "4.0", "2.0"]
    assert not plan["measurements"]["feeds_back"]  # with Adam
    assert plan["measurements"]["copy_seconds"] > 0  # DDP's, into its buckets and back

    written = (out / "plan.json").stat().st_mtime_ns
    second = edl(tmp_path / "b", *words, "--steps", "4", "--resume")
    assert [one.code for one in second] == [0, 0], second
    assert "bits auto: planned as before; a resumed run measures nothing" in " ".join(second[0].out.split())
    assert (out / "plan.json").stat().st_mtime_ns == written


def automatic(rank: int, out: Path, replan: bool, resumed: bool = False) -> None:
    settings = [
        "train.steps=40",
        "train.checkpoint_every=10",
        "train.keep_checkpoints=9",
        "optimizer.name=sgd",
    ]
    more = ["compression.check_every=5", f"compression.replan={str(replan).lower()}"]
    run(tiny(out, *settings, *more), resumed=resumed)


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(CheckpointFolder(out / "checkpoints").load(step).tensors)


def without(out: Path, after: int, copy: Path) -> Path:
    shutil.copytree(out, copy)
    for step in CheckpointFolder(out / "checkpoints").steps():
        if step > after:
            shutil.rmtree(CheckpointFolder(copy / "checkpoints").path / f"step-{step:06d}")
    (copy / "summary.json").unlink()
    return copy


def test_a_resumed_run_changes_its_plan_where_the_run_before_did(tmp_path: Path) -> None:
    """The first run changes nothing; a change is written into its record, and so has happened."""
    run_ranks(automatic, 2, tmp_path / "first", False)
    measured = json.loads((tmp_path / "first/plan.json").read_text())["measurements"]
    assert measured["feeds_back"]
    assert [one["codec"] for one in measured["codecs"]] == ["lossless", "grid:4.0", "grid:2.0"]
    other = "lossless" if json.loads((tmp_path / "first/summary.json").read_text())["bits"] == 2.0 else "2.0"
    changed = without(tmp_path / "first", 10, tmp_path / "changed")
    event = {"step": 20, "bits": other, "hierarchy": False, "reason": "a test", "event": "plan"}
    with (changed / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    run_ranks(automatic, 2, changed, True, True)
    assert f"{json.loads((changed / 'summary.json').read_text())['bits']}" == other
    after = [row for row in RunFolder(changed, writes=False).rows() if row.get("event") == "plan"]
    assert [(row["step"], row["bits"]) for row in after] == [(20, other)]
    for begin in (10, 20, 30):
        again = without(changed, begin, tmp_path / f"from-{begin}")
        run_ranks(automatic, 2, again, True, True)
        expected, found = weights(changed, 40), weights(again, 40)
        assert all(torch.equal(one, found[name]) for name, one in expected.items()), begin
    twice = without(changed, 10, tmp_path / "twice")
    kept = twice / "metrics.jsonl"
    RunFolder(twice, writes=True).ahead(10, "plan")  # a resume began, and crashed before it came to step 20
    kept.write_text("".join(line for line in kept.open() if json.loads(line)["step"] <= 10))
    run_ranks(automatic, 2, twice, True, True)
    expected, found = weights(changed, 40), weights(twice, 40)
    assert all(torch.equal(one, found[name]) for name, one in expected.items())


def test_probe_prints_tables_and_writes_what_it_measured(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    words = ["probe", "--model", "mlp-small", "--data", "digits", "--floor-bits", "3", "--json", str(file)]
    ended = edl(tmp_path, *words, "--what-if", "rate=1mbit,hosts=16,workers-per-host=4,latency=1ms")
    assert [one.code for one in ended] == [0, 0], ended
    for text in ("64 ranks on 16 nodes (assumed)", "bits:3.0", "pays below", "node 0 to node 1", "native"):
        assert text in ended[0].out
    assert ended[1].out == ""
    plan = json.loads(file.read_text())
    assert (plan["decision"]["bits"], plan["decision"]["hierarchy"]) == ("3.0", True)


@pytest.mark.parametrize(
    "text", ["", "rate=fast,hosts=2", "rate=1mbit", "rate=1mbit,hosts=1", "rate=1mbit,hosts=2,x=1"]
)
def test_a_network_that_cannot_be_imagined_is_an_error_with_an_example(tmp_path: Path, text: str) -> None:
    from efficient_dl.errors import ConfigError
    from efficient_dl.training.probing import WhatIf

    with pytest.raises(ConfigError, match="--what-if rate=400mbit,hosts=16"):
        WhatIf.of(text)


def test_more_workers_take_over_what_fewer_had_not_sent(tmp_path: Path) -> None:
    words = ["--optimizer", "sgd", "--bits", "0.5", "--out", str(tmp_path / "run")]
    first = edl(tmp_path / "a", *DIGITS, *words, "--batch-size", "8", "--steps", "3")
    more = ["--batch-size", "4", "--steps", "5", "--resume"]
    second = edl(tmp_path / "b", *DIGITS, *words, *more, ranks=4)
    assert [one.code for one in (*first, *second)] == [0] * 6, second
    assert (
        "restored on 4: the byte counters start again from zero; residuals are redistributed" in second[0].err
    )


def metrics_of_intervals(rank: int, out: Path) -> None:
    settings = ["compression.bits=2.0", "train.steps=24", "train.log_every=4", "train.eval_every=12"]
    run(tiny(out, *settings))


def test_metrics_are_of_the_steps_since_the_row_before(tmp_path: Path) -> None:
    run_ranks(metrics_of_intervals, 2, tmp_path / "run")
    folder = RunFolder(tmp_path / "run", writes=False)
    rows = [row for row in folder.rows() if "lr" in row]
    assert [row["step"] for row in rows if "relative_error" in row] == [4, 24]  # steps 1 and 21 are measured
    for row in rows:
        assert 1.5 < row["model_bits"] < row["bits_per_value"] < 8.0
        assert abs(row["order0_bits"] - row["model_bits"]) < 0.3
        assert row["ratio"] > 4
        for key in ("codec_seconds_per_step", "transport_seconds_per_step", "exposed_seconds_per_step"):
            assert row[key] > 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    mean = sum(row["wire_bytes_per_step"] for row in rows) / len(rows)
    assert mean == pytest.approx(summary["wire_bytes_per_step"])
    assert len({row["wire_bytes_per_step"] for row in rows}) > 1
    parts = folder.rows("parameters.jsonl")
    assert [part["step"] for part in parts] == [12, 24]
    sent = sum(row["wire_bytes_apportioned"] for part in parts for row in part["parameters"].values())
    assert sent == pytest.approx(24 * mean, rel=0.02)  # but for the messages of sizes
    assert all("relative_error" in row for part in parts for row in part["parameters"].values())


def train_with_objective(rank: int, folder: Path) -> None:
    run(tiny(folder, "train.objective=pow3gb", "compression.bits=none", "train.steps=2", "train.log_every=1"))


@pytest.mark.slow
def test_another_objective_is_trained_and_evaluated_in_nats_and_its_own_loss(tmp_path: Path) -> None:
    run_ranks(train_with_objective, 1, tmp_path / "run")
    rows = RunFolder(tmp_path / "run", writes=False).rows()
    first, last = rows[0], rows[-1]
    assert first["loss"] < 1.0  # of small logits pow3gb is about 0, cross-entropy about log 10
    assert last["val_objective"] < 1.0 < last["val_loss"] and 0 <= last["val_accuracy"] <= 1


def test_a_run_at_its_last_step_is_not_trained_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    edl(tmp_path, *DIGITS, "--steps", "2", "--out", str(out), ranks=1)
    before = (out / "summary.json").read_text()
    ended = edl(tmp_path, "train", "--resume", "--out", str(out), ranks=1)
    assert ended[0].code == 0
    assert "nothing to train" in ended[0].out
    assert (out / "summary.json").read_text() == before


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "run"
    edl(tmp_path, *DIGITS, "--steps", "1", "--out", str(out), ranks=1)
    ended = edl(tmp_path, *DIGITS, "--steps", "1", "--out", str(out), ranks=1)
    assert ended[0].code == 2
    assert "--resume" in ended[0].err


def test_a_run_resumes_with_moved_tokens_and_no_second_run_beside_it(tmp_path: Path) -> None:
    tokens, out = tmp_path / "a.bin", tmp_path / "run"
    tokens.write_bytes(bytes(range(256)) * 64)
    words = ("--model", "gpt-nano", "--set", "model.context=16", "--set", "train.eval_batches=1")
    first = edl(
        tmp_path, "train", *words, "--data", f"tokens:{tokens}", "--steps", "1", "--out", str(out), ranks=1
    )
    assert first[0].code == 0, first
    assert str(out / "summary.json") in first[0].out.splitlines()[-1]
    moved = tokens.rename(tmp_path / "b.bin")
    again = ("train", "--resume", "--out", str(out), "--steps", "2", "--data", f"tokens:{moved}")
    with locked(out, resumed=True):
        refused = edl(tmp_path, *again, ranks=1)
    assert refused[0].code == 2
    assert "another run writes here" in refused[0].err
    (out / "summary.json").unlink()
    assert edl(tmp_path, *again, ranks=1)[0].code == 0
    assert json.loads((out / "summary.json").read_text())["steps"] == 2


def test_resume_refuses_another_model_other_data_and_other_samples_per_step(tmp_path: Path) -> None:
    out = tmp_path / "run"
    edl(tmp_path, *DIGITS, "--steps", "1", "--out", str(out), ranks=1)
    again = ("train", "--resume", "--out", str(out), "--steps", "2")
    for change, words in {
        "--model=mlp-micro": "model.size",
        "--data=stdlib": "data.name",
        "--set=data.fingerprint=xxh3:0": "xxh3:0",
        "--seed=1": "train.seed",
        "--batch-size=4": "number of samples",
    }.items():
        ended = edl(tmp_path, *again, change, ranks=1)
        assert ended[0].code == 7, (change, ended)
        assert words in ended[0].err
        assert "Traceback" not in ended[0].err


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--data", "tokens:/nowhere"], 3, "/nowhere"),
        (["--model", "gtp"], 2, "did you mean gpt"),
        (["--bits", "99"], 2, "at most 7"),
        (["--set", "train.stepz=3"], 2, "did you mean steps"),
        (["--data", "digits"], 2, "gpt cannot be trained on this data"),
        (["--workers", "3"], 9, "WORLD_SIZE"),
        (["--model", "resnet18", "--data", "digits", "--optimizer", "muon"], 2, "muon"),
        (["--model", "resnet18-nano", "--data", "digits", "--batch-size", "1"], 2, "at least 2"),
    ],
)
def test_an_error_is_reported_once_and_without_a_traceback(
    words: list[str], code: int, text: str, tmp_path: Path
) -> None:
    first, second = edl(tmp_path, "train", "--out", str(tmp_path / "run"), *words)
    assert (first.code, second.code) == (code, code)
    assert text in first.err
    assert second.err == "", "rank 0 has said it"
    assert "Traceback" not in first.err
    assert not (tmp_path / "run").exists()


def test_overrides_that_cannot_be_read_or_match_nothing_are_refused(tmp_path: Path) -> None:
    for text, problem in (("bias", "PATTERN=BITS"), ("nosuch.*=4.0", "matches no parameter")):
        out = ("--out", str(tmp_path / text[:4]), "--steps", "1", "--set", f"compression.overrides={text}")
        ended = edl(tmp_path / "ranks", *DIGITS, "--bits", "2.0", *out)
        assert [one.code for one in ended] == [2, 2], ended
        assert problem in ended[0].err


def test_different_settings_on_different_ranks_are_named(tmp_path: Path) -> None:
    words = [*DIGITS, "--out", str(tmp_path / "run"), "--steps", "2"]
    first, second = EdlRanks(tmp_path, [*words, "--bits", "2.0"], [*words, "--bits", "1.5"]).end()
    assert (first.code, second.code) == (4, 4)
    assert "PlanMismatch" in first.err
    assert "compression.bits = 1.5, 2.0" in first.err
    assert second.err == ""


def test_an_error_on_one_rank_ends_all_and_is_named_by_that_rank(tmp_path: Path) -> None:
    words = [*DIGITS, "--out", str(tmp_path / "run")]
    first, second = EdlRanks(tmp_path, words, [*words, "--bits", "99"]).end()
    assert (first.code, second.code) == (2, 2)
    assert first.err == ""
    assert second.err.startswith("rank 1: ConfigError")


def test_a_killed_rank_ends_the_others_with_a_transport_error(tmp_path: Path) -> None:
    ranks = EdlRanks(
        tmp_path, *[[*DIGITS, "--bits", "2.0", "--steps", "1000000", "--out", str(tmp_path / "run")]] * 2
    )
    ranks.wait_for((tmp_path / "run" / "metrics.jsonl").exists)
    assert ranks._ranks[1].pid
    os.kill(ranks._ranks[1].pid, signal.SIGKILL)
    first, second = ranks.end()
    assert second.code == -signal.SIGKILL
    assert first.code == 6, first
    assert "TransportError" in first.err
    assert "Traceback" not in first.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_every_rank_and_keeps_the_last_checkpoint(
    number: int, code: int, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = [*DIGITS, "--steps", "1000000", "--out", str(out), "--set", "train.checkpoint_every=5"]
    ranks = EdlRanks(tmp_path, words, words)
    ranks.wait_for(lambda: CheckpointFolder(out / "checkpoints").latest() is not None)
    ranks.signal(number)
    first, second = ranks.end()
    assert (first.code, second.code) == (code, code)
    assert "Traceback" not in first.err + second.err
    step = CheckpointFolder(out / "checkpoints").latest()
    assert step
    assert edl(tmp_path, "train", "--out", str(out), "--resume", "--steps", str(step + 1))[0].code == 0


def test_a_file_size_limit_is_a_full_disk_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert edl(tmp_path, *DIGITS, "--steps", "3", "--out", str(out))[0].code == 0
    first, second = edl(tmp_path, "train", "--resume", "--out", str(out), "--steps", "6", file_bytes=20_000)
    assert 8 in (first.code, second.code)
    assert "DiskFull" in first.err + second.err
    assert "Traceback" not in first.err + second.err
    assert CheckpointFolder(out / "checkpoints").steps() == [3]
    assert [row["step"] for row in RunFolder(out, writes=False).rows()][-1] >= 3
    assert not list((out / "checkpoints").glob(".*")), "a part of a checkpoint was left"
    assert edl(tmp_path, "train", "--out", str(out), "--resume", "--steps", "6")[0].code == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_full_disk_keeps_the_checkpoints_before(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        settings = ("--set", "train.checkpoint_every=1", "--set", "train.keep_checkpoints=100")
        first, second = edl(tmp_path, *DIGITS, "--steps", "50", "--out", str(disk / "run"), *settings)
        assert 8 in (first.code, second.code), (first, second)
        assert "DiskFull: the disk is full" in first.err + second.err
        assert "Traceback" not in first.err + second.err
        checkpoints = CheckpointFolder(disk / "run" / "checkpoints")
        latest = checkpoints.latest()
        assert latest
        assert checkpoints.load(latest).step == latest
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_edl_starts_its_own_workers_survives_a_hangup_under_nohup_and_leaves_none_after_ctrl_c(
    tmp_path: Path,
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    words = [*DIGITS, "--steps", "1000000", "--out", str(out), "--workers", "2"]
    with log.open("w") as file:
        edl_command = [sys.executable, "-m", "efficient_dl.cli", *words]
        command = ["nohup", *edl_command, "--set", "train.checkpoint_every=5"]
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, env=without_launcher()
        )
    try:
        deadline = time.monotonic() + 180
        while CheckpointFolder(out / "checkpoints").latest() is None:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert len(members(process.pid)) >= 3, "edl and two workers"
        os.killpg(process.pid, signal.SIGHUP)  # as a terminal that closes does
        step = CheckpointFolder(out / "checkpoints").latest()
        while CheckpointFolder(out / "checkpoints").latest() == step:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
        assert process.wait(100) == 130
        deadline = time.monotonic() + 30
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)  # multiprocessing's own tracker ends when its pipe closes
        assert members(process.pid) == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in log.read_text()
    assert re.search(r"last checkpoint is of step \d+", log.read_text())
    assert f"edl train --out {out} --resume" in log.read_text()


def members(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(int(stat.parent.name))
    return found


def without_launcher() -> dict[str, str]:
    repository = str(Path(__file__).parents[2])
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return {**kept, "PYTHONPATH": repository}
