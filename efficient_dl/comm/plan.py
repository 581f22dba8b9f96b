"""What a run decided to do with its gradients, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from efficient_dl.codec import make_codec
from efficient_dl.comm.capacity import knows_capacity
from efficient_dl.errors import ConfigError

AUTO_BITS = 2.0
MIN_RATE, MAX_RATE = 0.125, 7.0  # bits a value, of rates that are controlled
Scale = Literal["local", "global", "second_moment"]
Messages = Literal["exact", "bounded"]
MIN_MAX_ERROR = 0.0125  # at 7 bits a value the relative error is 0.010 on Gaussian values


@dataclass(frozen=True)
class Plan:
    """One decision, equal on all ranks.

    bits: what the user asked for: "none", "identity", "lossless", "auto", a number of bits a value or a codec.
    codec: what that means, as `make_codec` takes it; "none" leaves the native collective alone.
    reason: one sentence for logs and reports.
    overrides: (pattern, codec) pairs; the first pattern that a parameter's name matches decides for it.
    max_error: the largest relative error of a packet, ‖decoded − x‖ / ‖x‖; the rates follow it.
    bytes_per_step: what a rank may send in a step; the rate follows it.
    first_rate: where a controlled rate starts; no part of `facts`, because it depends on the number of ranks.
    error_feedback: what a lossy packet leaves out is added to the same parameter's next one.
    scale: what a rate's step sizes follow. "local": the spread of blocks of 256 values (codec "bits"). "global": one
        step for all packets (codec "grid"), least squared error. "second_moment": one step a packet, after division
        by √v.
    messages: "exact": as long as their content takes, which is told first. "bounded": as long as the plan says (see
        capacity.py), where every codec of the plan allows it; else exact all the same.
    """

    bits: str
    codec: str
    reason: str
    overrides: tuple[tuple[str, str], ...] = ()
    max_error: float | None = None
    bytes_per_step: int | None = None
    error_feedback: bool = False
    scale: Scale = "local"
    first_rate: float = AUTO_BITS
    messages: Messages = "exact"

    @staticmethod
    def of(
        bits: str | float = "auto",
        *,
        overrides: Mapping[str, str | float] | None = None,
        max_error: float | None = None,
        bytes_per_step: int | None = None,
        values_per_step: int = 0,
        error_feedback: bool = False,
        scale: Scale = "local",
        messages: Messages = "exact",
    ) -> Plan:
        """Decides from the user's wish alone.

        overrides: shell-style patterns of parameter names to what travels for those, as `bits` takes it ("auto"
            excepted); "none" sends them uncompressed, inside the same messages.
        values_per_step: how many values a rank sends in a step; needed with bytes_per_step.

        Raises ConfigError for an unknown name, an impossible rate or wishes that contradict each other.
        """
        wish = _canonical(bits)
        if scale not in get_args(Scale):
            raise ConfigError("unknown scale", expected=", ".join(get_args(Scale)), found=str(scale))
        _check(wish, overrides or {}, max_error, bytes_per_step, error_feedback)
        rules = tuple(
            (pattern, _override(pattern, value, scale)) for pattern, value in (overrides or {}).items()
        )
        codec, reason = _decision(wish)
        first_rate = AUTO_BITS
        if max_error is not None:
            reason = f"as many bits as a relative error of {max_error:g} a packet takes"
        elif bytes_per_step is not None:
            first_rate = _first_rate(bytes_per_step, values_per_step)
            reason = f"as many bits as {bytes_per_step} bytes a step and rank allow"
        name, _, rate = codec.partition(":")
        if scale != "local" and name == "bits":
            codec = _codec(f"grid:{rate}")
        elif scale == "second_moment" and name != "grid":
            raise ConfigError(
                'scale="second_moment" goes with a number of bits a value',
                found=f"bits = {wish}",
                fix="bits=2.0",
            )
        if scale == "second_moment" and error_feedback:
            raise ConfigError(
                'error_feedback and scale="second_moment" exclude each other: the scale changes in every step',
                fix="error_feedback=False",
            )
        plan = Plan(
            wish, codec, reason, rules, max_error, bytes_per_step, error_feedback, scale, first_rate, messages
        )
        plan.check_messages()
        return plan

    def check_messages(self) -> None:
        """Raises ConfigError for messages that cannot be bounded, unless "auto" is still to choose the codec."""
        if self.messages not in get_args(Messages):
            raise ConfigError(
                "unknown messages", expected=", ".join(get_args(Messages)), found=str(self.messages)
            )
        if self.messages == "exact" or self.is_bounded or self.codec == "none":
            return
        unknown = [f"overrides: {pattern}" for pattern, codec in self.overrides if not knows_capacity(codec)]
        reasons = {
            "max_error": self.max_error is not None,
            "bytes_per_step": self.bytes_per_step is not None,
            f"scale={self.scale!r}": self.codec.startswith("grid"),
            f"bits={self.bits}": not knows_capacity(self.codec),
        }
        found = [reason for reason, is_given in reasons.items() if is_given][:1] + unknown
        raise ConfigError(
            'messages="bounded" needs sizes that are known beforehand',
            expected='a number of bits a value with scale="local", "identity", "fp16" or "bf16", for all parameters',
            found=", ".join(found),
            fix='messages="exact"',
        )

    @property
    def is_bounded(self) -> bool:
        """Whether every message's size follows from this plan."""
        codecs = [self.codec, *(codec for _, codec in self.overrides)]
        return self.messages == "bounded" and not self.varies_rates and all(map(knows_capacity, codecs))

    @property
    def varies_rates(self) -> bool:
        """Whether the rate of the default codec is controlled during the run."""
        return self.max_error is not None or self.bytes_per_step is not None

    @property
    def has_common_step(self) -> bool:
        """Whether all packets of the default codec share a step size (see `CommonStep`)."""
        return self.scale == "global" and self.codec.startswith("grid:") and not self.varies_rates

    @property
    def is_lossy(self) -> bool:
        """Whether the default codec is a quantizer with a rate."""
        return self.codec.partition(":")[0] in ("bits", "grid")

    def codec_for(self, name: str) -> str:
        """The codec of the parameter of this name."""
        return self.override_for(name) or self.codec

    def override_for(self, name: str) -> str | None:
        """The codec that an override names for this parameter; None if none does."""
        return next((codec for pattern, codec in self.overrides if fnmatchcase(name, pattern)), None)

    def check_names(self, names: Iterable[str]) -> None:
        """Raises ConfigError if a pattern matches no parameter."""
        known = list(names)
        for pattern, _ in self.overrides:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise ConfigError(
                    f"the override {pattern!r} matches no parameter",
                    expected=f"a pattern of names such as {known[0]!r}" if known else "parameters",
                    fix="print([name for name, _ in model.named_parameters()]); * stands for any text",
                )

    def facts(self) -> dict[str, Any]:
        """All that decides what travels, for comparisons between ranks and with checkpoints."""
        facts = asdict(self)
        del facts["reason"], facts["bits"], facts["first_rate"]
        # A list, because the first pattern counts: their order matters.
        return facts | {"overrides": [f"{pattern} = {codec}" for pattern, codec in self.overrides]}


