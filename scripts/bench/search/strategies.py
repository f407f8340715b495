"""Search strategies: each yields its current choice as its compute grows.

A strategy receives curves, the index of the recorded training seed that its trials run under, a seed of its own, and
its compute budget; it yields (samples trained so far, the configuration it would promote now). Before its first result
that is the baseline, the user's own settings.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from scripts.bench.search.curves import Configuration, Curves

BASELINE = Configuration(batch_size=8, d_coef=1.0)

Choice = tuple[int, Configuration]


@dataclass(frozen=True)
class Task:
    """One search: the curves, one of their training seeds (its index), the strategy's seed, the most to spend."""

    curves: Curves
    train_seed: int
    seed: int
    samples: int
    """No trial starts after this number."""

    def points(self, length: int) -> range:
        """Indexes of the validations in a trial of `length` samples."""
        return range(int(np.searchsorted(self.curves.points, length)) + 1)


class Strategy(Protocol):
    """A search strategy."""

    def choices(self, task: Task) -> Iterator[Choice]:
        """Yields the configuration it would promote, as its compute grows."""


@dataclass
class Trial:
    """A configuration's last loss, and after how many samples."""

    configuration: Configuration
    value: float
    samples: int
    pruned: bool = False


@dataclass(frozen=True)
class OptunaSearch:
    """An Optuna sampler and pruner, over trials of one length."""

    sampler: Callable[[int], BaseSampler]
    pruner: Callable[[], BasePruner] = optuna.pruners.NopPruner
    length: int = 1_200
    with_baseline: bool = False
    """The user's settings are trial 0, and are not pruned."""
    spare_rising: bool = False
    """A trial is not pruned while its d rises."""
    ordered: bool = False
    """The batch size is an ordered integer, its index, and not a category as a study.toml's choices are."""

    def trials(self, task: Task) -> Iterator[tuple[int, list[Trial]]]:
        """After each trial: the samples trained so far, and all trials."""
        curves, spent, done = task.curves, 0, list[Trial]()
        # Hyperband derives a trial's bracket from the study's name.
        name = f"replay-{task.seed}"
        study = optuna.create_study(study_name=name, sampler=self.sampler(task.seed), pruner=self.pruner())
        if self.with_baseline:
            study.enqueue_trial({"batch_size": BASELINE.batch_size, "d_coef": BASELINE.d_coef})
        while spent < task.samples:
            asked = study.ask()
            if self.ordered:
                batch_size = curves.batch_sizes[asked.suggest_int("batch_size", 0, len(curves.batch_sizes) - 1)]
            else:
                batch_size = asked.suggest_categorical("batch_size", curves.batch_sizes)
            d_coef = asked.suggest_float("d_coef", curves.d_coefs[0], curves.d_coefs[-1], log=True)
            configuration = Configuration(batch_size, d_coef)
            curve, points = curves.curve(configuration, task.train_seed), task.points(self.length)
            rising = curves.rising(configuration, task.train_seed)
            trial = Trial(configuration, np.inf, 0)
            for at in points:
                trial.value, trial.samples = float(curve[at]), int(curves.points[at])
                asked.report(trial.value, trial.samples)
                spared = (self.with_baseline and asked.number == 0) or (self.spare_rising and rising[at])
                # As the objective does: pruning at the last point saves nothing.
                if at != points[-1] and not spared and asked.should_prune():
                    trial.pruned = True
                    break
            spent += trial.samples
            state = optuna.trial.TrialState.PRUNED if trial.pruned else optuna.trial.TrialState.COMPLETE
            study.tell(asked, None if trial.pruned else trial.value, state=state)
            done.append(trial)
            yield spent, done

    def choices(self, task: Task) -> Iterator[Choice]:
        yield 0, BASELINE
        for spent, trials in self.trials(task):
            complete = [trial for trial in trials if not trial.pruned]
            if complete:
                yield spent, min(complete, key=lambda trial: trial.value).configuration


