"""One description of a job for every way to start it: what runs, on how much, and under which rules."""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from efficient_dl.config.setting import suggestion
from efficient_dl.errors import ConfigError

BACKENDS = ("local", "torchrun", "slurm", "mpirun", "kubernetes")
OWN_COMMANDS = ("train", "probe")  # of `edl`, that run on ranks
EXAMPLE = ("train", "--model", "gpt-micro", "--data", "stdlib", "--bits", "2.0", "--steps", "500")

_LABEL = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"
_TIME = r"\d+|\d+:\d\d(:\d\d)?|\d+-\d\d?(:\d\d(:\d\d)?)?"
_RULES: dict[str, tuple[str, str]] = {  # by field: a pattern for the whole text, and what it means
    "name": (_LABEL, "at most 40 lower-case letters, digits and dashes, the first one a letter"),
    "partition": (r"[\w.,-]*", "letters, digits, dots, commas and dashes"),
    "account": (r"[\w.-]*", "letters, digits, dots and dashes"),
    "time": (f"({_TIME})?", "minutes, hours:minutes:seconds or days-hours, as 90, 1:30:00 or 2-12"),
    "memory": (r"(\d+[KMGT]?)?", "a number of megabytes, or with K, M, G or T, as 64G"),
    "image": (r"[!-~]*", "an image's name without blanks"),
    "claim": (f"({_LABEL})?", "the name of a PersistentVolumeClaim"),
    "folder": (r"[^\0\n]*", "a path"),
    "python": (r"[^\0\n]+", "a Python's name or path"),
}
_HOST = r"([\w.-]+@)?[A-Za-z0-9][A-Za-z0-9.-]*"
_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
_USED_BY = {  # the others are used by all
    **dict.fromkeys(("gpus", "cpus", "memory"), ("slurm", "kubernetes")),
    **dict.fromkeys(("time", "partition", "account", "lead_seconds", "sweep"), ("slurm",)),
    "image": ("slurm", "kubernetes"),
    "claim": ("kubernetes",),
    "hosts": ("torchrun", "mpirun"),
    "port": ("torchrun", "kubernetes"),
    "mpi": ("mpirun",),
    "restarts": ("torchrun", "slurm", "kubernetes"),
}
_RANGES = {
    "nodes": (1, 100_000),
    "workers": (1, 1024),
    "gpus": (0, 64),
    "cpus": (1, 1024),
    "port": (1024, 65535),
    "restarts": (0, 1000),
    "lead_seconds": (10, 36_000),
}


