"""Data: the order that no world size changes, the splits, the file formats and what users get wrong."""

from __future__ import annotations

import gzip
import hashlib
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from efficient_dl.config import DataConfig
from efficient_dl.data import Dataset, check_data, dataset, download, fashion_mnist, load_data
from efficient_dl.data.dataset import content_fingerprint, spread
from efficient_dl.data.draw import draw_below, permutation
from efficient_dl.data.standard_library import load_standard_library, source_files
from efficient_dl.errors import ConfigError, DataError

FASHION_FILES = (("train", 40), ("t10k", 12))


def _write_fashion_mnist(folder: Path, zipped: bool = False, labels: int = 10) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(0)
    for split, numel in FASHION_FILES:
        images = draws.integers(0, 256, (numel, 28, 28), dtype=np.uint8)
        classes = (np.arange(numel) % labels).astype(np.uint8)
        contents = {
            f"{split}-images-idx3-ubyte": struct.pack(">4I", 0x803, numel, 28, 28) + images.tobytes(),
            f"{split}-labels-idx1-ubyte": struct.pack(">2I", 0x801, numel) + classes.tobytes(),
        }
        for name, content in contents.items():
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
            else:
                (folder / name).write_bytes(content)


def _write_tokens(path: Path, tokens: list[int] | range, dtype: str = "<u2") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.asarray(tokens, dtype=dtype).tofile(path)


@pytest.fixture(params=["stdlib", "digits", "fashion-mnist", "tokens"])
def open_data(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Dataset]:
    """Opens one of the data sets, with any seed and setting."""
    name: str = request.param
    settings: dict[str, object] = {"name": name}
    if name == "fashion-mnist":
        _write_fashion_mnist(tmp_path)
        settings["path"] = str(tmp_path)
    if name == "tokens":
        _write_tokens(tmp_path / "all.bin", range(3000))
        settings["name"] = f"tokens:{tmp_path / 'all.bin'}"

    def open_it(seed: int = 0, **more: object) -> Dataset:
        return load_data(DataConfig(**{**settings, **more}), context=16, seed=seed)  # type: ignore[arg-type]

    return open_it


def _global_batch(data: Dataset, step: int, world_size: int, accumulate: int, numel: int) -> torch.Tensor:
    batch_size = numel // (world_size * accumulate)
    parts = [
        data.train_batch(step, rank, world_size, batch_size, accumulate, part)
        for rank in range(world_size)
        for part in range(accumulate)
    ]
    assert all(len(x) == len(y) == batch_size for x, y in parts)
    return torch.cat(
        [torch.cat((x.flatten(1).float(), y.flatten().view(len(y), -1).float()), 1) for x, y in parts]
    )


def test_global_batch_is_the_same_for_1_2_and_4_ranks(open_data: Callable[..., Dataset]) -> None:
    data = open_data()
    for step in (0, 1, 7, 12_345_678):
        alone = _global_batch(data, step, world_size=1, accumulate=1, numel=16)
        for world_size, accumulate in ((2, 1), (4, 1), (1, 4), (2, 2), (4, 4)):
            assert torch.equal(_global_batch(data, step, world_size, accumulate, 16), alone)


def test_a_batch_depends_on_step_and_seed_alone(open_data: Callable[..., Dataset]) -> None:
    data, again, other = open_data(), open_data(), open_data(seed=1)
    later = data.train_batch(9, batch_size=8)[0]
    data.train_batch(3, batch_size=8)
    torch.manual_seed(3)
    assert torch.equal(again.train_batch(9, batch_size=8)[0], later)
    assert not torch.equal(other.train_batch(9, batch_size=8)[0], later)
    assert not torch.equal(data.train_batch(10, batch_size=8)[0], later)


def test_eval_batches_are_the_same_every_time_and_for_every_seed(open_data: Callable[..., Dataset]) -> None:
    first = list(open_data().eval_batches(3, 4))
    second = list(open_data(seed=5).eval_batches(3, 4))
    assert len(first) == 3 and all(len(x) == 4 for x, _ in first)
    for (x, y), (other_x, other_y) in zip(first, second, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)


@pytest.mark.parametrize("open_data", ["digits", "fashion-mnist", "tokens"], indirect=True)
def test_eval_batches_end_where_the_validation_data_ends(open_data: Callable[..., Dataset]) -> None:
    data = open_data()
    numel = sum(len(x) for x, _ in data.eval_batches(10_000, 7))
    windows = (data.num_validation - 1) // 16
    assert numel == (windows if data.spec.kind == "tokens" else data.num_validation)


