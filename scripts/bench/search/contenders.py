"""The strategies that are compared: by name, each with the variants of which the best is reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

from scripts.bench.search.external_search import ExternalSearch, find_command
from scripts.bench.search.runs import Task
from scripts.bench.search.strategies import MAX_TRIALS, Confirmed, Corner, OptunaSearch, Strategy, rank_recommended
from tuner.spec.study_toml import Choice
from tuner.study.samplers import PRUNERS, build_sampler

Variants = Mapping[str, Strategy]

SHARES = (120, 60, 20, 5)
"""A trial's length is a full run's over one of these."""
RUNGS = (60, 20, 5)
"""The same for a confirmation's; these have annealed losses."""
FIRST_POINT = 512

OPTUNA_PRUNERS: dict[str, Callable[[], BasePruner]] = {
    "no pruner": optuna.pruners.NopPruner,
    "Median": optuna.pruners.MedianPruner,
    "Hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=FIRST_POINT),
    "Wilcoxon": optuna.pruners.WilcoxonPruner,
}
SAMPLERS: dict[str, Callable[[Task], BaseSampler]] = {
    "TPE": lambda task: TPESampler(seed=task.seed),
    "Optuna's GP": lambda task: GPSampler(seed=task.seed),
}
# Configured as ours is by default: few random trials, and ordered batch sizes.
BY_HAND: dict[str, Callable[[Task], BaseSampler]] = {
    "TPE": lambda task: TPESampler(seed=task.seed, multivariate=True, n_startup_trials=5),
    "Optuna's GP": lambda task: GPSampler(seed=task.seed, n_startup_trials=3),
}
RANDOM = OptunaSearch(lambda task: RandomSampler(seed=task.seed))
WITHOUT_HORIZON = OptunaSearch(
    lambda task: build_sampler(Choice(name="gp"), task.seed), PRUNERS["median"], with_baseline=True, spare_rising=True
)
RECOMMENDED = replace(WITHOUT_HORIZON, rank=rank_recommended)
OURS = replace(RECOMMENDED, sampler=lambda task: build_sampler(Choice(name="gp"), task.seed, task.curves.length / 2))
OPTUNA_RECOMMENDED = replace(RECOMMENDED, sampler=BY_HAND["Optuna's GP"], ordered=True)


def vary_length(search: OptunaSearch) -> Variants:
    return {f"1/{share}": replace(search, share=share) for share in SHARES}


def vary_rung(search: OptunaSearch, *, is_annealed: bool = False) -> Variants:
    """All pairs of a trial's length and a longer one of the confirmation."""
    return {
        f"1/{share}, then 1/{rung}": Confirmed(replace(search, share=share), rung, is_annealed=is_annealed)
        for share, rung in product(SHARES, RUNGS)
        if rung < share
    }


def list_optuna() -> dict[str, Variants]:
    """Each sampler with its defaults and set up by hand, with each pruner."""
    return {
        f"{name}{suffix}, {pruner}": vary_length(OptunaSearch(samplers[name], build_pruner, ordered=bool(suffix)))
        for name in SAMPLERS
        for suffix, samplers in (("", SAMPLERS), (" set up by hand", BY_HAND))
        for pruner, build_pruner in OPTUNA_PRUNERS.items()
    }


EXTERNAL = {
    "Syne Tune's ASHA": ("syne_tune", "ASHA", None),
    "Syne Tune's MOBSTER": ("syne_tune", "MOBSTER", MAX_TRIALS),
    "Syne Tune's HyperTune": ("syne_tune", "HyperTune", MAX_TRIALS),
    "Syne Tune's DyHPO": ("syne_tune", "DyHPO", MAX_TRIALS),
    "Ray's ASHA": ("ray", "ASHAScheduler", None),
    "NePS's PriorBand": ("neps", "priorband", None),
    "SMAC's multi-fidelity facade": ("smac", "MultiFidelityFacade", None),
}
"""By title, a tool, its method, and the most trials of a search; those of a Gaussian process take hours."""


def list_external() -> dict[str, Variants]:
    """The methods of the tools whose environments exist."""
    return {
        title: {f"1/{share}": ExternalSearch(command, share, max_trials) for share in SHARES}
        for title, (tool, method, max_trials) in EXTERNAL.items()
        if (command := find_command(tool, method))
    }


CONTENDERS: dict[str, Variants] = {
    "always the corner": {"": Corner()},
    "random": vary_length(RANDOM),
    "random, best 3 continued": vary_rung(RANDOM),
    **list_optuna(),
    **list_external(),
    "ours": vary_length(OURS),
    "ours without the horizon": vary_length(WITHOUT_HORIZON),
    "ours, horizon only in the recommendation": vary_length(RECOMMENDED),
    "ours with Optuna's GP": vary_length(OPTUNA_RECOMMENDED),
    "ours, confirmed": vary_rung(OURS),
    "ours, confirmed after decay": vary_rung(OURS, is_annealed=True),
}
