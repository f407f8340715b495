"""The best trials once more, for longer and on several seeds, before one of them becomes a full run of days.

A short run may rank settings otherwise than a long one does, and the best of many noisy trials looks better than it
is. `confirm` takes the best ones and the baseline to a longer rung: on the study's own seed from the trial's own
checkpoint, since a trial is a prefix of its full run, and on others from step 0. Every evaluation is kept in the study
as it is made, so nothing is paid twice when the command is interrupted or repeated.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from trainer import Diverged, Evaluation, UserError
from trainer.checkpoint import digest_path
from trainer.tracking import Tracker
from tuner.full.continuation import go_on_from
from tuner.full.runs import CONTINUED_FROM
from tuner.objective import Interrupted
from tuner.run import Runtime, tracked_train
from tuner.search_space import full_setup, trial_setup
from tuner.spec import StudySpec
from tuner.trials import baseline_trial, ranking, stored_spec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConfirmedTrial:
    """A trial's values at the rung's end."""

    number: int
    params: dict[str, Any]
    values: dict[int, float]
    """By training seed."""
    failed: str = ""
    """What ended one of its runs before the rung's end; such a trial can't win."""

    @property
    def mean(self) -> float:
        return mean(self.values.values())

    @property
    def spread(self) -> float:
        """Largest minus smallest value over the seeds."""
        return max(self.values.values()) - min(self.values.values())


@dataclass(frozen=True)
class Confirmation:
    """What the longer runs found."""

    metric: str
    minimized: bool
    unit: str
    rung: int
    """How long the runs were, in `unit`: samples, steps or seconds."""
    trials: list[ConfirmedTrial]
    """The best mean first; those that failed last."""
    baseline: int | None
    """Number of the baseline among them."""

    @property
    def winner(self) -> ConfirmedTrial:
        return self.trials[0]

    def margin(self, trial: ConfirmedTrial) -> float | None:
        """By how much its mean is better than the baseline's; None where one of them has none."""
        base = next((each for each in self.trials if each.number == self.baseline), None)
        if base is None or base.failed or trial.failed:
            return None
        return base.mean - trial.mean if self.minimized else trial.mean - base.mean

    @property
    def noise(self) -> float | None:
        """The spread over seeds, pooled (root mean square) over the trials; None where there is one seed."""
        spreads = [trial.spread for trial in self.trials if not trial.failed and len(trial.values) > 1]
        return math.sqrt(mean(spread**2 for spread in spreads)) if spreads else None

    @property
    def verdict(self) -> str:
        """What it says of the winner, in a line."""
        name, margin, noise = f"trial {self.winner.number}", self.margin(self.winner), self.noise
        if self.winner.number == self.baseline:
            return f"the baseline ({name}) is the best of them: the study found nothing better"
        if margin is None:
            return f"{name} is the best of them; there is no baseline at the rung's end to compare it with"
        if noise is None:
            return f"{name} is {margin:.4f} better than the baseline; one seed does not say how much of it is noise"
        if margin < noise:
            return f"{name} is within noise of the baseline: {margin:.4f} better, and seeds alone differ by {noise:.4f}"
        return f"{name} is {margin:.4f} better than the baseline, and seeds alone differ by {noise:.4f}"


