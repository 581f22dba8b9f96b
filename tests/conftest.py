"""Decides for each test whether the machine has what it needs; a missing piece is the skip's reason."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Several ranks share few cores: one thread each, in this process and in those that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a GPU the kernels run in Triton's interpreter. Triton reads this when it is imported, which some of torch's
# modules do: decided here, before any test's module is read.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A script's background jobs ignore Ctrl-C, and so would the programs that the tests start, and send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: a worker more than cores, because tests wait for processes; few where there are many cores."""
    return min(len(os.sched_getaffinity(0)) + 1, 8)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps tests that share something costly in one worker, and begins with the slow, so that all end together."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    sharing = {item.path for item in items if _has_module_fixture(item)}
    for item in items:
        if item.get_closest_marker("xdist_group"):
            continue
        for name in ("mpi", "netns"):  # one job of ranks for all; links whose rates other links would disturb
            if marker := item.get_closest_marker(name):
                item.add_marker(pytest.mark.xdist_group(" ".join((name, *marker.args))))
        if item.path in sharing:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def _has_module_fixture(item: pytest.Item) -> bool:
    """Whether the test uses a fixture that its module builds once. pytest has no public name for this."""
    fixtures = item._fixtureinfo.name2fixturedefs.values() if isinstance(item, pytest.Function) else ()
    return any(definition.scope == "module" for definitions in fixtures for definition in definitions)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """For tests that change how many threads the compiled codecs use."""
    from efficient_dl.codec.kernels.native.library import num_threads, set_num_threads

    before = num_threads()
    yield
    set_num_threads(before)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips, or with REQUIRE_NETNS=1 (_SLURM, _MPI, ...) fails, a test whose marker names something missing."""
    for name, missing, required in (
        ("netns", _missing_for_namespaces, "REQUIRE_NETNS"),
        ("slurm", _missing_for_slurm, "REQUIRE_SLURM"),
        ("mpi", _missing_for_mpi, "REQUIRE_MPI"),
        ("gpu", _missing_for_gpu, "REQUIRE_GPU"),
        ("package", _missing_for_package, "REQUIRE_PACKAGES"),
    ):
        marker = item.get_closest_marker(name)
        if marker and (pieces := missing(*marker.args)):
            reason = "this machine lacks " + "; ".join(pieces)
            if os.environ.get(required) == "1":
                pytest.fail(f"{required}=1, but {reason}", pytrace=False)
            pytest.skip(reason)


@functools.cache
def _missing_for_namespaces() -> tuple[str, ...]:
    from cluster.namespaces import missing_requirements

    return tuple(missing_requirements())


@functools.cache
def _missing_for_slurm() -> tuple[str, ...]:
    from cluster.slurm import missing_requirements

    return tuple(missing_requirements())


@functools.cache
def _missing_for_mpi(name: str) -> tuple[str, ...]:
    from tests.distributed.mpi_ranks import missing_requirements

    return tuple(missing_requirements(name))


@functools.cache
def _missing_for_gpu() -> tuple[str, ...]:
    return () if torch.cuda.is_available() else ("a CUDA device",)


@functools.cache
def _missing_for_package(name: str) -> tuple[str, ...]:
    from importlib import import_module

    try:
        import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision built for another torch
        return (f"the package {name} ({error})",)
    return ()
