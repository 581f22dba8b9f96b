"""Features on disk: the same bits, in any order, and errors that name what is wrong."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from efficient_dl.errors import ConfigError, CorruptPacket, DiskFull
from efficient_dl.local_learning.feature_cache import FeatureCache
from efficient_dl.local_learning.learner import LocalLearner
from efficient_dl.local_learning.partition import partition


class Counted(nn.Module):
    """A prefix that counts the samples it has seen."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(6, 64, dtype=dtype)
        self.samples = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.samples += len(x)
        return torch.relu(self.layer(x.to(self.layer.weight.dtype))).view(-1, 4, 4, 4)


def batch(seed: int, size: int = 8) -> Tensor:
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(seed))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_epochs_read_the_same_bits_in_another_order(tmp_path: Path, dtype: torch.dtype) -> None:
    prefix = Counted(dtype)
    with FeatureCache(tmp_path, prefix, augmented=False) as cache:
        x = batch(0, 16)
        first = torch.cat([cache.features(part) for part in x.split(8)])
        order = torch.randperm(16)
        again = torch.cat([cache.features(part) for part in x[order].split(4)])
        assert same_bits(again, first[order])
        assert prefix.samples == 16
        assert (cache.stats.hits, cache.stats.misses, cache.stats.samples_written) == (4, 2, 16)


def test_special_values_come_back_bit_for_bit(tmp_path: Path) -> None:
    special = torch.tensor([[0.0, -0.0, float("nan"), float("inf"), 1e-45, -1e-40, 3.5, -1.0]])
    payload = torch.tensor([0x7FC01234, 0x7F801234], dtype=torch.int32).view(torch.float32)
    special[0, 6:] = payload
    with FeatureCache(tmp_path, nn.Identity().eval(), augmented=False) as cache:
        cache.features(special)
        assert same_bits(cache.features(special), special)
        assert cache.stats.hits == 1


def test_the_cache_survives_its_process(tmp_path: Path) -> None:
    prefix = Counted()
    with FeatureCache(tmp_path, prefix, augmented=False) as cache:
        made = cache.features(batch(1))
    with FeatureCache(tmp_path, prefix, augmented=False) as cache:
        assert same_bits(cache.features(batch(1)), made)
    assert prefix.samples == 8


class Shifting(nn.Module):
    """A prefix whose features differ a little from batch to batch, as kernels for other sizes make them."""

    calls = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1.0
        return x + self.calls


def test_a_sample_keeps_the_features_of_its_first_batch(tmp_path: Path) -> None:
    x, y = batch(1, 4), batch(2, 4)
    with FeatureCache(tmp_path, Shifting().eval(), augmented=False) as cache:
        cache.features(x)
        mixed = cache.features(torch.cat([y, x]))
        assert same_bits(mixed, torch.cat([y + 2.0, x + 1.0]))
        assert same_bits(cache.features(y), y + 2.0)


def test_new_samples_of_a_batch_are_added(tmp_path: Path) -> None:
    with FeatureCache(tmp_path, Counted(), augmented=False) as cache:
        cache.features(batch(1))
        cache.features(torch.cat([batch(1), batch(2)]))
        assert cache.stats.samples_written == 16


def test_features_with_zeros_take_fewer_bytes(tmp_path: Path) -> None:
    prefix = nn.Sequential(nn.Linear(6, 4096), nn.ReLU()).eval()
    with FeatureCache(tmp_path, prefix, augmented=False) as cache:
        cache.features(batch(1))
        assert cache.stats.packet_bytes < 0.7 * cache.stats.feature_bytes
        assert (tmp_path / "features.bin").stat().st_size == cache.stats.packet_bytes


def test_augmented_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no sample comes twice"):
        FeatureCache(tmp_path, Counted(), augmented=True)


def test_a_prefix_in_training_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="training mode"):
        FeatureCache(tmp_path, Counted().train(), augmented=False)


def test_features_of_another_prefix_are_refused(tmp_path: Path) -> None:
    with FeatureCache(tmp_path, Counted(), augmented=False) as cache:
        cache.features(batch(1))
    other = Counted()
    with torch.no_grad():
        other.layer.bias[0] += 1
    with pytest.raises(ConfigError, match="another prefix"):
        FeatureCache(tmp_path, other, augmented=False)


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with FeatureCache(tmp_path, Counted(), augmented=False):
        with pytest.raises(ConfigError, match="uses this folder"):
            FeatureCache(tmp_path, Counted(), augmented=False)
    FeatureCache(tmp_path, Counted(), augmented=False).close()


