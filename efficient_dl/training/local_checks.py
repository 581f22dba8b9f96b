"""What layer-wise and partition-wise training cannot be asked for, said before anything is measured."""

from __future__ import annotations

from efficient_dl.config import Config
from efficient_dl.errors import ConfigError


def check_local(config: Config, data: str) -> None:
    """Raise ConfigError for settings of local training that contradict each other, the data or the way of training.

    data: "tokens" or "images".
    """
    local = config.local
    partitions = local.count
    found = (local.mode, local.schedule, local.window)
    if local.keep_examples < 1.0 and found != ("layerwise", "simultaneous", 1):
        raise ConfigError(
            "examples are left out by partitions that train side by side, by their own losses alone",
            expected="local.mode=layerwise, local.schedule=simultaneous, local.window=1",
            found=f"local.mode={local.mode}, local.schedule={local.schedule}, local.window={local.window}",
            where="local.keep_examples",
            fix="--keep-examples 1.0, or --mode layerwise",
        )
    kept = (local.mode, local.schedule, config.data.augment, data)
    if local.cache_bytes and kept != ("layerwise", "sequential", False, "images"):
        raise ConfigError(
            "features are worth keeping where what makes them is frozen, and samples come again bit for bit",
            expected="local.mode=layerwise, local.schedule=sequential, data.augment=false, images",
            found="local.mode={}, local.schedule={}, data.augment={}, {}".format(*kept),
            where="local.cache_bytes",
            fix="local.cache_bytes=0, or what is expected",
        )
    if local.mode == "end-to-end":
        if local.cuts:
            raise ConfigError(
                "the whole model is trained at once, and is not cut",
                expected="local.mode=layerwise or partitionwise",
                found=f"local.cuts={local.cuts}",
                where="local.cuts",
                fix="--mode partitionwise, or leave local.cuts out",
            )
        return
    if local.window == 2 and found[:2] != ("layerwise", "simultaneous"):
        raise ConfigError(
            "window 2 needs all partitions on the same ranks",
            expected="local.mode=layerwise, local.schedule=simultaneous",
            found=f"local.mode={local.mode}, local.schedule={local.schedule}",
            fix="--window 1, or --mode layerwise",
        )
    if local.heads == "predsim" and config.data.batch_size < 2:
        raise ConfigError(
            "predsim compares the samples of a batch with each other",
            expected="data.batch_size of at least 2",
            found=f"data.batch_size={config.data.batch_size}",
            where="local.heads",
            fix="a larger batch_size with a smaller train.accumulate, or local.heads=auglocal",
        )
    if found[:2] == ("layerwise", "sequential") and config.train.steps < partitions:
        raise ConfigError(
            "there is not a step for each partition",
            expected=f"at least {partitions} steps, or fewer partitions",
            found=f"train.steps={config.train.steps}",
        )
    if config.compression.shadow and local.activations != "identity":
        raise ConfigError(
            "compression.shadow applies uncompressed results, local.activations would be compressed",
            fix="local.activations=identity, or compression.shadow=false",
        )
