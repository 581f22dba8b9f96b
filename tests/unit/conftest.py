"""What several files of this folder build only once."""

from __future__ import annotations

import pytest

from tests.unit.native_build import Sanitized, sanitized_library


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Sanitized:
    """The library under sanitizers. A minute to build: mark tests that want it with xdist_group("sanitizers")."""
    return sanitized_library(tmp_path_factory.mktemp("sanitized"))
