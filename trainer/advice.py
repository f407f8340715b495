"""Warnings from a run's figures while there is time to act: an idle GPU, lost gradients, a loss that does not fall.

Each comes once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from trainer.device_monitor import GPU_UTILIZATION

GPU_IDLE = "gpu_idle"
"""Kind of the warning about an idle GPU."""
BUSY = 0.8
"""A GPU that is busy for a smaller share of the time counts as idle."""
IDLE_SECONDS = 180.0
"""Training time over which utilization is averaged: over less, a checkpoint or another program looks like idling."""
FIRST_INTERVALS, FIRST_STEPS = 5, 100
"""Log intervals and steps after which the loss should have fallen."""
LOST = 0.1
"""A larger share of gradients that are not finite is no chance."""
LOST_STEPS = 100
"""The least number of steps over which this share is taken."""


def check_utilization(utilization: float, data_wait: float) -> str | None:
    """Returns a warning if the GPU idles, else None.

    Args:
        utilization: The share of the time in which the GPU was busy.
        data_wait: The share of the time in which the loop waited for its next batch.
    """
    if utilization >= BUSY:
        return None
    if data_wait >= (1 - utilization) / 2:
        cause = (
            f"{data_wait:.0%} of the time went into waiting for data: more train.num_workers, or data that is packed "
            "into one store"
        )
    else:
        cause = "the data arrives in time, so the steps are likely too small for it: a larger train.batch_size"
    return f"the GPU is busy for {utilization:.0%} of the time only; {cause}"


def check_loss_falls(losses: Sequence[float], step: int) -> str | None:
    """Returns a warning if the training loss has not fallen since step 0, else None.

    Args:
        losses: One loss per log interval. The first fifth of them is compared with the last fifth.
    """
    part = max(1, len(losses) // FIRST_INTERVALS)
    first, last = (math.fsum(some) / part for some in (losses[:part], losses[-part:]))
    if last < first:
        return None
    return (
        f"the loss has not fallen over the first {step:,} steps ({first:.4f} at first, {last:.4f} now): if d hardly "
        "rises, raise train.d_coef (or train.lr for AdamW), else check the data and the initial weights"
    )


class LostGradients:
    """Counts the gradients that were not finite, over the latest log intervals of at least `LOST_STEPS` steps."""

    def __init__(self) -> None:
        self._intervals: list[tuple[int, int]] = []
        self.lost = self.steps = 0

    def add(self, lost: int, steps: int) -> None:
        """Add a log interval of `steps` steps."""
        self._intervals.append((lost, steps))
        while sum(steps for _, steps in self._intervals[1:]) >= LOST_STEPS:
            self._intervals.pop(0)
        self.lost, self.steps = (sum(column) for column in zip(*self._intervals, strict=True))

    @property
    def share(self) -> float:
        """Lost gradients as a share of all; 0 while these are few."""
        return self.lost / self.steps if self.steps >= LOST_STEPS else 0.0

    def __str__(self) -> str:
        return f"{self.lost} of the last {self.steps} gradients were not finite"


class Advice:
    """Collects a run's log intervals and warns about them, once for each cause.

    Args:
        step: The step at which the run starts or continues. The loss is checked in runs from step 0 only.
    """

    def __init__(self, step: int = 0) -> None:
        self._losses: list[float] | None = [] if step == 0 else None
        self._intervals = 0
        self._seconds = self._busy = self._waited = 0.0
        self._judging_load = True
        self.lost = LostGradients()
        self._judging_lost = True

    def check_interval(self, values: Mapping[str, float], *, step: int, seconds: float) -> dict[str, str]:
        """Returns the warnings, by kind, after a log interval that took `seconds` and ends at `step`."""
        self._intervals += 1
        warnings = {
            GPU_IDLE: self._check_load(values, seconds),
            "lost_gradients": self._check_lost(),
            "loss_not_falling": self._check_loss(values, step),
        }
        return {kind: text for kind, text in warnings.items() if text is not None}

    def _check_load(self, values: Mapping[str, float], seconds: float) -> str | None:
        # The first interval holds compilation and warm-up, when the GPU must idle.
        if not self._judging_load or self._intervals == 1 or GPU_UTILIZATION not in values:
            return None
        self._seconds += seconds
        self._busy += seconds * values[GPU_UTILIZATION]
        self._waited += seconds * values["train/data_wait"]
        if self._seconds < IDLE_SECONDS:
            return None
        text = check_utilization(self._busy / self._seconds, self._waited / self._seconds)
        self._seconds = self._busy = self._waited = 0.0
        self._judging_load = text is None
        return text

    def _check_lost(self) -> str | None:
        if not self._judging_lost or self.lost.share <= LOST:
            return None
        self._judging_lost = False
        return (
            f"{self.lost}, and their updates were skipped: lower train.d_coef (or train.lr for AdamW), or look for "
            "samples with extreme values"
        )

    def _check_loss(self, values: Mapping[str, float], step: int) -> str | None:
        if self._losses is None or "train/loss" not in values:
            return None
        self._losses.append(values["train/loss"])
        if len(self._losses) < FIRST_INTERVALS or step < FIRST_STEPS:
            return None
        losses, self._losses = self._losses, None
        return check_loss_falls(losses, step)
