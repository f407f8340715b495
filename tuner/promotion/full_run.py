"""A full run: where it starts, its curve in `<study>.full`, its lineage, and the check against its trial's curve.

The study's attribute `promotions` holds where each full run started, a trial of `<study>.full` holds its curve, and the
run directory its checkpoints. Both are stored before the first step, so that a killed promotion is repeated as it was.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError

from trainer import Diverged, Evaluation, TrainResult, UserError
from trainer.acceleration import detect
from trainer.checkpoint import BEST, go_back, holds_state
from trainer.errors import first_line
from trainer.locks import is_locked
from trainer.run_folder import MARK
from trainer.tracking import Tracker
from tuner.promotion.curve_check import CurveCheck
from tuner.promotion.full_curve import begin_curve, continue_curve
from tuner.promotion.length import NO_REQUEST, LengthRequest, decide_length
from tuner.promotion.link_checkpoint import link_checkpoints, read_step
from tuner.promotion.projection import MeasuredSpeed, log_projections, project
from tuner.promotion.set_aside import set_aside
from tuner.spec.setups import Setup
from tuner.spec.study_toml import StudySpec
from tuner.study.confirmation import Confirmation
from tuner.study.keys import FullRunKeys, PromotionKeys, report_once, write_full_run, write_study
from tuner.study.peak_memory import PeakMemory
from tuner.study.record import FullRunRecord, StudyRecord, TrialRecord, read_spec
from tuner.study.tracked_run import code_digest, code_version, link_aim, log_file

log = logging.getLogger(__name__)

STEP_EVERY_S, MAX_SHARE = 60.0, 0.01
"""Seconds between two steps that are stored, and the share of the time that these writes may take."""


class State(StrEnum):
    """The state in which `promote` finds a full run: without a checkpoint, shorter than asked for, or ended."""

    NEW = "new"
    CONTINUED = "continued"
    FINISHED = "finished"


@dataclass(frozen=True)
class Origin:
    """The run whose checkpoint a full run continues from."""

    run_dir: Path
    step: int | None
    """None if an early version, which did not store it, started the run."""


@dataclass(frozen=True)
class FullRun:
    """The full run of one trial."""

    study: optuna.Study
    spec: StudySpec
    trial: TrialRecord
    run_dir: Path
    setup: Setup
    state: State
    origin: Origin | None
    """None: it started, or starts, at step 0."""
    curve: optuna.Trial | None
    """Its open trial of `<study>.full`; None when it is FINISHED."""
    curve_check: CurveCheck | None
    """For a run that is known to start at step 0."""

    @classmethod
    def find_or_begin(
        cls,
        study: optuna.Study,
        trial: TrialRecord,
        run_dir: Path,
        *,
        fresh: bool = False,
        length: LengthRequest = NO_REQUEST,
        confirmation: Confirmation | None = None,
    ) -> FullRun:
        """Find the full run of a trial by its run directory, or begin one: its record, its curve, its first checkpoint.

        Args:
            fresh: Start at step 0 instead of continuing from a checkpoint.
            length: In place of the spec's or that of the run so far.
            confirmation: The one that chose the trial.

        Raises:
            UserError: The run directory is in use, or the run can't have this start or this length.
        """
        if is_locked(run_dir):
            raise UserError(f"{run_dir} is in use by another process: wait for it or stop it.")
        record, spec, is_new = StudyRecord.read(study), read_spec(study), not holds_state(run_dir)
        last = next((run for run in reversed(record.all_full_runs) if run.trial == trial.number), None)
        # A run whose folder was removed starts anew, with the length in [full]. One that was killed before its first
        # checkpoint begins as it did.
        known = last if not is_new or (last and last.is_open and _is_unbegun(last, run_dir)) else None
        if fresh and not is_new:
            _refuse_fresh(last, run_dir)
        if is_new and last is not None and last.run_dir != run_dir and holds_state(last.run_dir):
            raise UserError(
                f"the full run of trial {trial.number} is in {last.run_dir}, at step {last.step}: give the --run-root "
                "that it was started with, or remove that folder."
            )
        promotion = _find_promotion(record, run_dir, is_new)
        begun = promotion if known or last is None else {}
        origin = _choose_origin(record, spec, trial, run_dir, begun, fresh) if is_new else _stored_origin(promotion)
        if is_new and length.finish:
            raise UserError(f"--finish: trial {trial.number} has no full run to finish; leave it out to start one.")
        origin_step = origin.step or 0 if is_new and origin else 0
        found = decide_length(spec, trial.params, length, last=known, origin=origin_step, run_dir=run_dir)
        setup, config = found.setup, found.setup.config
        if found.from_best:
            log.info("going back to %s, of step %s", run_dir / BEST, f"{found.restart:,}")
            # Before the record: until that is written, the same request does the same again.
            go_back(run_dir, BEST)
        if found.restart is not None:
            set_aside(run_dir, after=found.restart)
        if is_new or not promotion:
            _store_promotion(record, trial, run_dir, origin, promotion, confirmation)
        decay_steps = 0 if config.decay_start is None else config.decay_steps
        keys: FullRunKeys = {"run_dir": str(run_dir), "steps": config.num_steps, "decay_steps": decay_steps}
        curve: optuna.Trial | None
        if is_new:
            curve = begin_curve(record, spec, trial, last, origin.run_dir if origin else None, keys)
        else:
            curve = continue_curve(record, trial, last, keys, found.restart, config.effective_batch_size)
        if is_new and origin is not None:
            link_checkpoints(origin.run_dir, run_dir, setup.workload)
        at_zero = origin is None if is_new else last is not None and last.started_at_zero
        return cls(
            study=study,
            spec=spec,
            trial=trial,
            run_dir=run_dir,
            setup=setup,
            state=State.NEW if is_new else State.FINISHED if curve is None else State.CONTINUED,
            origin=origin,
            curve=curve,
            curve_check=CurveCheck(record, spec, trial) if at_zero and curve is not None else None,
        )

    @property
    def lineage(self) -> dict[str, Any]:
        """Where the run comes from, for its checkpoints: the same each time that it is continued."""
        origin = self.origin
        return {
            "study": self.study.study_name,
            "trial": self.trial.number,
            "params": dict(self.trial.params),
            "continued_from": None if origin is None else {"run_dir": str(origin.run_dir), "step": origin.step},
        }

    def warn_of_differences(self) -> None:
        """Warn if the code has changed since the trial, or if no point of the trial's curve will be met."""
        if self.curve_check is not None:
            self.curve_check.warn_if_blind(self.setup.config.eval_every or math.inf)
        if self.trial.code not in (None, code_digest(self.setup.workload)):
            log.warning("the code of %s has changed since trial %d ran", self.spec.study.workload, self.trial.number)

    def trackers(self) -> list[Tracker]:
        """Log the projected hours now, by the trial's speed, and again once the run's own speed is measured."""
        curve = self.curve
        if self.state is State.FINISHED or curve is None:
            return []
        projections = project(StudyRecord.read(self.study), self.spec, self.trial, self.setup.config.num_steps)
        with log_file(self.run_dir):
            log_projections(projections)
        peak = PeakMemory(detect(self.setup.config.device).kind)

        def store_hours(hours: float) -> None:
            with _storage_errors_logged():
                write_full_run(curve, full_hours=hours)

        return [MeasuredSpeed(projections, peak=peak.read, store_hours=store_hours), _Progress(curve)]

    def on_eval(self, evaluation: Evaluation) -> None:
        """Store one evaluation: the point of the curve, the step, the metrics."""
        curve = self.curve
        if curve is None:
            return
        value = evaluation.metrics[self.spec.study.metric]
        with _storage_errors_logged():
            decay_start = self.setup.config.decay_start
            # The trial's rate was constant.
            if self.curve_check is not None and (decay_start is None or evaluation.step <= decay_start):
                self.curve_check.check(curve, evaluation.point, value)
            report_once(curve, value, evaluation.samples)
            link_aim(curve, self.run_dir)
            write_full_run(curve, step=evaluation.step, metrics=dict(evaluation.metrics))

    def note_divergence(self, error: Diverged) -> bool:
        """Store a divergence as a decline, from which the run can go back; False if it has no best state."""
        record = None if self.curve is None else FullRunRecord.read(self.curve)
        if self.curve is None or record is None or not (self.run_dir / BEST).exists():
            return False
        write_full_run(self.curve, decline={"step": record.step, "reason": str(error), "outcome": ""})
        return True

    def end(self, result: TrainResult) -> None:
        """Store the end of this call's training, and close the curve if the run has its full length."""
        if self.curve is None:
            return
        link_aim(self.curve, self.run_dir)
        write_full_run(self.curve, step=result.step, metrics=dict(result.metrics))
        if result.finished:
            self.curve.study.tell(self.curve, result.metrics[self.spec.study.metric])


