"""The best trial becomes the full run, with its lineage; and the comparison that says what it won."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from trainer import Evaluation, TrainResult, UserError
from trainer.locks import is_locked
from trainer.tracking import Tracker
from tuner.dashboard.page import StudyPage
from tuner.full.confirmation import Confirmation, own_curve, own_seed, read_record
from tuner.full.continuation import go_on_from
from tuner.full.projection import MeasuredSpeed, projections
from tuner.full.retracing import Retracing
from tuner.full.runs import CONTINUED_FROM, curves_of, open_curve
from tuner.run import Runtime, code_version, log_file, tracked_train
from tuner.search_space import Setup, full_setup, trial_setup
from tuner.spec import StudySpec
from tuner.trials import ranking, report_once, stored_spec, trial_name

log = logging.getLogger(__name__)

PROMOTIONS = "promotions"


def promote(
    study: optuna.Study,
    *,
    trial: int | None = None,
    confirmed: Confirmation | None = None,
    steps: int | None = None,
    fresh: bool = False,
    runtime: Runtime | None = None,
    trackers: Sequence[Tracker] = (),
) -> TrainResult:
    """Train the full run with a trial's parameters, or continue the one that was started.

    The full run goes on from the checkpoint of the trial's confirmation, else from the trial's own, where there is
    one, since a trial is a prefix of its full run. One from step 0 is held against the trial's curve. The study
    remembers where it came from, and `<study>.full` holds its curve.

    Args:
        trial: Number of the trial. Default: that of the full run already started, else the best.
        confirmed: Promote the winner of this confirmation.
        steps: Length in optimizer updates, in place of the spec's `[full]`.
        fresh: Start at step 0, whatever checkpoints there are.

    Raises:
        UserError: There is no such trial, it can't be promoted, or a better one has appeared since.
    """
    runtime = runtime or Runtime()
    spec = stored_spec(study)
    chosen = _choose(study, trial, confirmed)
    length = _length(study, spec, chosen, steps)
    setup = full_setup(spec, chosen.params, **length)
    run_dir = runtime.run_dir(spec.study.name, f"full-{trial_name(chosen.number)}")
    if is_locked(run_dir):
        raise UserError(f"{run_dir} is in use by another process: wait for it or stop it.")
    origin, past, lineage = _start(study, spec, chosen, run_dir, setup, fresh)
    _remember(study, chosen, run_dir, origin, confirmed)
    curve = open_curve(study, chosen, run_dir, setup.config.num_steps, past=past, continued_from=origin)
    followers = list(trackers)
    if curve is not None:
        with log_file(run_dir):
            for line in projections(study, spec, chosen, length):
                log.info("%s", line)
        followers.append(MeasuredSpeed((setup.config.num_steps or 0) * setup.config.effective_batch_size))
    page = StudyPage(study, runtime.run_root)
    retracing = Retracing(study, spec, chosen)

    def on_eval(evaluation: Evaluation) -> None:
        assert curve is not None, "a finished run has nothing to evaluate"
        value = evaluation.metrics[spec.study.metric]
        if curve.user_attrs.get(CONTINUED_FROM, "unknown") is None:
            retracing.check(curve, evaluation.point, value)
        report_once(curve, value, evaluation.samples)
        curve.set_user_attr("step", evaluation.step)
        curve.set_user_attr("metrics", evaluation.metrics)
        page.update()

    result = tracked_train(
        setup,
        run_dir,
        runtime,
        experiment=f"{spec.study.name}.full",
        lineage=lineage,
        trackers=followers,
        on_eval=on_eval,
    )
    if curve is not None:
        curve.set_user_attr("step", result.step)
        curve.set_user_attr("metrics", result.metrics)
        if result.finished:
            curve.study.tell(curve, result.metrics[spec.study.metric])
    page.update(now=True)
    return result


def rerun(
    study: optuna.Study,
    number: int,
    *,
    seed: int,
    runtime: Runtime | None = None,
    trackers: Sequence[Tracker] = (),
) -> TrainResult:
    """Train a trial's short run once more on another seed, measured on the same validation set.

    The best of many noisy trials looks better than it is; a fresh seed says what it is worth.
    """
    spec, chosen = stored_spec(study), _find(study, number)
    setup = trial_setup(spec, chosen.params, seed=seed, save_every=None)
    runtime = runtime or Runtime()
    run_dir = runtime.run_dir(spec.study.name, f"{trial_name(number)}-seed-{seed}")
    lineage = {"study": spec.study.name, "trial": number, "params": chosen.params, "seed": seed}
    return tracked_train(
        setup, run_dir, runtime, experiment=f"{spec.study.name}.rerun", lineage=lineage, trackers=trackers
    )


def _length(study: optuna.Study, spec: StudySpec, chosen: FrozenTrial, steps: int | None) -> dict[str, Any]:
    """The full run's length where it is not the spec's: as asked for, now or when it was started."""
    horizon = full_setup(spec, chosen.params).config
    mine = curves_of(study, chosen)
    if steps is None and mine:
        steps = mine[-1].user_attrs["steps"]
    if steps is None or steps == horizon.num_steps:
        return {}
    if horizon.schedule != "none":
        raise UserError(
            f"--steps {steps}: the trials followed schedule {horizon.schedule} over {horizon.num_steps} steps, and the "
            "full run goes on from there; leave --steps out, or tune with another [full] length."
        )
    return {"steps": steps, "samples": None}


def _start(
    study: optuna.Study, spec: StudySpec, chosen: FrozenTrial, run_dir: Path, setup: Setup, fresh: bool
) -> tuple[Path | None, dict[int, float] | None, dict[str, Any]]:
    """Whose checkpoint a full run goes on from, the curve drawn so far, and its lineage.

    The curve is None for a run that is under way: it has one of its own.
    """
    lineage: dict[str, Any] = {"study": spec.study.name, "trial": chosen.number, "params": chosen.params}
    if any(run_dir.glob("*.pth")):
        if fresh:
            _refuse_other_start(study, chosen, run_dir)
        return None, None, lineage
    origin, step = (None, 0) if fresh else _go_on(study, spec, chosen, run_dir, setup)
    lineage[CONTINUED_FROM] = {"run_dir": str(origin), "step": step} if origin else None
    return origin, own_curve(study, spec, chosen) if origin and spec.trial.unit == "samples" else {}, lineage


def _refuse_other_start(study: optuna.Study, chosen: FrozenTrial, run_dir: Path) -> None:
    """A run that did not start at step 0 can't be made to have."""
    mine = curves_of(study, chosen)
    origin = mine[-1].user_attrs.get(CONTINUED_FROM, "a checkpoint") if mine else "a checkpoint"
    if origin is not None:
        raise UserError(
            f"{run_dir} went on from {Path(origin).name}: remove that folder to start at step 0, or leave --fresh out."
        )


