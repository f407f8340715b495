"""The command line: `tuner --help`. Thin: every command is one call of the Python API.

A user's mistake is one line on stderr and exit code 2; a run that was stopped and can be continued exits 130.
Heavy imports happen inside the commands, so that help is quick.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.errors import UserError
from tuner.terminal import (
    STOPPED,
    Overrides,
    RunRoot,
    Spec,
    Storage,
    Track,
    explained,
    parse_duration,
    show_log,
    shown_log,
    stoppable,
)

if TYPE_CHECKING:
    from trainer import TrainResult

app = typer.Typer(
    help="Tune a training run with short trials, look at the study, promote the best trial to the full run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    with shown_log():
        # The first look at the data may index and pack it, which takes its time.
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
    from tuner.dashboard.server import make_dashboard
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
    trial: Annotated[int | None, typer.Option(min=0, help=r"Promote this trial. \[default: the best]")] = None,
    confirm: Annotated[
        int | None, typer.Option(min=1, help="First run so many of the best, and the baseline, for longer.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help=r"Seeds of a confirmation. \[default: 2]")] = None,
    rung: Annotated[
        int | None, typer.Option(min=1, help="Length of the confirmation, in samples if the trials' is.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start at step 0, not from a checkpoint.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Length of the full run in optimizer updates.")] = None,
    storage: Storage = None,
    run_root: RunRoot = Path("runs"),
    track: Track = True,
) -> None:
    """Train the full run with the best trial's settings, or continue it.

    Example: tuner promote indextts2-ko --confirm 3
    """
    if confirm is None and (seeds or rung):
        raise UserError("--seeds and --rung belong to a confirmation: give --confirm 3 too.")
    if confirm is not None and trial is not None:
        raise UserError(f"--confirm chooses the trial itself: leave --trial {trial} or --confirm out.")
    from rich.console import Console

    from tuner.full.confirmation import confirm as confirm_best
    from tuner.full.promotion import promote
    from tuner.objective import Interrupted
    from tuner.report import confirmation_table
    from tuner.run import Runtime
    from tuner.storage import load_study, open_storage

    show_log()
    opened = load_study(study, open_storage(storage, must_exist=True))
    with stoppable(print) as stop, explained():
        runtime, confirmed = Runtime(run_root, track, stop), None
        if confirm is not None:
            try:
                confirmed = confirm_best(opened, confirm, num_seeds=seeds or 2, rung=rung, runtime=runtime)
            except Interrupted:
                print("Stopped with a checkpoint; the same command goes on.")
                raise typer.Exit(STOPPED) from None
            Console().print(confirmation_table(confirmed))
            print(confirmed.verdict)
        result = promote(opened, trial=trial, confirmed=confirmed, steps=steps, fresh=fresh, runtime=runtime)
    _finish(result, "the same command")


@app.command()
def train(
    spec: Spec,
    override: Overrides = None,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint to continue from.")] = "auto",
    init: Annotated[Path | None, typer.Option(help="Take the weights of this checkpoint for step 0.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help=r"\[default: RUN_ROOT/<study>/train]")] = None,
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
    study_spec = StudySpec.load(spec, dict(parse_override(text) for text in override or []), search=False)
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


@app.command()
def evaluate(
    spec: Spec,
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint, a run directory, or a gpt.pth.", show_default=False)],
    samples: Annotated[int | None, typer.Option(min=1, help="Only so many of the set, in place of all.")] = None,
    override: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """A checkpoint's metrics on the spec's validation data, dropout off.

    Example: tuner evaluate studies/indextts2/study.toml --checkpoint checkpoints/gpt.pth
    """
    from tuner.full.evaluation import evaluate_checkpoint
    from tuner.spec import StudySpec, parse_override

    if not as_json:
        show_log()
    study_spec = StudySpec.load(spec, dict(parse_override(text) for text in override or []), search=False)
    with explained():
        found = evaluate_checkpoint(study_spec, checkpoint, samples=samples)
    values = ", ".join(f"{name} {value:.4f}" for name, value in found.metrics.items())
    print(json.dumps(found.to_dict()) if as_json else f"{found.checkpoint}, {found.samples:,} samples: {values}")


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    to: Annotated[Path, typer.Option(help="The file to write.", show_default=False)],
    checkpoint: Annotated[
        str | None, typer.Option(help="best_text, latest, a step or a path; left out: best_mel, else latest.")
    ] = None,
    format: Annotated[str | None, typer.Option(help="pth or safetensors; left out: by the name of the file.")] = None,
    spec: Annotated[Path | None, typer.Option(help="Take the workload from this study.toml.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a checkpoint's weights for inference, in the form of the base checkpoint.

    Example: tuner export runs/indextts2-ko/full-trial-00007 --to gpt.pth
    """
    from tuner.full.export import export

    show_log()
    done = export(run_dir, to, checkpoint=checkpoint, format=format, spec=spec, force=force)
    print(f"{done.path}: {done.num_bytes / 1e9:.2f} GB, from {done.checkpoint}, step {done.step}")


@app.command()
def bench(
    spec: Spec,
    rounds: Annotated[int, typer.Option(min=1, help="How often every row is measured.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps a row and round, after a warm-up.")] = 30,
    only: Annotated[
        list[str] | None, typer.Option(help="This row, or group of rows, and the baseline; may be repeated.")
    ] = None,
    override: Overrides = None,
    chart: Annotated[Path | None, typer.Option(help="Write the chart to this .svg file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What each optimization of a training run gives on this machine.

    Example: tuner bench studies/korean_demo/study.toml --chart speed.svg
    """
    from rich.console import Console

    from tuner.bench.report import check_chart_path, print_table, write_chart
    from tuner.bench.table import Bench
    from tuner.spec import StudySpec, parse_override

    if chart:
        check_chart_path(chart)
    study_spec = StudySpec.load(spec, dict(parse_override(text) for text in override or []), search=False)
    say = Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print
    measurement = Bench(study_spec, rounds=rounds, steps=steps, only=only or [], say=say)
    measurement.run()
    result = measurement.result()
    if chart:
        write_chart(result, chart)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        print_table(result, Console())
    if measurement.failed:
        raise typer.Exit(1)


@app.command()
def new(
    name: Annotated[Path, typer.Argument(help="A folder to make; the study takes its name.", show_default=False)],
) -> None:
    """Write a small study that runs as it is, to put your own model into.

    Example: tuner new my-study
    """
    from tuner.new import new

    print(new(name))


@app.command()
def doctor(
    spec: Annotated[Path | None, typer.Argument(help="A study.toml. Without it: the installation alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, help="GB: judge for a CUDA card of this size, here or not.")
    ] = None,
    run_root: RunRoot = Path("runs"),
) -> None:
    """Say what a run needs, memory above all, and what is amiss. Exits 1 where something is.

    Example: tuner doctor studies/indextts2/study.toml --gpu-memory 25.3
    """
    from rich.console import Console

    from tuner import doctor

    checks = doctor.examine(spec, run_root=run_root, gpu_memory=gpu_memory and gpu_memory * 1e9)
    if as_json:
        print(json.dumps(doctor.as_json(checks), indent=1))
    else:
        doctor.show(checks, Console())
    if doctor.has_failed(checks):
        raise typer.Exit(1)


def _finish(result: TrainResult, again: str) -> None:
    values = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    print(f"step {result.step}, {result.samples} samples: {values or 'not validated yet'}")
    print(f"checkpoints: {result.run_dir}")
    if not result.finished:
        print(f"Stopped with a checkpoint; {again} goes on.")
        raise typer.Exit(STOPPED)


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
