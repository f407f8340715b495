"""Start a study, or continue it: open it, run its trials one after the other or in several workers."""

from __future__ import annotations

import gc
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Literal

import optuna
import torch
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from trainer import DamagedSample, UserError
from trainer.checkpoint import delete_checkpoints
from trainer.clock import clock
from trainer.data.loader import check_lengths, check_losses
from trainer.tracking import Tracker
from tuner.spec.comparison import compare_specs
from tuner.spec.setups import horizon, largest_step, search_space, stored_space
from tuner.spec.study_toml import StudySpec
from tuner.study.claims import Claim, claim_trial, describe_end, needs_more_trials
from tuner.study.horizon import recommend
from tuner.study.keys import trial_name, write_study
from tuner.study.objective import Interrupted, Objective, release_memory
from tuner.study.optuna_internals import storage_of
from tuner.study.ownership import Owner
from tuner.study.record import StudyRecord, TrialRecord, is_new, read_spec
from tuner.study.samplers import SpecSampler, build_pruner
from tuner.study.storage import for_other_processes, load_study, opened
from tuner.study.supervisor import Display, Supervisor, visible_devices, worker_environments
from tuner.study.tracked_run import Runtime, code_digest
from tuner.study.worker_process import Job

log = logging.getLogger(__name__)

Engine = Literal["local", "ray"]
"""Where workers run: on this machine, or on a Ray cluster."""
KEEP_TRIALS = 3
"""Number of best trials whose checkpoints are kept, besides the baseline's and the recommended one's."""