def _canonical(bits: str | float) -> str:
    return f"{float(bits)}" if isinstance(bits, (int, float)) or _is_number(bits) else bits


def _decision(wish: str) -> tuple[str, str]:
    if wish == "none":
        return "none", "the native collective, as asked for"
    if wish == "auto":
        return _codec(
            f"bits:{AUTO_BITS}"
        ), f"auto is {AUTO_BITS} bits a value where no planner measures the links"
    return _codec(wish), "as asked for"


def _codec(wish: str) -> str:
    """The canonical name; which kernel will run is not decided here."""
    if wish == "delta":
        raise ConfigError(
            "delta needs a copy that both ends hold, which gradients do not have", fix='use bits="lossless"'
        )
    return make_codec(f"bits:{wish}" if _is_number(wish) else wish, kernel="reference").name


def _override(pattern: str, value: str | float, scale: Scale) -> str:
    wish = _canonical(value)
    if scale == "global" and _is_number(wish):
        return _codec(f"grid:{wish}")
    if wish == "auto":
        raise ConfigError(f"the override {pattern!r} says nothing", fix="name a codec or a number of bits")
    return _codec("identity" if wish == "none" else wish)


def _check(
    wish: str,
    overrides: Mapping[str, str | float],
    max_error: float | None,
    bytes_per_step: int | None,
    error_feedback: bool,
) -> None:
    if max_error is not None and bytes_per_step is not None:
        raise ConfigError("max_error and bytes_per_step exclude each other", fix="choose one of them")
    if (max_error is not None or bytes_per_step is not None) and wish != "auto":
        raise ConfigError(
            "max_error and bytes_per_step decide the rate themselves",
            found=f"bits = {wish}",
            fix="leave bits out",
        )
    if wish == "none" and (overrides or error_feedback):
        raise ConfigError(
            'bits="none" leaves the native collective untouched: nothing can be overridden or fed back',
            fix='use bits="identity" for the parameters that no override names',
        )
    if max_error is not None and not MIN_MAX_ERROR <= max_error < 1:
        raise ConfigError(
            "max_error is out of range",
            expected=f"{MIN_MAX_ERROR} (about 7 bits a value) to 1, relative to the gradient's norm",
            found=f"{max_error}",
            fix='use bits="lossless" for less',
        )


def _first_rate(bytes_per_step: int, values_per_step: int) -> float:
    rate = 8 * bytes_per_step / max(values_per_step, 1)
    if rate < MIN_RATE:
        least = math.ceil(MIN_RATE * values_per_step / 8)
        raise ConfigError(
            "bytes_per_step is too small for this model",
            expected=f"at least {least} bytes: {MIN_RATE} bits for each of {values_per_step} values a rank sends",
            found=f"{bytes_per_step} bytes",
            fix="raise it, or synchronize less often (no_sync)",
        )
    return min(rate, MAX_RATE)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
