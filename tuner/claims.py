"""Which trial comes next: each process of a study claims one at a time, and none is worked on twice."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

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
            ours = frozen.user_attrs.get(HOST, platform.node()) == platform.node()
            if ours and not is_locked(before, CLAIM) and not is_locked(run_dir, CLAIM):
                claim.enter_context(locked(run_dir, CLAIM))
                return optuna.Trial(study, frozen._trial_id), True
        if not wants_more(study, spec, total, trials):
            return None
        if not any(t.user_attrs.get(BASELINE) and t.state != TrialState.FAIL for t in trials):
            study.enqueue_trial(baseline(spec), user_attrs={BASELINE: True})
        trial = study.ask()
        claim.enter_context(locked(study_dir / trial_name(trial.number), CLAIM))
        return trial, False


def wants_more(study: optuna.Study, spec: StudySpec, total: int, trials: Sequence[FrozenTrial]) -> bool:
    """Whether a study is to have another trial beside those it has, the running ones counted."""
    taken = sum(trial.state in (*COUNTED, TrialState.RUNNING) for trial in trials)
    return taken < total and not _is_stale(study, spec, trials)


def _is_stale(study: optuna.Study, spec: StudySpec, trials: Sequence[FrozenTrial]) -> bool:
    """Whether as many trials as the spec's patience improved nothing."""
    patience = spec.trial.patience
    return patience > 0 and trials_since_improvement(study, trials, spec.trial.min_delta) >= patience


def why_complete(study: optuna.Study, spec: StudySpec, total: int) -> str:
    """What ended a study that starts no more trials."""
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    if sum(state in (*COUNTED, TrialState.RUNNING) for state in states) >= total:
        return f"the study has its {total} trials"
    delta = f" by more than {spec.trial.min_delta:g}" if spec.trial.min_delta else ""
    return f"no trial improved {spec.study.metric}{delta} in the last {spec.trial.patience}"


def _patiently_locked(study_dir: Path) -> Any:
    from filelock import FileLock

    study_dir.mkdir(parents=True, exist_ok=True)
    return FileLock(study_dir / ".claims", timeout=600)
