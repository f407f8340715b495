"""The command line: `tuner --help`. Each command is one call of the Python API.

A UserError is one line on stderr and exit code 2. A stopped run exits with 130, or 3 if its guard stopped it.
Heavy imports are inside the commands: `--help` stays fast.
"""

from __future__ import annotations

import errno
import os
import sys
from importlib.metadata import version as version_of
from io import TextIOWrapper
from typing import Annotated

import typer

from trainer.errors import UserError
from tuner.cli import setup, storage, study, training
from tuner.cli.terminal import STOPPED

app = typer.Typer(
    help="Tune a training run with short trials, inspect the study, and promote the best trial to the full run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
REMEDIES = {
    errno.ELOOP: "remove that symbolic link, or name another path",
    errno.ENAMETOOLONG: "use shorter names",
    errno.ENOSPC: "free some space on that disk, then run this again",
    errno.EDQUOT: "free some space within your quota, then run this again",
    errno.EROFS: "choose another --run-root or --storage, on a disk that can be written",
}
"""Remedies for errors of the operating system, which are no bugs of this program."""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"prodigy-tuner {version_of('prodigy-tuner')}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """The options before a command."""
    if context.obj is not None:
        from tuner.cli.ranks import check_command

        check_command(context.invoked_subcommand)


# In the order of the help.
for command in (
    study.launch,
    study.worker,
    study.status,
    study.report,
    study.dashboard,
    study.promote,
    training.train,
    training.evaluate,
    training.average,
    training.export,
    training.bench,
    setup.new,
    setup.doctor,
    setup.notify,
):
    app.command()(command)
app.add_typer(storage.app, name="storage")


def main() -> None:
    """Run the command in `sys.argv`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A terminal without UTF-8 must not end a run, for example at a path in Korean.
            stream.reconfigure(errors="backslashreplace")
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
            from tuner.cli.ranks import run_on_ranks  # imports torch

            run_on_ranks(app)
        # Typer would draw a box around its own errors.
        sys.exit(app(standalone_mode=False) or 0)
    except KeyboardInterrupt:
        sys.exit(STOPPED)
    except Exception as error:
        if (line := _explain(error)) is None:
            raise
        if line:
            print(f"tuner: {line}", file=sys.stderr)
        sys.exit(2)


def _explain(error: Exception) -> str | None:
    """A mistake of the user in one line, "" if it was printed; None for a defect."""
    if isinstance(error, UserError | PermissionError | NotADirectoryError | FileExistsError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error}: {REMEDIES[error.errno]}." if error.errno in REMEDIES else None
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return f"{error}: remove that link, or name another path."
    if hasattr(error, "format_message"):  # of typer, whose base class is private
        context = getattr(error, "ctx", None)
        text, command = " ".join(error.format_message().split()), context.command_path if context else "tuner"
        text += "" if text[-1:] in ("", ".", "?") else "."
        # Without a command the help was printed.
        return text and f"{text} {command} --help lists what there is."
    return None
