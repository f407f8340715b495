"""Commands on a study: launch, status, dashboard, promote."""

from __future__ import annotations

import logging
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from trainer.errors import UserError
from tuner.cli.terminal import (
    STOPPED,
    Format,
    LogFormat,
    Overrides,
    RunRoot,
    Spec,
    Storage,
    Track,
    finish,
    follow_run,
    follow_study,
    parse_duration,
    show_log,
    stop_on_signals,
    temporary_log,
    user_errors,
)


class Engine(StrEnum):
    """Where the workers of a launch run."""

    local = "local"
    ray = "ray"


def launch(
    spec: Spec,
    override: Overrides = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Total of the study, instead of trial.num_trials.")] = None,
    timeout: Annotated[str | None, typer.Option(help="Stop after this time: 8h, 30m, 90s.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of parallel trials, each on its own GPU.")] = 1,
    engine: Annotated[Engine, typer.Option(help="Where the workers run: here, or on a Ray cluster.")] = Engine.local,
    address: Annotated[
        str | None, typer.Option(help=r"Of the Ray cluster. \[default: $RAY_ADDRESS, else this machine]")
    ] = None,
    storage: Storage = None,
    run_root: RunRoot = Path("runs"),
    track: Track = True,
    log_format: LogFormat = Format.auto,
) -> None:
    """Start a study, or continue it.

    Example: tuner launch studies/indextts2/study.toml --timeout 8h --set trial.patience=6
    """
    if address and engine != Engine.ray:
        raise UserError(f"--address {address}: it belongs to --engine ray.")
    seconds = parse_duration(timeout) if timeout else None
    from rich.console import Console

    from trainer.trackers import installed_trackers
    from tuner import Runtime, StudySpec, api, open_study
    from tuner.doctor.quick import report_checks, run_spec_checks
    from tuner.spec.overrides import parse_overrides
    from tuner.study.record import StudyRecord
    from tuner.study.servers import hide_password
    from tuner.study.storage import storage_url

    console = Console(stderr=log_format == Format.json)
    study_spec = StudySpec.load(spec, parse_overrides(override))
    report_checks(run_spec_checks(study_spec, run_root, storage=storage_url(storage)))
    with temporary_log(log_format):
        # The first use of the data may index and pack it, with a log.
        study = open_study(study_spec, storage)
    with stop_on_signals(console.print, seconds) as stop, temporary_log(log_format, logging.WARNING):
        total = trials or study_spec.trial.num_trials
        with follow_study(study, study_spec, total=total, log_format=log_format) as display:
            api.launch(
                study_spec,
                study=study,
                runtime=Runtime(run_root, track, stop),
                num_trials=trials,
                timeout=seconds,
                num_workers=workers,
                engine=engine.value,
                address=address,
                display=display,
            )
        name = study_spec.study.name
        if stop():
            console.print("Stopped with a checkpoint. The same command continues it.", highlight=False)
            raise typer.Exit(STOPPED)
    at = f" --storage {hide_password(storage)}" if storage else ""
    root = f" --run-root {run_root}" if run_root != Path("runs") else ""
    # Without a feasible trial there is nothing to promote.
    promote = f" | tuner promote {name}{at}{root}" if StudyRecord.read(study).best else ""
    viewers = [f" | {kind.viewer(run_root)}" for kind in installed_trackers(study_spec.track.to if track else ())]
    console.print(
        f"Next: tuner status {name}{at} | tuner dashboard{at}{promote}{''.join(viewers)}",
        highlight=False,
        soft_wrap=True,
    )


def worker(
    study: Annotated[str, typer.Argument(help="Name of a study that was launched.", show_default=False)],
    timeout: Annotated[str | None, typer.Option(help="Stop after this time: 8h, 30m, 90s.")] = None,
    storage: Storage = None,
    run_root: RunRoot = Path("runs"),
    track: Track = True,
) -> None:
    """Run trials of a study until it needs no more, on this machine; its spec is the stored one.

    Example: tuner worker indextts2-ko --storage postgresql://me@host/studies
    """
    seconds = parse_duration(timeout) if timeout else None
    from rich.console import Console

    from tuner import Runtime, api
    from tuner.study.launch import join_study
    from tuner.study.storage import open_storage

    joined, spec = join_study(study, open_storage(storage, must_exist=True))
    console = Console()
    with stop_on_signals(console.print, seconds) as stop, temporary_log(Format.plain, logging.WARNING):
        total = spec.trial.num_trials
        with follow_study(joined, spec, total=total, log_format=Format.plain) as display:
            runtime = Runtime(run_root, track, stop)
            api.launch(spec, study=joined, runtime=runtime, timeout=seconds, display=display)
        if stop():
            console.print("Stopped with a checkpoint. The same command continues it.", highlight=False)
            raise typer.Exit(STOPPED)


