"""Checks of the alarms' options that every integration with an optimizer makes."""

from __future__ import annotations

import torch

from efficient_dl.comm import OnAlarm, check_options
from efficient_dl.errors import ConfigError


def check_alarms(
    max_relative_error: float | None,
    on_alarm: OnAlarm,
    optimizer: torch.optim.Optimizer | None,
    check_every: int,
) -> None:
    """Raises ConfigError for options of the alarms that cannot be or do not go together."""
    check_options(max_relative_error, on_alarm)
    if on_alarm == "disable" and not (optimizer and check_every):
        raise ConfigError(
            'on_alarm="disable" needs the comparison of parameters',
            expected="an optimizer and check_every above 0: the ranks agree on it on the way",
            fix="give compress() the optimizer, and a check_every above 0",
        )