@dataclass(frozen=True)
class Confirmed:
    """A search whose best trials continue from their checkpoints to a longer rung, and run to the same length on other
    training seeds from step 0; the best mean there is chosen.

    The regret is a mean over the recorded seeds too, and there are only two: with both, the choice sees part of the
    data that it is judged by.
    """

    search: OptunaSearch
    num_trials: int = 3
    rung: int = 2_400
    num_seeds: int = 2

    def choices(self, task: Task) -> Iterator[Choice]:
        yield 0, BASELINE
        at = task.points(self.rung)[-1]
        for spent, trials in self.search.trials(task):
            complete = sorted((trial for trial in trials if not trial.pruned), key=lambda trial: trial.value)
            # Each point is a search that ends with a confirmation here, and pays for it in full.
            best = [trial.configuration for trial in complete[: self.num_trials]]
            if BASELINE not in best and self.search.with_baseline:
                best.append(BASELINE)
            if best:
                cost = len(best) * (self.num_seeds * self.rung - self.search.length)
                values = [self._mean(task, configuration, at) for configuration in best]
                yield spent + cost, best[int(np.argmin(values))]

    def _mean(self, task: Task, configuration: Configuration, at: int) -> float:
        seeds = [(task.train_seed + more) % len(task.curves.seeds) for more in range(self.num_seeds)]
        return float(np.mean([task.curves.curve(configuration, seed)[at] for seed in seeds]))


@dataclass
class RayTrial:
    """The part of a Ray trial that its scheduler reads."""

    trial_id: str
    status: str = "RUNNING"
    last_result: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RayASHA:
    """Ray Tune's AsyncHyperBandScheduler over random configurations, one trial at a time."""

    length: int = 6_400
    grace_period: int = 200
    reduction_factor: int = 4

    def choices(self, task: Task) -> Iterator[Choice]:
        from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

        curves, draw, spent = task.curves, random.Random(task.seed), 0
        best: tuple[float, Configuration] = (np.inf, BASELINE)
        scheduler = AsyncHyperBandScheduler(
            time_attr="samples",
            metric="loss",
            mode="min",
            max_t=self.length,
            grace_period=self.grace_period,
            reduction_factor=self.reduction_factor,
        )
        yield 0, BASELINE
        number = 0
        while spent < task.samples:
            configuration = draw_configuration(draw, curves)
            curve = curves.curve(configuration, task.train_seed)
            trial = RayTrial(f"{number:05d}")
            number += 1
            scheduler.on_trial_add(None, trial)
            for at in task.points(self.length):
                samples, loss = int(curves.points[at]), float(curve[at])
                result = {"samples": samples, "loss": loss}
                decision = scheduler.on_trial_result(None, trial, result)
                if decision != TrialScheduler.CONTINUE:
                    break
            scheduler.on_trial_complete(None, trial, result)
            spent += samples
            # Ray's best trial is the best last result, also of stopped trials.
            best = min(best, (loss, configuration), key=lambda pair: pair[0])
            yield spent, best[1]


@dataclass(frozen=True)
class ShortThenTop:
    """Random configurations for one short epoch each, then the best of them at full length."""

    num_top: int = 3
    length: int = 1_200

    def choices(self, task: Task) -> Iterator[Choice]:
        curves, draw, spent = task.curves, random.Random(task.seed), 0
        at = task.points(self.length)[-1]
        tried: list[tuple[float, Configuration]] = []
        yield 0, BASELINE
        while spent < task.samples:
            configuration = draw_configuration(draw, curves)
            tried.append((float(curves.curve(configuration, task.train_seed)[at]), configuration))
            spent += self.length
            if len(tried) >= self.num_top:
                top = [each for _, each in sorted(tried, key=lambda pair: pair[0])[: self.num_top]]
                finals = [curves.curve(each, task.train_seed)[-1] for each in top]
                yield spent + self.num_top * (curves.length - self.length), top[int(np.argmin(finals))]


def draw_configuration(draw: random.Random, curves: Curves) -> Configuration:
    """A random configuration, log-uniform in d_coef."""
    low, high = np.log(curves.d_coefs[0]), np.log(curves.d_coefs[-1])
    return Configuration(draw.choice(list(curves.batch_sizes)), float(np.exp(draw.uniform(low, high))))
