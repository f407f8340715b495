"""Start a study, or continue it where it was."""

from __future__ import annotations

import gc
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import optuna
import torch
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from trainer import DamagedSample, UserError
from trainer.checkpoint import digest_path
from trainer.clock import clock
from trainer.loader import check_lengths, check_losses
from trainer.tracking import Tracker
from tuner.claims import claim_trial, wants_more, why_complete
from tuner.objective import Interrupted, Objective
from tuner.run import Runtime, code_digest
from tuner.samplers import build_pruner, build_sampler
from tuner.search_space import largest_step
from tuner.show.page import StudyPage
from tuner.spec import StudySpec
from tuner.storage import for_other_processes, opened
from tuner.study.record import TrialRecord
from tuner.supervisor import Display as Display
from tuner.supervisor import Job, Supervisor, visible_devices, worker_environments
from tuner.trials import (
    BASE_DIR,
    BASELINE,
    CODE,
    DATA_DIGEST,
    ENDED,
    SPEC,
    ranking,
    stored_spec,
)

log = logging.getLogger(__name__)

KEEP_TRIALS = 3


def launch(
    spec: StudySpec | Path | str,
    *,
    storage: BaseStorage | str | None = None,
    runtime: Runtime | None = None,
    num_trials: int | None = None,
    timeout: float | None = None,
    num_workers: int = 1,
    display: Display | None = None,
) -> optuna.Study:
    """Run a study's trials until it has as many as the spec says or they improve nothing any more, and return it.

    A trial that was interrupted, by Ctrl-C or a lost process, is continued from its checkpoint under its own
    number. The first trial is always the baseline: the settings in `[train]` as they are. Why it came to its end
    stands in the study's attribute `ended`.

    Args:
        num_trials: The study's total, in place of `trial.num_trials`.
        timeout: Seconds after which no new trial starts and the running ones are stopped with a checkpoint.
        num_workers: Trials at once: each in a process of its own, on a GPU of its own or with its share of the
            CPU's threads. One runs in this process.

    Raises:
        UserError: The spec can't be, or differs from the one that the study was started with; with several workers
            also: they can't share the storage or the GPUs, or died again and again.
    """
    spec = spec if isinstance(spec, StudySpec) else StudySpec.load(spec)
    given = runtime or Runtime()
    deadline = None if timeout is None else time.monotonic() + timeout

    def stop() -> bool:
        return given.stop() or (deadline is not None and time.monotonic() > deadline)

    runtime = replace(given, stop=stop)
    study = open_study(spec, storage)
    total = num_trials or spec.trial.num_trials
    _warn_of_other_code(study, spec)
    study.set_user_attr(ENDED, "")
    with StudyPage(study, runtime.run_root).keep_updated() as update_page:
        if num_workers == 1:
            is_complete = run_trials(study, spec, runtime, total, display, update_page)
        else:
            is_complete = _run_workers(study, spec, runtime, total, num_workers, display, update_page)
        if is_complete:
            study.set_user_attr(ENDED, why_complete(study, spec, total))
        elif timeout is not None and not given.stop():
            study.set_user_attr(ENDED, f"the time given, {clock(timeout)}, is over")
    return study


def _warn_of_other_code(study: optuna.Study, spec: StudySpec) -> None:
    code = code_digest(spec.build_workload())
    others = [str(t.number) for t in study.get_trials(deepcopy=False) if t.user_attrs.get(CODE, code) != code]
    if others:
        log.warning(
            "the code of %s has changed since trials %s ran, which may no longer compare with those to come: to start "
            "anew, give study.name another value",
            spec.study.workload,
            ", ".join(others),
        )


def run_trials(
    study: optuna.Study,
    spec: StudySpec,
    runtime: Runtime,
    total: int,
    display: Display | None,
    on_trial_end: Callable[[], None] = lambda: None,
) -> bool:
    """Claim trials and run them, one after the other; True if none was left to claim, False if stopped."""
    objective = Objective(spec, runtime)
    try:
        while not runtime.stop():
            with ExitStack() as claim:
                claimed = claim_trial(study, spec, runtime, total, claim)
                if claimed is None:
                    return True
                _run_trial(study, objective, *claimed, display)
            on_trial_end()
            if not gc.get_freeze_count():
                # What lives after a trial, modules above all, lives on: the collections that give back the memory of
                # later ones need not walk over it, which would take them tenths of a second.
                gc.freeze()
    finally:
        gc.unfreeze()
    return False


