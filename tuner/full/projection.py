"""What a full run will take, said before it goes on, and once more when its own speed is known."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from trainer import UserError
from trainer.acceleration import choose_precision, detect
from trainer.clock import format_hours
from trainer.memory import NoEstimate, Probe
from tuner.search_space import Setup, full_setup
from tuner.spec import StudySpec
from tuner.trials import FULL_HOURS, baseline_trial

log = logging.getLogger(__name__)


def projections(study: optuna.Study, spec: StudySpec, chosen: FrozenTrial, length: Mapping[str, Any]) -> list[str]:
    """Hours, memory, samples and epochs of a trial's full run, and of the baseline's beside it; a line each.

    Args:
        length: Of the full run, where it is not the spec's: fields of the configuration.
    """
    lines = [f"full run of trial {chosen.number}: {_describe(spec, chosen, length)}"]
    base = baseline_trial(study)
    if base is not None and base.number != chosen.number and base.params:
        lines.append(f"full run of the baseline (trial {base.number}) would be: {_describe(spec, base, length)}")
    return lines


def _describe(spec: StudySpec, trial: FrozenTrial, length: Mapping[str, Any]) -> str:
    setup = full_setup(spec, trial.params, **length)
    steps = setup.config.num_steps or 0
    samples = steps * setup.config.effective_batch_size
    parts = [f"{steps:,} steps", f"{samples:,} samples", f"{samples / len(setup.workload.train_data()):.2f} epochs"]
    if hours := trial.user_attrs.get(FULL_HOURS):
        asked = full_setup(spec, trial.params).config.num_steps or steps
        parts.append(f"about {format_hours(hours * steps / asked)}")
    if memory := _memory(trial, setup):
        parts.append(memory)
    return ", ".join(parts)


def _memory(trial: FrozenTrial, setup: Setup) -> str | None:
    if peak := trial.user_attrs.get("peak_memory"):
        return f"{_format_bytes(peak)} of memory (its trial's peak)"
    capabilities = detect(setup.config.device)
    try:
        probe = Probe(setup.workload, setup.config, device=capabilities.kind, precision="fp32")
        probe.precision, _ = choose_precision(capabilities, setup.config, probe.num_trained)
        return f"{_format_bytes(probe.estimate().total)} of memory (estimated)"
    except (NoEstimate, UserError):
        return None


def _format_bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


class MeasuredSpeed:
    """A Tracker that says once how long the run will take at the speed that it has.

    The first log interval is left out: it holds the compilation and the choice of kernels.

    Args:
        samples: The whole run's.
        steps: Over how many at least the speed is measured.
    """

    def __init__(self, samples: int, steps: int = 50) -> None:
        self.samples, self.steps = samples, steps
        self._first: tuple[int, int] | None = None
        self._last = (0, 0)
        self._seconds = 0.0
        self._said = False

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        if self._said or "train/samples_per_second" not in values:
            return
        if self._first is None:
            self._first = self._last = (step, samples)
            return
        self._seconds += (samples - self._last[1]) / values["train/samples_per_second"]
        self._last = (step, samples)
        if step - self._first[0] < self.steps:
            return
        left = (self.samples - samples) * self._seconds / (samples - self._first[1])
        log.info("measured over %d steps under its own plan: %s left", step - self._first[0], format_hours(left / 3600))
        self._said = True

    def close(self) -> None:
        """Nothing to write at the end."""
