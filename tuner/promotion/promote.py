"""Promotion: the full run with the parameters of the best trial, or of the winner of a confirmation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import optuna

from trainer import Diverged, Evaluation, TrainResult, UserError
from trainer.checkpoint import holds_state, lock_folder
from trainer.tracking import Tracker
from tuner.promotion.full_run import FullRun
from tuner.promotion.length import FINISH, NO_REQUEST, LengthRequest, decide_length
from tuner.study.confirmation import Confirmation
from tuner.study.edges import describe_edges
from tuner.study.keys import trial_name
from tuner.study.objective import release_memory
from tuner.study.recommendation import describe_recommendation
from tuner.study.record import CLAIM, StudyRecord, TrialRecord, read_spec
from tuner.study.tracked_run import Runtime, tracked_train

log = logging.getLogger(__name__)


def promote(
    study: optuna.Study,
    *,
    trial: int | None = None,
    confirmed: Confirmation | None = None,
    length: LengthRequest = NO_REQUEST,
    fresh: bool = False,
    runtime: Runtime | None = None,
    trackers: Sequence[Tracker] = (),
    on_change: Callable[[], None] = lambda: None,
) -> TrainResult:
    """Train the full run of a trial, or continue it; see `tuner.promote`. Calls `on_change` after each evaluation."""
    runtime, record = runtime or Runtime(), StudyRecord.read(study)
    if trial is None and confirmed is None:
        confirmed = _stored_confirmation(record)
    chosen = _choose_trial(record, trial, confirmed)
    name = record.spec["study"]["name"]  # a copied study has another name in the storage
    run_dir = runtime.run_dir(name, f"full-{trial_name(chosen.number)}")
    if chosen is record.recommended:
        for sentence in filter(None, (describe_recommendation(record), *describe_edges(record))):
            log.info("%s", sentence)
    finishes = record.spec["full"].get("on_decline") == "finish"
    if finishes and length == NO_REQUEST and _is_declining(record, chosen, run_dir):
        length = FINISH
    # Another process would store another length, or begin another curve, before training finds the folder locked.
    with lock_folder(run_dir, CLAIM):
        while True:
            run = FullRun.find_or_begin(study, chosen, run_dir, fresh=fresh, length=length, confirmation=confirmed)
            log.info("%s: %s", run_dir.name, run.state)
            run.warn_of_differences()
            try:
                result = _train(run, name, runtime, trackers, on_change)
            except Diverged as error:
                # A second time it would only repeat what it did.
                if not finishes or length.has_diverged or not run.note_divergence(error):
                    raise
                log.warning("%s", error)
                length = replace(FINISH, has_diverged=True)
            else:
                if not (result.stopped_by_guard and finishes):
                    return result
                length = replace(FINISH, has_diverged=length.has_diverged)
            release_memory()


def check_before_confirmation(study: optuna.Study, length: LengthRequest, *, fresh: bool) -> None:
    """Raises UserError where the full run after a confirmation would be refused, whichever trial wins."""
    record = StudyRecord.read(study)
    started = record.promotions[-1] if record.promotions else None
    if fresh and started and holds_state(Path(started["run_dir"])):
        raise UserError(
            f"--fresh: the full run of trial {started['trial']} was started in {started['run_dir']}: leave it out, or "
            "remove that folder."
        )
    if started:
        log.warning(
            "the full run of trial %d was started: if another trial wins the confirmation, start its own with --trial",
            started["trial"],
        )
    if length.steps and started is None and record.favourites:
        decide_length(
            read_spec(study), record.favourites[0].params, length, last=None, origin=0, run_dir=Path("not begun")
        )


def _train(
    run: FullRun, experiment: str, runtime: Runtime, trackers: Sequence[Tracker], on_change: Callable[[], None]
) -> TrainResult:
    def on_eval(evaluation: Evaluation) -> None:
        run.on_eval(evaluation)
        on_change()

    result = tracked_train(
        run.setup,
        run.run_dir,
        runtime,
        experiment=experiment,
        lineage=run.lineage,
        trackers=[*trackers, *run.trackers()],
        on_eval=on_eval,
        full=run.spec,
    )
    run.end(result)
    return result


def _is_declining(record: StudyRecord, trial: TrialRecord, run_dir: Path) -> bool:
    """Whether the full run of a trial was stopped in a decline, before it went back."""
    run = next((run for run in record.full_runs if run.trial == trial.number), None)
    return run is not None and run.is_open and run.is_declining and holds_state(run_dir)


def _stored_confirmation(record: StudyRecord) -> Confirmation | None:
    """The study's confirmation, if no full run was started since.

    Raises:
        UserError: It is unfinished, or a better trial has appeared since.
    """
    request, confirmation = record.confirmation_request, record.confirmation
    if record.promotions and confirmation is not None:
        winner, started = confirmation.winner.number, record.promotions[-1]["trial"]
        if all(each["trial"] != winner for each in record.promotions):
            log.info(
                "trial %d won the confirmation: --trial %d starts its full run; %d goes on", winner, winner, started
            )
    if request is None or record.promotions:
        return None
    best = record.favourites[0].number
    if confirmation is None:
        raise UserError(
            f"a confirmation of {record.name} is unfinished: continue it ({request.options}), or promote the best "
            f"trial without it (--trial {best})."
        )
    if best != request.best:
        raise UserError(
            f"trial {best} is recommended since they were confirmed: confirm again ({request.options}), or choose with "
            f"--trial {best} or --trial {confirmation.winner.number} (which won)."
        )
    log.info("promoting the winner of the confirmation: %s", confirmation.verdict)
    return confirmation


def _choose_trial(record: StudyRecord, number: int | None, confirmation: Confirmation | None) -> TrialRecord:
    if number is not None:
        return _find_trial(record, number)
    if confirmation is None and record.best is None:
        raise UserError(f"study {record.name} has no complete trial yet: launch it, or look at tuner status.")
    started = record.promotions[-1]["trial"] if record.promotions else None
    if confirmation is not None:
        winner = confirmation.winner.number
        if started not in (None, winner):
            raise UserError(
                f"a full run of trial {started} was started, and trial {winner} won the confirmation: choose with "
                f"--trial {started} (continue) or --trial {winner} (start anew), without --confirm."
            )
        return _find_trial(record, winner)
    best = record.favourites[0]
    if started is None:
        return best
    if best.number not in (started, record.promotions[-1]["best"]):
        raise UserError(
            f"a full run of trial {started} was started, and trial {best.number} is recommended since: choose with "
            f"--trial {started} (continue) or --trial {best.number} (start anew)."
        )
    return _find_trial(record, started)


def _find_trial(record: StudyRecord, number: int) -> TrialRecord:
    trials = record.trials
    if not 0 <= number < len(trials):
        raise UserError(f"study {record.name} has no trial {number}: it has {len(trials)}, counted from 0.")
    if trials[number] not in record.ranked:
        raise UserError(
            f"trial {number} of {record.name} is {trials[number].state}, not complete and feasible: choose another."
        )
    return trials[number]
