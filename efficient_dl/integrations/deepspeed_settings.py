"""What users may ask of the DeepSpeed integration: the section of the JSON, the arguments, and what is refused."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast, get_args

import torch

from efficient_dl.comm import DEFAULT_TIMEOUT_SECONDS, Plan
from efficient_dl.comm.plan import Messages, Scale
from efficient_dl.comm.planner import DEFAULT_FLOOR_BITS
from efficient_dl.errors import ConfigError, UnsupportedTensor
from efficient_dl.integrations.feedback import automatic_scale, feeds_if_lossy
from efficient_dl.integrations.plan_watch import ReplanOptions

SECTION = "efficient_dl"
SCALES = ("auto", "local", "global")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WHERE = f'section "{SECTION}" of the DeepSpeed configuration'


@dataclass(frozen=True)
class Settings:
    """The keys of the section, and the arguments of `compress_engine` of the same names."""

    bits: str | float = "auto"
    check_every: int = 50
    timeout: float = DEFAULT_TIMEOUT_SECONDS
    kernel: str = "auto"
    scale: str = "auto"
    messages: str = "exact"
    error_feedback: bool | str = "auto"
    shadow: bool = False
    max_relative_error: float | None = None
    on_alarm: str = "warn"
    floor_bits: float = DEFAULT_FLOOR_BITS
    replan: bool | ReplanOptions = True

    @staticmethod
    def of(config: Mapping[str, Any], **arguments: Any) -> Settings:
        """Merges DeepSpeed's configuration and the arguments that are not None.

        Raises ConfigError for unknown keys, values of the wrong type, and a setting given twice with two values.
        """
        section = config.get(SECTION, {})
        if not isinstance(section, Mapping):
            raise ConfigError(
                f"{_WHERE} is no object", expected='{"bits": 2.0}', found=repr(section), where=_WHERE
            )
        known = [field.name for field in fields(Settings)]
        for key in section:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, 1)
                raise ConfigError(
                    f"unknown key {key!r}",
                    expected=", ".join(known),
                    where=_WHERE,
                    fix=f"did you mean {close[0]!r}?" if close else "remove it",
                )
        given = {name: value for name, value in arguments.items() if value is not None}
        for name in section.keys() & given.keys():
            if section[name] != given[name]:
                raise ConfigError(
                    f"{name} is given twice",
                    differs=f"{section[name]!r} ({_WHERE}), {given[name]!r} (argument)",
                    fix="give it in one place",
                )
        settings = Settings(**section, **{n: v for n, v in given.items() if n not in section})
        settings._check()
        return settings

    def _check(self) -> None:
        valid = {
            "bits": isinstance(self.bits, (str, int, float)) and not isinstance(self.bits, bool),
            "check_every": _is_number(self.check_every, int) and self.check_every >= 0,
            "timeout": _is_number(self.timeout, int, float) and self.timeout > 0,
            "kernel": isinstance(self.kernel, str),
            "scale": self.scale in SCALES,
            "messages": self.messages in get_args(Messages),
            "error_feedback": isinstance(self.error_feedback, bool) or self.error_feedback == "auto",
            "shadow": isinstance(self.shadow, bool),
            "max_relative_error": self.max_relative_error is None
            or (_is_number(self.max_relative_error, int, float) and self.max_relative_error > 0),
            "on_alarm": self.on_alarm in ("warn", "disable"),
            "floor_bits": _is_number(self.floor_bits, int, float) and 0.1 <= self.floor_bits <= 7,
            "replan": isinstance(self.replan, (bool, ReplanOptions)),
        }
        expected = {
            "bits": 'a number of bits a value, "lossless", "identity", "none" or "auto"',
            "check_every": "a number of optimizer steps, or 0",
            "timeout": "seconds, more than 0",
            "kernel": "a name",
            "scale": ", ".join(SCALES)
            + '; "second_moment" needs an optimizer that no rank has only a part of',
            "messages": " or ".join(get_args(Messages)),
            "error_feedback": 'true, false or "auto"',
            "shadow": "true or false",
            "max_relative_error": "a number above 0, such as 0.5",
            "on_alarm": '"warn" or "disable"',
            "floor_bits": "0.1 to 7 bits a value",
            "replan": "true or false; as an argument also ReplanOptions(...)",
        }
        for name, is_valid in valid.items():
            if not is_valid:
                raise ConfigError(
                    f"{name} has a wrong value",
                    expected=expected[name],
                    found=repr(getattr(self, name)),
                    where=f"{_WHERE}, or the argument",
                )
        if self.on_alarm == "disable" and not self.check_every:
            raise ConfigError(
                'on_alarm="disable" needs the comparison of parameters, with which ranks agree on it',
                expected="check_every above 0",
            )
        if isinstance(self.replan, ReplanOptions) and self.replan.active and not self.check_every:
            raise ConfigError(
                "plans change where parameters are compared",
                expected="check_every above 0",
                found=f"check_every={self.check_every}",
                fix="check_every=50, or replan=False",
            )

    @property
    def replan_options(self) -> ReplanOptions:
        """How plans change during the run; without comparisons of parameters they do not."""
        if isinstance(self.replan, ReplanOptions):
            return self.replan
        return ReplanOptions(active=self.replan and self.check_every > 0)

    def plan(self, engine: Any) -> Plan:
        """What travels; "auto" goes by the engine's optimizer and device, as for DistributedDataParallel."""
        is_sgd = isinstance(engine.basic_optimizer, torch.optim.SGD)
        scale = cast(Scale, self.scale)
        if self.scale == "auto":
            scale = automatic_scale(is_sgd, engine.device, self.messages == "bounded")
        plan = Plan.of(self.bits, scale=scale, error_feedback=self.error_feedback is True)
        plan = replace(plan, messages=cast(Messages, self.messages))
        hides_skips = bool(engine.torch_autocast_z0_gradscaler)
        if plan.error_feedback and hides_skips:
            raise ConfigError(
                "error feedback has to know which steps are skipped",
                found="torch_autocast with a GradScaler and without ZeRO, whose skipped steps DeepSpeed does not tell",
                fix="error_feedback=False, or DeepSpeed's own fp16",
            )
        feeds = plan.is_lossy and feeds_if_lossy(self.error_feedback, is_sgd, scale)
        return replace(plan, error_feedback=True) if feeds and not hides_skips else plan


