"""A sequence of tokens, in memory or mapped from files: windows at random places, in nanoGPT's file format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from efficient_dl.config import DataConfig, DataSpec
from efficient_dl.data.dataset import content_fingerprint, slice_of_step, spread
from efficient_dl.data.draw import WINDOW, Integers, draw_below
from efficient_dl.errors import DataError

Tokens = NDArray[np.unsignedinteger[Any]]
SCAN_BYTES = 256 * 2**20  # largest file whose highest token is looked for: a second of reading
LOOK_NUMEL = 2**16  # tokens looked at to tell uint32 from uint16


class TokenData:
    """Windows of `context` tokens and the token after each.

    A sample of the training data starts at a random place, drawn by (seed, step, index); windows may overlap, and
    there are no epochs, as in nanoGPT. Validation windows are spread evenly and do not overlap.
    """

    def __init__(
        self, name: str, train: Tokens, validation: Tokens, *, vocabulary: int, context: int, seed: int
    ) -> None:
        for split, tokens in (("training", train), ("validation", validation)):
            if len(tokens) <= context:
                raise DataError(
                    f"the {split} data of {name} is shorter than one sample",
                    expected=f"more than {context:,} tokens (model.context)",
                    found=f"{len(tokens):,} tokens",
                    fix="take a smaller model.context or more data; data.holdout sets the validation's share",
                )
        self.name = name
        self.spec = DataSpec(kind="tokens", classes=vocabulary, shape=(context,))
        self.fingerprint = content_fingerprint((train, validation))
        self.num_train = len(train)
        self.num_validation = len(validation)
        self._train, self._validation = train, validation
        self._context, self._seed = context, seed

    def train_batch(
        self,
        step: int,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 1,
        accumulate: int = 1,
        part: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """x, y: int64 (batch_size, context); see Dataset. Raises DataError on a token outside the vocabulary."""
        index = slice_of_step(rank, world_size, batch_size, accumulate, part)
        starts = draw_below(self.num_train - self._context, self._seed, WINDOW, step, index)
        return self._windows(self._train, starts)

    def eval_batches(self, num_batches: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """x, y: int64 (up to batch_size, context); see Dataset."""
        windows = (self.num_validation - 1) // self._context
        starts = spread(windows, num_batches * batch_size) * self._context
        for first in range(0, len(starts), batch_size):
            yield self._windows(self._validation, starts[first : first + batch_size])

    def _windows(self, tokens: Tokens, starts: Integers) -> tuple[Tensor, Tensor]:
        # One slice a window, and the vocabulary checked here: a fancy index would read the mapped file the same
        # way, only slower, and an embedding's own error for a token out of range is a traceback.
        window = np.stack([tokens[start : start + self._context + 1] for start in starts]).astype(np.int64)
        if int(window.max()) >= self.spec.classes:
            raise DataError(
                f"{self.name} holds a token outside its vocabulary",
                expected=f"tokens below {self.spec.classes:,}",
                found=f"{int(window.max()):,}",
                fix="correct vocab_size in meta.json, or set data.vocabulary or data.token_dtype",
            )
        return torch.from_numpy(window[:, :-1].copy()), torch.from_numpy(window[:, 1:].copy())


def split_off(tokens: Tokens, holdout: float) -> tuple[Tokens, Tokens]:
    """(training, validation): the last `holdout` share of the sequence, one piece, is validation."""
    cut = len(tokens) - round(len(tokens) * holdout)
    return tokens[:cut], tokens[cut:]


def load_tokens(config: DataConfig, path: Path, *, context: int, seed: int) -> TokenData:
    """Map token files: raw little-endian uint16 or uint32, without a header, as nanoGPT's prepare.py writes them.

    path: a folder with train.bin and val.bin, or one file, whose last `data.holdout` share is then validation.
    The dtype is, in this order: data.token_dtype; "dtype" in a meta.json beside the files; a name that ends in
    .uint16, .uint32, .uint16.bin or .uint32.bin; else uint16. The vocabulary: data.vocabulary; "vocab_size" in
    meta.json; else the highest token + 1, in files up to 256 MiB. Raises DataError.
    """
    files = _token_files(path)
    meta = _read_meta(files[0].parent / "meta.json")
    dtype = _token_dtype(config, meta, files[0])
    arrays = [_map_tokens(file, dtype) for file in files]
    vocabulary = config.vocabulary or _vocabulary(meta, files, arrays)
    train, validation = arrays if len(arrays) == 2 else split_off(arrays[0], config.holdout)
    name = f"tokens:{path}"
    return TokenData(name, train, validation, vocabulary=vocabulary, context=context, seed=seed)


def _token_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        fix = "give data.name=tokens:PATH a file of tokens, or a folder with train.bin and val.bin"
        raise DataError("there are no tokens at this path", where=str(path), fix=fix)
    files = [path / "train.bin", path / "val.bin"]
    missing = [one.name for one in files if not one.is_file()]
    if missing:
        found = ", ".join(sorted(one.name for one in path.iterdir())[:8]) or "an empty folder"
        raise DataError(
            f"{' and '.join(missing)} missing in the folder of tokens",
            expected="train.bin and val.bin",
            found=found,
            where=str(path),
            fix="write both, or give the path of a single file, which is split by data.holdout",
        )
    return files


def _read_meta(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fix = 'write it as JSON, for example {"dtype": "uint16", "vocab_size": 50257}, or remove it'
        raise DataError("meta.json cannot be read", found=str(error), where=str(path), fix=fix) from None
    if not isinstance(meta, dict):
        fix = 'for example {"dtype": "uint16", "vocab_size": 50257}'
        raise DataError("meta.json is not an object", where=str(path), fix=fix)
    return meta


def _token_dtype(config: DataConfig, meta: dict[str, Any], file: Path) -> np.dtype[Any]:
    endings = [one.removeprefix(".") for one in file.suffixes if one != ".bin"]
    stated = config.token_dtype if config.token_dtype != "auto" else meta.get("dtype")
    word = stated or next((one for one in endings[-1:] if one in ("uint16", "uint32")), "uint16")
    if word not in ("uint16", "uint32"):
        raise DataError(
            "tokens of this dtype are not read",
            expected="uint16 or uint32",
            found=str(word),
            where=str(file.parent / "meta.json"),
            fix="rewrite the tokens, for example numpy.asarray(tokens, dtype=numpy.uint16).tofile(path)",
        )
    if word == "uint16" and stated is None:
        _refuse_wide_tokens(file)
    return np.dtype(word).newbyteorder("<")


def _refuse_wide_tokens(file: Path) -> None:
    """Raise DataError if a file that nothing is known about holds uint32: every other 16 bits are then 0."""
    numel = min(LOOK_NUMEL, file.stat().st_size // 4 * 2)
    halves = np.fromfile(file, dtype="<u2", count=numel)
    if numel >= 64 and not halves[1::2].any() and halves[::2].any():
        raise DataError(
            "the tokens look like uint32, and nothing says what they are",
            found="every second 16-bit word is 0",
            where=str(file),
            fix='set data.token_dtype=uint32, or write {"dtype": "uint32"} to meta.json beside the file',
        )


def _map_tokens(file: Path, dtype: np.dtype[Any]) -> Tokens:
    size = file.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise DataError(
            "the file is no sequence of tokens",
            expected=f"a positive multiple of {dtype.itemsize} bytes ({dtype.name})",
            found=f"{size:,} bytes",
            where=str(file),
            fix="write the tokens again, or set data.token_dtype",
        )
    try:
        return np.memmap(file, dtype=dtype, mode="r")
    except OSError as error:
        fix = "see whether the file may be read, and whether its file system can map files"
        raise DataError("the tokens cannot be read", found=str(error), where=str(file), fix=fix) from None


def _vocabulary(meta: dict[str, Any], files: list[Path], arrays: list[Tokens]) -> int:
    if "vocab_size" in meta:
        size = meta["vocab_size"]
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            return size
        where = str(files[0].parent / "meta.json")
        fix = 'correct it, for example {"vocab_size": 50257}, or remove it and set data.vocabulary'
        raise DataError("vocab_size is not a positive whole number", found=repr(size), where=where, fix=fix)
    if sum(one.nbytes for one in arrays) > SCAN_BYTES:
        raise DataError(
            "the size of the vocabulary is unknown",
            found=f"no meta.json, and files too large to look through ({SCAN_BYTES >> 20} MiB)",
            where=str(files[0].parent),
            fix='set data.vocabulary=50257 (GPT-2\'s), or write {"vocab_size": 50257} to meta.json there',
        )
    return max(int(one.max()) for one in arrays) + 1
