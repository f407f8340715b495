"""One search on recorded curves, and what many of them say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from contenders import STRATEGIES
from curves import Curves, Floats
from strategies import Task

RECORDS = Path(__file__).resolve().parent.parent / "records"
COMPUTE = np.arange(0.05, 4.01, 0.05).round(2)
"""Full runs' worth of samples at which regrets are compared."""
GOAL = 0.01


def regrets(task: tuple[str, str, int]) -> Floats:
    """Of one strategy under one seed: the regret at each of `COMPUTE`."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    name, grid, seed = task
    curves = Curves.load(RECORDS / f"curves_{grid}.json")
    search = Task(curves, seed % len(curves.seeds), seed, int(COMPUTE[-1] * curves.length))
    spent, found = zip(*STRATEGIES[name].choices(search), strict=True)
    known = np.array([curves.regret(configuration) for configuration in found])
    return known[np.searchsorted(spent, (COMPUTE * curves.length).round(), side="right") - 1]


def compute_to_goal(mean: Floats) -> float | None:
    """The least compute from which on the mean regret is within the goal; None: never."""
    above = np.flatnonzero(mean > GOAL)
    first = above[-1] + 1 if len(above) else 0
    return float(COMPUTE[first]) if first < len(COMPUTE) else None


def judge(name: str, found: Floats) -> dict[str, Any]:
    """Mean regret at each of `COMPUTE`, its standard error, the quarter of worst seeds, and the compute to the goal."""
    mean = found.mean(axis=0)
    return {
        "name": name,
        "mean": mean.round(5).tolist(),
        "standard_error": (found.std(axis=0, ddof=1) / np.sqrt(len(found))).round(5).tolist(),
        "worst_quarter": np.quantile(found, 0.75, axis=0).round(5).tolist(),
        "compute_to_goal": compute_to_goal(mean),
    }
