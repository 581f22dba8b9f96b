"""What settings contradict each other, as far as that can be told before there are data, a model or other ranks."""

from __future__ import annotations

from efficient_dl.comm import Plan
from efficient_dl.config import Config
from efficient_dl.training.entropy_log import check_entropy
from efficient_dl.training.fused import check_fused
from efficient_dl.training.local_checks import check_local


def check_settings(config: Config, data: str) -> None:
    """Raise ConfigError for settings with which no run can start. data: "tokens" or "images"."""
    check_entropy(config)
    check_fused(config)
    check_local(config, data)
    _check_compression(config)


def _check_compression(config: Config) -> None:
    wish = config.compression
    Plan.of(
        wish.bits,
        overrides=wish.overrides_by_pattern(),
        max_error=wish.max_error or None,
        bytes_per_step=wish.bytes_per_step or None,
        values_per_step=wish.bytes_per_step,  # a rate that can be had: how many there are, the model says
        error_feedback=wish.error_feedback == "on",
        scale="local" if wish.scale == "auto" else wish.scale,  # pyright: ignore[reportArgumentType]  # it is a word of Scale
        messages="bounded" if wish.messages == "bounded" else "exact",
    )
