"""The objective: trains a trial and returns its metric. It alone reports to Optuna, prunes and marks as infeasible."""

from __future__ import annotations

import gc
import logging
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import torch

from trainer import Diverged, Evaluation, TrainResult, UserError
from trainer.acceleration import Capabilities, detect
from trainer.cgroup import oom_kills
from trainer.checkpoint import newest_step, step_file
from trainer.config import TrainConfig
from trainer.errors import first_line
from trainer.memory import Probe, available_memory
from trainer.micro_batches import SIZED_BY, MemoryFit, describe_shortage, estimate_fit
from trainer.tracking import Tracker
from trainer.workload import Workload
from tuner.spec.setups import OutsideSearch, Setup, check_enqueued, full_setup, suggest, trial_setup
from tuner.spec.study_toml import StudySpec
from tuner.study.keys import trial_name, write_trial
from tuner.study.optuna_internals import fixed_params
from tuner.study.peak_memory import PeakMemory
from tuner.study.record import TrialRecord
from tuner.study.tracked_run import Runtime, code_digest, link_aim, log_file, tracked_train
from tuner.study.trial_length import is_rising

log = logging.getLogger(__name__)

MAX_STARTS = 3
"""A trial that was killed for memory this often without progress is infeasible."""

OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Texts of out-of-memory errors that have no type of their own."""

_memory_fits: dict[tuple[str, ...], dict[int, MemoryFit]] = {}
"""Memory estimates of this process by all that they depend on, the batch size last: one takes about a second."""


class Interrupted(Exception):
    """The trial was stopped with a checkpoint; it stays open, and the next launch continues it."""


class Infeasible(Exception):
    """These parameters can't be trained; the sampler learns from it."""

    def __init__(self, constraint: str, reason: str) -> None:
        super().__init__(reason)
        self.constraint = constraint