class _Progress:
    """An `EventTracker` that stores a run's step between validations, and its latest decline, with its curve."""

    def __init__(self, curve: optuna.Trial) -> None:
        self.curve, self._next = curve, -math.inf

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        started = time.monotonic()
        if started < self._next:
            return
        with _storage_errors_logged():
            write_full_run(self.curve, step=step)
        ended = time.monotonic()
        # While a server is away, each write waits for it.
        self._next = ended + max(STEP_EVERY_S, (ended - started) / MAX_SHARE)

    def event(self, kind: str, text: str, *, step: int) -> None:
        record = FullRunRecord.read(self.curve)
        with _storage_errors_logged():
            if kind == "declined":
                write_full_run(self.curve, decline={"step": step, "reason": text, "outcome": ""})
            elif kind == "recovered" and record is not None and record.decline is not None:
                write_full_run(self.curve, decline={**record.decline, "outcome": f"recovered at step {step:,}"})

    def close(self) -> None:
        """Do nothing."""


def _is_unbegun(last: FullRunRecord, run_dir: Path) -> bool:
    """Whether a run without a state was killed before its first one: a folder that was removed has lost its mark."""
    return not last.step or (run_dir / MARK).exists()


def _refuse_fresh(last: FullRunRecord | None, run_dir: Path) -> None:
    if last is None or not last.started_at_zero:
        origin = last.continued_from.name if last and last.continued_from else "a checkpoint"
        raise UserError(
            f"{run_dir} continued from {origin}: remove that folder to start at step 0, or leave --fresh out."
        )


