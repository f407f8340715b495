"""Commands before a study: new, doctor."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import Annotated

import typer

from trainer.errors import UserError
from tuner.cli.terminal import RunRoot, Storage


def new(
    name: Annotated[Path, typer.Argument(help="The folder to create, named like the study.", show_default=False)],
) -> None:
    """Create a small study that runs at once. Put your own model into it.

    Example: tuner new my-study
    """
    from tuner.new import new

    print(new(name))


def notify(
    spec: Annotated[Path | None, typer.Argument(help="A study.toml. Without it: $TUNER_NOTIFY.")] = None,
) -> None:
    """Send a test message to the receiver of a study's notifications.

    Example: tuner notify studies/indextts2/study.toml
    """
    from tuner.spec.beside import NotifySection
    from tuner.spec.study_toml import StudySpec
    from tuner.study.notify import NotSent, deliver, find_target

    target = find_target(StudySpec.load(spec, search=False).notify if spec else NotifySection())
    if target is None:
        raise UserError("there is no receiver: set $TUNER_NOTIFY to a webhook's address, or write [notify].")
    try:
        deliver(target, "test", f"a test message of tuner on {platform.node()}")
    except NotSent as error:
        raise UserError(
            f"{target.name} did not take the message ({error}): check the address and the network."
        ) from None
    print(f"sent to {target.name}")


def doctor(
    spec: Annotated[Path | None, typer.Argument(help="A study.toml. Without it: only machine and storage.")] = None,
    data: Annotated[bool, typer.Option("--data", help="Read all data of SPEC and judge it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    gpu_memory: Annotated[float | None, typer.Option(min=1, help="Assume a CUDA card of this size, in GB.")] = None,
    storage: Storage = None,
    run_root: RunRoot = Path("runs"),
) -> None:
    """Check the machine, the storage and a study before a run. Exits with 1 if a check fails.

    Example: tuner doctor studies/indextts2/study.toml --gpu-memory 25.3
    """
    if gpu_memory is not None and not math.isfinite(gpu_memory):
        raise UserError(f"--gpu-memory {gpu_memory}: give the card's memory in GB, such as 25.3.")
    if spec is not None and not spec.is_file():
        raise UserError(f"{spec}: no such study spec; give the path of a study.toml.")
    if data and spec is None:
        raise UserError("--data judges the data of a study: name its study.toml.")
    from rich.console import Console
    from rich.progress import Progress

    from tuner.doctor.check import as_json as plain
    from tuner.doctor.check import has_failed, show
    from tuner.doctor.examine import examine

    with Progress(console=Console(stderr=True), transient=True, disable=not data) as bar:
        task = bar.add_task("reading the data", total=None)
        checks = examine(
            spec,
            run_root=run_root,
            gpu_memory=gpu_memory and gpu_memory * 1e9,
            storage=storage,
            whole_data=data,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        print(json.dumps(plain(checks), indent=1))
    else:
        show(checks, Console())
    if has_failed(checks):
        raise typer.Exit(1)