def launch(
    study: optuna.Study,
    spec: StudySpec,
    *,
    runtime: Runtime,
    num_trials: int | None = None,
    timeout: float | None = None,
    num_workers: int = 1,
    engine: Engine = "local",
    address: str | None = None,
    display: Display | None = None,
    on_change: Callable[[], None] = lambda: None,
) -> None:
    """Run a study's trials until it needs no more, and store why it ended; see `tuner.launch`.

    Args:
        study: From `open_study`.
        on_change: Called after each trial.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    asked_to_stop = runtime.stop

    def stop() -> bool:
        return asked_to_stop() or (deadline is not None and time.monotonic() > deadline)

    total = num_trials or spec.trial.num_trials
    _warn_of_other_code(study, spec)
    write_study(study, ended="")
    # [full], of which it depends, or the search space may have changed.
    _store_recommendation(study, spec)
    runtime = replace(runtime, stop=stop)
    if num_workers == 1 and engine == "local":
        is_complete = run_trials(study, spec, runtime, total, display, on_change)
    else:
        build = _ray_supervisors(spec, num_workers, address) if engine == "ray" else _supervisors(spec, num_workers)
        is_complete = _run_workers(study, spec, runtime, total, build, display, on_change)
    if is_complete or not needs_more_trials(StudyRecord.read(study), spec, total):
        write_study(study, ended=describe_end(StudyRecord.read(study), spec, total))
    elif timeout is not None and not asked_to_stop():
        write_study(study, ended=f"the time given, {clock(timeout)}, is over")


def _warn_of_other_code(study: optuna.Study, spec: StudySpec) -> None:
    code = code_digest(spec.build_workload())
    trials = [trial for trial in StudyRecord.read(study).trials if trial.curve]
    others = [str(trial.number) for trial in trials if trial.code not in (None, code)]
    if others:
        log.warning(
            "the code of %s has changed since trials %s ran, so they may not compare with new ones: to start a new "
            "study, give study.name another value",
            spec.study.workload,
            ", ".join(others),
        )


def run_trials(
    study: optuna.Study,
    spec: StudySpec,
    runtime: Runtime,
    total: int,
    display: Display | None,
    on_change: Callable[[], None] = lambda: None,
) -> bool:
    """Claim trials and run them one after the other; True if none was left to claim, False if stopped."""
    objective, is_frozen = Objective(spec, runtime), False
    try:
        while not runtime.stop():
            with ExitStack() as claim:
                claimed = claim_trial(study, spec, runtime, total, claim)
                if claimed is None:
                    return True
                objective.runtime = _with_owner(runtime, claimed.owner)
                ended = _run_trial(study, objective, claimed, display)
            if not ended:
                # An open trial's model would shrink the memory that the next trial is judged by.
                release_memory()
                _check_name(claimed.owner)
            on_change()
            if not is_frozen:
                # Objects that outlive a trial, modules above all, are permanent: later collections, which free the
                # memory of trials, need not walk them. That saves tenths of a second each.
                gc.freeze()
                is_frozen = True
    finally:
        gc.unfreeze()
    return False


def _supervisors(spec: StudySpec, num_workers: int) -> Callable[..., Supervisor]:
    devices = visible_devices(spec.baseline.device)
    environments = worker_environments(num_workers, devices, torch.get_num_threads(), os.cpu_count() or 1)
    return lambda job, **others: Supervisor(job, environments, **others)


def _ray_supervisors(spec: StudySpec, num_workers: int, address: str | None) -> Callable[..., Supervisor]:
    from tuner.study.ray_workers import RaySupervisor

    return lambda job, **others: RaySupervisor(job, num_workers, device=spec.baseline.device, address=address, **others)


def _run_workers(
    study: optuna.Study,
    spec: StudySpec,
    runtime: Runtime,
    total: int,
    build: Callable[..., Supervisor],
    display: Display | None,
    on_change: Callable[[], None],
) -> bool:
    """`run_trials` in several processes.

    Args:
        build: Returns a supervisor of the workers.
    """
    job = Job(
        study_name=study.study_name,
        spec=spec.to_dict(),
        base_dir=spec.base_dir,
        storage=for_other_processes(storage_of(study)),
        run_root=runtime.run_root.resolve(),
        track=runtime.track,
        total=total,
    )
    while True:
        supervisor = build(job, study=study, stop=runtime.stop, display=display, on_trial_end=on_change)
        if not supervisor.run():
            return False
        # A worker may have exited for lack of patience before another one's trial improved the best.
        if not needs_more_trials(StudyRecord.read(study), spec, total):
            return True


def open_study(spec: StudySpec, storage: BaseStorage | str | None = None) -> optuna.Study:
    """The spec's study: created if the storage has none, refused if it was started with another spec.

    Raises:
        UserError: The spec differs from the study's, or does not fit its data.
    """
    storage = opened(storage)
    name = spec.study.name
    sampler, pruner = SpecSampler(spec), build_pruner(spec.pruner, spec.trial.first_point)
    # Before the study is created: the data may be missing, damaged, or too small for the search space.
    digest, num_samples = _check_data(spec)
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        sampler=sampler,
        pruner=pruner,
        direction=spec.study.direction,
        load_if_exists=True,
    )
    if not is_new(study):
        record = StudyRecord.read(study)
        changed = _compare_choices(study, spec)
        changed += ["its direction can't change"] if study.direction.name.lower() != spec.study.direction else []
        if any(trial.curve or not trial.is_finished for trial in record.trials):
            changed = compare_specs(spec, read_spec(study)) or changed
            changed += ["the data has changed"] if record.data_digest not in (None, digest) else []
        if changed:
            raise UserError(
                f"study {name} was started with another spec ({'; '.join(changed)}): give study.name another value, "
                "or set these back."
            )
    write_study(study, spec=spec.to_dict(), data_digest=digest, num_samples=num_samples, base_dir=str(spec.base_dir))
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        study.set_metric_names([spec.study.metric])
    return study


def join_study(name: str, storage: BaseStorage | str | None = None) -> tuple[optuna.Study, StudySpec]:
    """A study that was launched before, ready to run trials, and its stored spec.

    Raises:
        UserError: There is no such study, or its workload can't be imported here.
    """
    study = load_study(name, opened(storage))
    spec = read_spec(study)
    study.sampler, study.pruner = SpecSampler(spec), build_pruner(spec.pruner, spec.trial.first_point)
    return study, spec


def _compare_choices(study: optuna.Study, spec: StudySpec) -> list[str]:
    """The searched fields whose list of choices differs from that of the trials, which Optuna does not allow."""
    trials = study.get_trials(deepcopy=False)
    stored = {name: d for trial in trials for name, d in trial.distributions.items()}
    changed = []
    for name, distribution in stored_space(spec, trials).items():
        before = stored.get(name)
        if isinstance(before, CategoricalDistribution) and distribution != before:
            changed.append(f"search.{name}: its trials are stored with the list of choices {list(before.choices)}")
        elif before is not None and type(before) is not type(distribution):
            changed.append(f"search.{name}: its trials are stored with numbers alone")
    return changed


def _check_data(spec: StudySpec) -> tuple[str, int]:
    """Check the spec against its data; returns the data's digest and its number of training samples.

    Raises:
        UserError: A split is empty or does not match its lengths, the weights name other losses than a batch, no
            validation gives the study's metric, or the data is smaller than a searched batch size.
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
    return digest, num_samples


