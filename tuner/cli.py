"""The command line: `tuner --help`. Thin: every command is one call of the Python API.

A user's mistake is one line on stderr and exit code 2; a run that was stopped and can be continued exits 130.
Heavy imports happen inside the commands, so that help is quick.
"""

from __future__ import annotations

import json
import logging
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.errors import UserError
from tuner.terminal import (
    STOPPED,
    Format,
    LogFormat,
    Overrides,
    RunRoot,
    Spec,
    Storage,
    Track,
    explained,
    follow_run,
    follow_study,
    parse_duration,
    show_log,
    shown_log,
    stoppable,
)

if TYPE_CHECKING:
    from trainer import TrainResult
    from tuner.display.events import RunEvents
    from tuner.display.run import RunDisplay

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
    workers: Annotated[int, typer.Option(min=1, help="Trials at once, each on a GPU of its own.")] = 1,
    storage: Storage = None,
    run_root: RunRoot = Path("runs"),
    track: Track = True,
    log_format: LogFormat = Format.auto,
) -> None:
    """Start a study, or continue it where it was.

    Example: tuner launch studies/indextts2/study.toml --timeout 8h
    """
    seconds = parse_duration(timeout) if timeout else None
    from rich.console import Console

    from trainer.tracking import aim_command
    from tuner.doctor.quick import before_spec, check_first
    from tuner.launcher import launch, open_study
    from tuner.run import Runtime
    from tuner.spec import StudySpec
    from tuner.storage import storage_url

    console = Console(stderr=log_format == Format.json)
    study_spec = StudySpec.load(spec)
    check_first(before_spec(study_spec, run_root, storage=storage_url(storage)))
    with shown_log(log_format):
        # The first look at the data may index and pack it, which takes its time.
        study = open_study(study_spec, storage)
    with stoppable(console.print) as stop, shown_log(log_format, logging.WARNING):
        runtime = Runtime(run_root, track, stop)
        total = trials or study_spec.trial.num_trials
        with follow_study(study, study_spec, total=total, log_format=log_format) as display:
            launch(
                study_spec,
                storage=study._storage,
                runtime=runtime,
                num_trials=trials,
                timeout=seconds,
                num_workers=workers,
                display=display,
            )
        name = study_spec.study.name
        if stop():
            console.print("Stopped with a checkpoint. The same command goes on.", highlight=False)
            raise typer.Exit(STOPPED)
    at = f" --storage {storage}" if storage else ""
    root = f" --run-root {run_root}" if run_root != Path("runs") else ""
    aim = f" | {aim_command(run_root)}" if track else ""
    console.print(
        f"Next: tuner status {name}{at} | tuner dashboard{at} | tuner promote {name}{at}{root}{aim}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def status(
    study: Annotated[str | None, typer.Argument(help="Name of a study. Without it: all studies.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    follow: Annotated[bool, typer.Option("--watch", help="Show it anew every few seconds, until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks of --watch.")] = 2.0,
    storage: Storage = None,
) -> None:
    """Trials, their curves, the best one, and full runs.

    Example: tuner status indextts2-ko --watch
    """
    if follow and as_json:
        raise UserError("--watch is for people: leave it or --json out.")
    from rich.console import Console

    from tuner.report import print_status, print_studies, status, watch
    from tuner.storage import load_study, open_storage

    opened = open_storage(storage, must_exist=True)
    if follow:
        watch(opened, load_study(study, opened) if study else None, interval=interval, console=Console())
    elif study is None:
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
    log_format: LogFormat = Format.auto,
) -> None:
    """Train the full run with the best trial's settings, or continue it.

    Example: tuner promote indextts2-ko --confirm 3
    """
    if confirm is None and (seeds or rung):
        raise UserError("--seeds and --rung belong to a confirmation: give --confirm 3 too.")
    if confirm is not None and trial is not None:
        raise UserError(f"--confirm chooses the trial itself: leave --trial {trial} or --confirm out.")
    from rich.console import Console

    from tuner.display.events import confirmation_ended
    from tuner.doctor.data import check_paths
    from tuner.doctor.quick import check_first, quick
    from tuner.full.confirmation import confirm as confirm_best
    from tuner.full.promotion import promote
    from tuner.objective import Interrupted
    from tuner.report import confirmation_table
    from tuner.run import Runtime
    from tuner.storage import load_study, open_storage, storage_url
    from tuner.trials import stored_spec

    check_first(quick(run_root, study=study, storage=storage_url(storage)))
    show_log(log_format)
    opened = load_study(study, open_storage(storage, must_exist=True))
    check_first(check_paths(stored_spec(opened).build_workload()))
    console = Console(stderr=log_format == Format.json)
    with stoppable(console.print) as stop, explained():
        runtime, confirmed = Runtime(run_root, track, stop), None
        if confirm is not None:
            try:
                confirmed = confirm_best(
                    opened,
                    confirm,
                    num_seeds=seeds or 2,
                    rung=rung,
                    runtime=runtime,
                    follow=partial(follow_run, log_format=log_format),
                )
            except Interrupted:
                console.print("Stopped with a checkpoint; the same command goes on.")
                raise typer.Exit(STOPPED) from None
            console.print(confirmation_table(confirmed))
            console.print(confirmed.verdict, markup=False, highlight=False, soft_wrap=True)
            if log_format == Format.json:
                confirmation_ended(study, confirmed)
        with follow_run(f"full run of {study}", log_format) as run:
            result = promote(
                opened, trial=trial, confirmed=confirmed, steps=steps, fresh=fresh, runtime=runtime, trackers=[run]
            )
    _finish(run, result, "the same command")


@app.command()
def train(
    spec: Spec,
    override: Overrides = None,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint to continue from.")] = "auto",
    init: Annotated[Path | None, typer.Option(help="Take the weights of this checkpoint for step 0.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help=r"\[default: RUN_ROOT/<study>/train]")] = None,
    run_root: RunRoot = Path("runs"),
    track: Track = True,
    log_format: LogFormat = Format.auto,
) -> None:
    """A full run without a study: the spec's [train] and [full] as they are.

    Example: tuner train studies/indextts2/study.toml --set train.batch_size=16 --set full.steps=50_000
    """
    from rich.console import Console

    from tuner.doctor.quick import before_spec, check_first
    from tuner.run import Runtime, tracked_train
    from tuner.search_space import full_setup
    from tuner.spec import StudySpec, parse_override

    show_log(log_format)
    say = Console(stderr=log_format == Format.json).print
    study_spec = StudySpec.load(spec, dict(parse_override(text) for text in override or []), search=False)
    check_first(before_spec(study_spec, run_dir or run_root))
    name = study_spec.study.name
    with stoppable(say) as stop, explained(), follow_run(f"{name}, full run without a study", log_format) as run:
        runtime = Runtime(run_root, track, stop)
        result = tracked_train(
            full_setup(study_spec, {}),
            run_dir.resolve() if run_dir else runtime.run_dir(name, "train"),
            runtime,
            experiment=name,
            lineage={"spec": str(spec.resolve()), "overrides": override or []},
            trackers=[run],
            resume=resume,
            init=init.resolve() if init else None,
        )
    _finish(run, result, "with --resume auto it" if resume == "never" else "the same command")


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


def _finish(run: RunDisplay | RunEvents, result: TrainResult, again: str) -> None:
    run.ended(result)
    if not result.finished:
        print(f"Stopped with a checkpoint; {again} goes on.", file=sys.stderr if run.as_json else sys.stdout)
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