def status(
    study: Annotated[str | None, typer.Argument(help="Name of a study. Without it: all studies.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    follow: Annotated[bool, typer.Option("--watch", help="Refresh every few seconds, until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between refreshes.")] = 2.0,
    storage: Storage = None,
) -> None:
    """Show the trials, their curves, the best trial and the full runs.

    Example: tuner status indextts2-ko --watch
    """
    if follow and as_json:
        raise UserError("--watch and --json exclude each other: leave one out.")
    from rich.console import Console

    from tuner.show.json_events import to_json
    from tuner.show.status import print_status, print_studies, status, watch
    from tuner.study.record import StudyRecord
    from tuner.study.storage import load_study, open_storage

    opened = open_storage(storage, must_exist=True)
    if follow:
        watch(opened, load_study(study, opened) if study else None, interval=interval, console=Console())
    elif study is None:
        print_studies(opened, as_json=as_json)
    elif as_json:
        print(to_json(status(StudyRecord.read(load_study(study, opened))), indent=1))
    else:
        print_status(StudyRecord.read(load_study(study, opened)))


def report(
    study: Annotated[str, typer.Argument(help="Name of a study.", show_default=False)],
    to: Annotated[Path, typer.Option(help="The .html file to write.", show_default=False)],
    storage: Storage = None,
) -> None:
    """Write a study as one HTML file to send to somebody: leaderboard, plots, full runs, samples.

    Example: tuner report indextts2-ko --to study.html
    """
    from trainer.units import format_bytes
    from tuner.show.report import write_report
    from tuner.study.record import StudyRecord
    from tuner.study.storage import load_study, open_storage

    path = write_report(StudyRecord.read(load_study(study, open_storage(storage, must_exist=True))), to)
    print(f"{path}: {format_bytes(path.stat().st_size)}")


def dashboard(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free port.")] = 8080,
    host: Annotated[str, typer.Option(help="Interface to listen on.")] = "127.0.0.1",
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse all changes.")] = False,
    storage: Storage = None,
) -> None:
    """Serve optuna-dashboard for the storage, protected by a token.

    Example: tuner dashboard --read-only
    """
    from tuner.show.server import make_dashboard
    from tuner.study.storage import open_storage

    opened = open_storage(storage, must_exist=True)
    server, address = make_dashboard(opened, host=host, port=port, read_only=read_only)
    print(f"Open {address}  (Ctrl-C stops)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


def promote(
    context: typer.Context,
    study: Annotated[str, typer.Argument(help="Name of a study.", show_default=False)],
    trial: Annotated[
        int | None, typer.Option(min=0, help=r"The trial to promote. \[default: the recommended one]")
    ] = None,
    confirm: Annotated[
        int | None, typer.Option(min=1, help="Confirm the best N trials and the baseline with longer runs first.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help=r"Seeds of the confirmation. \[default: 2]")] = None,
    rung: Annotated[int | None, typer.Option(min=1, help="Length of the confirmation, in the trials' unit.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start at step 0, not from the trial's checkpoint.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Length of the full run in steps.")] = None,
    end_now: Annotated[
        bool,
        typer.Option(
            "--finish",
            help="Let the learning rate fall to zero now, and end; a declining run does so from its best state.",
        ),
    ] = False,
    decay_steps: Annotated[
        int | None, typer.Option(min=1, help=r"Length of that decay. \[default: a fifth of the steps so far]")
    ] = None,
    storage: Storage = None,
    run_root: RunRoot = Path("runs"),
    track: Track = True,
    log_format: LogFormat = Format.auto,
) -> None:
    """Start or continue the full run, with a trial's settings. On several GPUs: torchrun -m tuner promote.

    Example: tuner promote indextts2-ko --confirm 3
    """
    if confirm is None and (seeds or rung):
        raise UserError("--seeds and --rung belong to a confirmation: give --confirm 3 too.")
    if end_now and (confirm is not None or steps or fresh):
        raise UserError("--finish ends the run that was started: leave --confirm, --steps and --fresh out.")
    if decay_steps and not end_now:
        raise UserError(f"--decay-steps {decay_steps} is the length of the decay of --finish: give --finish too.")
    if confirm is not None and trial is not None:
        raise UserError(f"--confirm chooses the trial itself: leave --trial {trial} or --confirm out.")
    from rich.console import Console

    from tuner import Runtime, api
    from tuner.cli.ranks import ranks_of
    from tuner.doctor.data import check_paths
    from tuner.doctor.quick import report_checks, run_quick_checks
    from tuner.promotion.length import LengthRequest
    from tuner.promotion.promote import check_before_confirmation
    from tuner.show.json_events import confirmation_ended
    from tuner.show.table import confirmation_table
    from tuner.study.notify import find_target
    from tuner.study.objective import Interrupted
    from tuner.study.record import read_spec
    from tuner.study.storage import load_study, open_storage, storage_url

    ranks = ranks_of(context)
    if confirm is not None and ranks.count > 1:
        raise UserError("--confirm trains on one GPU: confirm without torchrun, then promote the winner with it.")
    report_checks(run_quick_checks(run_root, study=study, storage=storage_url(storage)))
    show_log(log_format)
    opened = load_study(study, open_storage(storage, must_exist=True))
    spec = read_spec(opened)
    find_target(spec.notify)
    if confirm is not None:
        check_before_confirmation(opened, LengthRequest(steps), fresh=fresh)
    report_checks(check_paths(spec.build_workload()))
    console = Console(stderr=log_format == Format.json)
    with stop_on_signals(console.print) as stop, user_errors():
        runtime, confirmation = Runtime(run_root, track, stop, ranks=ranks), None
        if confirm is not None:
            follow = partial(follow_run, log_format=log_format)
            try:
                confirmation = api.confirm(
                    opened, confirm, num_seeds=seeds or 2, rung=rung, runtime=runtime, follow=follow
                )
            except Interrupted:
                console.print("Stopped with a checkpoint. The same command continues it.")
                raise typer.Exit(STOPPED) from None
            console.print(confirmation_table(confirmation))
            console.print(confirmation.verdict, markup=False, highlight=False, soft_wrap=True)
            if log_format == Format.json:
                confirmation_ended(study, confirmation)
        with follow_run(f"full run of {study}", log_format) as run:
            result = api.promote(
                opened,
                trial=trial,
                confirmed=confirmation,
                steps=steps,
                finish=end_now,
                decay_steps=decay_steps,
                fresh=fresh,
                runtime=runtime,
                trackers=[run],
            )
    best = "--finish goes back to best.pth, and lets the rate fall from there"
    finish(run, result, "the same command", remedy=best)