@dataclass(frozen=True)
class Job:
    """What `edl launch` starts. Every field is checked when it is made; raises ConfigError.

    nodes, workers: machines, and processes on each. gpus: of each node; cpus: of each worker. time, partition, account,
    memory (a node's): Slurm's. image: a container's; claim: the volume where a JobSet's runs lie, at `folder`.
    hosts: of torchrun (by ssh, the first one holds the rendezvous) and mpirun. environment: variables of the workers.
    folder: where the command runs, the current one if empty. restarts: how often a job that failed begins again.
    lead_seconds: how long before its end Slurm announces it. options: more words for sbatch, torchrun or mpirun.
    sweep: for a Slurm array, the words that each of its jobs adds. command: `train` or `probe` and their arguments, a
    .py file, -m MODULE, or a program.
    """

    backend: str
    name: str = "edl"
    nodes: int = 2
    workers: int = 4
    gpus: int = 0
    cpus: int = 4
    time: str = "1:00:00"
    partition: str = ""
    account: str = ""
    memory: str = ""
    image: str = ""
    claim: str = "runs"
    hosts: tuple[str, ...] = ()
    port: int = 29400
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""
    python: str = "python"
    mpi: str = "openmpi"
    restarts: int = 3
    lead_seconds: int = 120
    options: tuple[str, ...] = ()
    sweep: tuple[str, ...] = ()
    command: tuple[str, ...] = EXAMPLE

    def __post_init__(self) -> None:
        _check_word("backend", self.backend, BACKENDS)
        _check_word("mpi", self.mpi, ("openmpi", "mpich"))
        for name, (pattern, meaning) in _RULES.items():
            _check_text(name, getattr(self, name), pattern, meaning)
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise _wrong(name, value, f"a whole number from {low} to {high}")
        for name in ("hosts", "options", "sweep", "command"):
            if not all(isinstance(one, str) and _is_text(one) for one in getattr(self, name)):
                raise _wrong(name, getattr(self, name), "a list of texts, in Unicode and without zero bytes")
        self._check_parts()
        self._check_together()

    @property
    def runs_train(self) -> bool:
        """Whether the command is `edl train`, which can go on from its own checkpoints."""
        return self.command[0] == "train"

    @property
    def out(self) -> str:
        """The run's folder: that of --out, of the configuration file if it is here, else runs/ and the job's name."""
        return self.given_out or str(PurePosixPath("runs") / self.name)

    @property
    def given_out(self) -> str | None:
        """The run's folder, if the command names one."""
        if (out := _option(self.command, "--out")) is not None:
            return out
        file = _option(self.command, "--config")
        return None if file is None else _out_of(Path(self.folder) / file)

    @property
    def begins_again(self) -> bool:
        """Whether the backend starts a job that failed once more, in the folder of the first time."""
        return self.backend not in ("local", "mpirun")

    @property
    def settings(self) -> list[list[str]]:
        """The words of each setting of the sweep."""
        return [shlex.split(one) for one in self.sweep]

    def _check_parts(self) -> None:
        for host in self.hosts:
            _check_text("hosts", host, _HOST, "names or addresses, with user@ before them if need be")
        for name, value in self.environment.items():
            _check_text("environment", name, _VARIABLE, "names of variables")
            _check_text(f"environment.{name}", value, r"[^\0]*", "text")
        for one in self.options:
            _check_text(
                "options", one, r"-[^\0\n]+", "words that begin with a dash, as --exclusive or --mca=btl=tcp"
            )
        for one in self.sweep:
            try:
                shlex.split(one)
            except ValueError as error:
                raise _wrong("sweep", one, f"words as in a shell ({error})") from None
        if not self.command or not self.command[0]:
            raise _wrong(
                "command", list(self.command), "what to run", "edl launch local -- train --model gpt-micro"
            )
        _check_program(self.command[0])
        if self.command[0] == "-m" and len(self.command) < 2:
            raise _wrong("command", list(self.command), "a module after -m")

    def _check_together(self) -> None:
        if self.gpus and self.gpus < self.workers:
            raise _wrong("gpus", self.gpus, f"one for each of the {self.workers} workers of a node, or 0")
        if self.backend == "local" and self.nodes != 1:
            raise _wrong(
                "nodes",
                self.nodes,
                "1, on this machine",
                "for more choose torchrun, slurm, mpirun or kubernetes",
            )
        if self.hosts and self.backend not in ("torchrun", "mpirun"):
            raise _wrong("hosts", list(self.hosts), f"none: {self.backend} chooses them")
        if self.hosts and len(self.hosts) != self.nodes:
            raise _wrong("hosts", list(self.hosts), f"as many as nodes, {self.nodes}")
        if self.sweep and self.backend != "slurm":
            raise _wrong("sweep", list(self.sweep), "backend slurm, which has job arrays")
        if self.image and self.backend not in ("slurm", "kubernetes"):
            raise _wrong("image", self.image, "backend slurm or kubernetes, which start containers")
        if self.backend == "kubernetes" and self.folder and not self.folder.startswith("/"):
            raise _wrong("folder", self.folder, "an absolute path in the container")
        if self.begins_again and self.runs_train:
            self._check_begun_again()
        if self.command[0] in OWN_COMMANDS and _option(self.command, "--workers"):
            raise _wrong(
                "command", shlex.join(self.command), "no --workers: it belongs before --, to edl launch"
            )
        if self.sweep and self.runs_train and any(_option(words, "--out") for words in self.settings):
            raise _wrong(
                "sweep", list(self.sweep), "no --out: each job of the array gets its own folder in the run's"
            )

    def _check_begun_again(self) -> None:
        words = [*self.command, *(word for one in self.settings for word in one)]
        if {"--resume", "--resume-or-start"} & set(words):
            raise _wrong("command", shlex.join(words), "no --resume: jobs that begin again do it themselves")
        if any(word.removeprefix("--set=").startswith("run.out=") for word in words):
            raise _wrong("command", shlex.join(words), "no run.out: it would not be found again", "--out DIR")


