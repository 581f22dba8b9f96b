"""What `import efficient_dl` offers, and what it costs."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import efficient_dl


def test_every_public_name_exists() -> None:
    public = {name: getattr(efficient_dl, name) for name in efficient_dl.__all__}
    modules = {name for name, value in public.items() if isinstance(value, ModuleType)}
    assert modules == {"closed_form", "depth", "entropy", "objectives"}
    assert all(callable(value) for name, value in public.items() if name not in modules)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="compres"):
        efficient_dl.compres  # noqa: B018


def test_importing_the_package_alone_loads_neither_torch_nor_scikit_learn() -> None:
    check = "import efficient_dl, sys; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