def _go_on(
    study: optuna.Study, spec: StudySpec, chosen: FrozenTrial, run_dir: Path, setup: Setup
) -> tuple[Path | None, int]:
    """Put the checkpoint that a full run goes on from into its directory: whose it is, and its step."""
    record = read_record(study, chosen.number, own_seed(spec))
    # The confirmed run has come further than the trial.
    confirmed = [Path(record["run_dir"])] if record and not record["failed"] else []
    for origin in (*confirmed, Path(chosen.user_attrs["run_dir"])):
        step = go_on_from(origin, run_dir, setup.workload)
        if step is not None:
            return origin, step
    log.warning("the full run starts at step 0")
    return None, 0


def _choose(study: optuna.Study, number: int | None, confirmed: Confirmation | None) -> FrozenTrial:
    if number is not None:
        return _find(study, number)
    if confirmed is not None:
        return _find(study, _confirmed_winner(study, confirmed))
    ranked = ranking(study)
    if not ranked:
        raise UserError(f"study {study.study_name} has no complete trial yet: launch it, or look at tuner status.")
    promotions = study.user_attrs.get(PROMOTIONS, [])
    if not promotions:
        return ranked[0]
    started, best = promotions[-1]["trial"], ranked[0].number
    if best not in (started, promotions[-1]["best"]):
        raise UserError(
            f"a full run of trial {started} was started, and trial {best} is better since: choose with "
            f"--trial {started} (continue) or --trial {best} (start anew)."
        )
    return _find(study, started)


def _confirmed_winner(study: optuna.Study, confirmed: Confirmation) -> int:
    winner = confirmed.winner.number
    promotions = study.user_attrs.get(PROMOTIONS, [])
    started = promotions[-1]["trial"] if promotions else winner
    if started != winner:
        raise UserError(
            f"a full run of trial {started} was started, and trial {winner} won the confirmation: choose with "
            f"--trial {started} (continue) or --trial {winner} (start anew), without --confirm."
        )
    return winner


def _find(study: optuna.Study, number: int) -> FrozenTrial:
    trials = study.get_trials(deepcopy=False)
    if not 0 <= number < len(trials):
        raise UserError(f"study {study.study_name} has no trial {number}: it has {len(trials)}, counted from 0.")
    chosen = trials[number]
    if chosen not in ranking(study, trials):
        raise UserError(
            f"trial {number} of {study.study_name} is {chosen.state.name.lower()}, not complete and feasible: "
            "choose another."
        )
    return chosen


def _remember(
    study: optuna.Study, chosen: FrozenTrial, run_dir: Path, origin: Path | None, confirmed: Confirmation | None
) -> None:
    """A finished trial can't be written to, so its promotion is recorded with the study, once."""
    promotions = study.user_attrs.get(PROMOTIONS, [])
    if any(promotion["run_dir"] == str(run_dir) for promotion in promotions):
        return
    record: dict[str, Any] = {
        "trial": chosen.number,
        "value": chosen.value,
        "params": chosen.params,
        "best": ranking(study)[0].number,
        "run_dir": str(run_dir),
        CONTINUED_FROM: None if origin is None else str(origin),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "code_version": code_version(),
    }
    if confirmed is not None:
        record["confirmation"] = {**asdict(confirmed), "verdict": confirmed.verdict}
    study.set_user_attr(PROMOTIONS, [*promotions, record])
