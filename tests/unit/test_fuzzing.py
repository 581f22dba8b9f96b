"""The fuzzer's corpus, replayed with damage under the sanitizers, and a short search where libFuzzer is installed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.unit.native_build import Sanitized, run

ROOT = Path(__file__).resolve().parents[2]
FUZZ = ROOT / "tests" / "fuzz"


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sanitizers"), pytest.mark.timeout(900)]


def test_the_corpus_and_its_damaged_copies_are_harmless_under_sanitizers(
    sanitized: Sanitized, tmp_path: Path
) -> None:
    program = sanitized.linked(FUZZ / "decode_fuzzer.cpp", tmp_path / "replay", "-DREPLAY")
    inputs = sorted((FUZZ / "corpus").iterdir())
    assert len(inputs) >= 40
    assert run(program, *inputs) == f"ok {len(inputs)}\n"


def test_libfuzzer_finds_nothing_in_a_short_search(sanitized: Sanitized, tmp_path: Path) -> None:
    if not sanitized.fuzzes:
        pytest.skip("this machine lacks clang++ or its libFuzzer (apt-get install clang libclang-rt-14-dev)")
    options = ["10", "-seed=1", f"-artifact_prefix={tmp_path}/"]
    variables = {"LIBRARY": str(sanitized.library), "FOUND": str(tmp_path / "found")}
    done = subprocess.run(
        ["bash", FUZZ / "fuzz.sh", *options],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "number_of_executed_units" in done.stderr
