"""What users may ask of the DeepSpeed integration: the section of the JSON, the arguments, and what is refused."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from efficient_dl.comm import DEFAULT_TIMEOUT_SECONDS
from efficient_dl.errors import ConfigError, UnsupportedTensor

SECTION = "efficient_dl"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WHERE = f'section "{SECTION}" of the DeepSpeed configuration'


@dataclass(frozen=True)
class Settings:
    """The keys of the section, and the arguments of `compress_engine` of the same names."""

    bits: str | float = "auto"
    check_every: int = 50
    timeout: float = DEFAULT_TIMEOUT_SECONDS
    kernel: str = "auto"

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
        }
        expected = {
            "bits": 'a number of bits a value, "lossless", "identity", "none" or "auto"',
            "check_every": "a number of optimizer steps, or 0",
            "timeout": "seconds, more than 0",
            "kernel": "a name",
        }
        for name, is_valid in valid.items():
            if not is_valid:
                raise ConfigError(
                    f"{name} has a wrong value",
                    expected=expected[name],
                    found=repr(getattr(self, name)),
                    where=f"{_WHERE}, or the argument",
                )


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
