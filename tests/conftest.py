"""Decides for each test whether the machine has what it needs; a missing piece is the skip's reason."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import pytest

# Several ranks share few cores: one thread each, in this process and in those that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """For tests that change how many threads the compiled codecs use."""
    from efficient_dl.codec.kernels.native.library import num_threads, set_num_threads

    before = num_threads()
    yield
    set_num_threads(before)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips, or with REQUIRE_NETNS=1 (_MPI, _GPU, _PACKAGES) fails, a test whose marker names something missing."""
    for name, missing, required in (
        ("netns", _missing_for_namespaces, "REQUIRE_NETNS"),
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
def _missing_for_mpi(name: str) -> tuple[str, ...]:
    from tests.distributed.mpi_ranks import missing_requirements

    return tuple(missing_requirements(name))


@functools.cache
def _missing_for_gpu() -> tuple[str, ...]:
    import torch

    return () if torch.cuda.is_available() else ("a CUDA device",)


@functools.cache
def _missing_for_package(name: str) -> tuple[str, ...]:
    from importlib import import_module

    try:
        import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision built for another torch
        return (f"the package {name} ({error})",)
    return ()
