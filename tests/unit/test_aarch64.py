"""The compiled codecs on aarch64: they build without x86 flags, give the same bytes, and survive damaged packets."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from efficient_dl.codec.kernels.native import library
from efficient_dl.codec.kernels.native.library import available_isas
from tests.unit.native_build import DRIVERS, NATIVE, run

CROSS_COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
TARGET_ROOT = "/usr/aarch64-linux-gnu"  # the cross compiler's C library
AARCH64_MACHINE = 183  # of an ELF header
# Called with a compiler and its arguments.
LAUNCHER = """#!/bin/sh
for word; do
    shift
    case $word in
    *_avx2.cpp | *_avx512.cpp) ;;
    *.cpp) word=$(dirname "$0")/empty.cpp ;;
    esac
    set -- "$@" "$word"
done
exec "$@"
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def needed(program: str, package: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"this machine lacks {program}: apt-get install {package}")
    return found


def built(compiler: str, driver: str, library_path: Path, folder: Path) -> Path:
    """The driver, linked against a library that it finds by its path."""
    program = folder / driver
    source = DRIVERS / f"{driver}.cpp"
    run(compiler, "-O2", "-std=c++20", "-ffp-contract=off", "-pthread", source, library_path, "-o", program)
    return program


def machine_of(elf: Path) -> int:
    return int.from_bytes(elf.read_bytes()[18:20], "little")


@pytest.fixture(scope="module")
def cross_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = needed(CROSS_COMPILER, "g++-aarch64-linux-gnu")
    path = tmp_path_factory.mktemp("aarch64") / "libedl_codec.so"
    run("sh", NATIVE / "build.sh", path, CXX=compiler)
    return path


def test_the_build_script_asks_the_compiler_for_the_target(cross_library: Path) -> None:
    assert machine_of(cross_library) == AARCH64_MACHINE


def test_cmake_asks_the_compiler_for_the_target(tmp_path: Path) -> None:
    compiler, cmake = needed(CROSS_COMPILER, "g++-aarch64-linux-gnu"), needed("cmake", "cmake")
    root = Path(__file__).resolve().parents[2]
    # The flags that CMake chooses are of interest here. The sources that must not depend on them, those for x86, are
    # compiled; in the others' place, which the build script has compiled, an empty one.
    launcher = tmp_path / "launcher"
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    (tmp_path / "empty.cpp").touch()
    options = [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DCMAKE_CXX_COMPILER_LAUNCHER={launcher}"]
    run(cmake, "-S", root, "-B", tmp_path / "build", "-DCMAKE_BUILD_TYPE=Release", *options)
    run(cmake, "--build", tmp_path / "build")
    assert machine_of(tmp_path / "build" / "libedl_codec.so") == AARCH64_MACHINE
    objects = {path.name.partition(".")[0] for path in (tmp_path / "build").rglob("*.cpp.o")}
    assert objects == {path.stem for path in NATIVE.glob("*.cpp")}


def test_packets_values_and_residuals_are_those_of_this_machine(cross_library: Path, tmp_path: Path) -> None:
    emulator = needed(EMULATOR, "qemu-user")
    compiler = needed(os.environ.get("CXX", "c++"), "g++")
    here = built(compiler, "digest", library.find_library(), tmp_path)
    there = built(CROSS_COMPILER, "digest", cross_library, cross_library.parent)
    expected = run(here, "portable")
    assert expected.count("\n") == 5 * 9  # dtypes, codecs
    for isa in available_isas():
        assert run(here, isa) == expected
    assert run(emulator, "-L", TARGET_ROOT, there, "portable") == expected


def test_damaged_packets_are_harmless(cross_library: Path) -> None:
    emulator = needed(EMULATOR, "qemu-user")
    program = built(CROSS_COMPILER, "fuzz", cross_library, cross_library.parent)
    assert run(emulator, "-L", TARGET_ROOT, program, "portable", "60", "7").startswith("ok refused ")