def _check_name(owner: Owner) -> None:
    """Raises UserError for a trial lost to this machine's name: two of one name take each trial from one another."""
    if owner.lost_to == platform.node():
        raise UserError(
            f"trial {owner.number} was taken over by another process that has this machine's name, {owner.lost_to}, "
            "and does not see its lock: give each machine a host name of its own, and all launches on one machine the "
            "same --run-root."
        )


def _with_owner(runtime: Runtime, owner: Owner) -> Runtime:
    """The runtime of a trial: it shows its owner's life, and stops if the trial is lost."""
    return replace(
        runtime, stop=lambda: owner.is_lost() or runtime.stop(), alive=lambda: (owner.is_lost(), runtime.alive())
    )


def _run_trial(study: optuna.Study, objective: Objective, claim: Claim, display: Display | None) -> bool:
    """Whether the trial has ended; False if it stays open, or belongs to another process by now."""
    trial, resumed, owner = claim
    trackers: Sequence[Tracker] = [display.trial_started(TrialRecord.read(trial), resumed)] if display else []
    try:
        value = objective(trial, trackers)
    except optuna.TrialPruned:
        if owner.is_lost(at_once=True):
            return False
        frozen = study.tell(trial, state=TrialState.PRUNED)
    except (Interrupted, UserError, KeyboardInterrupt):
        # The trial stays open: the next launch continues it.
        if not objective.runtime.stop():
            raise
        return False
    except UpdateFinishedTrialError:
        # Another machine took it over while this one slept, and has ended it.
        if not owner.is_lost(at_once=True):
            raise
        return False
    except BaseException:
        if not owner.is_lost(at_once=True):
            study.tell(trial, state=TrialState.FAIL)
        raise
    else:
        if owner.is_lost(at_once=True):
            return False
        frozen = study.tell(trial, value)
    if display:
        display.trial_ended(TrialRecord.read(frozen))
    _delete_checkpoints(_store_recommendation(study, objective.spec), objective.runtime)
    return True


def _store_recommendation(study: optuna.Study, spec: StudySpec) -> StudyRecord:
    """Store the setting to promote, if it has changed, and return the study with it."""
    record = StudyRecord.read(study)
    recommendation = recommend(search_space(spec), record.trials, minimized=record.minimized, horizon=horizon(spec))
    if recommendation != record.recommendation:
        write_study(study, recommendation=recommendation)
    return replace(record, recommendation=recommendation)


def _delete_checkpoints(record: StudyRecord, runtime: Runtime) -> None:
    """Delete the checkpoints of finished trials but those of the baseline, the best trials and the recommended one.

    Only in the run root of this launch: the run directory that a copied study stores is that of the original.
    """
    kept = {trial.number for trial in (*record.ranked[:KEEP_TRIALS], *record.favourites[:1])}
    for trial in record.finished:
        folder = runtime.run_dir(record.name, "") / trial_name(trial.number)
        if trial.number in kept or trial.is_baseline or folder.is_symlink():
            continue
        delete_checkpoints(folder)
