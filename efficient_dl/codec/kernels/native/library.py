"""Loads the compiled codecs and calls them: pointers in, byte counts and exceptions out."""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

from efficient_dl.errors import CorruptPacket, NativeLibraryMissing

ABI_VERSION: Final = 1
LIBRARY_NAME: Final = "libedl_codec.so"
NUM_STEPS: Final = 321

_FIRST_CORRUPT: Final = -16
_NO_MEMORY: Final = -3
_HERE: Final = Path(__file__).resolve().parent
_BUILD: Final = f"run sh {_HERE / 'build.sh'}, or install the package again (pip install -e .)"

_Int64Array = ctypes.Array[ctypes.c_int64]
FloatArray = ctypes.Array[ctypes.c_float]


class NativeStats(ctypes.Structure):
    """What an encode call measured (edl_stats); bits are totals over the tensor."""

    order0_bits: float
    model_bits: float
    scale_bits: float
    header_bits: int
    escapes: int
    empty_blocks: int
    nonfinite_blocks: int
    step_index: int
    coded_tiles: int

    _fields_ = (
        ("order0_bits", ctypes.c_double),
        ("model_bits", ctypes.c_double),
        ("scale_bits", ctypes.c_double),
        ("header_bits", ctypes.c_int64),
        ("escapes", ctypes.c_int64),
        ("empty_blocks", ctypes.c_int64),
        ("nonfinite_blocks", ctypes.c_int64),
        ("step_index", ctypes.c_int32),
        ("coded_tiles", ctypes.c_int32),
    )


