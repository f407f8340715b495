"""What a run's figures say that a person should know while there is time: each thing once, as a warning in the log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from trainer.device_monitor import GPU_UTILIZATION

BUSY = 0.8
"""A GPU that is busy for a smaller share of the time idles."""
IDLE_SECONDS = 180.0
"""Over how much training that is judged: shorter, a checkpoint or another program would look like idling."""
FIRST_INTERVALS, FIRST_STEPS = 5, 100
"""After so many log intervals and steps the loss should have fallen."""


def why_idle(utilization: float, data_wait: float) -> str | None:
    """What to say of a GPU that was busy for this share of the time; None where it is busy enough.

    Args:
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
        cause = "the data is there in time, so the steps are likely too small for it: a larger train.batch_size"
    return f"the GPU is busy for {utilization:.0%} of the time only; {cause}"


def not_falling(losses: Sequence[float], step: int) -> str | None:
    """What to say of a training loss that has not fallen since step 0; None where it has.

    Args:
        losses: Of each log interval so far: the first fifth of them is compared with the last.
    """
    part = max(1, len(losses) // FIRST_INTERVALS)
    first, last = (math.fsum(some) / part for some in (losses[:part], losses[-part:]))
    if last < first:
        return None
    return (
        f"the loss has not fallen over the first {step:,} steps ({first:.4f} at first, {last:.4f} now): if d hardly "
        "rises, raise train.d_coef (or train.lr for AdamW), else look at the data and the weights it starts from"
    )


class Advice:
    """Gathers a run's log intervals and says what they show, each thing once.

    Args:
        step: Where the run starts or goes on; one that goes on has been through its first intervals.
    """

    def __init__(self, step: int = 0) -> None:
        self._losses: list[float] | None = [] if step == 0 else None
        self._intervals = 0
        self._seconds = self._busy = self._waited = 0.0
        self._judging_load = True

    def interval(self, values: Mapping[str, float], *, step: int, seconds: float) -> list[str]:
        """What is to be said after a log interval of so many seconds that ends at this step."""
        self._intervals += 1
        found = [self._load(values, seconds), self._loss(values, step)]
        return [text for text in found if text is not None]

    def _load(self, values: Mapping[str, float], seconds: float) -> str | None:
        # The first interval holds compilation and warm-up, in which a GPU has to idle.
        if not self._judging_load or self._intervals == 1 or GPU_UTILIZATION not in values:
            return None
        self._seconds += seconds
        self._busy += seconds * values[GPU_UTILIZATION]
        self._waited += seconds * values["train/data_wait"]
        if self._seconds < IDLE_SECONDS:
            return None
        text = why_idle(self._busy / self._seconds, self._waited / self._seconds)
        self._seconds = self._busy = self._waited = 0.0
        self._judging_load = text is None
        return text

    def _loss(self, values: Mapping[str, float], step: int) -> str | None:
        if self._losses is None or "train/loss" not in values:
            return None
        self._losses.append(values["train/loss"])
        if len(self._losses) < FIRST_INTERVALS or step < FIRST_STEPS:
            return None
        losses, self._losses = self._losses, None
        return not_falling(losses, step)