def _find_promotion(record: StudyRecord, run_dir: Path, is_new: bool) -> PromotionKeys:
    """The stored promotion of a run directory; empty if there is none."""
    promotions = [each for each in record.promotions if each["run_dir"] == str(run_dir)]
    if not promotions and not is_new:
        # The folder of runs was moved.
        promotions = [each for each in record.promotions if Path(each["run_dir"]).name == run_dir.name]
    return promotions[-1] if promotions else {}


def _stored_origin(promotion: PromotionKeys) -> Origin | None:
    origin = promotion.get("continued_from")
    return Origin(Path(origin), promotion.get("continued_at")) if origin else None


def _choose_origin(
    record: StudyRecord, spec: StudySpec, trial: TrialRecord, run_dir: Path, promotion: PromotionKeys, fresh: bool
) -> Origin | None:
    """The confirmation run of the trial, which is longer, else the trial; None to start at step 0.

    Args:
        promotion: That of a run to begin as it did; else empty.
    """
    if fresh or (promotion and promotion["continued_from"] is None):
        return None
    confirmed = record.confirmation_run(trial.number, spec.baseline.seed)
    origins = [Path(confirmed.run_dir)] if confirmed and not confirmed.failed else []
    for origin in (*origins, *([trial.run_dir] if trial.run_dir else [])):
        step = read_step(origin, run_dir)
        if step is not None:
            return Origin(origin, step)
    log.warning("the full run starts at step 0")
    return None


def _store_promotion(
    record: StudyRecord,
    trial: TrialRecord,
    run_dir: Path,
    origin: Origin | None,
    before: PromotionKeys,
    confirmation: Confirmation | None,
) -> None:
    """Store a promotion with the study: a finished trial can't be written to."""
    others = [promotion for promotion in record.promotions if promotion["run_dir"] != str(run_dir)]
    promotion: PromotionKeys = {
        "trial": trial.number,
        "value": trial.value or 0.0,
        "params": trial.params,
        "best": record.favourites[0].number,
        "run_dir": str(run_dir),
        "continued_from": None if origin is None else str(origin.run_dir),
        "continued_at": (origin.step or 0) if origin else 0,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "code_version": code_version(),
    }
    if confirmation is not None:
        promotion["confirmation"] = {**asdict(confirmation), "verdict": confirmation.verdict}
    elif "confirmation" in before:
        promotion["confirmation"] = before["confirmation"]
    write_study(record.study, promotions=[*others, promotion])


@contextmanager
def _storage_errors_logged() -> Iterator[None]:
    """A run of days does not end because the database is locked or its disk is full."""
    try:
        yield
    except StorageInternalError as error:
        reason = first_line(error.__cause__ or error)
        log.warning("the study could not be written (%s): the run continues, its curve has a gap", reason)