class Objective:
    """Trains the trials of a study one after the other.

    Between them it keeps the last workload, with its data open, and the models for the memory estimate.
    """

    def __init__(self, spec: StudySpec, runtime: Runtime) -> None:
        self.spec, self.runtime = spec, runtime
        self._workload: Workload | None = None
        self._probes: dict[tuple[str, ...], Probe] = {}

    def __call__(self, trial: optuna.Trial, trackers: Sequence[Tracker] = ()) -> float:
        """Train, report at every point of the evaluation grid, and return the metric at the trial's end.

        Args:
            trackers: Follow the trial besides Aim, such as a display.

        Raises:
            optuna.TrialPruned: The trial is worse than others at a point of the grid, or infeasible.
            Interrupted: It was stopped.
        """
        try:
            check_enqueued(fixed_params(trial), self.spec)
            params = suggest(trial, self.spec)
        except OutsideSearch as error:
            trial.set_constraint("search", 1.0)
            write_trial(trial, infeasible=str(error), host=platform.node())
            raise optuna.TrialPruned(str(error)) from None
        run_dir = self.runtime.run_dir(self.spec.study.name, trial_name(trial.number))
        code = code_digest(self.spec.build_workload())
        write_trial(trial, run_dir=str(run_dir), host=platform.node(), code=code)
        value, reason = math.nan, None
        try:
            _count_start(trial, run_dir)
            value = self._train(trial, params, run_dir, trackers)
        except Infeasible as error:
            trial.set_constraint(error.constraint, 1.0)
            reason = str(error)
            write_trial(trial, infeasible=reason)
        except optuna.TrialPruned as error:
            reason = str(error)
        except (Interrupted, UserError, KeyboardInterrupt):
            # The process was not killed: the start does not count.
            write_trial(trial, starts=[0])
            raise
        # Not in the handlers: while an exception is handled, its frames hold the model.
        release_memory()
        if reason is not None:
            raise optuna.TrialPruned(reason)
        return value

    def _train(
        self, trial: optuna.Trial, params: dict[str, object], run_dir: Path, trackers: Sequence[Tracker]
    ) -> float:
        setup = trial_setup(self.spec, params)
        if self._workload is None or self._workload.model_dump_json() != setup.workload.model_dump_json():
            self._workload = setup.workload
        setup = replace(setup, workload=self._workload)
        capabilities = detect(setup.config.device)
        full_steps = full_setup(self.spec, params).config.num_steps
        with log_file(run_dir):
            setup = _decide_micro_batches(trial, setup, capabilities, self._probes)

        reported = Reported(TrialRecord.read(trial))

        def on_eval(evaluation: Evaluation) -> None:
            link_aim(trial, run_dir)
            self._report(trial, reported, evaluation, setup.config, full_steps)

        with _record_peak_memory(trial, capabilities):
            result = self._run(trial, params, setup, run_dir, trackers, on_eval)
        if not result.finished:
            raise Interrupted
        if result.samples_per_second is not None:
            write_trial(trial, samples_per_second=result.samples_per_second)
        return result.metrics[self.spec.study.metric]

    def _report(
        self,
        trial: optuna.Trial,
        reported: Reported,
        evaluation: Evaluation,
        config: TrainConfig,
        full_steps: int | None,
    ) -> None:
        """Report one point of the grid to Optuna, and end a trial that is pruned there or has no finite value."""
        metric, budget = self.spec.study.metric, self.spec.trial.budget
        value = evaluation.metrics[metric]
        if not math.isfinite(value):
            raise Infeasible("finite", f"{metric} was {value} after {evaluation.samples} samples")
        if config.decay_start is not None and evaluation.step > config.decay_start:
            # Only a budget in seconds: the others are checked with the spec.
            raise UserError(
                f"trial.{self.spec.trial.unit} {budget:g}: trial {trial.number} is at step {evaluation.step:,}, and "
                f"its full run decays from step {config.decay_start:,} on: use a shorter trial or a longer [full]."
            )
        point = round(min(evaluation.point, budget))
        # After a crash a run passes some points again.
        if point not in reported.points:
            trial.report(value, point)
            reported.points.add(point)
            reported.d.append(float(f"{evaluation.d:.6g}"))
            reported.d_is_rising = config.optimizer == "prodigy" and is_rising(reported.d, config.d0)
            write_trial(trial, d=list(reported.d), d_rising=reported.d_is_rising)
        if full_steps is not None and evaluation.seconds_per_step is not None:
            hours = float(f"{evaluation.seconds_per_step * full_steps / 3600:.4g}")
            write_trial(trial, full_hours=hours, full_length=self.spec.full.length)
        # The baseline always runs to its end: everything is compared with it. A loss while d rises does not predict
        # that of a long run. At the last point pruning saves nothing.
        is_spared = reported.is_baseline or reported.d_is_rising or evaluation.point >= budget
        if not is_spared and trial.should_prune():
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
                trackers=[*trackers, _SignOfLife(trial)],
                on_eval=on_eval,
            )
        except Diverged as error:
            raise Infeasible("finite", str(error)) from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise Infeasible("memory", f"out of memory: {first_line(error)}") from None
        finally:
            link_aim(trial, run_dir)


class Reported:
    """What a trial has reported."""

    def __init__(self, record: TrialRecord) -> None:
        self.points, self.d, self.d_is_rising = set(record.curve), list(record.d), record.d_is_rising
        self.is_baseline = record.is_baseline


def _count_start(trial: optuna.Trial, run_dir: Path) -> None:
    """Count the starts without progress: a process that the kernel kills to free memory leaves no error.

    Raises:
        Infeasible: There were too many.
        UserError: There were too many of the baseline, with which all trials are compared.
    """
    record, saved, kills = TrialRecord.read(trial), newest_step(run_dir), oom_kills()
    progress = [len(record.curve), "" if saved is None else step_file(saved)]
    num_starts, *before = record.starts
    if before[:2] != progress:
        num_starts = 0
    elif num_starts and not _may_be_killed_for_memory(before[2:], kills):
        num_starts -= 1
    if num_starts >= MAX_STARTS:
        text = f"killed {num_starts} times before it made progress, likely by the kernel's out-of-memory killer"
        if record.is_baseline:
            raise UserError(f"the baseline was {text}: free some memory, or lower train.micro_batch_size.")
        raise Infeasible("memory", text)
    write_trial(trial, starts=[num_starts + 1, *progress, *(kills or ())])