def _run_workers(
    study: optuna.Study,
    spec: StudySpec,
    runtime: Runtime,
    total: int,
    num_workers: int,
    display: Display | None,
    on_trial_end: Callable[[], None],
) -> bool:
    """`run_trials` in several processes."""
    device = spec.build_config({**spec.train, "steps": 1}).device
    environments = worker_environments(num_workers, visible_devices(device), torch.get_num_threads())
    job = Job(
        study_name=study.study_name,
        spec=spec.to_dict(),
        base_dir=spec.base_dir,
        storage=for_other_processes(study._storage),
        run_root=runtime.run_root.resolve(),
        track=runtime.track,
        total=total,
    )
    while True:
        supervisor = Supervisor(
            job,
            environments,
            storage=study._storage,
            stop=runtime.stop,
            display=display,
            on_trial_end=on_trial_end,
        )
        if not supervisor.run():
            return False
        # Patience may have sent one worker away before another one's trial improved the best.
        if not wants_more(study, spec, total, study.get_trials(deepcopy=False)):
            return True


def open_study(spec: StudySpec, storage: BaseStorage | str | None = None) -> optuna.Study:
    """The spec's study: made where there is none, refused where it was started under another spec.

    Raises:
        UserError: What differs, and the remedy.
    """
    storage = opened(storage)
    name = spec.study.name
    sampler, pruner = build_sampler(spec.sampler, spec.study.seed), build_pruner(spec.pruner, spec.trial.first_point)
    # Before anything is made: the data may be missing, broken, or too small for what is searched.
    digest = _check_data(spec)
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        sampler=sampler,
        pruner=pruner,
        direction=spec.study.direction,
        load_if_exists=True,
    )
    if study.user_attrs or study.get_trials(deepcopy=False):
        changed = spec.differences(stored_spec(study))
        changed += ["the data has changed"] if study.user_attrs.get(DATA_DIGEST, digest) != digest else []
        if changed:
            raise UserError(
                f"study {name} was started with another spec ({'; '.join(changed)}): give study.name another value, "
                "or set these back."
            )
    study.set_user_attr(SPEC, spec.to_dict())
    study.set_user_attr(DATA_DIGEST, digest)
    study.set_user_attr(BASE_DIR, str(spec.base_dir))
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        study.set_metric_names([spec.study.metric])
    return study


def _check_data(spec: StudySpec) -> str:
    """Hold the spec against its data; returns the data's digest.

    Raises:
        UserError: A split is empty or does not fit its lengths, the weights name other losses than a batch, no
            validation gives the study's metric, or some batch size searched can't be filled.
    """
    workload = spec.build_workload()
    digest = workload.data_digest()
    train, val = workload.train_data(), workload.val_data()
    for data in (train, val):
        check_lengths(data)
    if not len(val):
        raise UserError("the validation split has no samples: name data for it in [workload].")
    names = {"loss", *workload.loss_weights}
    with suppress(DamagedSample):
        batch = workload.collate([val[0]])
        check_losses(workload, batch)
        names |= batch.counts.keys()
    if spec.study.metric.removeprefix("val/") not in names:
        known = ", ".join(f"val/{name}" for name in sorted(names))
        raise UserError(f"study.metric {spec.study.metric}: the workload's metrics are {known}.")
    num_samples, largest = len(train), largest_step(spec)
    if num_samples < largest:
        raise UserError(
            f"the search may take {largest} samples a step (train.batch_size x train.grad_accumulation), and the data "
            f"has {num_samples}: search smaller ones or use more data."
        )
    return digest


def _run_trial(
    study: optuna.Study, objective: Objective, trial: optuna.Trial, resumed: bool, display: Display | None
) -> None:
    trackers: Sequence[Tracker] = [display.trial_started(TrialRecord.read(trial), resumed)] if display else []
    try:
        value = objective(trial, trackers)
    except optuna.TrialPruned:
        frozen = study.tell(trial, state=TrialState.PRUNED)
    except (Interrupted, UserError, KeyboardInterrupt):
        # The trial stays open: the next launch continues it.
        if not objective.runtime.stop():
            raise
        return
    except BaseException:
        study.tell(trial, state=TrialState.FAIL)
        raise
    else:
        frozen = study.tell(trial, value)
    if display:
        display.trial_ended(TrialRecord.read(frozen))
    _drop_checkpoints(study)


def _drop_checkpoints(study: optuna.Study) -> None:
    """Keep the checkpoints of the baseline and of the best trials; delete those of the other finished ones."""
    trials = study.get_trials(deepcopy=False)
    ranked = ranking(study, trials)
    kept = {trial.number for trial in ranked[:KEEP_TRIALS]}
    for trial in trials:
        if trial.number in kept or trial.user_attrs.get(BASELINE) or not trial.state.is_finished():
            continue
        for path in Path(trial.user_attrs.get("run_dir", "")).glob("*.pth") if "run_dir" in trial.user_attrs else ():
            path.unlink(missing_ok=True)  # another worker may be at it too
            digest_path(path).unlink(missing_ok=True)
