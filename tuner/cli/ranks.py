"""A command that torchrun has started as several processes: the first runs it, the others take part in its training."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

import typer

from trainer.errors import UserError
from trainer.loop import follow
from trainer.ranks import ALONE, RankLost, Ranks, join
from tuner.cli.terminal import stop_on_signals, user_errors

COMMANDS = ("promote", "train")
"""Those that share their training."""


def run_on_ranks(app: typer.Typer) -> NoReturn:
    """Run the command on the first rank, and follow it on the others, which print errors only; exits."""
    with join() as ranks:
        if ranks.is_first:
            sys.exit(app(obj=ranks, standalone_mode=False) or 0)
        logging.disable(logging.WARNING)
        try:
            with stop_on_signals(lambda text: None) as stop, user_errors():
                follow(ranks, stop)
        except RankLost:
            pass  # the first rank has ended, or tells of another one
        sys.exit()


def check_command(command: str | None) -> None:
    """Refuse a command that torchrun has started as several processes, unless it can share its work.

    Raises:
        UserError: It can't.
    """
    if command not in COMMANDS:
        raise UserError(f"tuner {command or ''} is one process: start it without torchrun, which is for full runs.")


def ranks_of(context: typer.Context) -> Ranks:
    """The processes of this command.

    Raises:
        UserError: Others are there, and torchrun did not start them.
    """
    count = os.environ.get("WORLD_SIZE", "")
    if context.obj is None and count not in ("", "1") and "TORCHELASTIC_RUN_ID" not in os.environ:
        raise UserError(f"WORLD_SIZE is {count}, and torchrun did not start this process: use torchrun, or unset it.")
    return context.obj or ALONE
