"""One search on recorded curves, and the statistics of many."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
import torch

from scripts.bench.search.contenders import STRATEGIES
from scripts.bench.search.curves import Curves, Floats, find_curves
from scripts.bench.search.strategies import Task

COMPUTE = np.arange(0.05, 4.01, 0.05).round(2)
"""Full runs' worth of samples at which regrets are compared."""
GOAL = 0.01


def compute_regrets(task: tuple[str, str, int]) -> Floats:
    """The regret of one strategy under one seed, at each of `COMPUTE`."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    name, grid, seed = task
    curves = Curves.load(find_curves(grid))
    search = Task(curves, seed % len(curves.seeds), seed, int(COMPUTE[-1] * curves.length))
    spent, choices = zip(*STRATEGIES[name].choices(search), strict=True)
    regrets = np.array([curves.regret(configuration) for configuration in choices])
    return regrets[np.searchsorted(spent, (COMPUTE * curves.length).round(), side="right") - 1]


def compute_to_goal(mean: Floats) -> float | None:
    """The least compute from which on the mean regret is within the goal; None: never."""
    above = np.flatnonzero(mean > GOAL)
    first = above[-1] + 1 if len(above) else 0
    return float(COMPUTE[first]) if first < len(COMPUTE) else None


def summarize_regrets(name: str, regrets: Floats) -> dict[str, Any]:
    """Mean regret at each of `COMPUTE`, its standard error, the quarter of worst seeds, and the compute to the goal."""
    mean = regrets.mean(axis=0)
    return {
        "name": name,
        "mean": mean.round(5).tolist(),
        "standard_error": (regrets.std(axis=0, ddof=1) / np.sqrt(len(regrets))).round(5).tolist(),
        "worst_quarter": np.quantile(regrets, 0.75, axis=0).round(5).tolist(),
        "compute_to_goal": compute_to_goal(mean),
    }