def test_a_damaged_packet_is_told(tmp_path: Path) -> None:
    with FeatureCache(tmp_path, Counted(), augmented=False) as cache:
        cache.features(batch(1))
    content = bytearray((tmp_path / "features.bin").read_bytes())
    content[-10] ^= 1
    (tmp_path / "features.bin").write_bytes(content)
    with FeatureCache(tmp_path, Counted(), augmented=False) as cache:
        with pytest.raises(CorruptPacket, match="damaged"):
            cache.features(batch(1))


@pytest.mark.parametrize("byte", [0, 5, 21, 25])
def test_a_damaged_header_is_told(tmp_path: Path, byte: int) -> None:
    with FeatureCache(tmp_path, Counted(), augmented=False) as cache:
        cache.features(batch(1))
    content = bytearray((tmp_path / "features.bin").read_bytes())
    content[byte] ^= 1
    (tmp_path / "features.bin").write_bytes(content)
    with pytest.raises(CorruptPacket, match="header is damaged"):
        FeatureCache(tmp_path, Counted(), augmented=False)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"shape": "x", "dtype": "float32"}', '{"shape": [1], "dtype": "load"}']
)
def test_a_damaged_description_is_told(tmp_path: Path, text: str) -> None:
    with FeatureCache(tmp_path, Counted(), augmented=False) as cache:
        cache.features(batch(1))
    (tmp_path / "about.json").write_text(text)
    with pytest.raises(CorruptPacket, match=r"about\.json"):
        FeatureCache(tmp_path, Counted(), augmented=False)


@pytest.mark.parametrize("cut", [1, 40, 400])
def test_a_record_that_a_crash_cut_short_is_computed_again(tmp_path: Path, cut: int) -> None:
    prefix = Counted()
    with FeatureCache(tmp_path, prefix, augmented=False) as cache:
        made = cache.features(batch(1))
    os.truncate(tmp_path / "features.bin", (tmp_path / "features.bin").stat().st_size - cut)
    with FeatureCache(tmp_path, prefix, augmented=False) as cache:
        assert cache.stats.dropped_bytes > 0
        assert same_bits(cache.features(batch(1)), made)
        assert cache.stats.samples_written >= 1


def test_beyond_the_limit_samples_are_computed_every_time(tmp_path: Path) -> None:
    prefix = Counted()
    with FeatureCache(tmp_path, prefix, augmented=False, max_bytes=1000) as cache:
        made = cache.features(batch(1))
        assert same_bits(cache.features(batch(1)), made)
        assert 0 < cache.stats.samples_written < 8
        assert cache.stats.samples_left_out == 2 * (8 - cache.stats.samples_written)
    assert prefix.samples == 16
    assert (tmp_path / "features.bin").stat().st_size <= 1000


def test_a_full_disk_leaves_whole_records(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with FeatureCache(tmp_path, Counted(), augmented=False) as cache:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            with pytest.raises(DiskFull, match="the disk is full"):
                cache.features(batch(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    with FeatureCache(tmp_path, Counted(), augmented=False) as cache:
        assert cache.stats.dropped_bytes == 0
        assert same_bits(cache.features(batch(1)), Counted()(batch(1)))


def test_samples_of_another_shape_are_refused(tmp_path: Path) -> None:
    with FeatureCache(tmp_path, nn.Identity().eval(), augmented=False) as cache:
        cache.features(torch.randn(2, 3))
        with pytest.raises(ConfigError, match="another form"):
            cache.features(torch.randn(2, 4))


def test_the_rest_of_a_model_is_trained_on_kept_features_as_on_computed_ones(tmp_path: Path) -> None:
    def trained(cached: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(4)), nn.Linear(6, 3))
        cut = partition(model, ["1.0", "2.0", "3.0"])
        prefix = nn.Sequential(*(one.module for one in cut[:2])).eval().requires_grad_(False)
        rest = nn.Sequential(*(one.module for one in cut[2:]))
        x, y = batch(0), torch.arange(8) % 3
        with FeatureCache(tmp_path, prefix, augmented=False) as cache:
            learner = LocalLearner(
                partition(rest, 2), (prefix(x), y), lambda p: torch.optim.SGD(p, 0.1), heads="linear"
            )
            for _ in range(3):
                learner.step(cache.features(x) if cached else prefix(x), y)
        return list(model.state_dict().values())

    assert all(torch.equal(a, b) for a, b in zip(trained(True), trained(False), strict=True))
