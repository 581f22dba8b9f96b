"""What can be seen of the images without building them: stages, pins, users, the compose file, the health check."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = ("cpu", "cuda")
# How the two may differ: instruction, and what it says in each.
DIFFERENCES = {
    ("ARG", "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu", "PIP_EXTRA_INDEX_URL"),
    (
        "HEALTHCHECK",
        '--interval=5m --timeout=2m --start-period=1m --retries=3 CMD ["edl-health"]',
        '--interval=5m --timeout=2m --start-period=1m --retries=3 CMD ["edl-health", "--gpu"]',
    ),
}


def stages(name: str) -> dict[str, list[tuple[str, str]]]:
    """Instructions (name, rest) of every stage of a Dockerfile; those before the first stage under ""."""
    text = (ROOT / "docker" / f"{name}.Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {"": []}
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, rest = line.split(maxsplit=1)
        if instruction == "FROM":
            found[rest.split()[-1]] = []
        found[list(found)[-1]].append((instruction, " ".join(rest.split())))
    return found


def test_both_images_have_the_same_stages():
    cpu, cuda = (stages(name) for name in DOCKERFILES)
    assert list(cpu) == list(cuda) == ["", "base", "build", "runtime"]
    for stage in ("build", "runtime"):
        assert len(cpu[stage]) == len(cuda[stage])
        for one, other in zip(cpu[stage], cuda[stage], strict=True):
            assert one == other or (*one, other[1]) in DIFFERENCES, stage


@pytest.mark.parametrize("name", DOCKERFILES)
def test_bases_are_pinned_by_a_full_version(name: str):
    [(instruction, base)] = stages(name)[""]
    assert instruction == "ARG"
    assert re.fullmatch(r"BASE=docker\.io/[\w/]+:\d+\.\d+\.\d+-[\w.-]+", base)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_runtime_stage_installs_offline_and_runs_as_a_user(name: str):
    runtime = stages(name)["runtime"]
    installs = [rest for _, rest in runtime if "pip install" in rest]
    assert len(installs) == 1 and "--no-index --find-links /wheelhouse" in installs[0]
    assert not any("apt-get" in rest for _, rest in runtime)
    assert ("USER", "10001:10001") in runtime and ("ENTRYPOINT", '["edl"]') in runtime
    assert not any(
        "OMP_NUM_THREADS" in rest for instructions in stages(name).values() for _, rest in instructions
    )


def test_all_that_is_copied_is_in_the_build_context():
    listed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = {
        source
        for instructions in stages("cpu").values()
        for instruction, rest in instructions
        if instruction == "COPY"
        for source in [word for word in rest.split() if not word.startswith("--")][:-1]
    }
    assert copied == set(listed)
    assert all((ROOT / path).exists() for path in listed)


def test_constraints_fit_torch_with_and_without_cuda():
    """torch's CUDA builds require one version of Triton exactly; its CPU builds require none."""
    constraints = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^torch==", constraints, re.MULTILINE)
    assert not re.search(r"^triton==", constraints, re.MULTILINE)


def test_compose_starts_every_rank_of_one_world_in_its_own_container():
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    services = compose["services"]
    environments = [service["environment"] for service in services.values()]
    assert sorted(one["RANK"] for one in environments) == list(range(len(services)))
    assert {one["WORLD_SIZE"] for one in environments} == {len(services)}
    first = next(name for name, one in services.items() if one["environment"]["RANK"] == 0)
    assert {one["MASTER_ADDR"] for one in environments} == {first}
    for service in services.values():
        assert set(service["networks"]) <= set(compose["networks"])
        assert {volume.split(":")[0] for volume in service["volumes"]} <= set(compose["volumes"])
        folder = service["volumes"][0].split(":")[1]
        out = service["command"][service["command"].index("--out") + 1]
        assert (Path("/work") / out).is_relative_to(folder), "runs must outlive their container"


# An editable installation has a finder of its own, which would come before PYTHONPATH.
HEALTH = f"""
import runpy, sys
sys.meta_path[:] = [one for one in sys.meta_path if "Redirecting" not in type(one).__name__]
runpy.run_path({str(ROOT / "docker" / "health.py")!r}, run_name="__main__")
"""


def health(package: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HEALTH, *words],
        env={**os.environ, "PYTHONPATH": str(package), "CUDA_VISIBLE_DEVICES": ""},
        cwd=package,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_the_health_check_passes_here_and_misses_a_gpu():
    """Without a visible device the CUDA image's form of it fails, for that reason alone."""
    found = health(ROOT, "--gpu")
    assert found.returncode == 1 and found.stdout.startswith("torch sees no GPU"), found.stderr
    found = health(ROOT)
    assert (found.returncode, found.stdout) == (0, "healthy\n"), found.stderr


@pytest.mark.slow
def test_the_health_check_fails_where_the_kernels_cannot_be_loaded(tmp_path: Path):
    copy = tmp_path / "efficient_dl"
    shutil.copytree(ROOT / "efficient_dl", copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (copy / "codec" / "kernels" / "native" / "libedl_codec.so").write_bytes(b"no library")
    found = health(tmp_path)
    assert found.returncode == 1 and "cannot be loaded" in found.stdout, found.stderr


def test_a_wheelhouse_is_never_mixed_with_older_wheels(tmp_path: Path):
    (tmp_path / "old.whl").touch()
    found = subprocess.run(
        ["bash", str(ROOT / "docker" / "wheelhouse.sh"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 2 and "is not empty" in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["old.whl"]
