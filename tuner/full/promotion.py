"""The best trial becomes the full run, with its lineage; and the comparison that says what it won."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from trainer import TrainResult, UserError
from trainer.checkpoint import holds_state
from trainer.locks import is_locked
from trainer.tracking import Tracker
from tuner.full.confirmation import own_curve, own_seed
from tuner.full.confirmed import Confirmation, read_record, stored_asked, stored_confirmation
from tuner.full.continuation import go_on_from, step_to_go_on_from
from tuner.full.following import drawn, measured, stand
from tuner.full.lineage import CONTINUED_AT, PROMOTIONS, lineage_of, promotion_of, remember
from tuner.full.retracing import Retracing
from tuner.full.runs import CONTINUED_FROM, curves_of, open_curve
from tuner.run import Runtime, code_digest, link_aim, tracked_train
from tuner.search_space import Setup, full_setup, trial_setup
from tuner.show.page import StudyPage
from tuner.spec import StudySpec
from tuner.trials import CODE, ranking, stored_spec, trial_name

log = logging.getLogger(__name__)


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
        trial: Number of the trial. Default: that of the full run already started, else the winner of the study's
            confirmation, else the best.
        confirmed: Promote the winner of this confirmation.
        steps: Length in optimizer updates, in place of the spec's `[full]`.
        fresh: Start at step 0, whatever checkpoints there are.

    Raises:
        UserError: There is no such trial, it can't be promoted, a better one has appeared since, or a
            confirmation is unfinished.
    """
    runtime, spec = runtime or Runtime(), stored_spec(study)
    if trial is None and confirmed is None:
        confirmed = _confirmed_before(study)
    chosen = _choose(study, trial, confirmed)
    length = _length(study, spec, chosen, steps)
    setup = full_setup(spec, chosen.params, **length)
    run_dir = runtime.run_dir(spec.study.name, f"full-{trial_name(chosen.number)}")
    if is_locked(run_dir):
        raise UserError(f"{run_dir} is in use by another process: wait for it or stop it.")
    record, curve = _begin(study, spec, chosen, run_dir, setup, fresh, steps, confirmed)
    retracing = Retracing(study, spec, chosen)
    if record[CONTINUED_FROM] is None:
        retracing.say_if_blind(setup.config.eval_every or math.inf)
    if (code := code_digest(setup.workload)) != chosen.user_attrs.get(CODE, code):
        log.warning("the code of %s has changed since trial %d ran", spec.study.workload, chosen.number)
    followers, page = list(trackers), StudyPage(study, runtime.run_root)
    if curve is not None:
        followers.append(measured(study, spec, chosen, setup, length, curve, run_dir))
    try:
        result = tracked_train(
            setup,
            run_dir,
            runtime,
            experiment=spec.study.name,
            lineage=lineage_of(study, chosen, record),
            trackers=followers,
            on_eval=None if curve is None else drawn(spec, retracing, curve, run_dir, page),
        )
        if curve is not None:
            link_aim(curve, run_dir)
            stand(curve, result.step, result.metrics)
            if result.finished:
                curve.study.tell(curve, result.metrics[spec.study.metric])
    finally:
        # Nor does a run that failed go on.
        page.update(now=True)
    return result


def _begin(
    study: optuna.Study,
    spec: StudySpec,
    chosen: FrozenTrial,
    run_dir: Path,
    setup: Setup,
    fresh: bool,
    steps: int | None,
    confirmed: Confirmation | None,
) -> tuple[dict[str, Any], optuna.Trial | None]:
    """Record where a full run comes from, open its curve, and put the checkpoint that it goes on from in its place.

    Returns the record, and the curve, which is None where the run has finished.
    """
    begun = holds_state(run_dir)
    origin, step = _origin(study, spec, chosen, run_dir, begun, fresh)
    if steps is not None and steps < (stands := _stands_at(study, chosen, run_dir) if begun else step):
        raise UserError(f"--steps {steps}: the full run stands at step {stands}; leave --steps out, or give more.")
    # All that is to be known of the run comes before its first checkpoint: whatever ends this, the next call finds
    # either a run that has begun, or the same beginning.
    record = remember(study, chosen, run_dir, (origin, step), begun, confirmed)
    past = None if begun else own_curve(study, spec, chosen) if origin and spec.trial.unit == "samples" else {}
    curve = open_curve(study, chosen, run_dir, setup.config.num_steps, past=past, continued_from=origin)
    if origin and not begun:
        go_on_from(origin, run_dir, setup.workload)
    return record, curve


def _stands_at(study: optuna.Study, chosen: FrozenTrial, run_dir: Path) -> int:
    """The step at which a full run was validated or saved last."""
    mine = curves_of(study, chosen)
    validated = int(mine[-1].user_attrs.get("step", 0)) if mine else 0
    return max(validated, *(int(path.stem.removeprefix("step_")) for path in run_dir.glob("step_*.pth")), 0)


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
    return tracked_train(setup, run_dir, runtime, experiment=spec.study.name, lineage=lineage, trackers=trackers)


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


def _origin(
    study: optuna.Study, spec: StudySpec, chosen: FrozenTrial, run_dir: Path, begun: bool, fresh: bool
) -> tuple[Path | None, int]:
    """Whose checkpoint a full run goes on from, and its step; None and 0 where it starts at step 0."""
    record = promotion_of(study, run_dir)
    if begun:
        if fresh:
            _refuse_other_start(study, chosen, run_dir)
        started_from = record and record[CONTINUED_FROM]
        return (Path(started_from), record.get(CONTINUED_AT, 0)) if started_from else (None, 0)
    # One that was to start at step 0 and ended before its first checkpoint starts there again.
    if fresh or (record and record[CONTINUED_FROM] is None):
        return None, 0
    confirmed = read_record(study, chosen.number, own_seed(spec))
    # The confirmed run has come further than the trial.
    further = [Path(confirmed["run_dir"])] if confirmed and not confirmed["failed"] else []
    for origin in (*further, Path(chosen.user_attrs["run_dir"])):
        step = step_to_go_on_from(origin, run_dir)
        if step is not None:
            return origin, step
    log.warning("the full run starts at step 0")
    return None, 0


def _refuse_other_start(study: optuna.Study, chosen: FrozenTrial, run_dir: Path) -> None:
    """A run that did not start at step 0 can't be made to have."""
    mine = curves_of(study, chosen)
    origin = mine[-1].user_attrs.get(CONTINUED_FROM, "a checkpoint") if mine else "a checkpoint"
    if origin is not None:
        raise UserError(
            f"{run_dir} went on from {Path(origin).name}: remove that folder to start at step 0, or leave --fresh out."
        )


def _confirmed_before(study: optuna.Study) -> Confirmation | None:
    """The study's confirmation, where no full run was started since.

    Raises:
        UserError: It has not come to its end, or there is a better trial since.
    """
    asked = stored_asked(study)
    if asked is None or study.user_attrs.get(PROMOTIONS):
        return None
    found, best = stored_confirmation(study), ranking(study)[0].number
    if found is None:
        raise UserError(
            f"a confirmation of {study.study_name} is unfinished: go on with it ({asked.options}), or promote the best "
            f"trial without it (--trial {best})."
        )
    if best != asked.best:
        raise UserError(
            f"trial {best} is better than those that were confirmed: confirm again ({asked.options}), or choose with "
            f"--trial {best} or --trial {found.winner.number} (which won)."
        )
    log.info("promoting the winner of the confirmation: %s", found.verdict)
    return found


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
