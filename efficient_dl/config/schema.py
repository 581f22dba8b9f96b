"""The settings of a run: what there is, what it means, what it may be."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from efficient_dl.config.setting import Section, setting, to_toml_value
from efficient_dl.errors import ConfigError

BITS_WORDS = ("none", "identity", "lossless", "auto")
OBJECTIVE_WORDS = ("cross-entropy", "linear", "expgb", "pow3gb", "squentropy", "rescaled-square")
_MANY = 2**40  # more steps than anyone runs, and far from the end of int64


@dataclass(frozen=True)
class ModelConfig(Section):
    section: ClassVar[str] = "model"
    name: str = setting("gpt", "mlp, vgg8b, resnet18 or gpt", required=True)
    size: str = setting("micro", "nano, micro, mini, small or base", required=True)
    context: int = setting(128, "tokens a gpt sees at once", low=1, high=2**20)
    dropout: float = setting(0.0, "probability that an activation is dropped", low=0.0, below=1.0)
    positions: str = setting("rope", "how a gpt knows where a token stands", words=("rope", "learned"))
    tie_weights: bool = setting(True, "a gpt's output layer is its embedding's matrix")
    stem: str = setting(
        "auto",
        "resnet18's first layers; auto: imagenet from 64 pixels on",
        words=("auto", "cifar", "imagenet"),
    )


@dataclass(frozen=True)
class DataConfig(Section):
    section: ClassVar[str] = "data"
    name: str = setting("stdlib", "stdlib, digits, fashion-mnist or tokens:PATH", required=True)
    path: str = setting("", "folder of fashion-mnist's files, or of tokens; empty: the usual places")
    batch_size: int = setting(
        8, "samples a worker takes at once; a step takes batch_size * workers * accumulate", low=1, high=2**24
    )
    augment: bool = setting(False, "shift and mirror training images, drawn by (seed, step, index)")
    holdout: float = setting(
        0.1, "share kept for validation where the data brings no split", above=0.0, below=1.0
    )
    token_dtype: str = setting(
        "auto", "of tokens; auto: from meta.json or the file's name", words=("auto", "uint16", "uint32")
    )
    vocabulary: int = setting(
        0, "of tokens; 0: from meta.json, or the highest token + 1", low=0, high=2**31 - 1
    )
    download: bool = setting(True, "fetch fashion-mnist if it is nowhere on this machine")
    fingerprint: str = setting("", "hash of the data: recorded when a run starts, checked where given")


@dataclass(frozen=True)
class OptimizerConfig(Section):
    section: ClassVar[str] = "optimizer"
    name: str = setting("adamw", "the rule of the update", words=("sgd", "adamw", "muon"))
    lr: float = setting(1e-3, "learning rate at its peak", above=0.0, high=1e4)
    weight_decay: float = setting(0.1, "weight decay of matrices, decoupled except in sgd", low=0.0, high=1e3)
    momentum: float = setting(0.9, "momentum of sgd and muon", low=0.0, below=1.0)
    betas: tuple[float, float] = setting(
        (0.9, 0.95), "adamw's averages of the gradient and of its square", low=0.0, below=1.0
    )
    schedule: str = setting("cosine", "learning rate after the warm-up", words=("cosine", "constant"))
    final_lr_share: float = setting(0.1, "where cosine ends, as a share of lr", low=0.0, high=1.0)
    warmup_steps: int = setting(20, "steps of linear warm-up", low=0, high=_MANY)
    clip: float = setting(1.0, "largest norm of the whole gradient; 0: not clipped", low=0.0, high=1e12)


@dataclass(frozen=True)
class CompressionConfig(Section):
    section: ClassVar[str] = "compression"
    bits: float | str = setting(
        "auto",
        "bits a value, or one of the words; auto: measured and planned, at the start and during the run",
        low=0.1,
        high=7.0,
        words=BITS_WORDS,
    )
    floor_bits: float = setting(2.0, "the fewest bits a value that auto may choose", low=0.1, high=7.0)
    replan: bool = setting(True, "auto: look at links again during the run, at most 0.5 % of the time")
    overrides: str = setting(
        "", "other bits by parameter name: '*.bias=none, head.*=4.0'; the first pattern that fits counts"
    )
    max_error: float = setting(
        0.0,
        "instead of bits: the largest relative error of a packet, from 0.0125 on; 0: off",
        low=0.0,
        below=1.0,
    )
    bytes_per_step: int = setting(
        0, "instead of bits: what a worker may send in a step; 0: off", low=0, high=_MANY
    )
    error_feedback: str = setting(
        "auto",
        "add what a packet leaves out to the next; auto: for sgd with global steps",
        words=("auto", "on", "off"),
    )
    scale: str = setting(
        "auto",
        "what step sizes follow: blocks of 256 values, one for the model, adam's second moment; auto: global for sgd "
        "on a CPU with exact messages",
        words=("auto", "local", "global", "second_moment"),
    )
    messages: str = setting(
        "auto",
        "bounded: as long as bits says, so that no sizes travel, and on a GPU the host waits for nothing; exact: as "
        "long as it takes; auto: exact, but with bits auto what is faster",
        words=("auto", "exact", "bounded"),
    )
    hierarchy: int | str = setting(
        "plan",
        "compress between nodes only; the number of workers on each, or auto: the launcher's variables, host names; "
        "plan: where that or groups pay, with bits auto; groups: of workers with links of their own, fewer messages",
        low=1,
        high=_MANY,
        words=("plan", "none", "auto", "groups"),
    )
    group_size: int = setting(
        0, "workers in each of the groups of hierarchy groups; 0: what needs least time", low=0, high=_MANY
    )
    transport: str = setting(
        "process_group",
        "what carries compressed bytes: torch's process group, or mpi, in workers that mpirun has started",
        words=("process_group", "mpi"),
    )
    shadow: bool = setting(False, "apply the uncompressed result, only measure the compressed one")
    check_every: int = setting(
        50, "steps between comparisons of the parameters' hash; 0: never", low=0, high=_MANY
    )
    max_relative_error: float = setting(
        1.0, "of the gradients, or of one parameter's, over 20 steps: an alarm", above=0.0, high=1e9
    )
    on_alarm: str = setting(
        "warn", "what an alarm does; disable: also end compression, on all workers", words=("warn", "disable")
    )

    def overrides_by_pattern(self) -> dict[str, str]:
        """`overrides` as {pattern: bits}. Raises ConfigError for text that is no list of such pairs."""
        pairs: dict[str, str] = {}
        for one in filter(None, (part.strip() for part in self.overrides.split(","))):
            pattern, equals, bits = (word.strip() for word in one.rpartition("="))
            if not (pattern and equals and bits):
                raise ConfigError(
                    "compression.overrides cannot be read",
                    expected="PATTERN=BITS, PATTERN=BITS, ...",
                    found=one,
                    fix="""--set compression.overrides='*.bias=none, head.*=4.0'""",
                )
            pairs[pattern] = bits
        return pairs


@dataclass(frozen=True)
class TrainConfig(Section):
    section: ClassVar[str] = "train"
    steps: int = setting(500, "optimizer steps", low=1, high=_MANY)
    seed: int = setting(0, "the only source of randomness", low=0, high=2**63 - 1)
    objective: str = setting(
        "cross-entropy", "the loss of the model's outputs; val_loss is nats for all", words=OBJECTIVE_WORDS
    )
    fused_loss: str = setting(
        "auto",
        "a gpt's output layer and loss in one, without batch x context x vocabulary logits in memory; auto: where they "
        "are larger than 32 MiB; end-to-end",
        words=("auto", "on", "off"),
    )
    precision: str = setting("fp32", "arithmetic of the layers; bf16: autocast", words=("fp32", "bf16"))
    accumulate: int = setting(1, "batches a worker adds up before a step", low=1, high=2**20)
    activation_checkpointing: bool = setting(
        False,
        "keep each block's input alone and run the block again in the backward pass: less memory, and the same bits "
        "where cuts are the same",
    )
    eval_every: int = setting(100, "steps between evaluations; 0: only at the end", low=0, high=_MANY)
    eval_batches: int = setting(20, "batches of an evaluation, the same every time", low=1, high=2**30)
    log_every: int = setting(10, "steps between rows of metrics.jsonl", low=1, high=_MANY)
    checkpoint_every: int = setting(100, "steps between checkpoints; 0: only at the end", low=0, high=_MANY)
    keep_checkpoints: int = setting(2, "checkpoints kept, the newest ones", low=1, high=2**30)


@dataclass(frozen=True)
class LocalConfig(Section):
    section: ClassVar[str] = "local"
    mode: str = setting(
        "end-to-end",
        "what is trained at once: the whole model by backprop; its partitions by local losses, all on every worker "
        "(layerwise) or each on workers of its own (partitionwise)",
        words=("end-to-end", "layerwise", "partitionwise"),
    )
    partitions: int = setting(4, "parts that the model is cut into", low=1, high=4096)
    cuts: str = setting(
        "",
        "names of the pieces that begin parts 1, 2, ..., with commas; empty: partitions of them, cut by balance",
    )
    schedule: str = setting(
        "simultaneous",
        "layerwise: all partitions in every step, or one after the other, each a share of the steps",
        words=("simultaneous", "sequential"),
    )
    window: int = setting(
        1, "2: a partition also learns from the next one's loss; layerwise, simultaneous", low=1, high=2
    )
    heads: str = setting(
        "auto",
        "auxiliary heads: linear, auglocal, auglocal:DEPTH, predsim (images), causal:BLOCKS (tokens); "
        "auto: auglocal for images, causal:1 for tokens",
    )
    cache_bytes: int = setting(
        0,
        "of a worker's disk, in the run's folder, for what frozen partitions make of each image, read in later epochs; "
        "layerwise, sequential, without augmentation; 0: computed every time",
        low=0,
        high=2**60,
    )
    keep_examples: float = setting(
        1.0,
        "the share of its examples that a partition hands on to the next one, which learns from no others; layerwise, "
        "simultaneous, window 1",
        above=0.0,
        high=1.0,
    )
    keep_by: str = setting(
        "loss",
        "which examples are handed on: those with the largest local loss, or at random",
        words=("loss", "random"),
    )
    penalty: float = setting(
        0.0, "1/tau of the penalty on residual branches, (1/2tau)*|branch|^2; 0: none", low=0.0, high=1e6
    )
    balance: str = setting(
        "time", "what a cut makes equal among partitions", words=("time", "memory", "parameters")
    )
    activations: float | str = setting(
        "identity",
        "bits a value that partitionwise workers send forward, or how exactly",
        low=1.0,
        high=7.0,
        words=("identity", "lossless"),
    )
    queue: int = setting(4, "micro-batches that may wait at each end of a stream", low=1, high=1024)
    stage_steps: int = setting(
        0, "steps between the coordinator's decisions; 0: a tenth of the run", low=0, high=_MANY
    )
    freeze_below: float = setting(
        0.0,
        "a partition whose loss changes by a smaller share in a stage, by the trend of four, is frozen; 0: never",
        low=0.0,
        below=1.0,
    )
    memory_bytes: int = setting(0, "memory of a worker for its partitions; 0: not limited", low=0, high=2**50)

    @property
    def count(self) -> int:
        """Of the parts."""
        return len(self.names) + 1 if self.names else self.partitions

    @property
    def names(self) -> list[str]:
        """In `cuts`."""
        return [one.strip() for one in self.cuts.split(",")] if self.cuts else []


@dataclass(frozen=True)
class EntropyConfig(Section):
    section: ClassVar[str] = "entropy"
    every: int = setting(
        0,
        "steps between measurements of what weights, gradients, ... are worth in bits; 500 costs under 1 % of a step; "
        "0: never",
        low=0,
        high=_MANY,
    )
    kinds: str = setting(
        "weights, gradients, moments, activations", "what is measured, with commas", required=True
    )
    bits: int = setting(8, "of the quantizers whose entropy is told", low=2, high=12)


@dataclass(frozen=True)
class RunConfig(Section):
    section: ClassVar[str] = "run"
    out: str = setting("", "the run's folder; empty: a name made from the settings")
    workers: int = setting(1, "processes on this machine, where no launcher starts them", low=1, high=4096)
    device: str = setting("auto", "where the model is trained", words=("auto", "cpu", "cuda"))
    threads: int = setting(0, "CPU threads a worker; 0: the cores divided by the workers", low=0, high=4096)
    bind: str = setting(
        "none", "cores: each worker stays on its share of them, near its GPU", words=("none", "cores")
    )
    timeout_seconds: float = setting(120.0, "a collective that takes longer fails", above=0.0, high=86400.0)
    watchdog_seconds: float = setting(
        600.0,
        "a rank that begins nothing new for so long is stuck, and the run ends; 0: never",
        low=0.0,
        high=86400.0,
    )
    grace_seconds: float = setting(
        25.0, "after SIGTERM or SIGUSR1, to end a step and write a checkpoint", low=0.0, high=86400.0
    )


@dataclass(frozen=True)
class Config:
    """A run. Two runs with equal `fingerprint()` train the same model on the same data in the same way."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def settings(self, ignore: Sequence[str] = ()) -> dict[str, Any]:
        """Every setting by its full name, {"model.name": "gpt", ...}, in the order of the file.

        ignore: sections ("run") or full names ("data.fingerprint") to leave out.
        """
        return {
            key: getattr(getattr(self, name), one.name)
            for name, kind in SECTIONS.items()
            for one in dataclasses.fields(kind)
            if name not in ignore and (key := f"{name}.{one.name}") not in ignore
        }

    def fingerprint(self, ignore: Sequence[str] = ("run",)) -> str:
        """16 hexadecimal digits: the first 64 bits of sha-256 over "section.key = value" lines.

        The same on every machine and Python version; it changes when a setting is added to this file.
        """
        lines = [f"{key} = {to_toml_value(value)}\n" for key, value in self.settings(ignore).items()]
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]

    def differences(self, other: Config, ignore: Sequence[str] = ("run",)) -> list[str]:
        """What the two disagree on: ["train.seed = 0, 1", ...], the value of self first."""
        theirs = other.settings()
        return [
            f"{key} = {to_toml_value(value)}, {to_toml_value(theirs[key])}"
            for key, value in self.settings(ignore).items()
            if value != theirs[key]
        ]


SECTIONS: dict[str, type[Section]] = {
    kind.section: kind
    for kind in (
        ModelConfig,
        DataConfig,
        OptimizerConfig,
        CompressionConfig,
        TrainConfig,
        LocalConfig,
        EntropyConfig,
        RunConfig,
    )
}
