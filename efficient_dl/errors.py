"""What a user can get wrong, as exceptions that name the problem, the place and the fix."""

from __future__ import annotations


class EdlError(Exception):
    """An error that a user can act on; the command line prints it without a traceback.

    problem: one line, what is wrong. expected, found, differs, where, fix: further lines, each printed if given.
    `exit_code` is the process's exit status when the error ends a command.
    """

    exit_code = 1

    def __init__(
        self,
        problem: str,
        *,
        expected: str | None = None,
        found: str | None = None,
        differs: str | None = None,
        where: str | None = None,
        fix: str | None = None,
    ) -> None:
        details = {"expected": expected, "found": found, "differs": differs, "where": where, "fix": fix}
        self.problem = problem
        self.details = {name: text for name, text in details.items() if text is not None}
        super().__init__("\n".join([problem, *(f"  {name}: {text}" for name, text in self.details.items())]))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.problem, self.details)


def _rebuild(kind: type[EdlError], problem: str, details: dict[str, str]) -> EdlError:
    return kind(problem, **details)


class ConfigError(EdlError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""

    exit_code = 2


class DataError(EdlError):
    """Training data is missing, unreadable or not what the run was started with."""

    exit_code = 3


class PlanMismatch(EdlError):
    """Ranks disagree about what they are about to do together."""

    exit_code = 4


class RanksDiverged(EdlError):
    """Parameters that must be bitwise equal on all ranks are not."""

    exit_code = 5


class TransportError(EdlError):
    """A collective failed or timed out: a peer is dead, stuck or unreachable."""

    exit_code = 6


class CheckpointError(EdlError):
    """A checkpoint is missing, damaged or belongs to another run."""

    exit_code = 7


class DiskFull(EdlError):
    """There is no room left where the run writes."""

    exit_code = 8


class LaunchError(EdlError):
    """Workers cannot be started, or the launcher's environment contradicts the command."""

    exit_code = 9


class RankStuck(EdlError):
    """A rank makes no progress, and the others wait for it."""

    exit_code = 10


class UnsupportedTensor(EdlError, TypeError):
    """A tensor's dtype, layout, device or size is not one a codec takes."""


class CorruptPacket(EdlError, ValueError):
    """Bytes that are not a packet of this format, or were damaged on the way."""


class SideMismatch(CorruptPacket):
    """Encoder and decoder were given different side information."""


class NativeLibraryMissing(EdlError, ImportError):
    """The compiled codec kernels are not built, or of another version."""


class PackageMissing(EdlError, ImportError):
    """An optional package that a setting needs is not installed."""
