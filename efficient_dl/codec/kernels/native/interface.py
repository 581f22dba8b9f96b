"""The compiled codecs' C interface (edl_codec.h): pointers in, byte counts and exceptions out."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from efficient_dl.errors import ConfigError, CorruptPacket

ABI_VERSION: Final = 6

_FIRST_CORRUPT: Final = -16
_NO_MEMORY: Final = -3
_UNSUPPORTED_ISA: Final = -4

_Int64Array = ctypes.Array[ctypes.c_int64]
FloatArray = ctypes.Array[ctypes.c_float]

_POINTER, _INT64, _INT32, _FLOAT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: Final[dict[str, list[type[ctypes.c_void_p | ctypes.c_int64 | ctypes.c_int | ctypes.c_float]]]] = {
    "edl_split_max_bytes": [_INT64, _INT32],
    "edl_block_max_bytes": [_INT64, _INT64, _INT64],
    "edl_block_fixed_bytes": [_INT64, _POINTER, _INT64, _INT64],
    "edl_split_encode": [_POINTER, _INT64, _INT32, _POINTER, _INT64, _POINTER],
    "edl_block_encode": [
        _POINTER, _INT64, _INT32, _POINTER, _POINTER, _INT64, _INT64, _POINTER, _INT64, _POINTER, _INT64, _POINTER,
    ],
    "edl_split_decode": [_POINTER, _INT64, _INT32, _INT64, _POINTER, _INT32, _INT32],
    "edl_grid_max_bytes": [_INT64, _INT64],
    "edl_delta_max_bytes": [_INT64, _INT32],
    "edl_grid_encode": [
        _POINTER, _INT64, _INT32, _POINTER, _POINTER, _INT64, _INT64, _FLOAT32, _POINTER, _INT64, _POINTER,
    ],
    "edl_delta_encode": [_POINTER, _POINTER, _INT64, _INT32, _POINTER, _INT64, _POINTER],
    "edl_grid_decode": [_POINTER, _INT64, _INT32, _INT64, _POINTER, _INT64, _POINTER, _INT32, _INT32],
    "edl_delta_decode": [_POINTER, _INT64, _POINTER, _INT32, _INT64, _POINTER, _INT32, _INT32],
    "edl_block_decode": [_POINTER, _INT64, _INT32, _INT64, _POINTER, _INT64, _POINTER, _INT32, _INT32],
    "edl_blockwise_encode": [
        _INT32, _POINTER, _INT64, _INT32, _POINTER, _INT64, _INT64, _POINTER, _INT64, _POINTER,
    ],
    "edl_blockwise_decode": [
        _INT32, _POINTER, _INT64, _INT32, _INT64, _POINTER, _INT64, _INT64, _POINTER, _INT32, _INT32,
    ],
    "edl_topk_encode": [_POINTER, _INT64, _INT32, _INT64, _POINTER, _INT64, _POINTER],
    "edl_topk_decode": [_POINTER, _INT64, _INT32, _INT64, _INT64, _POINTER, _INT32, _INT32],
    "edl_cast_encode": [_POINTER, _INT64, _INT32, _INT32, _POINTER, _INT64],
    "edl_cast_decode": [_POINTER, _INT64, _INT32, _INT64, _POINTER, _INT32, _INT32],
    "edl_num_threads": [],
    "edl_set_num_threads": [_INT64],
}  # fmt: skip


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
    dropped_blocks: int
    largest_escape: int

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
        ("dropped_blocks", ctypes.c_int64),
        ("largest_escape", ctypes.c_int64),
    )


class NativeLibrary:
    """The library's functions for one instruction set: "auto" (the best), "avx512", "avx2" or "portable".

    Addresses are of contiguous memory (`tensor.data_ptr()`), dtypes the packet's codes (0 float32, 1 bfloat16,
    2 float16, 3 float8_e4m3fn, 4 float8_e5m2). Calls release the GIL and may run in any number of threads.
    Encoders return the bytes of the body. Decoders raise `CorruptPacket` with the reason; the output is then undefined.
    """

    def __init__(self, library: ctypes.CDLL, isa: str = "auto") -> None:
        self._library = library
        self._requested_isa = isa.encode()
        self._select_isa()
        self.isa: Final = _text(library.edl_isa())

    def num_threads(self) -> int:
        """Threads that one call may use, the caller's included."""
        return self._call("edl_num_threads")

    def set_num_threads(self, count: int) -> None:
        """Sets them, for the whole process; packets do not depend on it."""
        self._call("edl_set_num_threads", count)

    def split_max_bytes(self, numel: int, dtype: int) -> int:
        """The largest body of the exact codec."""
        return self._call("edl_split_max_bytes", numel, dtype)

    def block_max_bytes(self, numel: int, num_segments: int, bits_q16: int) -> int:
        """The largest body of the block quantizer at a rate of bits_q16 / 65536 bits a value."""
        return self._call("edl_block_max_bytes", numel, num_segments, bits_q16)

    def block_fixed_bytes(self, numel: int, segments: tuple[int, ...], bits_q16: int) -> int:
        """The smallest limit that `block_encode` takes."""
        return self._call("edl_block_fixed_bytes", numel, _int64_array(segments), len(segments), bits_q16)

    def split_encode(
        self, x: int, numel: int, dtype: int, body: int, capacity: int, stats: NativeStats | None = None
    ) -> int:
        """Encodes exactly into body, which has `capacity` bytes."""
        return self._call("edl_split_encode", x, numel, dtype, body, capacity, _pointer(stats))

    def split_decode(
        self, body: int, body_bytes: int, dtype: int, numel: int, out: int, out_dtype: int, accumulate: bool
    ) -> None:
        """Decodes a body of the exact codec into out, or adds to it."""
        self._call("edl_split_decode", body, body_bytes, dtype, numel, out, out_dtype, accumulate)

    def block_encode(
        self,
        x: int,
        numel: int,
        dtype: int,
        residual: int | None,
        segments: tuple[int, ...],
        bits_q16: int,
        steps: FloatArray,
        limit: int | None,
        body: int,
        capacity: int,
        stats: NativeStats | None = None,
    ) -> int:
        """Quantizes to about bits_q16 / 65536 bits a value and encodes.

        residual: numel floats, added and replaced. steps: see `float_array`. limit: the most bytes of the body.
        """
        return self._call(
            "edl_block_encode",
            x,
            numel,
            dtype,
            residual,
            _int64_array(segments),
            len(segments),
            bits_q16,
            steps,
            -1 if limit is None else limit,
            body,
            capacity,
            _pointer(stats),
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
        self._call(
            "edl_block_decode",
            body,
            body_bytes,
            dtype,
            numel,
            _int64_array(segments),
            len(segments),
            out,
            out_dtype,
            accumulate,
        )

    def blockwise_encode(
        self,
        codec: int,
        x: int,
        numel: int,
        dtype: int,
        segments: tuple[int, ...],
        block_values: int,
        body: int,
        capacity: int,
        stats: NativeStats | None = None,
    ) -> int:
        """Encodes as int8, int4 or sign (codec: 16, 17, 19) with a scale for each block."""
        return self._call(
            "edl_blockwise_encode",
            codec,
            x,
            numel,
            dtype,
            _int64_array(segments),
            len(segments),
            block_values,
            body,
            capacity,
            _pointer(stats),
        )

    def blockwise_decode(
        self,
        codec: int,
        body: int,
        body_bytes: int,
        dtype: int,
        numel: int,
        segments: tuple[int, ...],
        block_values: int,
        out: int,
        out_dtype: int,
        accumulate: bool,
    ) -> None:
        """Decodes a body of `blockwise_encode` into out, or adds to it."""
        self._call(
            "edl_blockwise_decode",
            codec,
            body,
            body_bytes,
            dtype,
            numel,
            _int64_array(segments),
            len(segments),
            block_values,
            out,
            out_dtype,
            accumulate,
        )

    def topk_encode(
        self,
        x: int,
        numel: int,
        dtype: int,
        count: int,
        body: int,
        capacity: int,
        stats: NativeStats | None = None,
    ) -> int:
        """Encodes the `count` largest magnitudes, of equal ones the first."""
        return self._call("edl_topk_encode", x, numel, dtype, count, body, capacity, _pointer(stats))

    def topk_decode(
        self,
        body: int,
        body_bytes: int,
        dtype: int,
        numel: int,
        count: int,
        out: int,
        out_dtype: int,
        accumulate: bool,
    ) -> None:
        """Decodes a body of `topk_encode` into out, or adds to it at the kept places."""
        self._call("edl_topk_decode", body, body_bytes, dtype, numel, count, out, out_dtype, accumulate)

    def cast_encode(self, x: int, numel: int, dtype: int, wire_dtype: int, body: int, capacity: int) -> int:
        """Rounds to another dtype."""
        return self._call("edl_cast_encode", x, numel, dtype, wire_dtype, body, capacity)

    def cast_decode(
        self,
        body: int,
        body_bytes: int,
        wire_dtype: int,
        numel: int,
        out: int,
        out_dtype: int,
        accumulate: bool,
    ) -> None:
        """Converts a body of `cast_encode` to out's dtype, or adds it to out."""
        self._call("edl_cast_decode", body, body_bytes, wire_dtype, numel, out, out_dtype, accumulate)

    def grid_max_bytes(self, numel: int, num_segments: int) -> int:
        """The largest body of the grid quantizer."""
        return self._call("edl_grid_max_bytes", numel, num_segments)

    def delta_max_bytes(self, numel: int, dtype: int) -> int:
        """The largest body of the exact delta."""
        return self._call("edl_delta_max_bytes", numel, dtype)

    def grid_encode(
        self,
        x: int,
        numel: int,
        dtype: int,
        residual: int | None,
        segments: tuple[int, ...],
        bits_q16: int,
        step: float,
        body: int,
        capacity: int,
        stats: NativeStats | None = None,
    ) -> int:
        """Quantizes with one step, or to about bits_q16 / 65536 bits a value if step is 0, and encodes."""
        return self._call(
            "edl_grid_encode",
            x,
            numel,
            dtype,
            residual,
            _int64_array(segments),
            len(segments),
            bits_q16,
            step,
            body,
            capacity,
            _pointer(stats),
        )

    def delta_encode(
        self,
        x: int,
        reference: int,
        numel: int,
        dtype: int,
        body: int,
        capacity: int,
        stats: NativeStats | None = None,
    ) -> int:
        """Encodes x exactly, given a reference of the same size and dtype."""
        return self._call("edl_delta_encode", x, reference, numel, dtype, body, capacity, _pointer(stats))

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
        self._call(
            "edl_grid_decode",
            body,
            body_bytes,
            dtype,
            numel,
            _int64_array(segments),
            len(segments),
            out,
            out_dtype,
            accumulate,
        )

    def delta_decode(
        self,
        body: int,
        body_bytes: int,
        reference: int,
        dtype: int,
        numel: int,
        out: int,
        out_dtype: int,
        accumulate: bool,
    ) -> None:
        """Decodes a body of the exact delta into out, which may be the reference, or adds to it."""
        self._call("edl_delta_decode", body, body_bytes, reference, dtype, numel, out, out_dtype, accumulate)

    def _call(self, function: str, *arguments: object) -> int:
        """What a C function of `_SIGNATURES` returns, if that is no error."""
        self._select_isa()
        return self._checked(int(getattr(self._library, function)(*arguments)))

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
        if result == _UNSUPPORTED_ISA:
            raise ConfigError(
                f"the codec kernels cannot use the instruction set {self._requested_isa.decode()!r}",
                expected="one that this processor and this build have",
                found=f"kernels up to {_text(self._library.edl_isa())!r}",
                where=platform.machine(),
                fix='use kernel="auto", which takes the best there is',
            )
        raise ValueError(f"native codec: {reason} (code {result})")


def declare(library: ctypes.CDLL) -> None:
    """Tells ctypes the types of the library's functions."""
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = ctypes.c_int64
    library.edl_set_isa.argtypes = [ctypes.c_char_p]
    library.edl_set_isa.restype = ctypes.c_int64
    library.edl_isa.argtypes = []
    library.edl_isa.restype = ctypes.c_char_p
    library.edl_error_name.argtypes = [ctypes.c_int64]
    library.edl_error_name.restype = ctypes.c_char_p


def float_array(values: Sequence[float]) -> FloatArray:
    """values as a C array of float32, for the relative steps that `block_encode` chooses from."""
    return (ctypes.c_float * len(values))(*values)


def _pointer(stats: NativeStats | None) -> object:
    return None if stats is None else ctypes.byref(stats)


@lru_cache(maxsize=256)
def _int64_array(values: tuple[int, ...]) -> _Int64Array:
    return (ctypes.c_int64 * len(values))(*values)


def _text(value: bytes) -> str:
    return value.decode()
