"""Start a study, or continue it where it was."""

from __future__ import annotations

import logging
import platform
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from trainer import DamagedSample, UserError
from trainer.checkpoint import digest_path, is_locked, locked
from trainer.clock import clock
from trainer.tracking import Tracker
from tuner.dashboard.page import StudyPage
from tuner.objective import Interrupted, Objective
from tuner.run import Runtime
from tuner.samplers import build_pruner, build_sampler
from tuner.search_space import baseline, largest_step
from tuner.spec import StudySpec
from tuner.storage import open_storage
from tuner.trials import (
    BASE_DIR,
    BASELINE,
    CLAIM,
    DATA_DIGEST,
    ENDED,
    HOST,
    SPEC,
    ranking,
    stored_spec,
    trial_name,
    trials_since_improvement,
)

log = logging.getLogger(__name__)

KEEP_TRIALS = 3
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)


class Display(Protocol):
    """Shows a study's progress to a person."""

    def trial_started(self, trial: optuna.Trial, resumed: bool) -> Tracker: ...

    def trial_ended(self, trial: FrozenTrial) -> None: ...


def launch(
    spec: StudySpec | Path | str,
    *,
    storage: BaseStorage | str | None = None,
    runtime: Runtime | None = None,
    num_trials: int | None = None,
    timeout: float | None = None,
    display: Display | None = None,
) -> optuna.Study:
    """Run a study's trials until it has as many as the spec says or they improve nothing any more, and return it.

    A trial that was interrupted, by Ctrl-C or a lost process, is continued from its checkpoint under its own
    number. The first trial is always the baseline: the settings in `[train]` as they are. Why it came to its end
    stands in the study's attribute `ended`.

    Args:
        num_trials: The study's total, in place of `trial.num_trials`.
        timeout: Seconds after which no new trial starts and the running one is stopped with a checkpoint.

    Raises:
        UserError: The spec can't be, or differs from the one that the study was started with.
    """
    spec = spec if isinstance(spec, StudySpec) else StudySpec.load(spec)
    given = runtime or Runtime()
    deadline = None if timeout is None else time.monotonic() + timeout

    def stop() -> bool:
        return given.stop() or (deadline is not None and time.monotonic() > deadline)

    runtime = replace(given, stop=stop)
    study = open_study(spec, storage)
    page = StudyPage(study, runtime.run_root)
    total = num_trials or spec.trial.num_trials
    study.set_user_attr(ENDED, "")
    while not stop():
        with ExitStack() as claim:
            claimed = _claim_trial(study, spec, runtime, total, claim)
            if claimed is None:
                study.set_user_attr(ENDED, _why_complete(study, spec, total))
                break
            _run_trial(study, spec, runtime, *claimed, display)
        page.update()
    else:
        if timeout is not None and not given.stop():
            study.set_user_attr(ENDED, f"the time given, {clock(timeout)}, is over")
    page.update(now=True)
    return study


def open_study(spec: StudySpec, storage: BaseStorage | str | None = None) -> optuna.Study:
    """The spec's study: made where there is none, refused where it was started under another spec.

    Raises:
        UserError: What differs, and the remedy.
    """
    storage = storage if isinstance(storage, BaseStorage) else open_storage(storage)
    name = spec.study.name
    sampler, pruner = build_sampler(spec), build_pruner(spec)
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
        UserError: No validation gives the study's metric, or some batch size searched can't be filled.
    """
    workload = spec.build_workload()
    digest = workload.data_digest()
    names = {"loss", *workload.loss_weights}
    with suppress(DamagedSample):
        names |= workload.collate([workload.val_data()[0]]).counts.keys()
    if spec.study.metric.removeprefix("val/") not in names:
        known = ", ".join(f"val/{name}" for name in sorted(names))
        raise UserError(f"study.metric {spec.study.metric}: the workload's metrics are {known}.")
    num_samples, largest = len(workload.train_data()), largest_step(spec)
    if num_samples < largest:
        raise UserError(
            f"the search may take {largest} samples a step (train.batch_size x train.grad_accumulation), and the data "
            f"has {num_samples}: search smaller ones or use more data."
        )
    return digest


def _claim_trial(
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
        if sum(trial.state in COUNTED for trial in trials) + len(running) >= total or _is_stale(study, spec, trials):
            return None
        if not any(t.user_attrs.get(BASELINE) and t.state != TrialState.FAIL for t in trials):
            study.enqueue_trial(baseline(spec), user_attrs={BASELINE: True})
        trial = study.ask()
        claim.enter_context(locked(study_dir / trial_name(trial.number), CLAIM))
        return trial, False


def _is_stale(study: optuna.Study, spec: StudySpec, trials: Sequence[FrozenTrial]) -> bool:
    """Whether as many trials as the spec's patience improved nothing."""
    patience = spec.trial.patience
    return patience > 0 and trials_since_improvement(study, trials, spec.trial.min_delta) >= patience


def _why_complete(study: optuna.Study, spec: StudySpec, total: int) -> str:
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


def _run_trial(
    study: optuna.Study,
    spec: StudySpec,
    runtime: Runtime,
    trial: optuna.Trial,
    resumed: bool,
    display: Display | None,
) -> None:
    trackers: Sequence[Tracker] = [display.trial_started(trial, resumed)] if display else []
    try:
        value = Objective(spec, runtime, trackers)(trial)
    except optuna.TrialPruned:
        frozen = study.tell(trial, state=TrialState.PRUNED)
    except (Interrupted, UserError, KeyboardInterrupt):
        # The trial stays open: the next launch continues it.
        if not runtime.stop():
            raise
        return
    except BaseException:
        study.tell(trial, state=TrialState.FAIL)
        raise
    else:
        frozen = study.tell(trial, value)
    if display:
        display.trial_ended(frozen)
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
            path.unlink()
            digest_path(path).unlink(missing_ok=True)
