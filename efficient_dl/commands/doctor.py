"""edl doctor: what this machine has."""

from __future__ import annotations

from efficient_dl.commands.reporting import reported

EXAMPLE = """
[bold]Example[/bold]

  edl doctor
"""


def doctor() -> None:
    """Say what this machine has: versions, codec kernels, cores, GPUs, data, network namespaces."""
    with reported():
        from efficient_dl.training.doctor import print_report

        print_report()
