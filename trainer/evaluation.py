"""The validation loss: the token-weighted mean over a fixed set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from trainer.metrics import LossMeter
from trainer.ranks import ALONE, Ranks
from trainer.workload import Batch, Workload


@dataclass(frozen=True)
class Evaluation:
    """One point of a validation curve."""

    point: float
    """The point of the evaluation grid, in its unit; equal for all trials of a study."""
    step: int
    samples: int
    seconds: float
    """Seconds of training so far, over `timed_steps`; without warm-up, validation and checkpoints."""
    timed_steps: int
    metrics: dict[str, float]
    """`val/loss` and the named losses, each a mean over the whole validation set; `val/loss/ko` over a part of it."""
    d: float
    """Prodigy's step size estimate; 1 for other optimizers."""

    @property
    def seconds_per_step(self) -> float | None:
        """None if all steps belong to the warm-up."""
        return self.seconds / self.timed_steps if self.timed_steps else None


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 autocast if `precision` is "bf16"; weights and their updates stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def evaluate(
    workload: Workload,
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    precision: str,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Validation metrics by name, dropout off: `val/loss`, ..., and of each part of the set `val/loss/ko`, ....

    Waits for the device at the end only. Each rank has a share of the batches, and all have the same result.
    """
    whole = LossMeter(workload.loss_weights)
    parts: dict[str, LossMeter] = {}
    training = model.training
    model.eval()
    for batch in batches:
        with autocast(device, precision):
            sums = workload.loss_sums(model, batch.to(device).inputs)
        whole.add(sums, batch.counts)
        if batch.part:
            parts.setdefault(batch.part, LossMeter(workload.loss_weights)).add(sums, batch.counts)
    model.train(training)
    metrics = {f"val/{name}": value for name, value in whole.read(ranks).items()}
    # A rank may have no batch of a part.
    for part in sorted(set[str]().union(*ranks.gather(list(parts)))):
        meter = parts.get(part, LossMeter(workload.loss_weights))
        metrics |= {f"val/{name}/{part}": value for name, value in meter.read(ranks).items()}
    return metrics
