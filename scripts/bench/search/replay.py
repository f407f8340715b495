"""Searches on recorded curves, and the statistics of many."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import optuna
import torch

from scripts.bench.search.contenders import CONTENDERS
from scripts.bench.search.curves import Curves, Floats, find_curves
from scripts.bench.search.runs import Task
from scripts.bench.search.strategies import Strategy

COMPUTE = 2 ** np.arange(-6, -0.99, 0.125)
"""Full runs' worth of samples at which regrets are compared."""
BUDGETS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Those of `COMPUTE` that are shown."""
JUDGED_AT = 1 / 4
"""The compute at which the best variant is chosen."""
GOAL = 0.005
NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Job:
    """One search to replay."""

    contender: str
    variant: str
    task: str
    seed: int
    budget: float
    """In full runs."""
    fill: bool = False
    """See `Curves.load`."""


@lru_cache
def load_curves(task: str, fill: bool) -> Curves:
    return Curves.load(find_curves(task), fill=fill)


def run_job(job: Job) -> Floats:
    """`replay` of a job; for a process of its own."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    torch.set_num_threads(1)
    curves = load_curves(job.task, job.fill)
    task = Task(curves, job.seed % curves.num_seeds, job.seed, round(job.budget * curves.length))
    return replay(CONTENDERS[job.contender][job.variant], task)


def replay(strategy: Strategy, task: Task) -> Floats:
    """[2, compute]: the regret after each of `COMPUTE`, and the compute that the promoted run does not contain.

    A search that has less to spend chooses as the last one that could pay.
    """
    choices, length = list(strategy.choices(task)), task.curves.length
    spent = np.array([choice.spent for choice in choices])
    last = [int(np.flatnonzero(spent <= round(compute * length))[-1]) for compute in COMPUTE]
    regrets = {at: task.curves.regret(choices[at].configuration) for at in set(last)}
    outside = [(choices[at].spent - choices[at].contained) / length for at in last]
    return np.array([[regrets[at] for at in last], outside])


def find_compute(compute: float) -> int:
    """Its index in `COMPUTE`."""
    return int(np.abs(COMPUTE - compute).argmin())


def compute_to_goal(mean: Floats) -> float | None:
    """The least compute from which on the mean regret is within the goal; None: never."""
    above = np.flatnonzero(mean > GOAL)
    first = above[-1] + 1 if len(above) else 0
    return float(COMPUTE[first]) if first < len(COMPUTE) else None


def bootstrap_interval(regrets: Floats) -> tuple[float, float]:
    """The 95% interval of the mean of [task, seed] over other seeds of the searches; the tasks are the same."""
    tasks, seeds = regrets.shape
    drawn = np.random.default_rng(0).integers(seeds, size=(NUM_RESAMPLES, tasks, seeds))
    means = regrets[np.arange(tasks)[:, None], drawn].mean(axis=(1, 2))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def summarize_regrets(results: Floats, tasks: list[str]) -> dict[str, Any]:
    """The statistics of one strategy's results, [task, seed, 2, compute]: those at `BUDGETS`, and the means over all of
    `COMPUTE`."""
    regrets, (mean, outside) = results[:, :, 0], results.mean(axis=(0, 1))
    places = [find_compute(budget) for budget in BUDGETS]
    return {
        "regret": mean[places].round(5).tolist(),
        "interval": np.round([bootstrap_interval(regrets[..., place]) for place in places], 5).tolist(),
        "outside": outside[places].round(4).tolist(),
        "compute_to_goal": compute_to_goal(mean),
        "mean": mean.round(5).tolist(),
        "tasks": dict(zip(tasks, regrets.mean(axis=1).round(5).tolist(), strict=True)),
    }