def confirm(
    study: optuna.Study,
    num_trials: int,
    *,
    num_seeds: int = 2,
    rung: int | None = None,
    runtime: Runtime | None = None,
    trackers: Sequence[Tracker] = (),
) -> Confirmation:
    """Run the best trials and the baseline for longer, each on several seeds; what was run before is taken over.

    Args:
        num_trials: How many of the best; the baseline comes besides, where it got to its end.
        num_seeds: The study's own training seed and the ones that follow it.
        rung: Length of the runs, in the unit of `[trial]`. Default: a quarter of the full run or twice a trial,
            whichever is smaller and still longer than a trial.

    Raises:
        UserError: There is no complete trial, the rung does not fit, or no trial got to its end.
        Interrupted: It was stopped; the same call goes on.
    """
    runtime, spec = runtime or Runtime(), stored_spec(study)
    chosen, base = _candidates(study, num_trials)
    rung = _rung(spec, chosen, rung)
    first = own_seed(spec)
    jobs = [(trial, seed) for trial in chosen for seed in range(first, first + num_seeds)]
    left = [(trial, seed) for trial, seed in jobs if not _is_done(read_record(study, trial.number, seed), rung)]
    log.info(
        "confirmation over %s %s, trials %s, %d seeds: %d runs, %d of them still to do",
        f"{rung:,}",
        spec.trial.unit,
        ", ".join(f"{t.number} (baseline)" if t.number == base else str(t.number) for t in chosen),
        num_seeds,
        len(jobs),
        len(left),
    )
    for trial, seed in left:
        _run(study, spec, trial, seed, rung, runtime, trackers)
    return _summary(study, spec, chosen, base, range(first, first + num_seeds), rung)


def own_seed(spec: StudySpec) -> int:
    """The training seed of a study's trials and full runs."""
    return spec.build_config({**spec.train, "steps": 1}).seed


def record_name(number: int, seed: int) -> str:
    """Of a confirmation run: its directory, and the study's attribute that holds its record."""
    return f"confirm-{number:05d}-seed-{seed}"


def read_record(study: optuna.Study, number: int, seed: int) -> dict[str, Any]:
    """What is known of a confirmation run: `run_dir`, `curve` (value by point, as text) and `failed`; {}: nothing."""
    record: dict[str, Any] = study.user_attrs.get(record_name(number, seed), {})
    return record


def own_curve(study: optuna.Study, spec: StudySpec, trial: FrozenTrial) -> dict[int, float]:
    """A trial's values by point, and those of its confirmation on the study's own seed."""
    return {**trial.intermediate_values, **_points(read_record(study, trial.number, own_seed(spec)))}


def seed_spread(study: optuna.Study, spec: StudySpec, trial: FrozenTrial, point: int) -> float | None:
    """Largest minus smallest value of a trial over its seeds at a point; None where fewer than two got there."""
    prefix = record_name(trial.number, 0)[:-1]
    others = [_points(record) for name, record in study.user_attrs.items() if name.startswith(prefix)]
    # Its own seed comes twice where it was confirmed, which changes no spread.
    curves = [own_curve(study, spec, trial), *others]
    values = {name: curve[point] for name, curve in enumerate(curves) if point in curve}
    return max(values.values()) - min(values.values()) if len(set(values.values())) > 1 else None


def _points(record: Mapping[str, Any]) -> dict[int, float]:
    return {int(point): value for point, value in record.get("curve", {}).items()}


def _candidates(study: optuna.Study, num_trials: int) -> tuple[list[FrozenTrial], int | None]:
    """The best trials and the baseline, and the baseline's number if it is among them."""
    ranked = ranking(study)
    if not ranked:
        raise UserError(f"study {study.study_name} has no complete trial yet: launch it, or look at tuner status.")
    base = baseline_trial(study)
    with_baseline = [trial for trial in ranked[num_trials:] if base is not None and trial.number == base.number]
    chosen = [*ranked[:num_trials], *with_baseline]
    return chosen, base.number if base is not None and base.number in {trial.number for trial in chosen} else None


def _rung(spec: StudySpec, chosen: Sequence[FrozenTrial], asked: int | None) -> int:
    """How long the runs are, in the unit of the trials."""
    unit, budget = spec.trial.unit, spec.trial.budget
    full = math.inf
    if unit != "seconds":
        configs = [full_setup(spec, trial.params).config for trial in chosen]
        full = min((c.num_steps or 0) * (c.effective_batch_size if unit == "samples" else 1) for c in configs)
    if full <= budget:
        raise UserError(
            f"the full run ({full:,} {unit}) is no longer than a trial: there is nothing to confirm; "
            "leave --confirm out."
        )
    longer = [length for length in (full / 4, 2 * budget) if length > budget]
    rung = math.ceil(min(*longer, full)) if asked is None else asked
    if not budget < rung <= full:
        limit = "" if math.isinf(full) else f" and no longer than the full run ({full:,})"
        raise UserError(f"--rung {rung}: it must be longer than a trial ({budget:,g} {unit}){limit}.")
    return rung


