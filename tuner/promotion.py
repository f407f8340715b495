"""The best trial becomes the full run, with its lineage; and the comparison that says what it won."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from trainer import Evaluation, TrainResult, UserError
from trainer.checkpoint import LATEST, digest_path, is_locked, read_checkpoint
from trainer.tracking import Tracker
from tuner.run import Runtime, code_version, tracked_train
from tuner.search_space import full_setup, trial_setup
from tuner.spec import StudySpec
from tuner.trials import ranking, report_once, stored_spec, trial_name

log = logging.getLogger(__name__)

PROMOTIONS = "promotions"


@dataclass(frozen=True)
class FullRun:
    """A promoted run as the study remembers it."""

    trial: int
    run_dir: Path
    step: int
    steps: int | None
    state: str
    """"running", "interrupted" or "finished"."""
    metrics: dict[str, float]


def promote(
    study: optuna.Study,
    *,
    trial: int | None = None,
    steps: int | None = None,
    runtime: Runtime | None = None,
    trackers: Sequence[Tracker] = (),
) -> TrainResult:
    """Train the full run with a trial's parameters, or continue the one that was started.

    The full run goes on from the trial's own checkpoint where there is one, since a trial is a prefix of its
    full run. The study remembers where it came from, and `<study>.full` holds its curve.

    Args:
        trial: Number of the trial. Default: that of the full run already started, else the best.
        steps: Length in optimizer updates, in place of the spec's `[full]`.

    Raises:
        UserError: There is no such trial, it can't be promoted, or a better one has appeared since.
    """
    runtime = runtime or Runtime()
    spec = stored_spec(study)
    chosen = _choose(study, trial)
    setup = full_setup(spec, chosen.params, **_length(study, spec, chosen, steps))
    run_dir = runtime.run_dir(spec.study.name, f"full-{trial_name(chosen.number)}")
    if is_locked(run_dir):
        raise UserError(f"{run_dir} is in use by another process: wait for it or stop it.")
    past: dict[int, float] = {}
    origin = Path(chosen.user_attrs["run_dir"])
    started = any(run_dir.glob("*.pth"))
    if not started and _is_whole(origin / LATEST):
        _copy_checkpoints(origin, run_dir, [*setup.workload.best_checkpoints().values(), LATEST])
        past = chosen.intermediate_values if spec.trial.unit == "samples" else {}
    lineage = {"study": spec.study.name, "trial": chosen.number, "params": chosen.params}
    _remember(study, chosen, run_dir)
    curve = _open_curve(study, chosen, run_dir, setup.config.num_steps, None if started else past)

    def on_eval(evaluation: Evaluation) -> None:
        assert curve is not None, "a finished run has nothing to evaluate"
        report_once(curve, evaluation.metrics[spec.study.metric], evaluation.samples)
        curve.set_user_attr("step", evaluation.step)
        curve.set_user_attr("metrics", evaluation.metrics)

    result = tracked_train(
        setup,
        run_dir,
        runtime,
        experiment=f"{spec.study.name}.full",
        lineage=lineage,
        trackers=trackers,
        on_eval=on_eval,
    )
    if curve is not None:
        curve.set_user_attr("step", result.step)
        curve.set_user_attr("metrics", result.metrics)
        if result.finished:
            curve.study.tell(curve, result.metrics[spec.study.metric])
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


def full_runs(study: optuna.Study) -> list[FullRun]:
    """The full runs that were promoted from a study, in the order of their start."""
    curves = _curves(study)
    if curves is None:
        return []
    newest = {t.user_attrs["trial"]: t for t in curves.get_trials(deepcopy=False) if "trial" in t.user_attrs}
    return [_describe(t) for t in newest.values()]


def _length(study: optuna.Study, spec: StudySpec, chosen: FrozenTrial, steps: int | None) -> dict[str, Any]:
    """The full run's length where it is not the spec's: as asked for, now or when it was started."""
    horizon = full_setup(spec, chosen.params).config
    mine = _curves_of(study, chosen)
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


def _is_whole(checkpoint: Path) -> bool:
    """Whether a trial's checkpoint can be gone on from; the log says why not."""
    try:
        read_checkpoint(checkpoint, mmap=True)
    except UserError as error:
        log.warning("the full run starts at step 0: %s", error)
        return False
    return True


def _describe(curve: FrozenTrial) -> FullRun:
    run_dir = Path(curve.user_attrs["run_dir"])
    open_state = "running" if is_locked(run_dir) else "interrupted"
    state = open_state if curve.state == TrialState.RUNNING else "finished"
    attrs = curve.user_attrs
    return FullRun(attrs["trial"], run_dir, attrs.get("step", 0), attrs["steps"], state, attrs.get("metrics", {}))


def _choose(study: optuna.Study, number: int | None) -> FrozenTrial:
    if number is not None:
        return _find(study, number)
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


def _copy_checkpoints(source: Path, target: Path, names: Sequence[str]) -> None:
    """Link where the file system can: a full checkpoint may have 10 GB. Checkpoints are never written in place."""
    target.mkdir(parents=True, exist_ok=True)
    for path in [source / name for name in names]:
        for one in (path, digest_path(path)):
            if not one.is_file():
                continue
            (target / one.name).unlink(missing_ok=True)
            try:
                os.link(one, target / one.name)
            except OSError:
                shutil.copyfile(one, target / one.name)


def _remember(study: optuna.Study, chosen: FrozenTrial, run_dir: Path) -> None:
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
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "code_version": code_version(),
    }
    study.set_user_attr(PROMOTIONS, [*promotions, record])


def _curves(study: optuna.Study) -> optuna.Study | None:
    name = f"{study.study_name}.full"
    storage = study._storage
    return optuna.load_study(study_name=name, storage=storage) if name in optuna.get_all_study_names(storage) else None


def _curves_of(study: optuna.Study, chosen: FrozenTrial) -> list[FrozenTrial]:
    """The trials of `<study>.full` that drew full runs of this trial, the newest last."""
    curves = _curves(study)
    trials = curves.get_trials(deepcopy=False) if curves else []
    return [trial for trial in trials if trial.user_attrs.get("trial") == chosen.number]


def _open_curve(
    study: optuna.Study, chosen: FrozenTrial, run_dir: Path, steps: int | None, past: dict[int, float] | None
) -> optuna.Trial | None:
    """The open trial of `<study>.full` that draws this run: the one left open, or a new one.

    A run that begins now (also because its folder is gone) has the `past` of its trial; one that was under way
    (`past` None) has the curve that was drawn. Returns None where it has already finished at this length.
    """
    curves = _curves(study)
    if curves is None:
        curves = optuna.create_study(
            study_name=f"{study.study_name}.full", storage=study._storage, direction=study.direction
        )
        curves.set_user_attr("promoted_from", study.study_name)
    mine = _curves_of(study, chosen)
    last = mine[-1] if mine else None
    if last and last.state == TrialState.RUNNING:
        curve = optuna.Trial(curves, last._trial_id)
    elif last and past is None and last.user_attrs["step"] >= (steps or 0):
        return None
    else:
        curves.enqueue_trial(chosen.params)
        curve = curves.ask(fixed_distributions=chosen.distributions)
        drawn = last.intermediate_values if last and past is None else past or {}
        for step, value in drawn.items():
            curve.report(value, step)
    curve.set_user_attr("run_dir", str(run_dir))
    curve.set_user_attr("trial", chosen.number)
    curve.set_user_attr("steps", steps)
    return curve
