"""The block quantizer on several threads: the same bytes, values and errors, also after a fork and under contention."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from efficient_dl.codec import PacketStats
from efficient_dl.codec.kernels.native import library
from efficient_dl.codec.kernels.native.bodies import NativeBlock
from efficient_dl.codec.kernels.native.library import num_threads, set_num_threads
from efficient_dl.errors import ConfigError, CorruptPacket

HERE = Path(__file__).resolve().parent
NATIVE = Path(library.__file__).resolve().parent
THREADS = (1, 2, 3, 8)
TILE_VALUES = 512 * 256  # of pair mode

pytestmark = pytest.mark.usefixtures("restored_threads")


def laplace_like(numel: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(numel, generator=generator) * torch.randn(numel, generator=generator)


def encoded(kernel: NativeBlock, x: Tensor, segments: tuple[int, ...]) -> tuple[Tensor, PacketStats]:
    stats = PacketStats()
    room = torch.full((kernel.max_bytes(x.numel(), x.dtype, len(segments)),), 0xEE, dtype=torch.uint8)
    size = kernel.encode(x, segments, room, stats)
    return room[:size], stats


def cases() -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    x = laplace_like(5 * TILE_VALUES + 777)
    yield "one segment", x, (x.numel(),)
    lengths = (0, 1, 2 * TILE_VALUES + 300, 0, *[3] * 700, 255, 256, 257)
    yield "segments", x, (*lengths, x.numel() - sum(lengths), 0)
    yield "bfloat16", x.bfloat16(), (x.numel(),)
    yield "float8", x.to(torch.float8_e5m2), (x.numel(),)
    holes = x.clone()
    holes[TILE_VALUES : 3 * TILE_VALUES] = 0
    holes[4 * TILE_VALUES + 5] = torch.nan
    holes[::3000] *= 1e4  # escapes
    yield "empty tiles, a NaN, escapes", holes, (x.numel(),)
    steep = torch.ldexp(x, torch.linspace(-110, 110, x.numel()).round())
    yield "scales too far apart for one byte", steep, (x.numel(),)
    # Three blocks that a stored tile codes best, and then only empty ones: no table is sent.
    sparse = torch.zeros(5 * TILE_VALUES)
    sparse[::TILE_VALUES] = 1.0
    yield "stored tiles only", sparse, (sparse.numel(),)


@pytest.mark.parametrize("bits", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(
    ("x", "segments"), [pytest.param(x, segments, id=name) for name, x, segments in cases()]
)
def test_bytes_stats_and_values_do_not_depend_on_the_threads(
    x: Tensor, segments: tuple[int, ...], bits: float
) -> None:
    kernel = NativeBlock(bits)
    set_num_threads(1)
    body, stats = encoded(kernel, x, segments)
    values = torch.empty_like(x)
    kernel.decode(body, x.dtype, segments, values, False)
    sums = torch.full(x.shape, 0.25)
    kernel.decode(body, x.dtype, segments, sums, True)
    for threads in THREADS[1:]:
        set_num_threads(threads)
        assert num_threads() == threads
        again, again_stats = encoded(kernel, x, segments)
        assert torch.equal(again, body)
        assert again_stats == stats
        out, total = torch.empty_like(x), torch.full(x.shape, 0.25)
        kernel.decode(body, x.dtype, segments, out, False)
        kernel.decode(body, x.dtype, segments, total, True)
        assert torch.equal(out.view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(total.view(torch.uint8), sums.view(torch.uint8))


@pytest.mark.parametrize("threads", THREADS)
def test_a_damaged_tile_raises_from_whichever_thread_has_it(threads: int) -> None:
    kernel, x = NativeBlock(2.0), laplace_like(8 * TILE_VALUES)
    body, _ = encoded(kernel, x, (x.numel(),))
    set_num_threads(threads)
    for part in range(1, 10):
        damaged = body.clone()
        damaged[body.numel() * part // 10] ^= 0xFF
        with pytest.raises(CorruptPacket):
            kernel.decode(damaged, x.dtype, (x.numel(),), torch.empty_like(x), False)
    out = torch.empty_like(x)
    kernel.decode(body, x.dtype, (x.numel(),), out, False)  # the threads are as good as before
    assert out.isfinite().all()


@pytest.mark.parametrize("threads", THREADS)
def test_a_body_that_does_not_fit_is_refused_and_the_exact_size_is_enough(threads: int) -> None:
    kernel, x = NativeBlock(2.0), laplace_like(6 * TILE_VALUES)
    body, _ = encoded(kernel, x, (x.numel(),))
    set_num_threads(threads)
    room = torch.full((body.numel() + 64,), 0xEE, dtype=torch.uint8)
    assert kernel.encode(x, (x.numel(),), room[: body.numel()], None) == body.numel()
    assert torch.equal(room[: body.numel()], body)
    for missing in (1, body.numel() // 2, body.numel() - 10):
        with pytest.raises(ValueError, match="too small"):
            kernel.encode(x, (x.numel(),), room[: body.numel() - missing], None)
    assert (room[body.numel() :] == 0xEE).all()


def test_callers_in_many_threads_share_the_pool() -> None:
    set_num_threads(3)
    kernel = NativeBlock(2.0)
    tensors = [laplace_like(3 * TILE_VALUES + 100 * i, seed=i) for i in range(6)]
    expected = [encoded(kernel, x, (x.numel(),))[0] for x in tensors]

    def round_trip(i: int) -> bool:
        x = tensors[i % len(tensors)]
        body, _ = encoded(kernel, x, (x.numel(),))
        out = torch.empty_like(x)
        kernel.decode(body, x.dtype, (x.numel(),), out, False)
        error = (out - x).norm() / x.norm()
        return torch.equal(body, expected[i % len(tensors)]) and bool(error < 0.5)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(round_trip, range(48)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_encodes() -> None:
    set_num_threads(3)
    kernel, x = NativeBlock(2.0), laplace_like(4 * TILE_VALUES)
    expected, _ = encoded(kernel, x, (x.numel(),))  # the parent's pool has threads that the child lacks
    room = torch.empty(kernel.max_bytes(x.numel(), x.dtype, 1), dtype=torch.uint8)
    child = os.fork()
    if child == 0:
        # Only the codec: torch's own threads did not survive the fork either.
        try:
            size = kernel.encode(x, (x.numel(),), room, None)
            same = bytes(room.numpy()[:size]) == bytes(expected.numpy())
            os._exit(0 if same else 3)
        finally:
            os._exit(4)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(encoded(kernel, x, (x.numel(),))[0], expected)


@pytest.mark.slow
def test_the_work_is_done_where_no_thread_can_be_started(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip("this machine lacks a C++ compiler")
    program = tmp_path / "no_threads"
    sources = [HERE / "native/no_threads.cpp", NATIVE / "threads.cpp"]
    subprocess.run([compiler, "-std=c++20", "-O1", "-w", "-pthread", *sources, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=180)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


@pytest.mark.parametrize("count", [0, -1, 257])
def test_an_impossible_number_of_threads_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match="1 to 256"):
        set_num_threads(count)
