"""Everything that defines a run: frozen dataclasses, their TOML file, and `section.key=value` overrides."""

from efficient_dl.config.data_spec import DataSpec
from efficient_dl.config.schema import (
    BITS_WORDS,
    CompressionConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from efficient_dl.config.setting import suggestion
from efficient_dl.config.toml import from_dict, from_toml, load_config, to_toml, with_overrides

__all__ = [
    "BITS_WORDS",
    "CompressionConfig",
    "Config",
    "DataConfig",
    "DataSpec",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "TrainConfig",
    "from_dict",
    "from_toml",
    "load_config",
    "suggestion",
    "to_toml",
    "with_overrides",
]
