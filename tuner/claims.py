"""Which trial comes next: each process of a study claims one at a time, and none is worked on twice."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from trainer.locks import is_locked, locked
from tuner.run import Runtime
from tuner.search_space import baseline
from tuner.spec import StudySpec
from tuner.trials import BASELINE, CLAIM, HOST, trial_name, trials_since_improvement

COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)


def claim_trial(
    study: optuna.Study, spec: StudySpec, runtime: Runtime, total: int, claim: ExitStack
) -> tuple[optuna.Trial, bool] | None:
    """An interrupted trial, or else a new one, held until `claim` closes; None when the study is complete."""
    study_dir = runtime.run_dir(study.study_name, "")
    # One at a time, so that no two processes take the same interrupted trial.
    with _patiently_locked(study_dir):
        trials = study.get_trials(deepcopy=False)
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        for frozen in running:
            # Found by its number, so that a folder of runs may be moved; where it was, somebody may still work.
            run_dir = study_dir / trial_name(frozen.number)
            before = Path(frozen.user_attrs.get("run_dir", run_dir))
            if (
                frozen.user_attrs.get(HOST) == platform.node()
                and not is_locked(before, CLAIM)
                and not is_locked(run_dir, CLAIM)
            ):
                claim.enter_context(locked(run_dir, CLAIM))
                return _propose(study, frozen._trial_id), True
        if not wants_more(study, spec, total, trials):
            return None
        if any(trial.state == TrialState.WAITING for trial in trials):
            # Enqueued by a person, through Optuna.
            trial_id = study._pop_waiting_trial_id()
            if trial_id is not None:
                study._storage.set_trial_user_attr(trial_id, HOST, platform.node())
                return _hold(study, trial_id, study_dir, claim), False
        return _new_trial(study, spec, study_dir, claim), False


def _new_trial(study: optuna.Study, spec: StudySpec, study_dir: Path, claim: ExitStack) -> optuna.Trial:
    """A trial that is this machine's from its first moment on.

    `Study.ask` would make one that nobody owns while the sampler thinks, and another machine, whom the lock on
    `study_dir` does not reach, would take it for an interrupted one.
    """
    attrs: dict[str, Any] = {HOST: platform.node()}
    fixed: dict[str, Any] = {}
    if not _has_baseline(study.get_trials(deepcopy=False)):
        attrs[BASELINE], fixed["fixed_params"] = True, baseline(spec)
    storage = study._storage
    template = create_trial(state=TrialState.RUNNING, user_attrs=attrs, system_attrs=fixed)
    trial_id = storage.create_new_trial(study._study_id, template)
    number = storage.get_trial_number_from_id(trial_id)
    if fixed and _has_baseline(study.get_trials(deepcopy=False)[:number]):
        # Another machine's came first.
        storage.set_trial_user_attr(trial_id, BASELINE, False)
        storage.set_trial_system_attr(trial_id, "fixed_params", {})
    return _hold(study, trial_id, study_dir, claim)


def _hold(study: optuna.Study, trial_id: int, study_dir: Path, claim: ExitStack) -> optuna.Trial:
    run_dir = study_dir / trial_name(study._storage.get_trial_number_from_id(trial_id))
    claim.enter_context(locked(run_dir, CLAIM))
    study._storage.set_trial_user_attr(trial_id, "run_dir", str(run_dir))
    return _propose(study, trial_id)


def _propose(study: optuna.Study, trial_id: int) -> optuna.Trial:
    """Let the sampler propose for a trial what it has not yet."""
    # As `Study.ask` does: what the sampler saw of the study's trials last time is old.
    study._thread_local.cached_all_trials = None
    return optuna.Trial(study, trial_id)


def _has_baseline(trials: Sequence[FrozenTrial]) -> bool:
    return any(trial.user_attrs.get(BASELINE) and trial.state != TrialState.FAIL for trial in trials)


def wants_more(study: optuna.Study, spec: StudySpec, total: int, trials: Sequence[FrozenTrial]) -> bool:
    """Whether a study is to have another trial beside those it has, the running ones counted."""
    return _num_taken(trials) < total and not _is_stale(study, spec, trials)


def _is_stale(study: optuna.Study, spec: StudySpec, trials: Sequence[FrozenTrial]) -> bool:
    """Whether as many trials as the spec's patience improved nothing."""
    patience = spec.trial.patience
    return patience > 0 and trials_since_improvement(study, trials, spec.trial.min_delta) >= patience


def _num_taken(trials: Sequence[FrozenTrial]) -> int:
    """Trials that have come to their end, or that a machine works on; one that is nobody's never will."""
    return sum(t.state in COUNTED or (t.state == TrialState.RUNNING and HOST in t.user_attrs) for t in trials)


def why_complete(study: optuna.Study, spec: StudySpec, total: int) -> str:
    """What ended a study that starts no more trials."""
    if _num_taken(study.get_trials(deepcopy=False)) >= total:
        return f"the study has its {total} trial{'s' if total > 1 else ''}"
    delta = f" by more than {spec.trial.min_delta:g}" if spec.trial.min_delta else ""
    return f"no trial improved {spec.study.metric}{delta} in the last {spec.trial.patience}"


def _patiently_locked(study_dir: Path) -> Any:
    from filelock import FileLock

    study_dir.mkdir(parents=True, exist_ok=True)
    return FileLock(study_dir / ".claims", timeout=600)