def check_supported(engine: Any) -> None:
    """Raises ConfigError or UnsupportedTensor for engines whose gradients this cannot reduce."""
    stage = int(engine.zero_optimization_stage())
    if stage == 3:
        raise ConfigError(
            "ZeRO stage 3 is not supported: its gradients are reduced inside its own parameter partitioning",
            expected="stage 0, 1 or 2",
            found="stage 3",
            fix="use stage 2, or FSDP2, which shards parameters as well: "
            "efficient_dl.compress(torch.distributed.fsdp.fully_shard(model), optimizer)",
        )
    config = engine._config
    refused = {
        "no optimizer": engine.optimizer is None,
        "pipeline parallelism": engine.pipeline_parallelism,
        "mixture-of-experts layers": engine.has_moe_layers,
        "sequence parallelism": engine.sequence_parallel_size > 1,
        "tensor parallelism": engine.autotp_size() > 1 or _model_parallel_size(engine) > 1,
        "ZenFlow": bool(engine.zenflow),
        "DeepCompile": config.compile_config.deepcompile,
        "sparse gradients": any(getattr(module, "sparse", False) for module in engine.module.modules()),
        "disabled all-reduce": not engine.enable_backward_allreduce,
        "quantized gradients of ZeRO++": config.zero_config.zero_quantized_gradients,
        "the Muon optimizer": any("Muon" in kind.__name__ for kind in _optimizer_kinds(engine)),
    }
    for feature, is_on in refused.items():
        if is_on:
            raise ConfigError(
                f"DeepSpeed with {feature} is not supported",
                expected="data parallelism with ZeRO stage 0, 1 or 2",
                fix="give deepspeed.initialize() an optimizer"
                if feature == "no optimizer"
                else "turn it off, or train without compress()",
            )
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and parameter.dtype not in _DTYPES:
            raise UnsupportedTensor(
                f"the gradients of parameter {name!r} cannot be compressed",
                expected="float32, bfloat16 or float16",
                found=str(parameter.dtype),
            )


def _is_number(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _model_parallel_size(engine: Any) -> int:
    size = getattr(engine.mpu, "get_model_parallel_world_size", None)
    return size() if size else 1


def _optimizer_kinds(engine: Any) -> list[type]:
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return list(type(inner).__mro__)
