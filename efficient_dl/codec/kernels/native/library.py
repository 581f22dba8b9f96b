"""Finds and loads the compiled codecs, and says what they and this processor can do."""

from __future__ import annotations

import ctypes
import importlib.metadata
from functools import lru_cache
from pathlib import Path
from typing import Final

from efficient_dl.codec.kernels.native.interface import ABI_VERSION, NativeLibrary, declare
from efficient_dl.codec.packet import FORMAT_VERSION
from efficient_dl.errors import ConfigError, NativeLibraryMissing

LIBRARY_NAME: Final = "libedl_codec.so"
MAX_THREADS: Final = 256
ISAS: Final = ("avx512", "avx2", "portable")

_HERE: Final = Path(__file__).resolve().parent
_BUILD: Final = f"run sh {_HERE / 'build.sh'}, or install the package again (pip install -e .)"


@lru_cache(maxsize=8)
def load_library(isa: str = "auto", path: Path | None = None) -> NativeLibrary:
    """Returns the library for an instruction set.

    Raises `NativeLibraryMissing` if it is not built or too old, `ConfigError` if the processor lacks isa.
    path: another build of the library, for tests.
    """
    return NativeLibrary(_open(find_library() if path is None else path), isa)


def num_threads() -> int:
    """Threads that one call may use, the caller's included.

    At first OMP_NUM_THREADS, or the processors that this process may run on, at most 16.
    """
    return load_library().num_threads()


def set_num_threads(count: int) -> None:
    """Sets `num_threads` for the whole process, 1 to 256. Packets and values do not depend on it."""
    if not 1 <= count <= MAX_THREADS:
        raise ConfigError(
            "the number of codec threads is out of range",
            expected=f"1 to {MAX_THREADS}",
            found=str(count),
            fix="pass the processors that this process may use",
        )
    load_library().set_num_threads(count)


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this processor and this build of the library have, the best first."""
    return tuple(isa for isa in ISAS if _is_available(isa))


def find_library() -> Path:
    """Where the compiled library is: beside this file, or where the package was installed from it (editable)."""
    candidates = [_HERE / LIBRARY_NAME]
    try:
        installed = importlib.metadata.distribution("efficient_dl")
        candidates.append(
            Path(str(installed.locate_file(f"efficient_dl/codec/kernels/native/{LIBRARY_NAME}")))
        )
    except importlib.metadata.PackageNotFoundError:
        pass
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise NativeLibraryMissing(
        "the compiled codec kernels are not built",
        where=", ".join(str(candidate) for candidate in candidates),
        fix=f'{_BUILD}; or pass kernel="reference", which is about a hundred times slower',
    )


def _open(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        found = int(library.edl_abi_version()), int(library.edl_format_version())
    except (OSError, AttributeError) as error:
        raise NativeLibraryMissing(
            "the compiled codec kernels cannot be loaded", found=str(error), where=str(path), fix=_BUILD
        ) from error
    if found != (ABI_VERSION, FORMAT_VERSION):
        raise NativeLibraryMissing(
            "the compiled codec kernels are of another version than the package",
            expected=f"interface {ABI_VERSION}, packets of version {FORMAT_VERSION}",
            found=f"interface {found[0]}, packets of version {found[1]}",
            where=str(path),
            fix=_BUILD,
        )
    declare(library)
    return library


def _is_available(isa: str) -> bool:
    try:
        load_library(isa)
    except ConfigError:
        return False
    return True
