"""The strategies that are compared, by name."""

from __future__ import annotations

from collections.abc import Callable

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from strategies import OptunaSearch, RayASHA, ShortThenTop, Strategy

from tuner.samplers import PRUNERS, SAMPLERS, PerTrialSampler

SHORT, FULL = 1_200, 6_400


def default_tpe(seed: int) -> BaseSampler:
    return TPESampler(seed=seed)


def ours(name: str = "tpe", **options: object) -> Callable[[int], BaseSampler]:
    return lambda seed: PerTrialSampler(lambda mixed: SAMPLERS[name](seed=mixed, **options), seed)


# Made for resources of any size; the lengths here are in samples, and the first point is at 200.
PEERS: dict[str, Callable[[], BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "Median": optuna.pruners.MedianPruner,
    "Percentile(75)": lambda: optuna.pruners.PercentilePruner(75.0),
    "Hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=200),
    "SuccessiveHalving": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=200),
    "Wilcoxon": optuna.pruners.WilcoxonPruner,
}

STRATEGIES: dict[str, Strategy] = {
    "random": OptunaSearch(lambda seed: RandomSampler(seed=seed), length=SHORT),
    "random, full length": OptunaSearch(lambda seed: RandomSampler(seed=seed), length=FULL),
    **{f"TPE, {name}": OptunaSearch(default_tpe, pruner, length=SHORT) for name, pruner in PEERS.items()},
    **{f"TPE, {name}, full length": OptunaSearch(default_tpe, pruner, length=FULL) for name, pruner in PEERS.items()},
    "short, then top 3": ShortThenTop(3, SHORT),
    "Ray ASHA": RayASHA(FULL),
    "Ray ASHA, short": RayASHA(SHORT),
    "prodigy-tuner before": OptunaSearch(ours(), PRUNERS["percentile"], length=SHORT, with_baseline=True),
}
