"""Trial -> float. The only place that reports to Optuna, prunes, and marks a trial as infeasible."""

from __future__ import annotations

import gc
import logging
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import optuna
import torch

from trainer import Diverged, Evaluation, TrainResult, UserError
from trainer.acceleration import Capabilities, detect
from trainer.config import TrainConfig
from trainer.memory import Probe, available_memory
from trainer.micro_batches import SIZED_BY, Fit, fit, shortage
from trainer.tracking import Tracker
from trainer.workload import Workload
from tuner.peak_memory import PeakMemory
from tuner.run import Runtime, code_digest, link_aim, log_file, tracked_train
from tuner.search_space import Setup, full_setup, suggest, trial_setup
from tuner.spec import StudySpec
from tuner.trials import (
    BASELINE,
    CODE,
    D_RISING,
    FULL_HOURS,
    FULL_LENGTH,
    HOST,
    INFEASIBLE,
    report_once,
    trial_name,
)

log = logging.getLogger(__name__)

STARTS = "starts"
"""Attribute of a trial: how often it was started since its last sign of life, and its evaluations and its newest
checkpoint at that time."""
MAX_STARTS = 3
RISING = 1.01
"""Prodigy's d still rose if the last evaluation found it larger than the one before by more than this factor."""

OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""In the messages of errors that are of no type of their own."""

_judged: dict[tuple[str, ...], Fit] = {}
"""Of this process, by all that decides it: an estimate takes about a second."""


class Interrupted(Exception):
    """The trial was stopped and has a checkpoint; it stays open, and the next launch continues it."""


class Infeasible(Exception):
    """These parameters can't be trained; the sampler is to learn that."""

    def __init__(self, constraint: str, reason: str) -> None:
        super().__init__(reason)
        self.constraint = constraint


class Objective:
    """Trains the trials of a study, one after the other, and keeps between them what the next one can use: the
    workload with its data open, and the model without contents that the memory estimate reads."""

    def __init__(self, spec: StudySpec, runtime: Runtime) -> None:
        self.spec, self.runtime = spec, runtime
        self._workload: tuple[str, Workload] | None = None
        self._probes: dict[tuple[str, ...], Probe] = {}

    def __call__(self, trial: optuna.Trial, trackers: Sequence[Tracker] = ()) -> float:
        """Train, report at every point of the grid, and return the metric at the trial's end.

        Args:
            trackers: Follow the trial beside Aim, such as a display.

        Raises:
            optuna.TrialPruned: The trial is worse than others at a point of the grid, or infeasible.
            Interrupted: It was stopped.
        """
        params = suggest(trial, self.spec)
        run_dir = self.runtime.run_dir(self.spec.study.name, trial_name(trial.number))
        trial.set_user_attr("run_dir", str(run_dir))
        trial.set_user_attr(HOST, platform.node())
        trial.set_user_attr(CODE, code_digest(self.spec.build_workload()))
        value, ending = math.nan, None
        try:
            _count_start(trial, run_dir)
            value = self._train(trial, params, run_dir, trackers)
        except Infeasible as error:
            trial.set_constraint(error.constraint, 1.0)
            ending = str(error)
            trial.set_user_attr(INFEASIBLE, ending)
        except optuna.TrialPruned as error:
            ending = str(error)
        except (Interrupted, UserError, KeyboardInterrupt):
            # It ended with a word.
            trial.set_user_attr(STARTS, [0])
            raise
        # Only here: the frames of an exception hold the model while it is handled.
        release_memory()
        if ending is not None:
            raise optuna.TrialPruned(ending)
        return value

    def _train(
        self, trial: optuna.Trial, params: dict[str, object], run_dir: Path, trackers: Sequence[Tracker]
    ) -> float:
        setup = trial_setup(self.spec, params)
        setup = replace(setup, workload=self._opened(setup.workload))
        capabilities = detect(setup.config.device)
        full_steps = full_setup(self.spec, params).config.num_steps
        with log_file(run_dir):
            setup = _fitted(trial, setup, capabilities, self._probes)

        def on_eval(evaluation: Evaluation) -> None:
            link_aim(trial, run_dir)
            self._report(trial, evaluation, setup.config, full_steps)

        with _measured(trial, capabilities):
            result = self._run(trial, params, setup, run_dir, trackers, on_eval)
        if not result.finished:
            raise Interrupted
        if result.samples_per_second is not None:
            trial.set_user_attr("samples_per_second", result.samples_per_second)
        return result.metrics[self.spec.study.metric]

    def _opened(self, workload: Workload) -> Workload:
        """The workload of the trial before, if this one is the same: its data need not be opened and read again."""
        key = workload.model_dump_json()
        if self._workload is None or self._workload[0] != key:
            self._workload = key, workload
        return self._workload[1]

    def _report(self, trial: optuna.Trial, evaluation: Evaluation, config: TrainConfig, full_steps: int | None) -> None:
        """Tell Optuna of one point of the grid, and end the trial where it is not worth going on."""
        metric = self.spec.study.metric
        value = evaluation.metrics[metric]
        if not math.isfinite(value):
            raise Infeasible("finite", f"{metric} was {value} after {evaluation.samples} samples")
        if report_once(trial, value, round(min(evaluation.point, self.spec.trial.budget))):
            found = [*trial.user_attrs.get("d", []), float(f"{evaluation.d:.6g}")]
            trial.set_user_attr("d", found)
            trial.set_user_attr(D_RISING, config.optimizer == "prodigy" and rises(found, config.d0))
        if full_steps is not None and evaluation.seconds_per_step is not None:
            trial.set_user_attr(FULL_HOURS, evaluation.seconds_per_step * full_steps / 3600)
            trial.set_user_attr(FULL_LENGTH, self.spec.full.length)
        # The baseline is what everything is compared with, so it runs to its end. While d rises a loss says little
        # of a long run's. And at the grid's end nothing is saved.
        early = trial.user_attrs.get(BASELINE) or trial.user_attrs.get(D_RISING)
        spared = early or evaluation.point >= self.spec.trial.budget
        if not spared and trial.should_prune():
            raise optuna.TrialPruned(f"{metric} {value:.4f} after {evaluation.samples} samples")

    def _run(
        self,
        trial: optuna.Trial,
        params: dict[str, object],
        setup: Setup,
        run_dir: Path,
        trackers: Sequence[Tracker],
        on_eval: Callable[[Evaluation], None],
    ) -> TrainResult:
        lineage = {"study": self.spec.study.name, "trial": trial.number, "params": params}
        try:
            return tracked_train(
                setup,
                run_dir,
                self.runtime,
                experiment=self.spec.study.name,
                lineage=lineage,
                trackers=trackers,
                on_eval=on_eval,
            )
        except Diverged as error:
            raise Infeasible("finite", str(error)) from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Infeasible("memory", f"out of memory: {reason}") from None
        finally:
            link_aim(trial, run_dir)


