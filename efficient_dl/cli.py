"""The command line `edl`: its commands, each a file of efficient_dl/commands, and its entry point."""

from __future__ import annotations

import os
import signal

import typer

from efficient_dl.commands import demo, doctor, launch, probe, train
from efficient_dl.commands.reporting import leave_at_once, reported
from efficient_dl.launching.ends import tell_end
from efficient_dl.reproduce import add_to as add_reproduce

app = typer.Typer(
    name="edl",
    help="Distributed training in torch with entropy-coded gradients: lossless, or about two bits a value.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command(epilog=train.EXAMPLE)(train.train)
app.command(epilog=demo.EXAMPLE)(demo.demo)
app.command(epilog=probe.EXAMPLE)(probe.probe)
app.command(name="launch", epilog=launch.EXAMPLE)(launch.launch_job)
app.command(epilog=doctor.EXAMPLE)(doctor.doctor)
add_reproduce(app, reported)


def main() -> None:
    """The entry point of `edl`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave_at_once)  # until torch is imported, which takes seconds
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the engine's warnings repeat what our errors say
    try:
        app()
    except SystemExit as end:  # done, or a flag that does not exist
        tell_end(end.code if isinstance(end.code, int) else int(end.code is not None), os.environ)
        raise


if __name__ == "__main__":
    main()
