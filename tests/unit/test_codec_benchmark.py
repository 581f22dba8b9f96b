"""The codec benchmark's parts: tensors are deterministic and what they claim to be, baselines are counted right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.codec_delta import coo_bits
from benchmarks.codec_run import OURS, Run
from benchmarks.codec_sparse import Zstd8, codec_at
from benchmarks.codec_tensors import NamedTensor, Recipe, Trained, trained_tensors
from benchmarks.codec_timing import Ours, Timing, check_exact, measure
from benchmarks.rows import RowFile
from efficient_dl.codec import make_codec

TINY = Recipe(gpt_size="nano", gpt_steps=4, cnn_steps=4, stream=2)


@pytest.fixture
def pretended() -> Trained:
    """A gpt's weights and their update, drawn instead of trained."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40_000, generator=generator) * 0.02
    after = weight + 1e-3 * torch.randn(40_000, generator=generator)
    tensors = {"gpt, weight, end": weight, "gpt, weight after, end": after}
    return Trained(tensors, {"gpt": (10_000, 30_000)}, {"gpt": "gpt"})


def test_training_twice_gives_the_same_tensors_and_the_cache_keeps_them(tmp_path: Path) -> None:
    cache = tmp_path / "tensors.pt"
    first, kept, again = (trained_tensors(TINY, path) for path in (cache, cache, None))
    for model in ("gpt", "cnn"):
        tensors = [trained.gradient(model, "end").values for trained in (first, kept, again)]
        assert all(torch.equal(tensors[0], other) for other in tensors[1:])
    stream = first.gradient("gpt", "stream")
    assert torch.equal(stream.values.chunk(2)[1], first.gradient("gpt", "end").values)
    assert sum(stream.segments) == stream.values.numel()
    # The ReLU network's gradient must have the exact zeros that it is there for.
    assert (first.gradient("cnn", "end").values == 0).float().mean() > 0.02


def test_a_cache_of_other_settings_is_not_used(tmp_path: Path) -> None:
    cache = tmp_path / "tensors.pt"
    trained_tensors(TINY, cache)
    content = torch.load(cache, weights_only=True)
    torch.save({**content, "key": "another", "tensors": {}}, cache)
    assert trained_tensors(TINY, cache).weight("gpt", "start").values.numel() > 0


@pytest.mark.parametrize("density", [0.001, 0.024, 0.1, 1.0])
def test_updates_change_the_asked_share_of_the_weights(pretended: Trained, density: float) -> None:
    one, two = (pretended.delta_of_density(density, 100_000) for _ in range(2))
    assert torch.equal(one.after.view(torch.int16), two.after.view(torch.int16))
    assert one.changed.float().mean() == pytest.approx(density, rel=0.15)
    assert sum(one.segments) == one.after.numel() == 100_000


def test_cutting_and_tiling_keep_segments_beside_their_values() -> None:
    tensor = NamedTensor("x", torch.arange(10.0), (4, 6))
    assert tensor.first(7).segments == (4, 3) and tensor.first(3).segments == (3,)
    tiled = tensor.tiled(4 * 25)
    assert tiled.segments == (4, 6, 4, 6, 4, 1)
    assert torch.equal(tiled.values[20:], torch.arange(5.0))


def test_coo_pays_for_gaps_that_do_not_fit_16_bits() -> None:
    changed = torch.zeros(200_000, dtype=torch.bool)
    changed[[0, 1, 65_536, 199_000]] = True
    # Gaps 0, 0, 65,534 (fits) and 133,463 (two more pairs).
    assert coo_bits(changed) == (4 + 2) * 32
    assert coo_bits(torch.zeros(5, dtype=torch.bool)) == 0


def test_zstd_codes_the_integers_that_our_packet_holds() -> None:
    pytest.importorskip("zstandard")
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(1))
    codec, step = codec_at(x, 0.03)
    ours, peer = Ours(OURS, codec, x), Zstd8(x, step, quantize=True)
    ours.encode()
    peer.encode()
    assert (ours.decoded() != 0).float().mean() == pytest.approx(0.03, rel=0.1)
    assert torch.equal(peer.decoded(), ours.decoded())


def test_a_lossy_system_does_not_pass_as_exact() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(2))
    check_exact(Ours("exact", make_codec("lossless"), x), x)
    with pytest.raises(RuntimeError, match="does not give back"):
        check_exact(Ours("lossy", make_codec("bits:2.0"), x), x)


def test_speeds_become_rows_and_ratios() -> None:
    class Fixed:
        def __init__(self, name: str) -> None:
            self.name = name
            self.prepared = self.encoded = 0

        def prepare(self) -> None:
            self.prepared += 1

        def encode(self) -> None:
            assert self.prepared > self.encoded  # nothing is encoded unprepared
            self.encoded += 1

        def decode(self) -> None: ...

        def packet_bytes(self) -> int:
            return 1

        def decoded(self) -> Tensor:
            return torch.zeros(1)

    systems = [Fixed(OURS), Fixed("peer")]
    assert set(measure(systems, rounds=3)) == {OURS, "peer"}
    run = Run(trained=Trained({}, {}, {}), file=RowFile(None), rounds=3, timing_bytes=0)
    timings = {
        OURS: (Timing(0.5, 1.0), Timing(0.25, 0.5)),
        "peer": (Timing(1.0, 2.0), Timing(0.5, 0.5)),
    }
    cells = run.speeds("case", 10**9, timings, systems)
    assert cells[OURS] == ["2.00", "1.00", "4.00", "2.00", "", ""]
    assert cells["peer"] == ["1.00", "0.50", "2.00", "2.00", "2.00", "2.00"]
    found = {(row.system, row.metric): row.value for row in run.file.rows}
    assert found[OURS, "encode_speed over peer"] == 2.0 and found["peer", "decode_gb_per_s"] == 2.0
