"""Trial -> float. The only place that reports to Optuna, prunes, and marks a trial as infeasible."""

from __future__ import annotations

import gc
import math
import platform
from collections.abc import Sequence
from pathlib import Path

import optuna
import torch

from trainer import Diverged, Evaluation
from trainer.tracking import Tracker
from tuner.run import Runtime, tracked_train
from tuner.search_space import suggest, trial_setup
from tuner.spec import StudySpec
from tuner.trials import BASELINE, HOST, INFEASIBLE, report_once, trial_name


class Interrupted(Exception):
    """The trial was stopped and has a checkpoint; it stays open, and the next launch continues it."""


class Infeasible(Exception):
    """These parameters can't be trained; the sampler is to learn that."""

    def __init__(self, constraint: str, reason: str) -> None:
        super().__init__(reason)
        self.constraint = constraint


class Objective:
    """Trains one trial of a study.

    Args:
        trackers: Follow the trial beside Aim, such as a display.
    """

    def __init__(self, spec: StudySpec, runtime: Runtime, trackers: Sequence[Tracker] = ()) -> None:
        self.spec, self.runtime, self.trackers = spec, runtime, trackers

    def __call__(self, trial: optuna.Trial) -> float:
        """Train, report at every point of the grid, and return the metric at the trial's end.

        Raises:
            optuna.TrialPruned: The trial is worse than others at a point of the grid, or infeasible.
            Interrupted: It was stopped.
        """
        params = suggest(trial, self.spec)
        run_dir = self.runtime.run_dir(self.spec.study.name, trial_name(trial.number))
        trial.set_user_attr("run_dir", str(run_dir))
        trial.set_user_attr(HOST, platform.node())
        try:
            return self._train(trial, params, run_dir)
        except Infeasible as error:
            trial.set_constraint(error.constraint, 1.0)
            trial.set_user_attr(INFEASIBLE, str(error))
            raise optuna.TrialPruned(str(error)) from None

    def _train(self, trial: optuna.Trial, params: dict[str, object], run_dir: Path) -> float:
        metric = self.spec.study.metric

        def on_eval(evaluation: Evaluation) -> None:
            value = evaluation.metrics[metric]
            if not math.isfinite(value):
                raise Infeasible("finite", f"{metric} was {value} after {evaluation.samples} samples")
            if report_once(trial, value, round(min(evaluation.point, self.spec.trial.budget))):
                trial.set_user_attr("d", [*trial.user_attrs.get("d", []), evaluation.d])
            # The baseline is what everything is compared with, so it runs to its end; and at its end nothing is saved.
            spared = trial.user_attrs.get(BASELINE) or evaluation.point >= self.spec.trial.budget
            if not spared and trial.should_prune():
                raise optuna.TrialPruned(f"{metric} {value:.4f} after {evaluation.samples} samples")

        lineage = {"study": self.spec.study.name, "trial": trial.number, "params": params}
        try:
            result = tracked_train(
                trial_setup(self.spec, params),
                run_dir,
                self.runtime,
                experiment=self.spec.study.name,
                lineage=lineage,
                trackers=self.trackers,
                on_eval=on_eval,
            )
        except Diverged as error:
            raise Infeasible("finite", str(error)) from None
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[0]
            # The traceback's frames hold the tensors: without this the memory would stay taken.
            error.__traceback__ = None
            release_memory()
            raise Infeasible("memory", f"out of memory: {reason}") from None
        if not result.finished:
            raise Interrupted
        trial.set_user_attr("samples_per_second", result.samples / result.seconds)
        return result.metrics[metric]


def is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA's out-of-memory error, or the CPU allocator's."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
