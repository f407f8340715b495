"""The best trials once more, for longer and on several seeds, before one of them becomes a full run of days.

A short run may rank settings otherwise than a long one does, and the best of many noisy trials looks better than it
is. `confirm` takes the best ones and the baseline to a longer rung: on the study's own seed from the trial's own
checkpoint, since a trial is a prefix of its full run, and on others from step 0. Every evaluation is kept in the study
as it is made, so nothing is paid twice when the command is interrupted or repeated.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from trainer import Diverged, Evaluation, UserError
from trainer.checkpoint import digest_path, holds_state
from trainer.tracking import Tracker, Trackers
from tuner.full.confirmed import (
    Asked,
    Confirmation,
    ConfirmedTrial,
    keep_asked,
    keep_found,
    points_of,
    read_record,
    record_name,
)
from tuner.full.continuation import go_on_from, step_to_go_on_from
from tuner.full.runs import CONTINUED_FROM
from tuner.objective import Interrupted
from tuner.run import Runtime, tracked_train
from tuner.search_space import full_setup, trial_setup
from tuner.show.page import StudyPage
from tuner.spec import StudySpec
from tuner.trials import baseline_trial, ranking, stored_spec

Follow = Callable[[str], AbstractContextManager[Tracker]]
"""Given a run's name, what follows it while it trains."""

log = logging.getLogger(__name__)


def confirm(
    study: optuna.Study,
    num_trials: int,
    *,
    num_seeds: int = 2,
    rung: int | None = None,
    runtime: Runtime | None = None,
    follow: Follow = lambda name: nullcontext(Trackers([])),
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
    asked = Asked(num_trials, num_seeds, rung, best=chosen[0].number)
    if left:
        keep_asked(study, asked)
    for trial, seed in left:
        _run(study, spec, trial, seed, rung, runtime, follow)
    found = _summary(study, spec, chosen, base, range(first, first + num_seeds), rung)
    keep_found(study, asked, found)
    StudyPage(study, runtime.run_root).update(now=True)
    return found


def own_seed(spec: StudySpec) -> int:
    """The training seed of a study's trials and full runs."""
    return spec.build_config({**spec.train, "steps": 1}).seed


def own_curve(study: optuna.Study, spec: StudySpec, trial: FrozenTrial) -> dict[int, float]:
    """A trial's values by point, and those of its confirmation on the study's own seed."""
    return {**trial.intermediate_values, **points_of(read_record(study, trial.number, own_seed(spec)))}


def seed_spread(study: optuna.Study, spec: StudySpec, trial: FrozenTrial, point: int) -> float | None:
    """Largest minus smallest value of a trial over its seeds at a point; None where fewer than two got there."""
    prefix = record_name(trial.number, 0)[:-1]
    others = [points_of(record) for name, record in study.user_attrs.items() if name.startswith(prefix)]
    # Its own seed comes twice where it was confirmed, which changes no spread.
    curves = [own_curve(study, spec, trial), *others]
    values = {name: curve[point] for name, curve in enumerate(curves) if point in curve}
    return max(values.values()) - min(values.values()) if len(set(values.values())) > 1 else None


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
    points = points_of(record)
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
    follow: Follow,
) -> None:
    """Train one run to the rung's end, or go on with it, and keep what it finds in the study."""
    setup = trial_setup(spec, trial.params, **{spec.trial.unit: rung, "seed": seed})
    name, metric, own = record_name(trial.number, seed), spec.study.metric, seed == own_seed(spec)
    run_dir = runtime.run_dir(spec.study.name, name)
    lineage = {"study": spec.study.name, "trial": trial.number, "params": trial.params, "seed": seed}
    log.info("%s", name)
    if own and not holds_state(run_dir):
        origin = Path(trial.user_attrs["run_dir"])
        step = step_to_go_on_from(origin, run_dir)
        if step is not None:
            go_on_from(origin, run_dir, setup.workload)
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

    experiment = spec.study.name
    try:
        with follow(f"confirmation of trial {trial.number}, seed {seed}, of {experiment}") as tracker:
            result = tracked_train(
                setup, run_dir, runtime, experiment=experiment, lineage=lineage, trackers=[tracker], on_eval=on_eval
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
        values = {seed: points_of(record)[rung] for seed, record in records.items() if not record["failed"]}
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
