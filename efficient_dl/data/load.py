"""A data set from its name in the configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from efficient_dl.config import DataConfig, suggestion
from efficient_dl.data.dataset import Dataset
from efficient_dl.data.digits import load_digits
from efficient_dl.data.fashion_mnist import load_fashion_mnist
from efficient_dl.data.standard_library import load_standard_library
from efficient_dl.data.tokens import load_tokens
from efficient_dl.errors import ConfigError, DataError


@dataclass(frozen=True)
class Source:
    """What a name in the configuration stands for, and which of the optional settings it heeds."""

    load: Callable[[DataConfig, Path, int, int], Dataset]  # configuration, path, context, seed
    heeds: frozenset[str]


OPTIONAL_SETTINGS = ("path", "augment", "holdout", "token_dtype", "vocabulary")


def _stdlib(config: DataConfig, path: Path, context: int, seed: int) -> Dataset:
    return load_standard_library(holdout=config.holdout, context=context, seed=seed)


def _digits(config: DataConfig, path: Path, context: int, seed: int) -> Dataset:
    return load_digits(holdout=config.holdout, seed=seed, augment=config.augment)


def _fashion_mnist(config: DataConfig, path: Path, context: int, seed: int) -> Dataset:
    return load_fashion_mnist(config, seed=seed)


def _tokens(config: DataConfig, path: Path, context: int, seed: int) -> Dataset:
    return load_tokens(config, path, context=context, seed=seed)


SOURCES: dict[str, Source] = {
    "stdlib": Source(_stdlib, frozenset({"holdout"})),
    "digits": Source(_digits, frozenset({"holdout", "augment"})),
    "fashion-mnist": Source(_fashion_mnist, frozenset({"path", "augment"})),
    "tokens": Source(_tokens, frozenset({"path", "holdout", "token_dtype", "vocabulary"})),
}
DATA_NAMES = ("stdlib", "digits", "fashion-mnist", "tokens:PATH")


def check_data(config: DataConfig) -> tuple[str, Path]:
    """The kind of the data and its path: "tokens:a/b" is ("tokens", a/b). Opens nothing.

    Raises ConfigError for a name that does not exist and for a setting that would change nothing.
    """
    kind, colon, path = config.name.partition(":")
    if kind not in SOURCES or (colon and kind != "tokens"):
        fix = suggestion(kind, DATA_NAMES)
        raise ConfigError(f"unknown data {config.name!r}", where="data.name", fix=fix)
    for setting in OPTIONAL_SETTINGS:
        if setting not in SOURCES[kind].heeds and getattr(config, setting) != getattr(DataConfig(), setting):
            raise ConfigError(
                f"data.{setting} changes nothing where the data is {kind}",
                found=f"{setting} = {getattr(config, setting)!r}",
                where=f"data.{setting}",
                fix=f"leave data.{setting} out, or take data that heeds it: {_heeding(setting)}",
            )
    if path and config.path:
        found = f"{path}, {config.path}"
        raise ConfigError(
            "two paths for one data set",
            found=found,
            where="data.name and data.path",
            fix="leave data.path out",
        )
    path = path or config.path
    if kind == "tokens" and not path:
        fix = "for example data.name=tokens:data/openwebtext"
        raise ConfigError("tokens need a path", found=config.name, where="data.name", fix=fix)
    return kind, Path(path).expanduser()


def _heeding(setting: str) -> str:
    return ", ".join(name for name, source in SOURCES.items() if setting in source.heeds)


def load_data(config: DataConfig, *, context: int = 128, seed: int = 0) -> Dataset:
    """The data that config.name says. context: tokens a sample, for text. seed: of the order and augmentation.

    Call it once before workers are started: what is missing is then downloaded, or reported, once. Raises
    ConfigError for a name that does not exist, DataError for data that is missing, damaged or, where
    data.fingerprint is given, other than it was.
    """
    kind, path = check_data(config)
    try:
        data = SOURCES[kind].load(config, path, context, seed)
    except OSError as error:
        fix = "see whether the files exist and may be read"
        raise DataError(f"{config.name} cannot be read", found=str(error), fix=fix) from None
    if config.fingerprint and config.fingerprint != data.fingerprint:
        raise DataError(
            f"{config.name} is not the data that this configuration was made with",
            expected=config.fingerprint,
            found=data.fingerprint,
            where="data.fingerprint",
            fix="take the same files and, for stdlib, the same Python; or start a new run with data.fingerprint=",
        )
    return data
