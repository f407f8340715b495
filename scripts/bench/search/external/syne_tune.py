"""Syne Tune's asynchronous schedulers, with one worker: ASHA, MOBSTER, HyperTune and DyHPO.

    python -m venv data/environments/syne_tune
    data/environments/syne_tune/bin/pip install syne-tune==0.13.0 scipy autograd

Later versions have no MOBSTER, HyperTune and DyHPO.
"""

from __future__ import annotations

import datetime
import logging
import sys
from typing import Any

from syne_tune.backend.trial_status import Trial
from syne_tune.config_space import loguniform, ordinal
from syne_tune.optimizer import baselines
from syne_tune.optimizer.scheduler import SchedulerDecision

from scripts.bench.search.external import client

RUNGS = (1, 3, 9, 32)
"""Syne Tune's default, three times as long each, in units of the first point; no loss of 27 was recorded."""

OPTIONS: dict[str, dict[str, Any]] = {
    "HyperTune": {"brackets": 4, "search_options": {"opt_skip_init_length": 8, "opt_skip_period": 3}},
    "DyHPO": {"type": "dyhpo"},
}
"""HyperTune is meant for several brackets. It fits its model for each third proposal, as DyHPO does by default: else a
search takes minutes."""


class SyneTune:
    """One search. Resource levels are in units of the first point."""

    def __init__(self, method: str) -> None:
        self.search = search = client.read_line()
        self.unit = search["points"][0]
        self.end = search["longest"] // self.unit
        space = {
            "batch_size": ordinal(search["batch_sizes"], kind="equal"),
            "d_coef": loguniform(*search["d_coefs"]),
        }
        # DyHPO expects rungs at equal distances.
        rungs = [self.end // 4 * level for level in (1, 2, 3)] if method == "DyHPO" else RUNGS
        options = {"type": "promotion", "search_options": {}} | OPTIONS.get(method, {})
        options["search_options"] |= {"debug_log": False}
        self.scheduler = getattr(baselines, method)(
            space,
            metric="loss",
            mode="min",
            resource_attr="level",
            max_t=self.end,
            rung_levels=[level for level in rungs if level < self.end],
            points_to_evaluate=[search["baseline"]],
            random_seed=search["seed"],
            **options,
        )
        self.trials: list[Trial] = []
        self.levels: dict[int, int] = {}
        """Of each trial, the last one that was reported."""
        self.incumbent = client.Incumbent()

    def run(self) -> None:
        while (suggestion := self.scheduler.suggest(trial_id=len(self.trials))) is not None:
            if suggestion.spawn_new_trial_id:
                trial = Trial(len(self.trials), suggestion.config, datetime.datetime.now())
                self.trials.append(trial)
                self.scheduler.on_trial_add(trial)
            else:
                trial = self.trials[suggestion.checkpoint_trial_id]
            self.train(trial)

    def train(self, trial: Trial) -> None:
        """Continue a trial until the scheduler pauses or stops it."""
        config = {name: trial.config[name] for name in ("batch_size", "d_coef")}
        for samples in self.search["points"]:
            level = samples // self.unit
            if self.levels.get(trial.trial_id, 0) < level <= self.end:
                result = {"level": level, "loss": self.incumbent.train(config, samples)}
                self.levels[trial.trial_id] = level
                decision = self.scheduler.on_trial_result(trial, result)
                if decision != SchedulerDecision.CONTINUE:
                    if level < self.end:
                        self.scheduler.on_trial_remove(trial)
                        return
                    break
        self.scheduler.on_trial_complete(trial, result)


if __name__ == "__main__":
    logging.disable()
    SyneTune(sys.argv[1]).run()
