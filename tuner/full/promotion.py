"""The best trial becomes the full run, with its lineage; and the comparison that says what it won."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from trainer import Evaluation, TrainResult, UserError
from trainer.acceleration import detect
from trainer.locks import is_locked
from trainer.tracking import Tracker
from tuner.dashboard.page import StudyPage
from tuner.full.confirmation import own_curve, own_seed
from tuner.full.confirmed import Confirmation, read_record, stored_asked, stored_confirmation
from tuner.full.continuation import go_on_from
from tuner.full.projection import MeasuredSpeed, outlooks, say
from tuner.full.retracing import Retracing
from tuner.full.runs import CONTINUED_FROM, curves_of, open_curve
from tuner.peak_memory import PeakMemory
from tuner.run import Runtime, code_version, link_aim, log_file, tracked_train
from tuner.search_space import Setup, full_setup, trial_setup
from tuner.spec import StudySpec
from tuner.trials import FULL_HOURS, ranking, report_once, stored_spec, trial_name

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
    origin, past, lineage = _start(study, spec, chosen, run_dir, setup, fresh)
    _remember(study, chosen, run_dir, origin, confirmed)
    curve = open_curve(study, chosen, run_dir, setup.config.num_steps, past=past, continued_from=origin)
    followers, page = list(trackers), StudyPage(study, runtime.run_root)
    if curve is not None:
        followers.append(_measured(study, spec, chosen, setup, length, curve, run_dir))
    result = tracked_train(
        setup,
        run_dir,
        runtime,
        experiment=spec.study.name,
        lineage=lineage,
        trackers=followers,
        on_eval=None if curve is None else _drawn(study, spec, chosen, curve, run_dir, page),
    )
    if curve is not None:
        link_aim(curve, run_dir)
        _stand(curve, result.step, result.metrics)
        if result.finished:
            curve.study.tell(curve, result.metrics[spec.study.metric])
    page.update(now=True)
    return result


def _measured(
    study: optuna.Study,
    spec: StudySpec,
    chosen: FrozenTrial,
    setup: Setup,
    length: Mapping[str, Any],
    curve: optuna.Trial,
    run_dir: Path,
) -> Tracker:
    """Says what the full run will take, at once by its trial, and by its own first steps once they are measured."""
    found = outlooks(study, spec, chosen, length)
    with log_file(run_dir):
        say(found)
    peak = PeakMemory(detect(setup.config.device).kind)
    return MeasuredSpeed(found, peak=peak.read, keep=lambda hours: curve.set_user_attr(FULL_HOURS, hours))


def _drawn(
    study: optuna.Study, spec: StudySpec, chosen: FrozenTrial, curve: optuna.Trial, run_dir: Path, page: StudyPage
) -> Callable[[Evaluation], None]:
    """Draws a full run's curve, evaluation by evaluation; one from step 0 is held against its trial's."""
    retracing = Retracing(study, spec, chosen)

    def on_eval(evaluation: Evaluation) -> None:
        value = evaluation.metrics[spec.study.metric]
        if curve.user_attrs.get(CONTINUED_FROM, "unknown") is None:
            retracing.check(curve, evaluation.point, value)
        report_once(curve, value, evaluation.samples)
        link_aim(curve, run_dir)
        _stand(curve, evaluation.step, evaluation.metrics)
        page.update()

    return on_eval


def _stand(curve: optuna.Trial, step: int, metrics: Mapping[str, float]) -> None:
    curve.set_user_attr("step", step)
    curve.set_user_attr("metrics", dict(metrics))


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
