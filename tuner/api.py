"""The Python API, which the commands call too: the core, with the study's page in optuna-dashboard kept up to date."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import optuna
from optuna.storages import BaseStorage

from trainer import TrainResult
from trainer.tracking import Tracker, Trackers
from tuner.promotion import confirm as confirm_core
from tuner.promotion import promote as promote_core
from tuner.promotion.confirm import Follow
from tuner.promotion.length import LengthRequest
from tuner.show.page import StudyPage
from tuner.spec.study_toml import StudySpec
from tuner.study import launch as launch_core
from tuner.study.confirmation import Confirmation
from tuner.study.launch import Engine
from tuner.study.notify import Notifier, describe_study
from tuner.study.record import StudyRecord
from tuner.study.supervisor import Display
from tuner.study.tracked_run import Runtime


def launch(
    spec: StudySpec | Path | str,
    *,
    storage: BaseStorage | str | None = None,
    study: optuna.Study | None = None,
    runtime: Runtime | None = None,
    num_trials: int | None = None,
    timeout: float | None = None,
    num_workers: int = 1,
    engine: Engine = "local",
    address: str | None = None,
    display: Display | None = None,
) -> optuna.Study:
    """Run a study's trials until it has as many as the spec asks for, or until they no longer improve it.

    An interrupted trial, by Ctrl-C or a lost process, is continued from its checkpoint under its own number. The first
    trial is always the baseline: the settings in `[train]`. The study's attribute `ended` holds why it ended.

    Args:
        spec: A study.toml, read or by its path.
        storage: An Optuna storage or a database URL. Default: $TUNER_STORAGE, else runs/tuner.db.
        study: The spec's study, if `open_study` has opened it already.
        num_trials: The study's total, in place of `trial.num_trials`.
        timeout: Seconds after which no new trial starts and the running ones are stopped with a checkpoint.
        num_workers: Trials at once, each in a process of its own, on a GPU of its own or with its share of the CPU's
            threads. One trains in this process.
        engine: "ray" runs the workers, one or more, on the Ray cluster at `address`. All its nodes need the storage,
            the packages, and the workload at the same path; with a shared run root trials continue on other nodes.
        address: Default: $RAY_ADDRESS, else a cluster of this machine alone.

    Raises:
        UserError: The spec has a mistake, or differs from the one that the study was started with; with several
            workers also: they can't share the storage or the GPUs, or died again and again.
    """
    spec = spec if isinstance(spec, StudySpec) else StudySpec.load(spec)
    study, runtime = study or launch_core.open_study(spec, storage), runtime or Runtime()
    with (
        Notifier(spec.notify, f"study {spec.study.name}", running=True) as notifier,
        StudyPage(study, runtime.run_root).keep_updated() as on_change,
    ):
        launch_core.launch(
            study,
            spec,
            runtime=runtime,
            num_trials=num_trials,
            timeout=timeout,
            num_workers=num_workers,
            engine=engine,
            address=address,
            display=display,
            on_change=on_change,
        )
        if (record := StudyRecord.read(study)).ended:
            notifier.send("study_ended", describe_study(record))
    return study


def confirm(
    study: optuna.Study,
    num_trials: int,
    *,
    num_seeds: int = 2,
    rung: int | None = None,
    runtime: Runtime | None = None,
    follow: Follow = lambda name: nullcontext(Trackers([])),
) -> Confirmation:
    """Run the best trials and the baseline for longer: see `tuner.promotion.confirm.confirm`."""
    runtime = runtime or Runtime()
    page = StudyPage(study, runtime.run_root)
    confirmation = confirm_core.confirm(
        study, num_trials, num_seeds=num_seeds, rung=rung, runtime=runtime, follow=follow, on_change=page.update
    )
    page.update(now=True)
    return confirmation


def promote(
    study: optuna.Study,
    *,
    trial: int | None = None,
    confirmed: Confirmation | None = None,
    steps: int | None = None,
    finish: bool = False,
    decay_steps: int | None = None,
    fresh: bool = False,
    runtime: Runtime | None = None,
    trackers: Sequence[Tracker] = (),
) -> TrainResult:
    """Train the full run with a trial's parameters, or continue the one that was started.

    The full run continues from the checkpoint of the trial's confirmation, else from the trial's own, since a trial is
    a prefix of its full run. A run from step 0 is checked against the trial's curve.

    Args:
        trial: Number of the trial. Default: that of the full run already started, else the winner of the study's
            confirmation, else the best.
        confirmed: Promote the winner of this confirmation.
        steps: Length in optimizer updates, in place of the spec's `[full]`. A run that has decayed goes on from its
            checkpoint before the decay, and decays at its new end.
        finish: Start the decay of the learning rate now, and end after it.
        decay_steps: Length of that decay. Default: a fifth of the steps so far.
        fresh: Start at step 0 instead of continuing from a checkpoint.

    Raises:
        UserError: There is no such trial, it can't be promoted, a better one has appeared since, or a confirmation is
            unfinished.
    """
    runtime = runtime or Runtime()
    StudyRecord.read(study)  # refuses a study of another program before its page is touched
    page = StudyPage(study, runtime.run_root)
    try:
        return promote_core.promote(
            study,
            trial=trial,
            confirmed=confirmed,
            length=LengthRequest(steps, finish, decay_steps),
            fresh=fresh,
            runtime=runtime,
            trackers=trackers,
            on_change=page.update,
        )
    finally:
        # A run that failed is shown as it is, too.
        page.update(now=True)
