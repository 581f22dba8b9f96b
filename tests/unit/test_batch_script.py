"""The batch script of `edl launch slurm`: what it requeues, and what signals do."""

from __future__ import annotations

import signal
from pathlib import Path

from efficient_dl.launching.job import Job
from efficient_dl.launching.submit import submission
from tests.unit.scripts import TRAIN, run_script

SRUN = {
    "succeeds": "exit 0",
    "fails": "touch $EDL_ENDS/6; exit 1",
    "fails for good": "touch $EDL_ENDS/2 $EDL_ENDS/6; exit 1",
    "checkpoints": "trap 'echo got USR1; exit 138' USR1; echo up; while :; do sleep 0.05; done",
    "ends": "trap 'echo got TERM; exit 143' TERM; echo up; while :; do sleep 0.05; done",
}


def run_batch(folder: Path, srun: str, number: signal.Signals | None = None, **more: str) -> tuple[int, str]:
    """Run the batch script with stand-ins for Slurm's programs, send it a signal; exit code and output."""
    (folder / "srun").write_text(f"#!/bin/bash\n{SRUN[srun]}\n")
    (folder / "scontrol").write_text(
        '#!/bin/bash\n[ "$1" = requeue ] || { echo n1; exit; }\necho requeued "$2"; kill -TERM "$PPID"\n'
    )
    for name in ("srun", "scontrol"):
        (folder / name).chmod(0o755)
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", **more}
    return run_script(folder, submission(Job("slurm", restarts=2, command=TRAIN)).text, number, environment)


def test_a_job_that_succeeds_is_not_requeued(tmp_path: Path) -> None:
    code, text = run_batch(tmp_path, "succeeds")
    assert (code, "requeued" in text) == (0, False)


def test_a_job_that_fails_is_requeued_a_number_of_times(tmp_path: Path) -> None:
    assert "requeued 7" in run_batch(tmp_path, "fails", SLURM_RESTART_COUNT="1")[1]
    code, text = run_batch(tmp_path, "fails", SLURM_RESTART_COUNT="2")
    assert (code, "requeued" in text) == (1, False)


def test_a_job_whose_error_would_come_again_is_not_requeued(tmp_path: Path) -> None:
    code, text = run_batch(tmp_path, "fails for good")
    assert (code, "requeued" in text) == (2, False)
    assert "a rank ended with 2, as it would again" in text
    assert not list(tmp_path.glob(".edl-ends*"))


def test_what_an_earlier_start_of_the_job_has_left_does_not_end_it(tmp_path: Path) -> None:
    (tmp_path / ".edl-ends-7-0").mkdir()
    (tmp_path / ".edl-ends-7-0" / "2").touch()
    assert "requeued 7" in run_batch(tmp_path, "fails", SLURM_RESTART_COUNT="1")[1]
    assert not list(tmp_path.glob(".edl-ends*"))


def test_an_announced_end_reaches_the_ranks_and_requeues_however_often(tmp_path: Path) -> None:
    _, text = run_batch(tmp_path, "checkpoints", signal.SIGUSR1, SLURM_RESTART_COUNT="50")
    assert (
        text.index("got USR1")
        < text.index("srun ended with 138, after the announcement")
        < text.index("requeued 7")
    )


def test_a_cancelled_job_passes_the_signal_on_and_is_not_requeued(tmp_path: Path) -> None:
    code, text = run_batch(tmp_path, "ends", signal.SIGTERM)
    assert (code, "got TERM" in text, "requeued" in text) == (143, True, False)
