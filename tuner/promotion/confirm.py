"""Confirmation: the best trials and the baseline on longer runs and several seeds, before one is promoted.

A short run may rank settings otherwise than a long one, and the best of many noisy trials looks better than it is. The
run on the study's own seed continues from the trial's checkpoint, since a trial is a prefix of its full run; the others
start at step 0. Each evaluation is stored when it is made: an interrupted or repeated command trains nothing twice.
They are judged by the study's metric, or by that of [hooks], which the command measures on the end of each run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import optuna

from trainer import Diverged, Evaluation, UserError
from trainer.checkpoint import LATEST, delete_checkpoints, holds_state
from trainer.tracking import Tracker, Trackers
from tuner.promotion.link_checkpoint import link_checkpoints, read_step
from tuner.spec.setups import full_setup, trial_setup
from tuner.spec.study_toml import StudySpec
from tuner.study.confirmation import Confirmation, ConfirmationRequest, ConfirmationRun, ConfirmedTrial
from tuner.study.hooks import LOG, Hook
from tuner.study.keys import confirmation_run_name, write_confirmation, write_confirmation_run
from tuner.study.objective import Interrupted
from tuner.study.record import StudyRecord, TrialRecord, read_spec
from tuner.study.tracked_run import Runtime, tracked_train

Follow = Callable[[str], AbstractContextManager[Tracker]]
"""Given a run's name, returns its tracker."""

log = logging.getLogger(__name__)


def confirm(
    study: optuna.Study,
    num_trials: int,
    *,
    num_seeds: int = 2,
    rung: int | None = None,
    runtime: Runtime | None = None,
    follow: Follow = lambda name: nullcontext(Trackers([])),
    on_change: Callable[[], None] = lambda: None,
) -> Confirmation:
    """Run the best trials and the baseline for longer, each on several seeds; stored runs are not trained again.

    Args:
        num_trials: Number of best trials; the baseline is added if it is complete.
        num_seeds: The study's own training seed and the ones that follow it.
        rung: Length of the runs, in the unit of `[trial]`. Default: a quarter of the full run or twice a trial,
            whichever is smaller and still longer than a trial.
        on_change: Called after each run.

    Raises:
        UserError: There is no complete trial, the rung does not fit, no run was completed, or the command of [hooks]
            left no value of its metric.
        Interrupted: It was stopped; the same call continues it.
    """
    runtime, record, spec = runtime or Runtime(), StudyRecord.read(study), read_spec(study)
    chosen, base = _candidates(record, num_trials)
    rung = _rung(spec, chosen, rung)
    seeds = range(spec.baseline.seed, spec.baseline.seed + num_seeds)
    jobs = [(trial, seed) for trial in chosen for seed in seeds]
    judge = spec.hooks.metric if spec.hooks else None
    left = [job for job in jobs if not _is_done(record.confirmation_run(job[0].number, job[1]), rung, judge)]
    log.info(
        "confirmation over %s %s, trials %s, %d seeds: %d runs, %d of them still to do",
        f"{rung:,}",
        spec.trial.unit,
        ", ".join(f"{t.number} (baseline)" if t.number == base else str(t.number) for t in chosen),
        num_seeds,
        len(jobs),
        len(left),
    )
    request = ConfirmationRequest(num_trials, num_seeds, rung, best=chosen[0].number)
    if left:
        write_confirmation(study, request)
    for trial, seed in left:
        _Run(study, spec, trial, seed, rung, runtime).train(follow, record.confirmation_run(trial.number, seed))
        on_change()
    confirmation = _summary(StudyRecord.read(study), spec, chosen, base, seeds, rung)
    write_confirmation(study, request, confirmation)
    return confirmation


def _candidates(record: StudyRecord, num_trials: int) -> tuple[list[TrialRecord], int | None]:
    """The best trials and the baseline, and the baseline's number if it is among them."""
    if not record.ranked:
        raise UserError(f"study {record.name} has no complete trial yet: launch it, or look at tuner status.")
    chosen = [*record.favourites[:num_trials], *filter(record.is_baseline, record.favourites[num_trials:])]
    return chosen, next((trial.number for trial in chosen if record.is_baseline(trial)), None)


def _rung(spec: StudySpec, chosen: Sequence[TrialRecord], asked: int | None) -> int:
    """Length of the runs, in the unit of the trials."""
    unit, budget = spec.trial.unit, spec.trial.budget
    whole = full = math.inf
    if unit != "seconds":
        configs = [full_setup(spec, trial.params).config for trial in chosen]
        # At most up to the first decay: a candidate whose rate has fallen would beat one whose rate is constant.
        step_sizes = [c.effective_batch_size if unit == "samples" else 1 for c in configs]
        whole = min((c.num_steps or 0) * size for c, size in zip(configs, step_sizes, strict=True))
        full = min((c.decay_start or c.num_steps or 0) * size for c, size in zip(configs, step_sizes, strict=True))
    if full <= budget:
        raise UserError(
            f"the full run, up to its decay ({full:,} {unit}), is no longer than a trial: there is nothing to confirm; "
            "leave --confirm out."
        )
    longer = [length for length in (whole / 4, 2 * budget) if length > budget]
    rung = math.ceil(min(*longer, full)) if asked is None else asked
    if not budget < rung <= full:
        limit = "" if math.isinf(full) else f" and no longer than the full run up to its decay ({full:,})"
        raise UserError(f"--rung {rung}: it must be longer than a trial ({budget:,g} {unit}){limit}.")
    return rung


