"""Claims: each process of a study takes one trial at a time, and no trial is trained twice."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.exceptions import UpdateFinishedTrialError

from trainer.locks import is_locked, lock_folder, one_at_a_time
from tuner.spec.setups import baseline_params, count_settings, try_params
from tuner.spec.study_toml import StudySpec
from tuner.study import optuna_internals
from tuner.study.keys import create_trial, trial_name, write_unopened_trial
from tuner.study.ownership import Owner, is_abandoned
from tuner.study.record import CLAIM, StudyRecord, TrialRecord
from tuner.study.storage import database_time
from tuner.study.tracked_run import Runtime

CLAIMS = ".claims"


class Claim(NamedTuple):
    """A trial to run."""

    trial: optuna.Trial
    resumed: bool
    """It was interrupted, here or on a machine that is gone."""
    owner: Owner


def claim_trial(study: optuna.Study, spec: StudySpec, runtime: Runtime, total: int, claim: ExitStack) -> Claim | None:
    """Claim an interrupted trial, else a new one; None when the study needs no more trials.

    Args:
        claim: Releases the trial when it closes.

    Raises:
        UserError: Another process has been claiming one for ten minutes.
    """
    study_dir = runtime.run_dir(study.study_name, "")
    study_dir.mkdir(parents=True, exist_ok=True)
    # One process at a time, so that no two take the same interrupted trial.
    with one_at_a_time(study_dir / CLAIMS):
        record, now = StudyRecord.read(study), database_time(optuna_internals.storage_of(study))
        for trial in record.trials:
            if _is_free(trial, study_dir, now):
                held = claim.enter_context(ExitStack())
                held.enter_context(lock_folder(study_dir / trial_name(trial.number), CLAIM))
                try:
                    owner = Owner(study, trial.number)
                except UpdateFinishedTrialError:
                    # Its process has ended it since the trials were read.
                    held.close()
                    continue
                return Claim(optuna_internals.open_trial(study, trial.number), True, owner)
        if not needs_more_trials(record, spec, total):
            return None
        number = None
        if any(trial.state == "waiting" for trial in record.trials):
            # A person enqueued it, through Optuna.
            number = optuna_internals.pop_waiting_trial(study)
        if number is None:
            number = _create_trial(study, spec, record.trials)
        else:
            write_unopened_trial(study, number, host=platform.node())
        run_dir = study_dir / trial_name(number)
        claim.enter_context(lock_folder(run_dir, CLAIM))
        write_unopened_trial(study, number, run_dir=str(run_dir))
        owner = Owner(study, number)
        return Claim(optuna_internals.open_trial(study, number), False, owner)


def _is_free(trial: TrialRecord, study_dir: Path, now: float) -> bool:
    """Whether no process trains an open trial: it belongs to this machine, or its own machine is gone."""
    # By its number, since the folder of runs may have been moved; a process may still work in the old one.
    run_dir = study_dir / trial_name(trial.number)
    is_ours = (trial.state == "running" and trial.host == platform.node()) or is_abandoned(trial, now)
    return is_ours and not is_locked(trial.run_dir or run_dir, CLAIM) and not is_locked(run_dir, CLAIM)


def _create_trial(study: optuna.Study, spec: StudySpec, trials: Sequence[TrialRecord]) -> int:
    """Create a trial that belongs to this machine, and return its number.

    The first one is the baseline, the next ones are the entries of [[search.try]].
    """
    if not _has_baseline(trials):
        number = create_trial(study, baseline_params(spec), host=platform.node(), baseline=True)
        if _has_baseline(StudyRecord.read(study).trials[:number]):
            # Another machine, which the lock does not reach, was first.
            write_unopened_trial(study, number, baseline=False)
            optuna_internals.remove_fixed_params(study, number)
        return number
    untried = list_untried(trials, spec)
    if not untried:
        return create_trial(study, {}, host=platform.node())
    number = create_trial(study, untried[0], host=platform.node(), tried=untried[0])
    if untried[0] not in list_untried(StudyRecord.read(study).trials[:number], spec):
        # As above.
        write_unopened_trial(study, number, tried={})
        optuna_internals.remove_fixed_params(study, number)
    return number


def list_untried(trials: Sequence[TrialRecord], spec: StudySpec) -> list[dict[str, Any]]:
    """Parameters of the entries of [[search.try]] that no trial has; a failed trial is tried again."""
    # A trial has its parameters only once its process opened it.
    taken = [params for trial in trials if trial.state != "failed" for params in (trial.tried, trial.params)]
    return [params for params in try_params(spec) if params not in taken]


def _has_baseline(trials: Sequence[TrialRecord]) -> bool:
    return any(trial.is_baseline and trial.state != "failed" for trial in trials)


def needs_more_trials(record: StudyRecord, spec: StudySpec, total: int) -> bool:
    """Whether the study needs another trial besides its finished and running ones."""
    patience, since = spec.trial.patience, record.trials_since_improvement(spec.trial.min_delta)
    wants_more = not 0 < patience <= since or bool(list_untried(record.trials, spec))
    return _num_counted(record) < total and wants_more and _count_tried(record) < count_settings(spec)


def _count_tried(record: StudyRecord) -> int:
    """Number of settings that were tried: training is deterministic, and a repetition would tell nothing."""
    names = record.spec["search"]
    tried = [t.params for t in record.trials if t.state != "failed" and names.keys() <= t.params.keys()]
    return len({tuple(params[name] for name in names) for params in tried})


def _num_counted(record: StudyRecord) -> int:
    """Number of trials that have ended or that a machine trains; a RUNNING trial without an owner is not counted."""
    ended = ("complete", "pruned", "infeasible")
    return sum(t.state in ended or (t.state == "running" and t.host is not None) for t in record.trials)


def describe_end(record: StudyRecord, spec: StudySpec, total: int) -> str:
    """Why the study starts no more trials."""
    if _num_counted(record) >= total:
        untried = len(list_untried(record.trials, spec))
        left = f"; {untried} of [[search.try]] not tried: raise trial.num_trials" if untried else ""
        return f"the study has its {total} trial{'s' if total > 1 else ''}{left}"
    if _count_tried(record) >= count_settings(spec):
        return f"all {count_settings(spec)} settings of [search] were tried"
    delta = f" by more than {spec.trial.min_delta:g}" if spec.trial.min_delta else ""
    return f"no trial improved {spec.study.metric}{delta} in the last {spec.trial.patience}"