def test_batches_have_the_shapes_and_dtypes_of_the_spec(open_data: Callable[..., Dataset]) -> None:
    data = open_data()
    for x, y in (data.train_batch(0, batch_size=5), next(data.eval_batches(1, 5))):
        assert x.shape == (5, *data.spec.shape) and y.dtype == torch.int64
        assert x.dtype == (torch.int64 if data.spec.kind == "tokens" else torch.float32)
        assert y.shape == (x.shape if data.spec.kind == "tokens" else (5,))
        assert x.is_contiguous() and y.is_contiguous()
        assert int(y.min()) >= 0 and int(y.max()) < data.spec.classes


def test_y_is_x_one_token_later(tmp_path: Path) -> None:
    _write_tokens(tmp_path / "all.bin", range(1000))
    data = load_data(DataConfig(name=f"tokens:{tmp_path / 'all.bin'}"), context=16)
    x, y = data.train_batch(0, batch_size=4)
    assert torch.equal(x + 1, y)
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_validation_tokens_are_never_trained_on(tmp_path: Path) -> None:
    _write_tokens(tmp_path / "all.bin", range(1000))
    data = load_data(DataConfig(name=f"tokens:{tmp_path / 'all.bin'}", holdout=0.2), context=16)
    assert (data.num_train, data.num_validation) == (800, 200)
    highest = max(int(data.train_batch(step, batch_size=64)[1].max()) for step in range(50))
    lowest = min(int(x.min()) for x, _ in data.eval_batches(100, 4))
    assert highest == 799 and lowest == 800


def test_an_epoch_shows_every_image_once(tmp_path: Path) -> None:
    _write_fashion_mnist(tmp_path)
    data = load_data(DataConfig(name="fashion-mnist", path=str(tmp_path)))
    steps = [data.train_batch(step, batch_size=8)[0] for step in range(10)]
    for epoch in (steps[:5], steps[5:]):
        seen = torch.cat(epoch).flatten(1)
        assert len(torch.unique(seen, dim=0)) == len(seen) == data.num_train
    assert not torch.equal(steps[0], steps[5])


def test_a_batch_may_reach_over_the_end_of_an_epoch(tmp_path: Path) -> None:
    _write_fashion_mnist(tmp_path)
    data = load_data(DataConfig(name="fashion-mnist", path=str(tmp_path)))
    whole = torch.cat([data.train_batch(step, batch_size=40)[0] for step in range(3)])
    pieces = torch.cat([data.train_batch(step, batch_size=24)[0] for step in range(5)])
    assert torch.equal(whole, pieces)
    assert torch.equal(data.train_batch(0, batch_size=120)[0], whole)


def test_the_order_is_the_same_in_every_version() -> None:
    """Golden numbers: who changes them changes what every seed of every user means."""
    assert permutation(8, seed=3, epoch=1).tolist() == [6, 2, 4, 0, 1, 3, 5, 7]
    assert draw_below(1000, 3, 0, 7, np.arange(4)).tolist() == [936, 148, 547, 790]
    assert draw_below(1000, 2**63 - 1, 4, 2**40, np.arange(2)).tolist() == [736, 266]


def test_draws_are_spread_evenly() -> None:
    drawn = draw_below(10, 0, 0, np.arange(1000)[:, None], np.arange(100))
    counts = np.bincount(drawn.reshape(-1), minlength=10)
    assert drawn.shape == (1000, 100)
    assert abs(counts - 10_000).max() < 400  # four standard deviations
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 0.1


def test_augmentation_is_off_by_default_and_moves_pixels_without_losing_the_class(tmp_path: Path) -> None:
    _write_fashion_mnist(tmp_path)
    plain = load_data(DataConfig(name="fashion-mnist", path=str(tmp_path)))
    moved = load_data(DataConfig(name="fashion-mnist", path=str(tmp_path), augment=True))
    x, y = plain.train_batch(2, batch_size=8)
    moved_x, moved_y = moved.train_batch(2, batch_size=8)
    assert torch.equal(y, moved_y) and not torch.equal(x, moved_x) and x.shape == moved_x.shape
    again = torch.cat([moved.train_batch(2, rank, 4, 2)[0] for rank in range(4)])
    assert torch.equal(again, moved_x)
    centre, wide = moved_x[:, :, 10:18, 10:18], x
    for image, original in zip(centre, wide, strict=True):
        found = [
            torch.equal(image, candidate[:, top : top + 8, left : left + 8])
            for candidate in (original, original.flip(2))
            for top in range(21)
            for left in range(21)
        ]
        assert any(found)
    assert torch.equal(next(moved.eval_batches(1, 4))[0], next(plain.eval_batches(1, 4))[0])


