"""The strategies that are compared, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

from scripts.bench.search.strategies import Confirmed, OptunaSearch, RayASHA, ShortThenTop, Strategy
from tuner.spec.study_toml import Choice
from tuner.study.samplers import PRUNERS, build_sampler

SHORT, FULL = 1_200, 6_400


def build_tpe(seed: int) -> BaseSampler:
    return TPESampler(seed=seed)


def build_ours(name: str) -> Callable[[int], BaseSampler]:
    return lambda seed: build_sampler(Choice(name=name), seed)


# The lengths here are in samples, and the first point is at 200.
PEERS: dict[str, Callable[[], BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "Median": optuna.pruners.MedianPruner,
    "Percentile(75)": lambda: optuna.pruners.PercentilePruner(75.0),
    "Hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=200),
    "SuccessiveHalving": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=200),
    "Wilcoxon": optuna.pruners.WilcoxonPruner,
}
OURS = OptunaSearch(build_ours("gp"), PRUNERS["median"], SHORT, with_baseline=True, spare_rising=True)

STRATEGIES: dict[str, Strategy] = {
    "prodigy-tuner": OURS,
    # The rung has the command's default length: a quarter of the full run.
    "prodigy-tuner, then --confirm 3": Confirmed(OURS, num_trials=3, rung=1_600),
    "prodigy-tuner, then --confirm 3 --seeds 1": Confirmed(OURS, num_trials=3, rung=1_600, num_seeds=1),
    "ours without pruning": replace(OURS, pruner=optuna.pruners.NopPruner),
    "ours, pruning while d rises": replace(OURS, spare_rising=False),
    "ours with TPE": replace(OURS, sampler=build_ours("tpe")),
    "ours with Optuna's GP": replace(OURS, sampler=lambda seed: GPSampler(seed=seed, n_startup_trials=3)),
    "random": OptunaSearch(lambda seed: RandomSampler(seed=seed), length=SHORT),
    "random, full length": OptunaSearch(lambda seed: RandomSampler(seed=seed), length=FULL),
    **{f"TPE, {name}": OptunaSearch(build_tpe, pruner, SHORT) for name, pruner in PEERS.items()},
    **{f"TPE, {name}, full length": OptunaSearch(build_tpe, pruner, FULL) for name, pruner in PEERS.items()},
    "Optuna's GP, none": OptunaSearch(lambda seed: GPSampler(seed=seed), length=SHORT),
    # Configured as ours is by default: few random trials, and ordered batch sizes.
    "Optuna's GP, set up by hand": OptunaSearch(
        lambda seed: GPSampler(seed=seed, n_startup_trials=3), length=SHORT, ordered=True
    ),
    "TPE, set up by hand": OptunaSearch(
        lambda seed: TPESampler(seed=seed, multivariate=True, n_startup_trials=5), length=SHORT, ordered=True
    ),
    "short, then the top 3": ShortThenTop(3, SHORT),
    "Ray ASHA": RayASHA(SHORT),
    "Ray ASHA, full length": RayASHA(FULL),
}
