"""What several files of this folder build only once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.native_build import NATIVE, Sanitized, compiler, run, sanitized_library


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Sanitized:
    """The library under sanitizers. A minute to build: mark tests that want it with xdist_group("sanitizers")."""
    return sanitized_library(tmp_path_factory.mktemp("sanitized"))


@pytest.fixture(scope="session")
def built_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the build script builds in a hurry, its functions visible: mark tests that want it xdist_group("built")."""
    path = tmp_path_factory.mktemp("built") / "built.so"
    run(
        "sh", NATIVE / "build.sh", path, CXX=compiler(), CXXFLAGS="-O1 -fvisibility=default"
    )  # the last one counts
    return path
