"""What a full run tells the study while it trains: its curve, its state, its speed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial

from trainer import Evaluation
from trainer.acceleration import detect
from trainer.tracking import Tracker
from tuner.full.projection import MeasuredSpeed, outlooks, say
from tuner.full.retracing import Retracing
from tuner.full.runs import CONTINUED_FROM
from tuner.peak_memory import PeakMemory
from tuner.run import link_aim, log_file
from tuner.search_space import Setup
from tuner.show.page import StudyPage
from tuner.spec import StudySpec
from tuner.trials import FULL_HOURS, report_once

log = logging.getLogger(__name__)


def measured(
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

    def keep(hours: float) -> None:
        with _storage_outlived():
            curve.set_user_attr(FULL_HOURS, hours)

    return MeasuredSpeed(found, peak=peak.read, keep=keep)


def drawn(
    spec: StudySpec, retracing: Retracing, curve: optuna.Trial, run_dir: Path, page: StudyPage
) -> Callable[[Evaluation], None]:
    """Draws a full run's curve, evaluation by evaluation; one from step 0 is held against its trial's."""

    def on_eval(evaluation: Evaluation) -> None:
        value = evaluation.metrics[spec.study.metric]
        with _storage_outlived():
            if curve.user_attrs.get(CONTINUED_FROM, "unknown") is None:
                retracing.check(curve, evaluation.point, value)
            report_once(curve, value, evaluation.samples)
            link_aim(curve, run_dir)
            stand(curve, evaluation.step, evaluation.metrics)
            page.update()

    return on_eval


@contextmanager
def _storage_outlived() -> Iterator[None]:
    """A run of days does not end because somebody holds the database, or its disk is full."""
    try:
        yield
    except StorageInternalError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        log.warning("the study could not be written (%s): the run goes on, its curve has a gap", reason)


def stand(curve: optuna.Trial, step: int, metrics: Mapping[str, float]) -> None:
    curve.set_user_attr("step", step)
    curve.set_user_attr("metrics", dict(metrics))
