"""The fuzzer's corpus, replayed with damage under the sanitizers, and a short search where libFuzzer is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FUZZ = ROOT / "tests" / "fuzz"
NATIVE = ROOT / "efficient_dl/codec/kernels/native"
SANITIZE = "-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all"


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, **environment},
        cwd=ROOT,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_corpus_and_its_damaged_copies_are_harmless_under_sanitizers(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "c++")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }")
    if run(compiler, *SANITIZE.split(), probe, "-o", tmp_path / "probe").returncode:
        pytest.skip("this compiler lacks the address or undefined-behaviour sanitizer")
    library, program = tmp_path / "libedl_codec.so", tmp_path / "replay"
    built = run("bash", NATIVE / "build.sh", library, CXXFLAGS=SANITIZE)
    assert built.returncode == 0, built.stderr
    flags = ["-std=c++20", "-DREPLAY", *SANITIZE.split(), "-pthread", f"-Wl,-rpath,{tmp_path}"]
    linked = run(compiler, *flags, FUZZ / "decode_fuzzer.cpp", library, "-o", program)
    assert linked.returncode == 0, linked.stderr
    inputs = sorted((FUZZ / "corpus").iterdir())
    assert len(inputs) >= 40
    done = run(program, *inputs)
    assert done.returncode == 0 and done.stdout == f"ok {len(inputs)}\n", done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_libfuzzer_finds_nothing_in_a_short_search(tmp_path: Path) -> None:
    clang = os.environ.get("CLANGXX", "clang++")
    if shutil.which(clang) is None:
        pytest.skip("this machine lacks clang++ (apt-get install clang libclang-rt-14-dev)")
    probe = tmp_path / "probe.cpp"
    probe.write_text(
        'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }'
    )
    if run(clang, "-fsanitize=fuzzer,address", probe, "-o", tmp_path / "probe").returncode:
        pytest.skip("this clang lacks libFuzzer (apt-get install libclang-rt-14-dev)")
    options = ("20", "-seed=1", f"-artifact_prefix={tmp_path}/")
    done = run("bash", FUZZ / "fuzz.sh", *options, FOUND=str(tmp_path / "found"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "number_of_executed_units" in done.stderr
