"""Losses that are not finite, at a share of the steps."""

from __future__ import annotations

import torch

from tests.attacks.full.common import Job, Result
from tests.attacks.test_lost_states import noisy, run
from trainer import Diverged
from trainer.checkpoint import find_state


def lost_gradients(job: Job) -> Result:
    """A run that loses up to nine tenths of its gradients ends; one that loses more is stopped. Its weights are finite
    either way."""
    result = Result()
    for share in (0.001, 0.01, 0.1, 0.9, 0.95, 1.0)[: job.size]:
        folder = job.folder / str(share)
        lost = share
        workload = noisy(lambda call, lost=lost: int(call * lost) > int((call - 1) * lost))
        try:
            ended = run(workload, folder, steps=1000, save_every=50, log_every=20).finished
        except Diverged:
            ended = False
        result.attempts += 1
        result.check(ended == (share <= 0.9), f"NaN at {share:.1%} of the steps: finished is {ended}")
        found = find_state(folder)
        finite = found is None or all(bool(torch.isfinite(t).all()) for t in found[1]["model"].values())
        result.check(finite, f"NaN at {share:.1%} of the steps: weights")
        result.figures[f"{share:.1%}"] = "finished" if ended else "stopped"
    return result
