"""Compiles C++ drivers and the codecs' sources for tests, with the flags of the library's own build script."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from efficient_dl.codec.kernels.native import library

DRIVERS = Path(__file__).resolve().parent / "native"
NATIVE = Path(library.__file__).resolve().parent
SANITIZE = ["-g1", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run(*command: str | Path, timeout: float = 600, **environment: str) -> str:
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


@dataclass(frozen=True)
class Sanitized:
    """The codecs' library, built so that a wrong access or an undefined operation ends the process.

    fuzzes: whether the compiler has libFuzzer; the library is then instrumented for it.
    """

    compiler: str
    library: Path
    fuzzes: bool

    def linked(self, driver: Path, program: Path, *flags: str) -> Path:
        """The driver with the same sanitizers, linked against the library that it finds by its path."""
        return linked(driver, self.library, program, *SANITIZE, *flags, by=self.compiler)


def sanitized_library(folder: Path) -> Sanitized:
    """Builds the library with both sanitizers; skips the test if no compiler has them."""
    clang = shutil.which(os.environ.get("CLANGXX", "clang++"))
    fuzzer = 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long)'
    if clang and can_build(folder, clang, fuzzer, "-fsanitize=fuzzer"):
        found, flags, fuzzes = clang, [*SANITIZE, "-fsanitize=fuzzer-no-link"], True
    elif can_build(folder, compiler(), "int main()"):
        found, flags, fuzzes = compiler(), SANITIZE, False
    else:
        pytest.skip("this machine's compilers lack the address or undefined-behaviour sanitizer")
    path = folder / "libedl_codec.so"
    run("sh", NATIVE / "build.sh", path, CXX=found, CXXFLAGS=" ".join(flags))
    return Sanitized(found, path, fuzzes)


def can_build(folder: Path, compiler: str, function: str, *flags: str) -> bool:
    """Whether this compiler links a program of one function with the sanitizers and these flags."""
    probe = folder / "probe.cpp"
    probe.write_text(f"{function} {{ return 0; }}")
    command = [compiler, *SANITIZE, *flags, probe, "-o", folder / "probe"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def linked(driver: Path, library_path: Path, program: Path, *flags: str, by: str | None = None) -> Path:
    """The driver, linked against a library that it finds by its path."""
    run(by or compiler(), "-std=c++20", "-pthread", *flags, driver, library_path, "-o", program)
    return program
