"""Sums kept on the device, read once per log interval; the log line."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.clock import clock as clock
from trainer.device_monitor import GPU_MEMORY, GPU_UTILIZATION
from trainer.ranks import ALONE, Ranks
from trainer.units import format_bytes
from trainer.workload import Batch


def compute_means(
    sums: Mapping[str, float], counts: Mapping[str, int], weights: Mapping[str, float]
) -> dict[str, float]:
    """Mean of each loss, and their weighted sum as "loss"."""
    values = {name: sums[name] / counts[name] for name in sums if counts[name]}
    total = sum(weight * values[name] for name, weight in weights.items() if name in values)
    return {"loss": total, **{name: value for name, value in values.items() if name != "loss"}}


class LossMeter:
    """Sums of losses over many batches. Adding never waits for the device; reading does, once."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = weights
        self.reset()

    def reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, sums: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        for name, value in sums.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + counts[name]

    def read(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """Means so far, over all ranks. Waits for the device once."""
        values = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        # A rank may have no value of a loss.
        for their_sums, their_counts in ranks.gather((dict(zip(self._sums, values, strict=True)), self._counts)):
            for name, value in their_sums.items():
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0) + their_counts[name]
        return compute_means(sums, counts, self.weights) if sums else {}


def log_line(step: int, values: Mapping[str, float], *, time: float) -> str:
    """`[Step 100] Loss: 2.34, Text Loss: 1.23, Mel Loss: 1.11, LR: 0.00012, Time: 45.2s, 17.7 samples/s, ...`.

    Args:
        values: Metrics by name, such as `train/loss`; `train/lr` is the effective rate, d x lr for Prodigy.
        time: Seconds since the previous line.
    """
    losses = [name for name in values if name.startswith("train/") and name.endswith("loss")]
    parts = [f"{name[6:].replace('_', ' ').title()}: {values[name]:.4f}" for name in losses]
    parts += [f"LR: {values['train/lr']:.3g}", f"Time: {time:.1f}s"]
    parts += [f"{values['train/samples_per_second']:.1f} samples/s"]
    if GPU_MEMORY in values:
        parts += [f"GPU {format_bytes(values[GPU_MEMORY])}"]
    if GPU_UTILIZATION in values:
        parts += [f"{values[GPU_UTILIZATION]:.0%} busy"]
    if "train/seconds_left" in values:
        parts += [f"{clock(values['train/seconds_left'])} left"]
    if values.get("train/skipped_updates"):
        parts += [f"{values['train/skipped_updates']:.0f} updates skipped (gradient not finite)"]
    return f"[Step {step}] " + ", ".join(parts)


class IntervalMeter:
    """Collects one log interval: losses, the last update's norm and rate, skipped updates, tokens, times."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.losses = LossMeter(weights)
        self.start(0)

    def start(self, step: int) -> None:
        """Begin a new interval at this step."""
        self.first_step = step
        self.tokens = self.slots = 0
        self.seconds = self.data_wait = 0.0
        self.timed_steps, self._timed_seconds = 0, 0.0
        self._skipped: Tensor | float = 0.0
        self._last: tuple[Tensor | float, Tensor | float, float] = (0.0, 0.0, 0.0)
        self.losses.reset()

    def add_batch(self, sums: Mapping[str, Tensor], batch: Batch) -> None:
        self.losses.add(sums, batch.counts)
        self.tokens += batch.num_tokens
        self.slots += batch.num_slots

    def add_update(self, norm: Tensor, skipped: Tensor, *, lr: float, d: Tensor | float) -> None:
        self._skipped = self._skipped + skipped
        self._last = (norm, d, lr)

    def add_step(self, seconds: float, *, warm_up: bool) -> None:
        """Count the time of a step; warm-up steps do not enter the rates."""
        self.seconds += seconds
        if not warm_up:
            self.timed_steps += 1
            self._timed_seconds += seconds

    def rates(self, steps: int, batch_size: int) -> dict[str, float]:
        """Samples and tokens per second, and the share of the time that was spent waiting for data.

        Args:
            steps: Steps in the interval.
            batch_size: Samples per step.
        """
        # An interval of warm-up steps only is measured by these.
        pace = self.timed_steps / self._timed_seconds if self.timed_steps else steps / self.seconds
        return {
            "train/samples_per_second": pace * batch_size,
            "train/tokens_per_second": pace * self.tokens / steps,
            "train/data_wait": self.data_wait / self.seconds,
        }

    def read(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """The interval's figures by name, of all ranks. Waits for the device: all work launched so far is then
        finished.

        Raises:
            UserError: Prodigy's d differs between the ranks.
        """
        norm, d, lr = self._last
        ranks.check_equal("Prodigy's d", float(d))
        self.tokens, self.slots = map(sum, zip(*ranks.gather((self.tokens, self.slots)), strict=True))
        return {
            **{f"train/{name}": value for name, value in self.losses.read(ranks).items()},
            "train/lr": float(d) * lr,
            "train/d": float(d),
            "train/grad_norm": float(norm),
            "train/skipped_updates": float(self._skipped),
            "train/real_token_share": self.tokens / max(1, self.slots),
        }