def described_job(backend: str, file: Path | None, given: Mapping[str, Any], dry_run: bool = False) -> Job:
    """The job that a TOML file and flags describe, flags first. given: fields that were set, by name.

    dry_run: without a command it is an example's. Raises ConfigError, also for a flag that the backend does not use; a
    file may be for several of them.
    """
    known = {one.name for one in dataclasses.fields(Job)} - {"backend"}
    values: dict[str, Any] = {"nodes": 1} if backend == "local" else {}
    if file is not None:
        for key, value in _table(file).items():
            if key not in known:
                raise ConfigError(
                    f"unknown key {key!r} of a job", where=str(file), fix=suggestion(key, sorted(known))
                )
            values[key] = _frozen(key, value, str(file))
    for name in given:
        if backend not in _USED_BY.get(name, BACKENDS):
            flag = "option" if name == "options" else name.replace("_", "-")
            raise ConfigError(
                f"edl launch {backend} has no use for --{flag}",
                expected=f"{', '.join(_USED_BY[name])}",
                fix="leave it out; in a job's file it may stand for other backends",
            )
    environment = {**values.get("environment", {}), **given.get("environment", {})}
    values |= {**given, "environment": environment}
    if "command" not in values and not dry_run:
        raise ConfigError(
            "nothing to run",
            expected="a command after --",
            fix=f"edl launch {backend} -- {shlex.join(EXAMPLE)}",
        )
    return Job(backend, **values)


def variables(texts: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE as a table; raises ConfigError."""
    pairs = [text.partition("=") for text in texts]
    for name, equals, _ in pairs:
        if not equals:
            raise ConfigError("not a variable", expected="--env NAME=VALUE", found=name)
    return {name: value for name, _, value in pairs}


def command_words(job: Job, more: Sequence[str] = ()) -> list[str]:
    """The command with its first words as a rank's Python takes them: ["-m", "efficient_dl.cli", "train", ...]."""
    own = job.command[0] in OWN_COMMANDS
    return [*(("-m", "efficient_dl.cli") if own else ()), *job.command, *more]


def is_python(job: Job) -> bool:
    """Whether Python runs the command; else it is a program of its own."""
    first = job.command[0]
    return first in OWN_COMMANDS or first == "-m" or first.endswith(".py")


def without_out(job: Job) -> Job:
    """The job without --out, which a backend then adds itself."""
    kept: list[str] = []
    words = iter(job.command)
    for word in words:
        if word == "--out":
            next(words, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return dataclasses.replace(job, command=tuple(kept))


def _option(words: Sequence[str], name: str) -> str | None:
    for position, word in enumerate(words):
        if word == name and position + 1 < len(words):
            return words[position + 1]
        if word.startswith(f"{name}="):
            return word[len(name) + 1 :]
    return None


def _out_of(file: Path) -> str | None:
    """The run's folder in a configuration file; None without one, or if the file is not here."""
    try:
        run = tomllib.loads(file.read_text(encoding="utf-8")).get("run", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return None
    return (str(run.get("out") or "") or None) if isinstance(run, dict) else None


def _table(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            "the job's description cannot be read",
            expected="a TOML file",
            found=str(error),
            where=str(file),
            fix='lines look like: nodes = 2, command = ["train", "--bits", "2.0"]',
        ) from None


def _frozen(key: str, value: Any, where: str) -> Any:
    wants_list, wants_table = key in ("hosts", "options", "sweep", "command"), key == "environment"
    if wants_list != isinstance(value, list) or wants_table != isinstance(value, dict):
        expected = "a list of texts" if wants_list else "a table of texts" if wants_table else "one value"
        raise ConfigError(f"{key} of a job cannot be {value!r}", expected=expected, where=where)
    return tuple(value) if wants_list else value


def _check_program(first: str) -> None:
    is_path = "." in first or "/" in first
    close = difflib.get_close_matches(first, OWN_COMMANDS, n=1, cutoff=0.7)
    if (
        close
        and not is_path
        and first not in OWN_COMMANDS
        and not Path(first).exists()
        and shutil.which(first) is None
    ):
        fix = f"did you mean {close[0]}? or give the path of a program, a .py file, or -m MODULE"
        raise ConfigError(f"there is no command {first!r}", fix=fix)
    if first.startswith("-") and first != "-m":
        raise _wrong(
            "command", first, "a command before its options", "edl launch slurm --nodes 2 -- train --bits 2.0"
        )


def _check_word(name: str, value: Any, words: Sequence[str]) -> None:
    if value not in words:
        raise ConfigError(f"{name} of a job cannot be {value!r}", fix=suggestion(str(value), words))


def _check_text(name: str, value: Any, pattern: str, meaning: str) -> None:
    if not isinstance(value, str) or not _is_text(value) or re.fullmatch(pattern, value, re.DOTALL) is None:
        raise _wrong(name, value, meaning)


def _is_text(value: str) -> bool:
    """False for what no script can hold: a zero byte, and the halves of a character that is not UTF-8."""
    return "\0" not in value and not any(0xD800 <= ord(one) <= 0xDFFF for one in value)


def _wrong(name: str, value: Any, expected: str, fix: str | None = None) -> ConfigError:
    return ConfigError(
        f"{name} of a job cannot be {value!r}", expected=expected, fix=fix or "see docs/launch.md"
    )