def test_the_fingerprint_follows_the_content_not_the_container(tmp_path: Path) -> None:
    _write_fashion_mnist(tmp_path / "plain")
    _write_fashion_mnist(tmp_path / "zipped", zipped=True)
    _write_fashion_mnist(tmp_path / "other", labels=9)
    prints = [
        load_data(DataConfig(name="fashion-mnist", path=str(tmp_path / name))).fingerprint
        for name in ("plain", "zipped", "other")
    ]
    assert prints[0] == prints[1] != prints[2]


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    code = "from efficient_dl.data import load_data\nfrom efficient_dl.config import DataConfig\n"
    code += "print(load_data(DataConfig()).fingerprint)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == load_data(DataConfig()).fingerprint


def test_a_large_array_is_sampled_from_its_first_to_its_last_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "FULL_HASH_BYTES", 10_000)
    monkeypatch.setattr(dataset, "CHUNK_BYTES", 100)
    monkeypatch.setattr(dataset, "NUM_CHUNKS", 10)
    content = np.zeros(100_000, np.uint8)
    before = content_fingerprint([content])
    assert before.startswith("xxh3-sampled:")
    assert content_fingerprint([content[:-1]]) != before
    for place in (0, 99, 99_950, 99_999):
        content[place] = 1
        assert content_fingerprint([content]) != before
        content[place] = 0


def test_other_data_than_the_recorded_is_refused(tmp_path: Path) -> None:
    _write_tokens(tmp_path / "all.bin", range(1000))
    name = f"tokens:{tmp_path / 'all.bin'}"
    fingerprint = load_data(DataConfig(name=name), context=16).fingerprint
    load_data(DataConfig(name=name, fingerprint=fingerprint), context=16)
    _write_tokens(tmp_path / "all.bin", range(1, 1001))
    with pytest.raises(DataError, match=r"data\.fingerprint"):
        load_data(DataConfig(name=name, fingerprint=fingerprint), context=16)


# ------------------------------------------------------------------------------------------ standard library


def test_the_standard_library_is_bytes_of_python() -> None:
    data = load_data(DataConfig(), context=64)
    text = bytes(data.train_batch(0, batch_size=1)[0][0].tolist())
    assert data.spec.classes == 256 and data.num_train > 5 * 2**20
    assert text.decode("utf-8", errors="replace")
    assert data.num_validation == round((data.num_train + data.num_validation) * 0.1)


def test_the_standard_library_leaves_out_tests_packages_and_generated_files(tmp_path: Path) -> None:
    kept = ["a/b.py", "a.py", "json/decoder.py", "testing.py"]
    left = [
        "test/x.py",
        "a/tests/x.py",
        "site-packages/x.py",
        "dist-packages/x.py",
        "__pycache__/x.py",
        "_sysconfigdata__linux.py",
        "sitecustomize.py",
        "a/x.pyc",
    ]
    for name in kept + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    found = [path.relative_to(tmp_path).as_posix() for path in source_files(tmp_path)]
    assert found == sorted(kept, key=lambda name: name.split("/"))