def rises(d: Sequence[float], d0: float) -> bool:
    """Whether Prodigy's d rose since the evaluation before, or has not begun to; after one evaluation it counts so."""
    return len(d) < 2 or d[-1] > RISING * d[-2] or d[-1] <= RISING * d0


def _count_start(trial: optuna.Trial, run_dir: Path) -> None:
    """Count the starts of a trial that end without a word: what the kernel kills to free memory says nothing."""
    evaluations = len(trial.storage.get_trial(trial._trial_id).intermediate_values)
    life = [evaluations, max((path.name for path in run_dir.glob("step_*.pth")), default="")]
    starts, *before = trial.user_attrs.get(STARTS, [0])
    starts = starts if before == life else 0
    if starts >= MAX_STARTS:
        raise Infeasible("memory", f"ended {starts} times without a word, likely by the kernel's out-of-memory killer")
    trial.set_user_attr(STARTS, [starts + 1, *life])


def _fitted(
    trial: optuna.Trial,
    setup: Setup,
    capabilities: Capabilities,
    probes: dict[tuple[str, ...], Probe] | None = None,
) -> Setup:
    """The trial with its micro-batch size decided. Raises Infeasible where the device's memory can't hold it."""
    available = available_memory(capabilities.kind)
    found = _judge(setup, capabilities, available, probes)
    if capabilities.kind == "cpu":
        # What other programs hold they may give back: infeasible is only what the machine can never hold.
        available = capabilities.memory
    if not found.fits(available):
        raise Infeasible("memory", shortage(found, available))
    trial.set_user_attr("micro_batch_size", found.micro_batch_size)
    if setup.config.micro_batch_size != "auto":
        return setup
    log.info("micro-batches: %d: %s", found.micro_batch_size, found.reason)
    decided = {"micro_batch_size": found.micro_batch_size}
    return replace(setup, config=setup.config.model_copy(update=decided))


def _judge(
    setup: Setup, capabilities: Capabilities, available: int, probes: dict[tuple[str, ...], Probe] | None
) -> Fit:
    """What the memory estimate says of a trial; where it was asked before, what it said."""
    workload, config = setup.workload, setup.config
    key = (
        f"{type(workload).__module__}:{type(workload).__qualname__}",
        workload.model_dump_json(),
        config.model_dump_json(include=SIZED_BY),
        capabilities.kind,
    )
    if key not in _judged or (config.micro_batch_size == "auto" and not _judged[key].fits(available)):
        _judged[key] = fit(workload, config, capabilities, available, probes)
    return _judged[key]


@contextmanager
def _measured(trial: optuna.Trial, capabilities: Capabilities) -> Iterator[None]:
    """Record with a trial the memory that it took, however it ends."""
    trial.set_user_attr("memory", capabilities.memory)
    peak = PeakMemory(capabilities.kind)
    try:
        yield
    finally:
        if (taken := peak.read()) is not None:
            # A trial that goes on may have had its peak before.
            trial.set_user_attr("peak_memory", max(taken, trial.user_attrs.get("peak_memory", 0)))


def is_out_of_memory(error: Exception) -> bool:
    """torch's out-of-memory error, an error of CUDA's libraries or of the CPU allocator, or Python's own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def release_memory() -> None:
    """Give back what ended runs left: what cyclic references hold, and what CUDA's allocator keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