class NativeLibrary:
    """The library's functions for one instruction set: "auto", "avx512" or "portable".

    Addresses are of contiguous memory (`tensor.data_ptr()`), dtypes the packet's codes (0 float32, 1 bfloat16,
    2 float16). Calls release the GIL and may run in any number of threads. Encoders return the bytes of the body.
    Decoders raise `CorruptPacket` with the reason; the output's content is then undefined.
    """

    def __init__(self, library: ctypes.CDLL, isa: str = "auto") -> None:
        self._library = library
        self._requested_isa = isa.encode()
        self._select_isa()
        self.isa: Final = _text(library.edl_isa())

    def num_threads(self) -> int:
        """Threads that one call may use, the caller's included."""
        return int(self._library.edl_num_threads())

    def set_num_threads(self, count: int) -> None:
        """Sets them, for the whole process; packets do not depend on it."""
        self._checked(int(self._library.edl_set_num_threads(count)))

    def split_max_bytes(self, numel: int, dtype: int) -> int:
        """The largest body of the exact codec."""
        return self._checked(int(self._library.edl_split_max_bytes(numel, dtype)))

    def block_max_bytes(self, numel: int, num_segments: int, mode: int = -1) -> int:
        """The largest body of the block quantizer; mode 0 pairs, 1 bytes, -1 whichever needs more."""
        return self._checked(int(self._library.edl_block_max_bytes(numel, num_segments, mode)))

    def split_encode(
        self, x: int, numel: int, dtype: int, body: int, capacity: int, stats: NativeStats | None = None
    ) -> int:
        """Encodes exactly into body, which has `capacity` bytes."""
        self._select_isa()
        pointer = None if stats is None else ctypes.byref(stats)
        return self._checked(int(self._library.edl_split_encode(x, numel, dtype, body, capacity, pointer)))

    def split_decode(
        self, body: int, body_bytes: int, dtype: int, numel: int, out: int, out_dtype: int, accumulate: bool
    ) -> None:
        """Decodes a body of the exact codec into out, or adds to it."""
        self._select_isa()
        self._checked(
            int(
                self._library.edl_split_decode(
                    body, body_bytes, dtype, numel, out, out_dtype, int(accumulate)
                )
            )
        )

    def block_encode(
        self,
        x: int,
        numel: int,
        dtype: int,
        segments: tuple[int, ...],
        bits_q16: int,
        steps: FloatArray,
        body: int,
        capacity: int,
        stats: NativeStats | None = None,
    ) -> int:
        """Quantizes to about bits_q16 / 65536 bits a value and encodes. steps: see `float_array`."""
        self._select_isa()
        pointer = None if stats is None else ctypes.byref(stats)
        lengths = _int64_array(segments)
        return self._checked(
            int(
                self._library.edl_block_encode(
                    x, numel, dtype, lengths, len(segments), bits_q16, steps, body, capacity, pointer
                )
            )
        )

    def block_decode(
        self,
        body: int,
        body_bytes: int,
        dtype: int,
        numel: int,
        segments: tuple[int, ...],
        out: int,
        out_dtype: int,
        accumulate: bool,
    ) -> None:
        """Decodes a body of the block quantizer into out, or adds to it."""
        self._select_isa()
        lengths = _int64_array(segments)
        self._checked(
            int(
                self._library.edl_block_decode(
                    body,
                    body_bytes,
                    dtype,
                    numel,
                    lengths,
                    len(segments),
                    out,
                    out_dtype,
                    int(accumulate),
                )
            )
        )

    def grid_max_bytes(self, numel: int, num_segments: int) -> int:
        """The largest body of the grid quantizer."""
        return self._checked(int(self._library.edl_grid_max_bytes(numel, num_segments)))

    def delta_max_bytes(self, numel: int, num_segments: int, dtype: int) -> int:
        """The largest body of the exact delta."""
        return self._checked(int(self._library.edl_delta_max_bytes(numel, num_segments, dtype)))

    def grid_encode(
        self,
        x: int,
        numel: int,
        dtype: int,
        segments: tuple[int, ...],
        bits_q16: int,
        step: float,
        body: int,
        capacity: int,
        stats: NativeStats | None = None,
    ) -> int:
        """Quantizes with one step, or to about bits_q16 / 65536 bits a value if step is 0, and encodes."""
        self._select_isa()
        pointer = None if stats is None else ctypes.byref(stats)
        lengths = _int64_array(segments)
        return self._checked(
            int(
                self._library.edl_grid_encode(
                    x, numel, dtype, lengths, len(segments), bits_q16, step, body, capacity, pointer
                )
            )
        )

    def delta_encode(
        self,
        x: int,
        reference: int,
        numel: int,
        dtype: int,
        segments: tuple[int, ...],
        body: int,
        capacity: int,
        stats: NativeStats | None = None,
    ) -> int:
        """Encodes x exactly, given a reference of the same size and dtype."""
        self._select_isa()
        pointer = None if stats is None else ctypes.byref(stats)
        lengths = _int64_array(segments)
        return self._checked(
            int(
                self._library.edl_delta_encode(
                    x, reference, numel, dtype, lengths, len(segments), body, capacity, pointer
                )
            )
        )

    def grid_decode(
        self,
        body: int,
        body_bytes: int,
        dtype: int,
        numel: int,
        segments: tuple[int, ...],
        out: int,
        out_dtype: int,
        accumulate: bool,
    ) -> None:
        """Decodes a body of the grid quantizer into out, or adds to it."""
        self._select_isa()
        lengths = _int64_array(segments)
        self._checked(
            int(
                self._library.edl_grid_decode(
                    body, body_bytes, dtype, numel, lengths, len(segments), out, out_dtype, int(accumulate)
                )
            )
        )

    def delta_decode(
        self,
        body: int,
        body_bytes: int,
        reference: int,
        dtype: int,
        numel: int,
        segments: tuple[int, ...],
        out: int,
        out_dtype: int,
        accumulate: bool,
    ) -> None:
        """Decodes a body of the exact delta into out, which may be the reference, or adds to it."""
        self._select_isa()
        lengths = _int64_array(segments)
        self._checked(
            int(
                self._library.edl_delta_decode(
                    body,
                    body_bytes,
                    reference,
                    dtype,
                    numel,
                    lengths,
                    len(segments),
                    out,
                    out_dtype,
                    int(accumulate),
                )
            )
        )

    def _select_isa(self) -> None:
        # The choice is per thread, so that two codecs in one process cannot change each other's.
        self._checked(int(self._library.edl_set_isa(self._requested_isa)))

    def _checked(self, result: int) -> int:
        if result >= 0:
            return result
        reason = _text(self._library.edl_error_name(result))
        if result <= _FIRST_CORRUPT:
            raise CorruptPacket(
                reason, fix="the bytes were damaged, or are no packet of this codec; send the packet again"
            )
        if result == _NO_MEMORY:
            raise MemoryError("the native codec could not allocate its scratch memory")
        raise ValueError(f"native codec: {reason} (code {result})")