def test_a_python_without_its_sources_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="libpython3-stdlib"):
        load_standard_library(holdout=0.1, context=16, seed=0, folder=tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------ images


def test_digits_need_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(DataError, match=r"efficient_dl\[data\]"):
        load_data(DataConfig(name="digits"))


def test_images_are_normalized(tmp_path: Path) -> None:
    data = load_data(DataConfig(name="digits"))
    x = torch.cat([data.train_batch(step, batch_size=100)[0] for step in range(16)])
    assert abs(float(x.mean())) < 0.05 and abs(float(x.std()) - 1) < 0.05
    assert data.num_train + data.num_validation == 1797 and data.num_validation == 180


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cut short"),
        (lambda path: path.write_bytes(b""), "cut short"),
        (lambda path: path.write_bytes(b"\x00\x00\x0d\x03" + path.read_bytes()[4:]), "IDX"),
        (lambda path: path.rename(path.with_name(path.name + ".gz")), "cannot be read"),
    ],
)
def test_damaged_idx_files_are_data_errors(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    _write_fashion_mnist(tmp_path)
    damage(tmp_path / "train-images-idx3-ubyte")
    with pytest.raises(DataError, match=message):
        load_data(DataConfig(name="fashion-mnist", path=str(tmp_path)))


def test_a_damaged_gzip_file_is_a_data_error(tmp_path: Path) -> None:
    _write_fashion_mnist(tmp_path, zipped=True)
    damaged = next(tmp_path.glob("train-images*.gz"))
    content = bytearray(damaged.read_bytes())
    content[10] |= 0b110  # the reserved kind of a deflate block
    damaged.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read(.|\n)*fix:"):
        load_data(DataConfig(name="fashion-mnist", path=str(tmp_path)))


def test_labels_that_do_not_fit_the_images_are_refused(tmp_path: Path) -> None:
    _write_fashion_mnist(tmp_path, labels=11)
    with pytest.raises(DataError, match="none above 9"):
        load_data(DataConfig(name="fashion-mnist", path=str(tmp_path)))


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mirror of Fashion-MNIST on this disk, an empty cache, and no Debian package."""
    folder = tmp_path / "mirror"
    _write_fashion_mnist(folder, zipped=True)
    checksums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(fashion_mnist, "CHECKSUMS", checksums)
    monkeypatch.setattr(fashion_mnist, "MIRRORS", ((tmp_path / "gone").as_uri() + "/", folder.as_uri() + "/"))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "no-debian-package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_a_download_lands_in_the_cache_complete_and_once(mirror: Path) -> None:
    first = load_data(DataConfig(name="fashion-mnist"))
    for path in mirror.iterdir():
        path.unlink()
    assert load_data(DataConfig(name="fashion-mnist", download=False)).fingerprint == first.fingerprint
    cached = sorted(path.name for path in (download.cache_folder() / "fashion-mnist").iterdir())
    assert cached == sorted([".lock", *fashion_mnist.CHECKSUMS])


def test_a_wrong_checksum_leaves_no_file_behind(mirror: Path) -> None:
    for path in mirror.iterdir():
        path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match="wrong checksum"):
        load_data(DataConfig(name="fashion-mnist"))
    assert [path.name for path in (download.cache_folder() / "fashion-mnist").iterdir()] == [".lock"]


def test_two_processes_that_download_at_once_both_get_the_files(mirror: Path) -> None:
    prints: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: prints.append(load_data(DataConfig(name="fashion-mnist")).fingerprint)
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(prints) == 3 and len(set(prints)) == 1


def test_nothing_is_fetched_where_downloads_are_off(mirror: Path) -> None:
    with pytest.raises(DataError, match="apt install dataset-fashion-mnist"):
        load_data(DataConfig(name="fashion-mnist", download=False))


def test_a_machine_without_network_gets_the_way_out(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "MIRRORS", ("http://127.0.0.1:9/",))
    with pytest.raises(DataError, match=r"cannot be downloaded(.|\n)*data\.path"):
        load_data(DataConfig(name="fashion-mnist"))


def test_debians_package_comes_before_the_network(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", mirror)
    load_data(DataConfig(name="fashion-mnist"))
    assert not download.cache_folder().exists()


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stdlb", "did you mean stdlib"),
        ("fashion", "did you mean fashion-mnist"),
        ("stdlib:x", "unknown data"),
        ("tokens", "tokens need a path"),
        ("tokens:", "tokens need a path"),
    ],
)
def test_unknown_data_is_answered_with_a_suggestion(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_data(DataConfig(name=name))


def test_a_setting_that_would_change_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.augment changes nothing(.|\n)*digits, fashion-mnist"):
        check_data(DataConfig(augment=True))
    with pytest.raises(ConfigError, match=r"data\.path"):
        check_data(DataConfig(name="digits", path="x"))
    with pytest.raises(ConfigError, match="two paths"):
        check_data(DataConfig(name="tokens:a", path="b"))


def test_a_slice_that_does_not_exist_is_our_own_bug() -> None:
    data = load_data(DataConfig())
    for rank, part in ((2, 0), (-1, 0), (0, 1)):
        with pytest.raises(ValueError, match="no part"):
            data.train_batch(0, rank, 2, 4, 1, part)


def test_spread_takes_everything_where_there_is_too_little() -> None:
    assert spread(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert spread(9, 3).tolist() == [0, 3, 6]
    assert spread(0, 3).tolist() == []