def _is_done(run: ConfirmationRun | None, rung: int, judge: str | None) -> bool:
    if run is None:
        return False
    if not run.failed and max(run.curve, default=0) > rung and rung not in run.curve:
        raise UserError(f"--rung {rung}: {Path(run.run_dir).name} is at {max(run.curve)} already; use that.")
    return bool(run.failed) or (rung in run.curve and (judge is None or judge in run.hook))


@dataclass
class _Run:
    """One run of a confirmation."""

    study: optuna.Study
    spec: StudySpec
    trial: TrialRecord
    seed: int
    rung: int
    runtime: Runtime
    curve: dict[int, float] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        return self.runtime.run_dir(self.spec.study.name, confirmation_run_name(self.trial.number, self.seed))

    def train(self, follow: Follow, before: ConfirmationRun | None) -> None:
        """Train to the rung's end, or continue, and store each evaluation in the study.

        Args:
            before: The run so far.
        """
        spec, trial, seed, run_dir = self.spec, self.trial, self.seed, self.run_dir
        setup = trial_setup(spec, trial.params, **{spec.trial.unit: self.rung, "seed": seed})
        is_own_seed = seed == spec.baseline.seed
        lineage = {"study": spec.study.name, "trial": trial.number, "params": dict(trial.params), "seed": seed}
        log.info("%s", run_dir.name)
        origin = trial.run_dir
        if is_own_seed and not holds_state(run_dir) and origin is not None:
            step = read_step(origin, run_dir)
            if step is not None:
                link_checkpoints(origin, run_dir, setup.workload)
            lineage["continued_from"] = None if step is None else {"run_dir": str(origin), "step": step}
        self.curve.update(before.curve if before else {})
        name = f"confirmation of trial {trial.number}, seed {seed}, of {spec.study.name}"
        try:
            with follow(name) as tracker:
                result = tracked_train(
                    setup,
                    run_dir,
                    self.runtime,
                    experiment=spec.study.name,
                    lineage=lineage,
                    trackers=[tracker],
                    on_eval=self._on_eval,
                )
        except Diverged as error:
            log.warning("%s: %s", run_dir.name, error)
            self._store(failed=str(error))
            return
        if not result.finished:
            raise Interrupted
        self.curve[self.rung] = result.metrics[spec.study.metric]
        self._store(hook=self._judge(result.step))
        if not is_own_seed:
            # No run continues from this one, and a checkpoint may have 10 GB.
            delete_checkpoints(run_dir)

    def _on_eval(self, evaluation: Evaluation) -> None:
        value = evaluation.metrics[self.spec.study.metric]
        if not math.isfinite(value):
            raise Diverged(f"{self.spec.study.metric} was {value} after {evaluation.samples} samples")
        if evaluation.point < self.rung:
            self.curve[round(evaluation.point)] = value
            self._store()

    def _judge(self, step: int) -> dict[str, float]:
        """The metrics of [hooks] at the end of the run; none if the study's metric judges."""
        hooks = self.spec.hooks
        if hooks is None or hooks.metric is None:
            return {}
        hook = Hook(hooks, self.spec.base_dir, {"study": self.spec.study.name, "trial": str(self.trial.number)})
        samples = hook.sample(self.run_dir, self.run_dir / LATEST, step, stop=self.runtime.stop)
        if samples is None and self.runtime.stop():
            raise Interrupted
        if samples is None or hooks.metric not in samples.metrics:
            cause = "its command failed" if samples is None else f"{samples.folder} has no metrics.json with it"
            raise UserError(
                f"hooks.metric {hooks.metric!r} has no value for {self.run_dir.name}: {cause}; see its {LOG}, and give "
                "the same command again."
            )
        return samples.metrics

    def _store(self, failed: str = "", hook: dict[str, float] | None = None) -> None:
        run = ConfirmationRun(str(self.run_dir), self.curve, failed, hook or {})
        write_confirmation_run(self.study, self.trial.number, self.seed, run)


def _summary(
    record: StudyRecord,
    spec: StudySpec,
    chosen: Sequence[TrialRecord],
    base: int | None,
    seeds: Sequence[int],
    rung: int,
) -> Confirmation:
    metric, minimized, judge = record.metric, record.minimized, None
    if spec.hooks and spec.hooks.metric:
        metric = judge = spec.hooks.metric
        minimized = spec.hooks.direction == "minimize"
    confirmed = []
    for trial in chosen:
        runs = {seed: run for seed in seeds if (run := record.confirmation_run(trial.number, seed))}
        values = {seed: run.hook[judge] if judge else run.curve[rung] for seed, run in runs.items() if not run.failed}
        failed = next((f"seed {seed}: {run.failed}" for seed, run in runs.items() if run.failed), "")
        confirmed.append(ConfirmedTrial(trial.number, dict(trial.params), values, failed))
    complete = sorted((t for t in confirmed if not t.failed), key=lambda t: t.mean if minimized else -t.mean)
    if not complete:
        raise UserError(
            f"no trial completed its confirmation (trial {confirmed[0].number}, {confirmed[0].failed}): "
            "search lower train.d_coef or train.lr."
        )
    failed_trials = [trial for trial in confirmed if trial.failed]
    return Confirmation(metric, minimized, record.unit, rung, [*complete, *failed_trials], base)
