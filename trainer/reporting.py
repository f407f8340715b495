"""Reports a run while it trains, to log and tracker, with warnings; detects divergence."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from trainer.advice import Advice
from trainer.device_monitor import DeviceMonitor
from trainer.evaluation import Evaluation
from trainer.guard import GuardEvent
from trainer.metrics import IntervalMeter, log_line
from trainer.state import Run
from trainer.tracking import Trackers

log = logging.getLogger(__name__)


MAX_LOST_STEPS = 5
"""A run ends after whole log intervals of at least this many steps in a row without a finite gradient. A single one may
be a bad batch: its update is skipped."""
MAX_LOST_SHARE = 0.9
"""A run ends when a larger share of its gradients is not finite, see `trainer.advice.LostGradients`."""


class Diverged(RuntimeError):
    """The run can't recover: no gradient is finite any more, or the validation loss is not."""


class Reporter:
    """Reports a run's log intervals, validations and checkpoints to log and tracker."""

    def __init__(self, run: Run, tracker: Trackers, monitor: DeviceMonitor) -> None:
        self.run, self.tracker, self.monitor = run, tracker, monitor
        self._advice = Advice(run.progress.step)
        self.stopped_by_guard = ""
        """Why the guard ends the run; empty while it does not."""
        self._lost_steps = 0
        """Steps of the latest log intervals in a row without a finite gradient."""

    def report_interval(self, meter: IntervalMeter, values: dict[str, float]) -> None:
        """Report a log interval that has ended; `values` is the meter's reading.

        Raises:
            Diverged: None of its gradients was finite, and none of the intervals just before; or hardly any.
        """
        progress, config = self.run.progress, self.run.config
        steps = progress.step - meter.first_step
        self._lost_steps = self._lost_steps + steps if values["train/skipped_updates"] == steps else 0
        if self._lost_steps >= MAX_LOST_STEPS:
            raise Diverged(f"none of the last {self._lost_steps} gradients was finite, at step {progress.step}")
        lost = self._advice.lost
        lost.add(int(values["train/skipped_updates"]), steps)
        if lost.share > MAX_LOST_SHARE:
            raise Diverged(f"{lost}, at step {progress.step}")
        values |= meter.rates(steps, config.effective_batch_size) | self.monitor.read()
        values["train/timed_steps"] = meter.timed_steps
        if config.num_steps is not None:
            samples_left = (config.num_steps - progress.step) * config.effective_batch_size
            values["train/seconds_left"] = samples_left / values["train/samples_per_second"]
        elif config.seconds is not None:
            values["train/seconds_left"] = max(0.0, config.seconds - progress.seconds)
        log.info("%s", log_line(progress.step, values, time=meter.seconds))
        self.tracker.track(values, step=progress.step, samples=self.run.samples)
        for kind, text in self._advice.check_interval(values, step=progress.step, seconds=meter.seconds).items():
            log.warning("[Step %d] %s", progress.step, text)
            self.tracker.event(kind, text, step=progress.step)
        if config.on_decline is not None and "train/loss" in values:
            self._report_guard(progress.guard.add_train(values["train/loss"]))

    def report_evaluation(self, evaluation: Evaluation) -> None:
        """Report a validation. The tracker also gets the best values so far: `best/mel_loss`.

        Raises:
            Diverged: The loss is not finite.
        """
        shown = ", ".join(f"{name}: {value:.4f}" for name, value in evaluation.metrics.items())
        log.info("[Step %d] validation after %d samples: %s", evaluation.step, evaluation.samples, shown)
        best = {f"best/{metric.removeprefix('val/')}": value for metric, value in self.run.progress.best.items()}
        self.tracker.track({**evaluation.metrics, **best}, step=evaluation.step, samples=evaluation.samples)
        if not math.isfinite(evaluation.metrics["val/loss"]):
            raise Diverged(f"val/loss was {evaluation.metrics['val/loss']} after {evaluation.samples} samples")
        config, guard = self.run.config, self.run.progress.guard
        if config.on_decline is not None:
            self._report_guard(guard.add_validation(evaluation.metrics["val/loss"], config.patience))

    def _report_guard(self, event: GuardEvent | None) -> None:
        """Report that the run declines, or does so no longer, and end it where the configuration says so."""
        if event is None:
            return
        step, guard, on_decline = self.run.progress.step, self.run.progress.guard, self.run.config.on_decline
        text = guard.declined or f"val/loss {guard.best:.4f} is the best so far"
        level, verb = (logging.WARNING, "declines") if event == "declined" else (logging.INFO, "has recovered")
        log.log(level, "[Step %d] the run %s: %s", step, verb, text)
        self.tracker.event(event, text, step=step)
        # It may recover in the validation of the same step, before it has ended.
        is_stopped = event == "declined" and on_decline != "warn" and not self.run.finished
        self.stopped_by_guard = text if is_stopped else ""
        if is_stopped:
            self.tracker.event("stopped_by_guard", text, step=step)

    def report_checkpoints(self, names: Sequence[str]) -> None:
        """Report checkpoints of the current step, which may still be being written."""
        for name in names:
            self.tracker.checkpoint(name, step=self.run.progress.step)
