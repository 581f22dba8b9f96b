"""Features of a frozen prefix on disk, compressed without loss: computed once, read in every later epoch."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
import xxhash
from torch import Tensor, nn

from efficient_dl.codec import make_codec
from efficient_dl.codec.dtypes import DTYPE_CODES
from efficient_dl.errors import ConfigError, CorruptPacket, DiskFull

FORMAT = 1
_RECORD = struct.Struct(
    "<4s16sI"
)  # magic, the sample's hash, bytes of the packet; then xxh3 of these 24 bytes
_CHECK = struct.Struct("<Q")
_HEADER_BYTES = _RECORD.size + _CHECK.size
_MAGIC = b"EDLF"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass
class CacheStats:
    """Batches that were read and computed; samples written; bytes of the features written and of their packets.

    dropped_bytes: of a record at the end that a crash had cut short; its sample is computed again.
    samples_left_out: that came when there was no more room (max_bytes); one may count several times.
    """

    hits: int = 0
    misses: int = 0
    samples_written: int = 0
    feature_bytes: int = 0
    packet_bytes: int = 0
    dropped_bytes: int = 0
    samples_left_out: int = 0


class FeatureCache:
    """What a frozen prefix makes of each sample, kept in one file of a folder that no other process uses.

    A sample is known by the hash of its input, so that epochs may come in any order and batches in any composition; it
    must come again bit for bit, which augmented samples do not. A sample's features are those that its first batch had,
    bit for bit, in every later one. They may differ in their last bits between batches, so a run with the cache need
    not equal one without; it equals one with the cache that was stopped and resumed with the same folder.
    In memory: one batch, and about 150 bytes a sample for the index. On disk: one packet of the codec "lossless" and 32
    bytes a sample.

    prefix: in eval mode. augmented: whether the data is, from its configuration. max_bytes: of the file;
    samples beyond are computed every time.
    Raises ConfigError for augmented data, a prefix in training mode, a folder with features of another prefix or one
    in use; DiskFull; CorruptPacket for a damaged file.

        with FeatureCache(Path("cache"), prefix, augmented=config.data.augment) as cache:
            features = cache.features(inputs)
    """

    def __init__(
        self, folder: Path, prefix: nn.Module, *, augmented: bool, max_bytes: int | None = None
    ) -> None:
        if augmented:
            raise ConfigError(
                "features of augmented samples are not worth keeping: no sample comes twice",
                found="data.augment = true",
                fix="data.augment=false, or train without the cache",
            )
        if any(part.training for part in prefix.modules()):
            raise ConfigError(
                "only what a frozen prefix makes stays the same, and this one is in training mode",
                fix="prefix.eval().requires_grad_(False)",
            )
        self.folder, self.max_bytes = folder, max_bytes
        self.stats = CacheStats()
        self._prefix = prefix
        self._codec = make_codec("lossless")
        self._about: dict[str, object] | None = None
        self._index: dict[
            bytes, tuple[int, int]
        ] = {}  # sample's hash -> where its packet begins, and its bytes
        self._path = folder / "features.bin"
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock()
            self._fingerprint = fingerprint(prefix)
            self._open()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the folder free; what was written stays."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Tensor:
        """prefix(inputs): read where all samples are known, else computed, and what is new written.

        inputs: (batch, ...), any dtype. The result is on their device.
        """
        keys = [_digest(row) for row in inputs.detach().cpu()]
        if keys and all(key in self._index for key in keys):
            self.stats.hits += 1
            return self._read(keys).to(inputs.device)
        self.stats.misses += 1
        features: Tensor = self._prefix(inputs)
        known = [row for row, key in enumerate(keys) if key in self._index]
        self._write(keys, features.cpu().contiguous())
        if known:
            features[known] = self._read([keys[row] for row in known]).to(features.device)
        return features

    def _read(self, keys: list[bytes]) -> Tensor:
        assert self._about is not None
        shape, dtype = self._about["shape"], self._about["dtype"]
        out = torch.empty((len(keys), *shape), dtype=getattr(torch, str(dtype)))  # type: ignore[misc]
        for row, key in zip(out, keys, strict=True):
            start, length = self._index[key]
            content = os.pread(self._file, length, start)
            if len(content) != length:
                raise self._corrupt("a packet is cut short", f"{len(content)} of {length} bytes", start)
            try:
                self._codec.decode(torch.frombuffer(bytearray(content), dtype=torch.uint8), row)
            except CorruptPacket as error:
                raise self._corrupt("a sample's packet is damaged", error.problem, start) from error
        return out

    def _write(self, keys: list[bytes], features: Tensor) -> None:
        about = {
            "format": FORMAT,
            "prefix": self._fingerprint,
            "codec": self._codec.name,
            "shape": list(features.shape[1:]),
            "dtype": str(features.dtype).removeprefix("torch."),
        }
        if self._about is None:
            with self._writing():
                _write_atomically(self.folder / "about.json", json.dumps(about, indent=1))
            self._about = about
        elif self._about != about:
            raise ConfigError(
                "the prefix's features have another form than those in the cache",
                expected=f"{self._about['shape']}, {self._about['dtype']}",
                found=f"{about['shape']}, {about['dtype']}",
                where=str(self.folder),
                fix="use one cache for samples of one shape and one precision",
            )
        for key, row in zip(keys, features, strict=True):
            if key not in self._index:
                # By what a packet takes at most, so that a resumed run leaves out what the first one did.
                longest = self._end + _HEADER_BYTES + self._codec.max_bytes(row.numel(), row.dtype)
                if self.max_bytes is not None and longest > self.max_bytes:
                    self.stats.samples_left_out += 1
                    continue
                packet = self._codec.encode(row).numpy().tobytes()
                head = _RECORD.pack(_MAGIC, key, len(packet))
                self._append(head + _CHECK.pack(xxhash.xxh3_64_intdigest(head)) + packet, row)
                self._index[key] = (self._end - len(packet), len(packet))

    def _append(self, record: bytes, row: Tensor) -> None:
        with self._writing():
            written = 0
            try:
                while written < len(record):
                    written += os.pwrite(self._file, record[written:], self._end + written)
            except OSError:
                os.ftruncate(self._file, self._end)
                raise
        self._end += len(record)
        self.stats.samples_written += 1
        self.stats.feature_bytes += row.numel() * row.element_size()
        self.stats.packet_bytes += len(record)

    def _open(self) -> None:
        about = self.folder / "about.json"
        self._end = 0
        if not about.exists():
            if os.fstat(self._file).st_size:
                raise self._corrupt("nothing says what the features in this file are", "no about.json", 0)
            return
        try:
            known = json.loads(about.read_text())
            self._check(known)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise self._corrupt("about.json cannot be read", repr(error), 0) from None
        self._about = known
        self._scan()

    def _check(self, known: dict[str, object]) -> None:
        dtypes = {str(dtype).removeprefix("torch.") for dtype in DTYPE_CODES}
        shape = known["shape"]
        if known["dtype"] not in dtypes or not isinstance(shape, list):
            raise TypeError(f"shape {shape}, dtype {known['dtype']}")
        if not all(isinstance(side, int) and side >= 0 for side in shape):
            raise TypeError(f"shape {shape}")
        expected = (FORMAT, self._fingerprint, self._codec.name)
        found = (known["format"], known["prefix"], known["codec"])
        if found != expected:
            raise ConfigError(
                "the folder holds features of another prefix",
                expected="format {}, prefix {}, codec {}".format(*expected),
                found="format {}, prefix {}, codec {}".format(*found),
                where=str(self.folder),
                fix="remove the folder, or name another one",
            )

    def _scan(self) -> None:
        """Read the headers of all records; cut off one that a crash left unfinished at the end."""
        size = os.fstat(self._file).st_size
        while self._end < size:
            head = os.pread(self._file, _HEADER_BYTES, self._end)
            if len(head) == _HEADER_BYTES:
                magic, key, length = _RECORD.unpack_from(head)
                check = _CHECK.unpack_from(head, _RECORD.size)[0]
                if magic != _MAGIC or check != xxhash.xxh3_64_intdigest(head[: _RECORD.size]):
                    raise self._corrupt("a record's header is damaged", head[:8].hex(), self._end)
                start = self._end + _HEADER_BYTES
                if start + length <= size:
                    self._index[key] = (start, length)
                    self._end = start + length
                    continue
            self.stats.dropped_bytes = size - self._end
            os.ftruncate(self._file, self._end)
            return

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                "another process, or another cache of this one, uses this folder of features",
                where=str(self.folder),
                fix="name a folder for each rank",
            ) from None
        except OSError:
            pass  # a file system without locks

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise DiskFull(
                "the disk is full",
                found=str(error),
                where=str(self._path),
                fix="free some space, name a folder on another disk, or train without the cache",
            ) from None

    def _corrupt(self, problem: str, found: str, offset: int) -> CorruptPacket:
        where = f"{self._path}, byte {offset:,}"
        return CorruptPacket(
            problem, found=found, where=where, fix=f"remove {self.folder}; it is computed again"
        )


def _digest(row: Tensor) -> bytes:
    content = row.contiguous().view(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_128_digest(content.data)


def fingerprint(prefix: nn.Module) -> str:
    """Of all that decides what the prefix makes of a sample: its layers and their values, as 32 hexadecimal digits."""
    digest = xxhash.xxh3_128(repr(prefix).encode())
    for name, value in prefix.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