@lru_cache(maxsize=8)
def load_library(isa: str = "auto", path: Path | None = None) -> NativeLibrary:
    """Returns the library for an instruction set; raises `NativeLibraryMissing` if it is not built or too old.

    path: another build of the library, for tests.
    """
    return NativeLibrary(_open(find_library() if path is None else path), isa)


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


def float_array(values: Sequence[float]) -> FloatArray:
    """values as a C array of float32, for the relative steps that `block_encode` chooses from."""
    return (ctypes.c_float * len(values))(*values)


@lru_cache(maxsize=256)
def _int64_array(values: tuple[int, ...]) -> _Int64Array:
    return (ctypes.c_int64 * len(values))(*values)


def _open(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        found = int(library.edl_abi_version())
    except (OSError, AttributeError) as error:
        raise NativeLibraryMissing(
            "the compiled codec kernels cannot be loaded", found=str(error), where=str(path), fix=_BUILD
        ) from error
    if found != ABI_VERSION:
        raise NativeLibraryMissing(
            "the compiled codec kernels are of another version than the package",
            expected=f"interface {ABI_VERSION}",
            found=f"interface {found}",
            where=str(path),
            fix=_BUILD,
        )
    pointer, int64, int32, float32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    signatures: dict[str, list[type[ctypes.c_void_p | ctypes.c_int64 | ctypes.c_int | ctypes.c_float]]] = {
        "edl_split_max_bytes": [int64, int32],
        "edl_block_max_bytes": [int64, int64, int32],
        "edl_split_encode": [pointer, int64, int32, pointer, int64, pointer],
        "edl_block_encode": [
            pointer, int64, int32, pointer, int64, int64, pointer, pointer, int64, pointer,
        ],
        "edl_split_decode": [pointer, int64, int32, int64, pointer, int32, int32],
        "edl_block_decode": [pointer, int64, int32, int64, pointer, int64, pointer, int32, int32],
        "edl_grid_max_bytes": [int64, int64],
        "edl_delta_max_bytes": [int64, int64, int32],
        "edl_grid_encode": [
            pointer, int64, int32, pointer, int64, int64, float32, pointer, int64, pointer,
        ],
        "edl_delta_encode": [pointer, pointer, int64, int32, pointer, int64, pointer, int64, pointer],
        "edl_grid_decode": [pointer, int64, int32, int64, pointer, int64, pointer, int32, int32],
        "edl_delta_decode": [
            pointer, int64, pointer, int32, int64, pointer, int64, pointer, int32, int32,
        ],
    }  # fmt: skip
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = ctypes.c_int64
    library.edl_set_isa.argtypes = [ctypes.c_char_p]
    library.edl_set_isa.restype = ctypes.c_int64
    library.edl_num_threads.argtypes = []
    library.edl_num_threads.restype = ctypes.c_int64
    library.edl_set_num_threads.argtypes = [ctypes.c_int64]
    library.edl_set_num_threads.restype = ctypes.c_int64
    library.edl_isa.argtypes = []
    library.edl_isa.restype = ctypes.c_char_p
    library.edl_error_name.argtypes = [ctypes.c_int64]
    library.edl_error_name.restype = ctypes.c_char_p
    return library


def _text(value: bytes) -> str:
    return value.decode()
