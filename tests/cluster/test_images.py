"""An image is built from docker/cpu.Dockerfile, and trains; a wheelhouse installs where there is no network.

Both take minutes of two cores, too much for every push: they run if REQUIRE_IMAGES=1 asks for it, and then fail where
something that they need is missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, seconds: float) -> str:
    """The output of a command that succeeds; of one that does not, with the failure."""
    found = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, cwd=ROOT
    )
    assert found.returncode == 0, f"exit code {found.returncode}\n{found.stdout[-6000:]}"
    return found.stdout


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(
        os.environ.get("REQUIRE_IMAGES") != "1",
        reason="takes minutes of two cores; REQUIRE_IMAGES=1 runs it, as docker/check.sh does by hand",
    ),
]


def test_the_cpu_image_builds_and_trains():
    output = run("bash", "docker/check.sh", seconds=2900)
    assert "== all done" in output
    left = Path("/proc/mounts").read_text()
    assert "edl-images." not in left, "the check leaves nothing mounted"


def test_a_wheelhouse_installs_without_network(tmp_path: Path):
    """unshare takes the network away: there is not even a loopback device that is up."""
    wheels, fresh = tmp_path / "wheels", tmp_path / "fresh"
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(
        ["bash", "docker/wheelhouse.sh", str(wheels), "data"],
        cwd=ROOT,
        env=environment,
        check=True,
        timeout=900,
    )
    subprocess.run(["sha256sum", "--quiet", "--check", "SHA256SUMS"], cwd=wheels, check=True, timeout=120)
    offline = ["unshare", "--user", "--map-root-user", "--net"]
    run(sys.executable, "-m", "venv", str(fresh), seconds=120)
    python = str(fresh / "bin" / "python")
    install = [python, "-m", "pip", "install", "--no-cache-dir", "--no-index", "--find-links", str(wheels)]
    run(
        "env",
        "-u",
        "PIP_FIND_LINKS",
        "PIP_CONFIG_FILE=/dev/null",
        *offline,
        *install,
        "efficient_dl[data]",
        seconds=300,
    )
    run(*offline, python, "-I", "docker/health.py", seconds=120)