def _is_done(record: Mapping[str, Any], rung: int) -> bool:
    points = _points(record)
    if record.get("failed") or rung in points:
        return True
    if points and max(points) > rung:
        raise UserError(f"--rung {rung}: {Path(record['run_dir']).name} has gone on to {max(points)}; use that.")
    return False


def _run(
    study: optuna.Study,
    spec: StudySpec,
    trial: FrozenTrial,
    seed: int,
    rung: int,
    runtime: Runtime,
    trackers: Sequence[Tracker],
) -> None:
    """Train one run to the rung's end, or go on with it, and keep what it finds in the study."""
    setup = trial_setup(spec, trial.params, **{spec.trial.unit: rung, "seed": seed})
    name, metric, own = record_name(trial.number, seed), spec.study.metric, seed == own_seed(spec)
    run_dir = runtime.run_dir(spec.study.name, name)
    lineage = {"study": spec.study.name, "trial": trial.number, "params": trial.params, "seed": seed}
    log.info("%s", name)
    if own and not any(run_dir.glob("*.pth")):
        origin = Path(trial.user_attrs["run_dir"])
        step = go_on_from(origin, run_dir, setup.workload)
        lineage[CONTINUED_FROM] = None if step is None else {"run_dir": str(origin), "step": step}
    curve = dict(read_record(study, trial.number, seed).get("curve", {}))

    def keep(failed: str = "") -> None:
        study.set_user_attr(name, {"run_dir": str(run_dir), "curve": curve, "failed": failed})

    def on_eval(evaluation: Evaluation) -> None:
        value = evaluation.metrics[metric]
        if not math.isfinite(value):
            raise Diverged(f"{metric} was {value} after {evaluation.samples} samples")
        if evaluation.point < rung:
            curve[str(round(evaluation.point))] = value
            keep()

    experiment = f"{spec.study.name}.confirm"
    try:
        result = tracked_train(
            setup, run_dir, runtime, experiment=experiment, lineage=lineage, trackers=trackers, on_eval=on_eval
        )
    except Diverged as error:
        log.warning("%s: %s", name, error)
        keep(failed=str(error))
        return
    if not result.finished:
        raise Interrupted
    curve[str(rung)] = result.metrics[metric]
    keep()
    if not own:
        # Nothing goes on from here, and a checkpoint may have 10 GB.
        _drop_checkpoints(run_dir)


def _drop_checkpoints(run_dir: Path) -> None:
    for path in run_dir.glob("*.pth"):
        path.unlink()
        digest_path(path).unlink(missing_ok=True)


def _summary(
    study: optuna.Study,
    spec: StudySpec,
    chosen: Sequence[FrozenTrial],
    base: int | None,
    seeds: Sequence[int],
    rung: int,
) -> Confirmation:
    confirmed = []
    for trial in chosen:
        records = {seed: read_record(study, trial.number, seed) for seed in seeds}
        values = {seed: _points(record)[rung] for seed, record in records.items() if not record["failed"]}
        failed = next((f"seed {seed}: {record['failed']}" for seed, record in records.items() if record["failed"]), "")
        confirmed.append(ConfirmedTrial(trial.number, trial.params, values, failed))
    minimized = spec.study.direction == "minimize"
    whole = sorted((t for t in confirmed if not t.failed), key=lambda t: t.mean if minimized else -t.mean)
    if not whole:
        raise UserError(
            f"no trial got to the end of the confirmation (trial {confirmed[0].number}, {confirmed[0].failed}): "
            "search lower train.d_coef or train.lr."
        )
    failed_ones = [trial for trial in confirmed if trial.failed]
    return Confirmation(spec.study.metric, minimized, spec.trial.unit, rung, [*whole, *failed_ones], base)