def _may_be_killed_for_memory(before: Sequence[Any], now: tuple[str, int] | None) -> bool:
    """Whether the kernel killed a process for memory since a start; where it does not count, each death may be one.

    Args:
        before: The boot and the number of kills at that start; empty if unknown.
    """
    if now is None or not before:
        return True
    boot, num_kills = before
    return bool(boot == now[0] and now[1] > num_kills)


class _SignOfLife:
    """A tracker for machines whose kernel does not count: a trial that has trained was not killed by its size."""

    def __init__(self, trial: optuna.Trial) -> None:
        self._trial = trial

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        if oom_kills() is None and TrialRecord.read(self._trial).starts != [0]:
            write_trial(self._trial, starts=[0])

    def close(self) -> None:
        """Do nothing."""


def _decide_micro_batches(
    trial: optuna.Trial,
    setup: Setup,
    capabilities: Capabilities,
    probes: dict[tuple[str, ...], Probe] | None = None,
) -> Setup:
    """The trial's setup with its micro-batch size decided.

    Raises:
        Infeasible: The device's memory can't hold it.
    """
    available = available_memory(capabilities.kind)
    memory_fit = _estimate_memory(setup, capabilities, available, probes)
    if capabilities.kind == "cpu":
        # Other programs may free their memory: only what the whole machine can't hold is infeasible.
        available = capabilities.memory
    if not memory_fit.fits(available):
        raise Infeasible("memory", describe_shortage(memory_fit, available))
    write_trial(trial, micro_batch_size=memory_fit.micro_batch_size)
    if setup.config.micro_batch_size != "auto":
        return setup
    log.info("micro-batches: %d: %s", memory_fit.micro_batch_size, memory_fit.reason)
    decided = {"micro_batch_size": memory_fit.micro_batch_size}
    return replace(setup, config=setup.config.model_copy(update=decided))


def _estimate_memory(
    setup: Setup, capabilities: Capabilities, available: int, probes: dict[tuple[str, ...], Probe] | None
) -> MemoryFit:
    """The memory estimate of a trial, made once for each size; none is needed if a larger batch fits as a whole."""
    workload, config = setup.workload, setup.config
    batch_size, is_auto = config.batch_size, config.micro_batch_size == "auto"
    key = (
        f"{type(workload).__module__}:{type(workload).__qualname__}",
        workload.model_dump_json(),
        config.model_dump_json(include=SIZED_BY - {"batch_size"}),
        capabilities.kind,
    )
    known = _memory_fits.setdefault(key, {})
    for size, larger in known.items():
        if size > batch_size and larger.micro_batch_size == size and 0 < (larger.needs or 0) <= available:
            return MemoryFit(batch_size, larger.needs, f"a whole batch of {size} fits")
    if batch_size not in known or (is_auto and not known[batch_size].fits(available)):
        known[batch_size] = estimate_fit(workload, config, capabilities, available, probes)
    return known[batch_size]


@contextmanager
def _record_peak_memory(trial: optuna.Trial, capabilities: Capabilities) -> Iterator[None]:
    """Store the memory that a trial took, however it ends."""
    write_trial(trial, memory=capabilities.memory)
    peak = PeakMemory(capabilities.kind)
    try:
        yield
    finally:
        if (taken := peak.read()) is not None:
            # A resumed trial may have had its peak before.
            write_trial(trial, peak_memory=max(taken, TrialRecord.read(trial).peak_memory or 0))


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
