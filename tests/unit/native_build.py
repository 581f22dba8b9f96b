"""Compiles C++ drivers and the codecs' sources for tests, with the flags of the library's own build script."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from efficient_dl.codec.kernels.native import library

DRIVERS = Path(__file__).resolve().parent / "native"
NATIVE = Path(library.__file__).resolve().parent
SANITIZE = "-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all"


def run(*command: str | Path, timeout: float = 280, **environment: str) -> str:
    """What the command prints; the test fails with its output if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compiler() -> str:
    """The C++ compiler; skips the test if there is none."""
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        pytest.skip("this machine lacks a C++ compiler")
    return found


def vector_flags(source: Path) -> list[str]:
    """What build.sh adds for this source."""
    isa = source.stem.rpartition("_")[2]
    if platform.machine().lower() not in ("x86_64", "amd64") or isa not in ("avx512", "avx2"):
        return []
    found = re.search(rf'^ +{isa}="(.*)"$', (NATIVE / "build.sh").read_text(), re.MULTILINE)
    assert found, f"build.sh does not set {isa}"
    return found[1].split()


def sanitized_library(folder: Path) -> Path:
    """The library with both sanitizers; skips the test if the compiler lacks them."""
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }")
    built = subprocess.run(
        [compiler(), *SANITIZE.split(), probe, "-o", folder / "probe"], capture_output=True, check=False
    )
    if built.returncode:
        pytest.skip("this compiler lacks the address or undefined-behaviour sanitizer")
    path = folder / "libedl_codec.so"
    run("sh", NATIVE / "build.sh", path, CXXFLAGS=SANITIZE)
    return path


def linked(driver: Path, library_path: Path, program: Path, *flags: str) -> Path:
    """The driver, linked against a library that it finds by its path."""
    run(compiler(), "-std=c++20", "-pthread", *flags, driver, library_path, "-o", program)
    return program
