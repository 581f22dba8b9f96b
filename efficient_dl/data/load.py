"""A data set from its name in the configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from efficient_dl.config import DataConfig, suggestion
from efficient_dl.data.dataset import Dataset
from efficient_dl.data.digits import load_digits
from efficient_dl.data.fashion_mnist import load_fashion_mnist
from efficient_dl.data.standard_library import load_standard_library
from efficient_dl.data.tokens import load_tokens
from efficient_dl.errors import ConfigError, DataError

Loader = Callable[[DataConfig, Path, int, int], Dataset]  # configuration, path, context, seed


def _stdlib(config: DataConfig, path: Path, context: int, seed: int) -> Dataset:
    return load_standard_library(holdout=config.holdout, context=context, seed=seed)


def _digits(config: DataConfig, path: Path, context: int, seed: int) -> Dataset:
    return load_digits(holdout=config.holdout, seed=seed, augment=config.augment)


def _fashion_mnist(config: DataConfig, path: Path, context: int, seed: int) -> Dataset:
    return load_fashion_mnist(config, seed=seed)


def _tokens(config: DataConfig, path: Path, context: int, seed: int) -> Dataset:
    return load_tokens(config, path, context=context, seed=seed)


LOADERS: dict[str, Loader] = {
    "stdlib": _stdlib,
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "tokens": _tokens,
}
DATA_NAMES = ("stdlib", "digits", "fashion-mnist", "tokens:PATH")


def check_data(config: DataConfig) -> tuple[str, Path]:
    """The kind of the data and its path: "tokens:a/b" is ("tokens", a/b). Raises ConfigError, opens nothing."""
    kind, colon, path = config.name.partition(":")
    if kind not in LOADERS or (colon and kind != "tokens"):
        fix = suggestion(kind, DATA_NAMES)
        raise ConfigError(f"unknown data {config.name!r}", where="data.name", fix=fix)
    path = path or config.path
    if kind == "tokens" and not path:
        fix = "for example data.name=tokens:data/openwebtext"
        raise ConfigError("tokens need a path", found=config.name, where="data.name", fix=fix)
    return kind, Path(path).expanduser()


def load_data(config: DataConfig, *, context: int = 128, seed: int = 0) -> Dataset:
    """The data that config.name says. context: tokens a sample, for text. seed: of the order and augmentation.

    Call it once before workers are started: what is missing is then downloaded, or reported, once. Raises
    ConfigError for a name that does not exist, DataError for data that is missing, damaged or, where
    data.fingerprint is given, other than it was.
    """
    kind, path = check_data(config)
    data = LOADERS[kind](config, path, context, seed)
    if config.fingerprint and config.fingerprint != data.fingerprint:
        raise DataError(
            f"{config.name} is not the data that this configuration was made with",
            expected=config.fingerprint,
            found=data.fingerprint,
            where="data.fingerprint",
            fix="take the same files and, for stdlib, the same Python; or start a new run with data.fingerprint=",
        )
    return data
