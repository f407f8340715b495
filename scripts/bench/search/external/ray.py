"""Ray Tune's ASHA with its random search, one trial at a time.

    python -m venv data/environments/ray
    data/environments/ray/bin/pip install 'ray[tune]==2.60.0'

Its scheduler decides which trials stop; Ray's processes are not started.
"""

from __future__ import annotations

import logging
import sys
from itertools import count
from types import SimpleNamespace

import numpy as np
from ray import tune
from ray.tune import schedulers

from scripts.bench.search.external import client


def search(scheduler_name: str) -> None:
    """Levels are in units of the first point."""
    described, incumbent = client.read_line(), client.Incumbent()
    generator = np.random.default_rng(described["seed"])
    unit, longest = described["points"][0], described["longest"]
    scheduler = getattr(schedulers, scheduler_name)("level", "loss", "min", max_t=longest // unit)
    batch_size, d_coef = tune.choice(described["batch_sizes"]), tune.loguniform(*described["d_coefs"])
    for number in count():
        trial = SimpleNamespace(trial_id=str(number))
        config = described["baseline"]
        if number:
            config = {
                "batch_size": batch_size.sample(random_state=generator),
                "d_coef": float(d_coef.sample(random_state=generator)),
            }
        scheduler.on_trial_add(None, trial)
        for samples in described["points"]:
            result = {"level": samples // unit, "loss": incumbent.train(config, samples)}
            if scheduler.on_trial_result(None, trial, result) == schedulers.TrialScheduler.STOP:
                break


if __name__ == "__main__":
    logging.disable()
    search(sys.argv[1])
