"""Token files: how dtype, vocabulary and split are found, and what users get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from efficient_dl.config import DataConfig
from efficient_dl.data import load_data
from efficient_dl.errors import DataError


def _write_tokens(path: Path, tokens: list[int] | range, dtype: str = "<u2") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.asarray(tokens, dtype=dtype).tofile(path)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("stated_by", ["setting", "meta", "name"])
def test_the_dtype_of_tokens_is_stated_in_three_ways(tmp_path: Path, dtype: str, stated_by: str) -> None:
    folder = tmp_path / "corpus"
    path = folder / (f"all.{dtype}.bin" if stated_by == "name" else "all.bin")
    _write_tokens(path, range(1000), dtype)
    if stated_by == "meta":
        (folder / "meta.json").write_text(json.dumps({"dtype": dtype}))
    config = DataConfig(name=f"tokens:{path}", token_dtype=dtype if stated_by == "setting" else "auto")
    data = load_data(config, context=16)
    assert data.spec.classes == 1000
    assert data.num_train + data.num_validation == 1000


def test_a_folder_brings_its_own_split(tmp_path: Path) -> None:
    _write_tokens(tmp_path / "train.bin", range(500))
    _write_tokens(tmp_path / "val.bin", range(300))
    for config in (DataConfig(name=f"tokens:{tmp_path}"), DataConfig(name="tokens", path=str(tmp_path))):
        data = load_data(config, context=16)
        assert (data.num_train, data.num_validation, data.spec.classes) == (500, 300, 500)


def test_the_vocabulary_is_the_setting_then_meta_then_the_highest_token(tmp_path: Path) -> None:
    path = tmp_path / "all.bin"
    _write_tokens(path, range(1000))
    name = f"tokens:{path}"
    assert load_data(DataConfig(name=name), context=16).spec.classes == 1000
    (tmp_path / "meta.json").write_text('{"vocab_size": 1024}')
    assert load_data(DataConfig(name=name), context=16).spec.classes == 1024
    assert load_data(DataConfig(name=name, vocabulary=2048), context=16).spec.classes == 2048


def test_a_token_outside_the_vocabulary_is_reported(tmp_path: Path) -> None:
    _write_tokens(tmp_path / "all.bin", range(1000))
    data = load_data(DataConfig(name=f"tokens:{tmp_path / 'all.bin'}", vocabulary=10), context=16)
    with pytest.raises(DataError, match="outside its vocabulary"):
        data.train_batch(0, batch_size=8)


def test_a_vocabulary_that_would_take_long_to_find_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_tokens(tmp_path / "all.bin", range(1000))
    monkeypatch.setattr("efficient_dl.data.tokens.SCAN_BYTES", 100)
    with pytest.raises(DataError, match=r"data\.vocabulary"):
        load_data(DataConfig(name=f"tokens:{tmp_path / 'all.bin'}"), context=16)


def test_unstated_uint32_is_not_read_as_uint16(tmp_path: Path) -> None:
    _write_tokens(tmp_path / "all.bin", range(1000), "<u4")
    with pytest.raises(DataError, match=r"data\.token_dtype=uint32"):
        load_data(DataConfig(name=f"tokens:{tmp_path / 'all.bin'}"), context=16)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "no tokens at this path"),
        (lambda folder: folder.mkdir(), "train.bin and val.bin missing"),
        (lambda folder: _write_tokens(folder / "train.bin", range(99)), "val.bin missing"),
        (lambda folder: _write_split(folder, b"x" * 301), "multiple of 2 bytes"),
        (lambda folder: _write_split(folder, b""), "multiple of 2 bytes"),
        (lambda folder: _write_split(folder, b"x" * 8), "shorter than one sample"),
        (lambda folder: _write_split(folder, b"x" * 400, meta="{"), "meta.json cannot be read"),
        (lambda folder: _write_split(folder, b"x" * 400, meta="[]"), "meta.json is not an object"),
        (lambda folder: _write_split(folder, b"x" * 400, meta='{"dtype": "int64"}'), "uint16 or uint32"),
        (lambda folder: _write_split(folder, b"x" * 400, meta='{"vocab_size": "x"}'), "vocab_size"),
    ],
)
def test_bad_token_files_are_data_errors(
    tmp_path: Path, prepare: Callable[[Path], None], message: str
) -> None:
    prepare(tmp_path / "corpus")
    with pytest.raises(DataError, match=message):
        load_data(DataConfig(name=f"tokens:{tmp_path / 'corpus'}"), context=16)


def _write_split(folder: Path, content: bytes, meta: str | None = None) -> None:
    folder.mkdir()
    (folder / "train.bin").write_bytes(content)
    (folder / "val.bin").write_bytes(content)
    if meta is not None:
        (folder / "meta.json").write_text(meta)
