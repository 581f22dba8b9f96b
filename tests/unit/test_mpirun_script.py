"""How the script around mpirun ends: with the ranks' exit codes, and with no process left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from efficient_dl.launching.ends import tell_end
from efficient_dl.launching.job import Job
from efficient_dl.launching.submit import submission
from tests.unit.scripts import TRAIN, run_script

MPIRUN = {
    "ends well": "touch $EDL_ENDS/0; exit 0",
    "says nothing": "exit 0",
    "fails": "exit 213",
    "hides an error": "touch $EDL_ENDS/6; exit 0",
    "hides several": "touch $EDL_ENDS/{0,143,6,4,1}; exit 0",
    "hides some that have a cause": "touch $EDL_ENDS/{143,6,42}; exit 137",
    "ends its ranks": "touch $EDL_ENDS/143; exit 137",
    "loses its daemon": "(sleep 0.5; touch $EDL_ENDS/143; exec sleep 60) & exit 0",
    "hangs after an error": "touch $EDL_ENDS/6; echo up; exec sleep 60",
    "ends late": "touch $EDL_ENDS/0; sleep 2",
    "ignores SIGTERM": "trap 'echo got TERM' TERM; echo up; touch $EDL_ENDS/6; while :; do sleep 0.05; done",
    "checkpoints": "trap 'echo got USR1; touch $EDL_ENDS/138; exit 138' USR1; echo up; while :; do sleep 0.05; done",
    "is asked": "trap 'echo got TERM; exit 1' TERM; echo up; while :; do sleep 0.05; done",
}


def run_mpirun(
    folder: Path, mpirun: str, number: signal.Signals | None = None, command: tuple[str, ...] = TRAIN
) -> tuple[int, str]:
    """Run the script, with short waits, around a stand-in for mpirun, send it a signal; exit code and output."""
    (folder / "mpirun").write_text(f"#!/bin/bash\n{MPIRUN[mpirun]}\n")
    (folder / "mpirun").chmod(0o755)
    text = submission(Job("mpirun", command=command)).text
    for long, short in (("patience=30", "patience=1"), ("late=60", "late=1"), ("forced >= 5", "forced >= 1")):
        assert text.count(long) == 1
        text = text.replace(long, short)
    return run_script(folder, text, number, {})


@pytest.mark.parametrize(
    ("mpirun", "code", "said"),
    [
        ("ends well", 0, ""),
        ("says nothing", 1, "no rank has said in"),
        ("fails", 213, ""),
        ("hides an error", 6, "mpirun ended with 0, a rank with 6"),
        ("hides several", 4, "a rank with 4"),
        ("hides some that have a cause", 42, "mpirun ended with 137, a rank with 42"),
        ("ends its ranks", 137, ""),
        ("loses its daemon", 143, "mpirun ended with 0, a rank with 143"),
        ("hangs after an error", 6, "mpirun is ended"),
        ("ends late", 0, ""),
    ],
)
def test_mpiruns_zero_counts_only_if_a_rank_has_ended_well_and_none_with_an_error(
    tmp_path: Path, mpirun: str, code: int, said: str
) -> None:
    found, text = run_mpirun(tmp_path, mpirun)
    assert (found, said in text) == (code, True), text
    assert not list(tmp_path.glob(".edl-ends*"))


@pytest.mark.parametrize(
    ("mpirun", "code"),
    [
        ("says nothing", 0),
        ("ends late", 0),
        ("fails", 213),
        ("hides an error", 6),
        ("hangs after an error", 6),
    ],
)
def test_a_program_whose_ranks_leave_no_codes_ends_with_mpiruns(
    tmp_path: Path, mpirun: str, code: int
) -> None:
    assert run_mpirun(tmp_path, mpirun, command=("./run.sh",))[0] == code


def test_an_mpirun_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    code, text = run_mpirun(tmp_path, "ignores SIGTERM")
    assert (code, "got TERM" in text, "a rank with 6" in text) == (6, True, True), text


@pytest.mark.parametrize(
    ("mpirun", "number", "code"),
    [
        ("checkpoints", signal.SIGUSR1, 138),
        ("is asked", signal.SIGTERM, 143),
        ("hangs after an error", signal.SIGHUP, 6),
    ],
)
def test_signals_reach_mpirun_once_and_give_the_exit_code(
    tmp_path: Path, mpirun: str, number: signal.Signals, code: int
) -> None:
    found, text = run_mpirun(tmp_path, mpirun, number)
    assert (found, text.count("got ") <= 1) == (code, True), text


def test_ranks_leave_every_exit_code_and_say_where_they_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for code in (0, 6):
        tell_end(code, {"EDL_ENDS": str(tmp_path)})
        tell_end(code, {})
    assert {path.name for path in tmp_path.iterdir()} == {"0", "6"}
    assert capsys.readouterr().err == ""
    tell_end(0, {"EDL_ENDS": str(tmp_path / "gone")})
    assert f"exit code 0 could not be left in EDL_ENDS={tmp_path / 'gone'}: " in capsys.readouterr().err


def test_a_command_ends_with_a_code_in_the_folder(tmp_path: Path) -> None:
    for flag, code in (("--help", 0), ("--wrong", 2)):
        words = [sys.executable, "-m", "efficient_dl.cli", "train", flag]
        done = subprocess.run(
            words, env={**os.environ, "EDL_ENDS": str(tmp_path)}, capture_output=True, timeout=120
        )
        assert (done.returncode, (tmp_path / str(code)).exists()) == (code, True)


def test_what_is_not_begun_again_may_resume() -> None:
    job = Job("mpirun", command=(*TRAIN, "--out", "runs/a", "--resume-or-start"))
    assert "--out runs/a --resume-or-start <&0" in submission(job).text


def test_an_mpirun_whose_script_is_killed_ends_too(tmp_path: Path) -> None:
    assert run_mpirun(tmp_path, "is asked", signal.SIGKILL)[0] == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while "got TERM" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
