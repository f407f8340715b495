"""What comes before a study: new, doctor."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from trainer.errors import UserError
from tuner.cli.terminal import (
    RunRoot,
    Storage,
)


def new(
    name: Annotated[Path, typer.Argument(help="A folder to make; the study takes its name.", show_default=False)],
) -> None:
    """Write a small study that runs as it is, to put your own model into.

    Example: tuner new my-study
    """
    from tuner.new import new

    print(new(name))


def doctor(
    spec: Annotated[Path | None, typer.Argument(help="A study.toml. Without it: the machine alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, help="GB: judge for a CUDA card of this size, here or not.")
    ] = None,
    storage: Storage = None,
    run_root: RunRoot = Path("runs"),
) -> None:
    """Say what a run needs, memory above all, and what is amiss. Exits 1 where something is.

    Example: tuner doctor studies/indextts2/study.toml --gpu-memory 25.3
    """
    if gpu_memory is not None and not math.isfinite(gpu_memory):
        raise UserError(f"--gpu-memory {gpu_memory}: give the card's memory in GB, such as 25.3.")
    from rich.console import Console

    from tuner.doctor.check import as_json as plain
    from tuner.doctor.check import has_failed, show
    from tuner.doctor.examine import examine

    checks = examine(spec, run_root=run_root, gpu_memory=gpu_memory and gpu_memory * 1e9, storage=storage)
    if as_json:
        print(json.dumps(plain(checks), indent=1))
    else:
        show(checks, Console())
    if has_failed(checks):
        raise typer.Exit(1)
