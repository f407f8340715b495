"""The same for programs: one JSON object a line on stdout, with what it tells under `event`.

`trial_started`, `metrics`, `evaluation`, `checkpoint`, `trial_ended`, `study_ended` of a launch; `run_started`,
`metrics`, `evaluation`, `checkpoint`, `run_ended` of a run; `confirmation` after the runs of one; `warning` of either.
Each has its `time` (UTC).
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
from optuna.trial import FrozenTrial

from tuner.trials import BASELINE, ENDED, INFEASIBLE, last_value, ranking, state_of

if TYPE_CHECKING:
    from trainer import TrainResult
    from tuner.full.confirmed import Confirmation
    from tuner.spec import StudySpec

# Several trials may tell something at once.
_lock = threading.Lock()


def emit(event: str, **values: Any) -> None:
    """Write one line."""
    line = {"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **values}
    with _lock:
        print(to_json(line), file=sys.stdout, flush=True)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """As JSON has it: what is not finite is null, and what is not ASCII is escaped, whatever the terminal can show."""
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
    """Warnings of the log as events; the rest of it stands in the run's `train.log`."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        emit("warning", message=record.getMessage())


class Events:
    """A `Tracker` of one trial or run, which `of` names in each line."""

    def __init__(self, **of: Any) -> None:
        self.of = of

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        event = "evaluation" if "val/loss" in values else "metrics"
        emit(event, **self.of, step=step, samples=samples, values=dict(values))

    def checkpoint(self, name: str, *, step: int) -> None:
        emit("checkpoint", **self.of, step=step, name=name)

    def close(self) -> None:
        """Its end is told by who started it."""


class StudyEvents:
    """Follows a launch. A context manager; a `Display`."""

    def __init__(self, study: optuna.Study, spec: StudySpec, *, total: int) -> None:
        self.study, self.spec, self.total = study, spec, total

    def __enter__(self) -> StudyEvents:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        trials = self.study.get_trials(deepcopy=False)
        best = next(iter(ranking(self.study, trials)), None)
        emit(
            "study_ended",
            study=self.study.study_name,
            complete=kind is None and bool(self.study.user_attrs.get(ENDED)),
            reason=self.study.user_attrs.get(ENDED) or None,
            trials=len(trials),
            total=self.total,
            best=None if best is None else {"trial": best.number, "value": best.value, "params": best.params},
        )

    def trial_started(self, trial: optuna.Trial, resumed: bool) -> Events:
        of = {"study": self.study.study_name, "trial": trial.number}
        emit("trial_started", **of, resumed=resumed, baseline=bool(trial.user_attrs.get(BASELINE)))
        return Events(**of)

    def trial_ended(self, trial: FrozenTrial) -> None:
        taken = None
        if trial.datetime_start and trial.datetime_complete:
            taken = (trial.datetime_complete - trial.datetime_start).total_seconds()
        emit(
            "trial_ended",
            study=self.study.study_name,
            trial=trial.number,
            state=state_of(trial),
            params=trial.params,
            metric=self.spec.study.metric,
            value=last_value(trial),
            seconds=taken,
            reason=trial.user_attrs.get(INFEASIBLE),
        )


def confirmation_ended(study: str, found: Confirmation) -> None:
    """Tell what a confirmation found: its trials, the best first."""
    emit(
        "confirmation",
        study=study,
        metric=found.metric,
        rung=found.rung,
        unit=found.unit,
        winner=found.winner.number,
        baseline=found.baseline,
        verdict=found.verdict,
        trials=[asdict(trial) for trial in found.trials],
    )


class RunEvents(Events):
    """Follows one run. A context manager."""

    as_json = True

    def __init__(self, name: str) -> None:
        super().__init__(run=name)

    def __enter__(self) -> RunEvents:
        emit("run_started", **self.of)
        return self

    def __exit__(self, *_: object) -> None:
        """Its end is told with its result."""

    def ended(self, result: TrainResult) -> None:
        """Tell how the run ended."""
        emit(
            "run_ended",
            **self.of,
            finished=result.finished,
            step=result.step,
            samples=result.samples,
            seconds=result.seconds,
            metrics=result.metrics,
            best=result.best,
            run_dir=str(result.run_dir),
        )
