"""A configuration survives its file, refuses what it does not know, and names the fix."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficient_dl.codec.registry import MAX_BITS, MIN_BITS
from efficient_dl.config import (
    BITS_WORDS,
    CompressionConfig,
    Config,
    OptimizerConfig,
    TrainConfig,
    from_dict,
    from_toml,
    load_config,
    to_toml,
    with_overrides,
)
from efficient_dl.config.schema import SECTIONS
from efficient_dl.config.setting import kinds_of, rules_of
from efficient_dl.errors import ConfigError


def _values(kind: Any, rule: Any) -> st.SearchStrategy[Any]:
    """Every value that a setting's rule allows."""
    words = st.sampled_from(rule["words"]) if rule["words"] is not None else None
    if kind is bool:
        return st.booleans()
    if kind is str:
        text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1 if rule["required"] else 0)
        return text if words is None else words
    if kind in (int, int | str):
        integers = st.integers(rule["low"], rule["high"])
        return integers if words is None else st.one_of(words, integers)
    low = rule["low"] if rule["low"] is not None else rule["above"]
    high = rule["high"] if rule["high"] is not None else rule["below"]
    open_ends = {"exclude_min": rule["above"] is not None, "exclude_max": rule["below"] is not None}
    floats = st.floats(low, high, **open_ends)
    if kind == tuple[float, float]:
        return st.tuples(floats, floats)
    return st.one_of(words, floats) if words is not None else floats


def _configs() -> st.SearchStrategy[Config]:
    sections = {
        name: st.builds(
            kind, **{key: _values(kinds_of(kind)[key], rule) for key, rule in rules_of(kind).items()}
        )
        for name, kind in SECTIONS.items()
    }
    return st.builds(Config, **sections)


@given(_configs(), st.booleans())
def test_any_configuration_survives_its_file(config: Config, explain: bool) -> None:
    again = from_toml(to_toml(config, explain=explain))
    assert again == config
    assert to_toml(again) == to_toml(config)
    assert again.fingerprint() == config.fingerprint()


@given(_configs())
def test_any_configuration_can_be_written_as_overrides(config: Config) -> None:
    overrides: list[str] = []
    section = ""
    for line in to_toml(config).split("\n"):
        if line.startswith("["):
            section = line.strip("[]")
        elif line:
            overrides.append(f"{section}.{line}")
    assert with_overrides(Config(), overrides) == config


def test_defaults_are_valid_and_frozen() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 3  # type: ignore[misc]
    assert from_dict({}) == config


def test_an_unknown_setting_names_the_closest_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting train\.stpes\n.*\n  fix: did you mean steps\?"):
        with_overrides(Config(), ["train.stpes=3"])
    with pytest.raises(ConfigError, match="did you mean optimizer"):
        from_dict({"optimiser": {"lr": 1.0}})


def test_a_setting_in_the_wrong_section_names_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"did you mean optimizer\.lr\?"):
        with_overrides(Config(), ["train.lr=3"])
    with pytest.raises(ConfigError, match=r"did you mean optimizer\.lr\?"):
        with_overrides(Config(), ["lr=3"])
    with pytest.raises(ConfigError, match=r"did you mean optimizer\.lr\?"):
        from_toml("lr = 3")


@pytest.mark.parametrize(
    "override",
    [
        "compression.bits=7.01",
        "compression.bits=0.09",
        "compression.bits=inf",
        "compression.bits=nan",
        "compression.bits=",
        "compression.bits=losless",
        "compression.bits=true",
        "train.steps=0",
        "train.steps=1.5",
        "train.steps=many",
        "train.steps=true",
        "train.seed=-1",
        "train.precision=fp8",
        "model.dropout=1.0",
        "model.name=",
        "optimizer.betas=0.9",
        "optimizer.betas=[0.9, 1.0]",
        "optimizer.betas=[0.9, 'x']",
        "data.holdout=0",
        "data.augment=1",
        "run.timeout_seconds=0",
        "optimizer.lr=" + "9" * 400,
    ],
)
def test_a_value_out_of_range_names_key_expectation_and_fix(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_overrides(Config(), [override])
    message = str(caught.value)
    assert override.partition("=")[0] in message
    assert all(word in message for word in ("expected:", "found:", "fix:"))


def test_a_misspelt_word_is_corrected() -> None:
    with pytest.raises(ConfigError, match="did you mean lossless"):
        with_overrides(Config(), ["compression.bits=losless"])


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"train\.steps"):
        TrainConfig(steps=0)
    assert isinstance(OptimizerConfig(lr=1).lr, float)
    assert OptimizerConfig(betas=[0, 0.5]).betas == (0.0, 0.5)  # type: ignore[arg-type]


def test_the_range_of_bits_is_the_codecs() -> None:
    rule = rules_of(CompressionConfig)["bits"]
    assert (rule["low"], rule["high"]) == (MIN_BITS, MAX_BITS)


@pytest.mark.parametrize("word", BITS_WORDS)
def test_bits_are_a_number_or_a_word(word: str) -> None:
    assert with_overrides(Config(), [f"compression.bits={word}"]).compression.bits == word
    assert with_overrides(Config(), [f"compression.bits='{word}'"]).compression.bits == word
    bits = with_overrides(Config(), ["compression.bits=2"]).compression.bits
    assert bits == 2.0 and isinstance(bits, float)


def test_the_last_override_wins_and_strings_need_no_quotes() -> None:
    config = with_overrides(
        Config(),
        [
            "train.steps=3",
            "train.steps=4",
            "run.out=runs/a=b",
            "data.augment=True",
            "optimizer.betas=0.8,0.9",
        ],
    )
    assert config.train.steps == 4
    assert config.run.out == "runs/a=b"
    assert config.data.augment is True
    assert config.optimizer.betas == (0.8, 0.9)
    assert with_overrides(config, ["run.out="]).run.out == ""


def test_what_a_file_leaves_out_keeps_its_default(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[optimizer]\nlr = 3\n")
    assert load_config(path) == with_overrides(Config(), ["optimizer.lr=3.0"])


def test_errors_in_a_file_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    for text in ("[train]\nsteps = 'x'", "[train]\nstep = 1", "train = 3", "[train", "[train]\nsteps = 0"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"run\.toml"):
            load_config(path)
    with pytest.raises(ConfigError, match=r"did you mean .*run\.toml"):
        load_config(tmp_path / "rum.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(path)


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    code = "from efficient_dl.config import Config; print(Config().fingerprint())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == Config().fingerprint()


def test_the_fingerprint_ignores_where_a_run_is_written() -> None:
    config = Config()
    assert with_overrides(config, ["run.out=elsewhere"]).fingerprint() == config.fingerprint()
    assert with_overrides(config, ["train.seed=1"]).fingerprint() != config.fingerprint()
    moved = with_overrides(config, ["data.fingerprint=xxh3:12"])
    assert moved.fingerprint(ignore=("run", "data.fingerprint")) == config.fingerprint(
        ignore=("run", "data.fingerprint")
    )


def test_differences_name_the_setting_and_both_values() -> None:
    first = Config()
    second = with_overrides(first, ["train.seed=1", "compression.bits=lossless", "run.workers=2"])
    assert first.differences(second) == ['compression.bits = "auto", "lossless"', "train.seed = 0, 1"]
    assert first.differences(second, ignore=("train", "run", "compression.bits")) == []


def test_every_setting_is_explained() -> None:
    for kind in SECTIONS.values():
        assert all(rule["help"] for rule in rules_of(kind).values())
