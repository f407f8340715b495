"""The command line: `tuner --help`. Thin: every command is one call of the Python API.

A user's mistake is one line on stderr and exit code 2; a run that was stopped and can be continued exits 130.
Heavy imports happen inside the commands, so that help is quick.
"""

from __future__ import annotations

import sys

import typer

from trainer.errors import UserError
from tuner.cli import setup, study, training
from tuner.cli.terminal import STOPPED

app = typer.Typer(
    help="Tune a training run with short trials, look at the study, promote the best trial to the full run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# In the order of the help.
for command in (
    study.launch,
    study.status,
    study.dashboard,
    study.promote,
    training.train,
    training.evaluate,
    training.export,
    training.bench,
    setup.new,
    setup.doctor,
):
    app.command()(command)


def main() -> None:
    """Run a command as `sys.argv` says."""
    try:
        app()
    except (UserError, PermissionError, NotADirectoryError, FileExistsError) as error:
        print(f"tuner: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(STOPPED)
