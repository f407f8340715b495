"""A launch or a run for a program: one JSON object a line on stdout, with its kind under `event`.

A launch emits `trial_started`, `metrics`, `evaluation`, `checkpoint`, `trial_ended` and `study_ended`; a run
`run_started`, `metrics`, `evaluation`, `checkpoint` and `run_ended`, and of its guard `declined`, `recovered` and
`stopped_by_guard`; a confirmation `confirmation` after its runs; all emit `warning`. Each object has its `time` (UTC).
"""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import optuna

from tuner.study.record import StudyRecord, TrialRecord

if TYPE_CHECKING:
    from trainer import TrainResult
    from tuner.spec.study_toml import StudySpec
    from tuner.study.confirmation import Confirmation

# Several trials may emit at once.
_lock = threading.Lock()


def emit(event: str, **values: Any) -> None:
    """Write one line."""
    line = {"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **values}
    with _lock:
        print(to_json(line), file=sys.stdout, flush=True)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON in ASCII, whatever the terminal can show; non-finite values become null."""
    return json.dumps(_finite(value), allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


class JsonWarnings(logging.Handler):
    """Emits the warnings of the log as events; the run's `train.log` has the whole log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        emit("warning", message=record.getMessage())


class Events:
    """A `CheckpointTracker` and `EventTracker` of one trial or run, which the fields `source` name."""

    def __init__(self, **source: Any) -> None:
        self.source = source

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        event = "evaluation" if "val/loss" in values else "metrics"
        emit(event, **self.source, step=step, samples=samples, values=dict(values))

    def checkpoint(self, name: str, *, step: int) -> None:
        emit("checkpoint", **self.source, step=step, name=name)

    def event(self, kind: str, text: str, *, step: int) -> None:
        emit(kind, **self.source, step=step, reason=text)

    def close(self) -> None:
        """Do nothing: the display emits the end."""


class StudyEvents:
    """Emits a launch. A context manager; a `Display`."""

    def __init__(self, study: optuna.Study, spec: StudySpec, *, total: int) -> None:
        self.study, self.spec, self.total = study, spec, total

    def __enter__(self) -> StudyEvents:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        record = StudyRecord.read(self.study)
        best = record.best
        emit(
            "study_ended",
            study=record.name,
            complete=kind is None and bool(record.ended),
            reason=record.ended or None,
            trials=len(record.trials),
            total=self.total,
            best=None if best is None else {"trial": best.number, "value": best.value, "params": best.params},
        )

    def trial_started(self, trial: TrialRecord, resumed: bool) -> Events:
        source = {"study": self.study.study_name, "trial": trial.number}
        emit("trial_started", **source, resumed=resumed, baseline=trial.is_baseline)
        return Events(**source)

    def trial_ended(self, trial: TrialRecord) -> None:
        emit(
            "trial_ended",
            study=self.study.study_name,
            trial=trial.number,
            state=trial.state,
            params=trial.params,
            metric=self.spec.study.metric,
            value=trial.value,
            seconds=(trial.completed - trial.started).total_seconds() if trial.started and trial.completed else None,
            reason=trial.infeasible,
        )


def confirmation_ended(study_name: str, confirmation: Confirmation) -> None:
    """Emit the result of a confirmation: its trials, the best first."""
    emit(
        "confirmation",
        study=study_name,
        metric=confirmation.metric,
        rung=confirmation.rung,
        unit=confirmation.unit,
        winner=confirmation.winner.number,
        baseline=confirmation.baseline,
        verdict=confirmation.verdict,
        trials=[asdict(trial) for trial in confirmation.trials],
    )


class RunEvents(Events):
    """Emits one run. A context manager."""

    as_json = True

    def __init__(self, name: str) -> None:
        super().__init__(run=name)

    def __enter__(self) -> RunEvents:
        emit("run_started", **self.source)
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: `ended` emits the end."""

    def ended(self, result: TrainResult) -> None:
        """Emit the result of the run."""
        emit(
            "run_ended",
            **self.source,
            finished=result.finished,
            stopped_by_guard=result.stopped_by_guard or None,
            step=result.step,
            samples=result.samples,
            seconds=result.seconds,
            metrics=result.metrics,
            best=result.best,
            run_dir=str(result.run_dir),
        )
