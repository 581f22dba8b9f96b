"""The fuzzer's corpus, replayed with damage under the sanitizers, and a short search where libFuzzer is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.native_build import SANITIZE, linked, run, sanitized_library

ROOT = Path(__file__).resolve().parents[2]
FUZZ = ROOT / "tests" / "fuzz"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_corpus_and_its_damaged_copies_are_harmless_under_sanitizers(tmp_path: Path) -> None:
    built = sanitized_library(tmp_path)
    flags = ("-DREPLAY", f"-Wl,-rpath,{tmp_path}", *SANITIZE.split())
    program = linked(FUZZ / "decode_fuzzer.cpp", built, tmp_path / "replay", *flags)
    inputs = sorted((FUZZ / "corpus").iterdir())
    assert len(inputs) >= 40
    assert run(program, *inputs) == f"ok {len(inputs)}\n"


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
    command = [clang, "-fsanitize=fuzzer,address", probe, "-o", tmp_path / "probe"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this clang lacks libFuzzer (apt-get install libclang-rt-14-dev)")
    options = ["20", "-seed=1", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        ["bash", FUZZ / "fuzz.sh", *options],
        env={**os.environ, "FOUND": str(tmp_path / "found")},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "number_of_executed_units" in done.stderr
