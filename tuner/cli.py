"""The command line: `tuner --help`. Thin: every command is one call of the Python API.

A user's mistake is one line on stderr and exit code 2; a run that was stopped and can be continued exits 130.
Heavy imports happen inside the commands, so that help is quick.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer import TrainResult

app = typer.Typer(
    help="Tune a training run with short trials, look at the study, promote the best trial to the full run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Spec = Annotated[Path, typer.Argument(help="A study.toml.", show_default=False)]
Storage = Annotated[
    str | None, typer.Option(help="Database URL. [default: $TUNER_STORAGE, else sqlite:///runs/tuner.db]")
]
RunRoot = Annotated[Path, typer.Option(help="Folder of the run directories and of the Aim repository.")]
Track = Annotated[bool, typer.Option("--track/--no-track", help="Write losses and d to Aim.")]

STOPPED = 130


@app.command()
def launch(
    spec: Spec,
    trials: Annotated[int | None, typer.Option(min=1, help="The study's total, in place of the spec's.")] = None,
    timeout: Annotated[str | None, typer.Option(help="Stop after this time: 8h, 30m, 90s.")] = None,
    storage: Storage = None,
    run_root: RunRoot = Path("runs"),
    track: Track = True,
) -> None:
    """Start a study, or continue it where it was.

    Example: tuner launch studies/indextts2/study.toml --timeout 8h
    """
    seconds = parse_duration(timeout) if timeout else None
    from rich.console import Console

    from tuner.display import StudyDisplay
    from tuner.launcher import launch, open_study
    from tuner.run import Runtime
    from tuner.spec import StudySpec

    console = Console()
    study_spec = StudySpec.load(spec)
    study = open_study(study_spec, storage)
    with stoppable(console.print) as stop:
        runtime = Runtime(run_root, track, stop)
        total = trials or study_spec.trial.num_trials
        with StudyDisplay(study, study_spec, total=total, console=console) as display:
            launch(
                study_spec,
                storage=study._storage,
                runtime=runtime,
                num_trials=trials,
                timeout=seconds,
                display=display,
            )
        name = study_spec.study.name
        if stop():
            console.print("Stopped with a checkpoint. The same command goes on.", highlight=False)
            raise typer.Exit(STOPPED)
    at = f" --storage {storage}" if storage else ""
    root = f" --run-root {run_root}" if run_root != Path("runs") else ""
    console.print(
        f"Next: tuner status {name}{at} | tuner dashboard{at} | tuner promote {name}{at}{root}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def status(
    study: Annotated[str | None, typer.Argument(help="Name of a study. Without it: all studies.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    storage: Storage = None,
) -> None:
    """Trials, the best one, and full runs.

    Example: tuner status indextts2-ko --json
    """
    from tuner.report import print_status, print_studies, status
    from tuner.storage import load_study, open_storage

    opened = open_storage(storage, must_exist=True)
    if study is None:
        print_studies(opened, as_json=as_json)
    elif as_json:
        print(json.dumps(status(load_study(study, opened)), indent=1))
    else:
        print_status(load_study(study, opened))


@app.command()
def dashboard(
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    host: Annotated[str, typer.Option(help="Interface to listen on.")] = "127.0.0.1",
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse everything that changes a study.")] = False,
    storage: Storage = None,
) -> None:
    """Serve optuna-dashboard on the storage, behind a token.

    Example: tuner dashboard --read-only
    """
    from tuner.dashboard import make_dashboard
    from tuner.storage import open_storage

    opened = open_storage(storage, must_exist=True)
    server, address = make_dashboard(opened, host=host, port=port, read_only=read_only)
    print(f"Open {address}  (Ctrl-C stops)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


@app.command()
def promote(
    study: Annotated[str, typer.Argument(help="Name of a study.", show_default=False)],
    trial: Annotated[int | None, typer.Option(min=0, help="Promote this trial. [default: the best]")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Length of the full run in optimizer updates.")] = None,
    storage: Storage = None,
    run_root: RunRoot = Path("runs"),
    track: Track = True,
) -> None:
    """Train the full run with the best trial's settings, or continue it.

    Example: tuner promote indextts2-ko
    """
    from tuner.promotion import promote
    from tuner.run import Runtime
    from tuner.storage import load_study, open_storage

    show_log()
    opened = load_study(study, open_storage(storage, must_exist=True))
    with stoppable(print) as stop, explained():
        result = promote(opened, trial=trial, steps=steps, runtime=Runtime(run_root, track, stop))
    _finish(result, "the same command")


@app.command()
def train(
    spec: Spec,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, such as train.batch_size=16.")
    ] = None,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint to continue from.")] = "auto",
    init: Annotated[Path | None, typer.Option(help="Take the weights of this checkpoint for step 0.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="[default: RUN_ROOT/<study>/train]")] = None,
    run_root: RunRoot = Path("runs"),
    track: Track = True,
) -> None:
    """A full run without a study: the spec's [train] and [full] as they are.

    Example: tuner train studies/indextts2/study.toml --set train.batch_size=16 --set full.steps=50_000
    """
    from tuner.run import Runtime, tracked_train
    from tuner.search_space import full_setup
    from tuner.spec import StudySpec, parse_override

    show_log()
    study_spec = StudySpec.load(spec, dict(parse_override(text) for text in override or []))
    name = study_spec.study.name
    with stoppable(print) as stop, explained():
        runtime = Runtime(run_root, track, stop)
        result = tracked_train(
            full_setup(study_spec, {}),
            run_dir.resolve() if run_dir else runtime.run_dir(name, "train"),
            runtime,
            experiment=f"{name}.train",
            lineage={"spec": str(spec.resolve()), "overrides": override or []},
            resume=resume,
            init=init.resolve() if init else None,
        )
    _finish(result, "with --resume auto it" if resume == "never" else "the same command")


def _finish(result: TrainResult, again: str) -> None:
    values = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    print(f"step {result.step}, {result.samples} samples: {values or 'not validated yet'}")
    print(f"checkpoints: {result.run_dir}")
    if not result.finished:
        print(f"Stopped with a checkpoint; {again} goes on.")
        raise typer.Exit(STOPPED)


def parse_duration(text: str) -> float:
    """`8h`, `30m`, `90s` or `1h30m` in seconds.

    Raises:
        UserError: It is none of these.
    """
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    if not text.strip() or match is None:
        raise UserError(f"--timeout {text}: write it as 8h, 30m, 90s or 1h30m.")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds


def show_log() -> None:
    """The trainer's log on stdout, a line as it stands."""
    logging.basicConfig(format="%(message)s", stream=sys.stdout)


@contextmanager
def explained() -> Iterator[None]:
    """A run that can't go on with these settings ends with one line, not with a traceback."""
    from trainer import Diverged
    from tuner.objective import is_out_of_memory

    try:
        yield
    except Diverged as error:
        raise UserError(f"{error}: the loss diverged; lower train.d_coef or train.lr.") from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0]
        remedy = "use a smaller train.batch_size, with train.grad_accumulation for the same effective one"
        raise UserError(f"out of memory ({reason}): {remedy}.") from error


@contextmanager
def stoppable(say: Callable[[str], Any]) -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM asks the run to stop at the next step with a checkpoint; a second one stops at once."""
    asked: list[int] = []

    def ask(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        say("Stopping at the next step with a checkpoint; once more stops at once.")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    try:
        app()
    except (UserError, PermissionError, NotADirectoryError, FileExistsError) as error:
        print(f"tuner: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
