"""Lossless compressors that users have today, as systems of codec_timing.py: each on one thread, at its settings.

Those without a way to pass an output buffer allocate it; see use_one_core on how they get used memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.codec_timing import System

INSTALL = "pip install 'efficient_dl[bench]'"
ZIPNN_CHUNK_BYTES = 2**18  # its default; from 512 KiB on its Huffman coder stores everything


class _Peer:
    """What all have in common: the tensor's bytes and the kept packet."""

    name: str

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self._bytes = byte_view(x)
        self._packet: Any = b""

    def prepare(self) -> None:
        """Nothing, for most."""

    def packet_bytes(self) -> int:
        """See System."""
        return len(self._packet)

    def _as_tensor(self, content: Any) -> Tensor:
        flat = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())
        return flat.view(self._x.dtype).view(self._x.shape)


class Zstd(_Peer):
    """zstandard on the tensor's bytes."""

    def __init__(self, x: Tensor, level: int) -> None:
        super().__init__(x)
        zstandard = load("zstandard")
        self.name = f"zstd -{level}"
        self._compressor = zstandard.ZstdCompressor(level=level, threads=0)  # 0: in the calling thread
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self) -> None:
        """See System."""
        self._packet = self._compressor.compress(self._bytes)

    def decode(self) -> None:
        """See System."""
        self._decompressor.decompress(self._packet)

    def decoded(self) -> Tensor:
        """See System."""
        return self._as_tensor(self._decompressor.decompress(self._packet))


class Lz4(_Peer):
    """LZ4 in its block format, default mode."""

    name = "lz4"

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        self._lz4 = load("lz4.block")

    def encode(self) -> None:
        """See System."""
        self._packet = self._lz4.compress(self._bytes)

    def decode(self) -> None:
        """See System."""
        self._lz4.decompress(self._packet)

    def decoded(self) -> Tensor:
        """See System."""
        return self._as_tensor(self._lz4.decompress(self._packet))


class Blosc2(_Peer):
    """Blosc2's byte shuffle, then zstd. The type's size is given, its default is 8.

    Level 1 is the strong setting for tensors: about as small as level 5, and seven to ten times as fast.
    """

    def __init__(self, x: Tensor, level: int) -> None:
        super().__init__(x)
        blosc2 = load("blosc2")
        self.name = f"blosc2 shuffle+zstd -{level}"
        self._blosc2 = blosc2
        self._encoding = blosc2.CParams(
            codec=blosc2.Codec.ZSTD,
            clevel=level,
            typesize=x.element_size(),
            nthreads=1,
            filters=[blosc2.Filter.SHUFFLE],
        )
        self._decoding = blosc2.DParams(nthreads=1)
        self._out = np.zeros_like(self._bytes)

    def encode(self) -> None:
        """See System."""
        self._packet = self._blosc2.compress2(self._bytes, cparams=self._encoding)

    def decode(self) -> None:
        """See System."""
        self._blosc2.decompress2(self._packet, dst=self._out, dparams=self._decoding)

    def decoded(self) -> Tensor:
        """See System."""
        self.decode()
        return self._as_tensor(self._out)


class ZipNN(_Peer):
    """ZipNN in its mode for the tensor's dtype, byte format.

    It changes its input in place (rotates the bits), so the input is restored before each encode, untimed; timing it
    in a loop without that measures other data. direct: calls its C function; the documented method first copies the
    input into a variable that nothing uses, which costs 15 to 30 %. We are compared with the faster one.
    """

    def __init__(self, x: Tensor, direct: bool) -> None:
        super().__init__(x)
        zipnn = load("zipnn")
        self._core = load("zipnn_core")
        self.name = "ZipNN" if direct else "ZipNN, documented method"
        dtype = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[x.dtype]
        self._zipnn = zipnn.ZipNN(
            input_format="byte", bytearray_dtype=dtype, threads=1, compression_chunk=ZIPNN_CHUNK_BYTES
        )
        self._direct = direct
        self._scratch = bytearray(self._bytes.tobytes())
        # Number of byte groups and their order, as ZipNN.compress_torch_numpy_byte sets them.
        self._groups, self._order = {torch.float32: (4, 220), torch.bfloat16: (2, 10)}[x.dtype]
        self._zipnn.compress(self._scratch)  # fills in the header
        self._header = bytes(self._zipnn._header)

    def prepare(self) -> None:
        """Restores what the last encode changed."""
        np.frombuffer(self._scratch, dtype=np.uint8)[:] = self._bytes

    def encode(self) -> None:
        """See System."""
        if self._direct:
            self._packet = self._core.zipnn_core(
                self._header, self._scratch, self._groups, 1, self._order, 0, ZIPNN_CHUNK_BYTES, 0.95, 10, 1
            )
        else:
            self._packet = self._zipnn.compress(self._scratch)

    def decode(self) -> None:
        """See System."""
        self._zipnn.decompress(self._packet)

    def decoded(self) -> Tensor:
        """See System."""
        return self._as_tensor(self._zipnn.decompress(self._packet))


def lossless_peers(x: Tensor) -> tuple[list[System], list[str]]:
    """All peers for a float32 or bfloat16 tensor, and a sentence for each that is not installed."""
    makers: dict[str, Callable[[], System]] = {
        "ZipNN": lambda: ZipNN(x, direct=True),
        "ZipNN, documented method": lambda: ZipNN(x, direct=False),
        "blosc2 5": lambda: Blosc2(x, 5),
        "blosc2 1": lambda: Blosc2(x, 1),
        "zstd 1": lambda: Zstd(x, 1),
        "zstd 3": lambda: Zstd(x, 3),
        "lz4": lambda: Lz4(x),
    }
    systems, missing = list[System](), list[str]()
    for name, make in makers.items():
        try:
            systems.append(make())
        except ImportError as error:
            missing.append(f"{name}: {error}; {INSTALL}")
    return systems, missing


def byte_view(x: Tensor) -> NDArray[np.uint8]:
    """The tensor's bytes, not copied."""
    return x.view(-1).view(torch.uint8).numpy()


def load(module: str) -> Any:
    """The peer's module; they come without types."""
    return importlib.import_module(module)
