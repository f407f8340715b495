"""Search strategies: each yields its current choice as its compute grows.

Before its first result that is the baseline, the user's own settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from scripts.bench.search.curves import Configuration, Curves
from scripts.bench.search.runs import Choice, Runs, Task
from tuner.study.horizon import recommend
from tuner.study.keys import write_trial
from tuner.study.record import TrialRecord

BASELINE = Configuration(batch_size=8, d_coef=1.0)
BATCH_SIZE, D_COEF = "train.batch_size", "train.d_coef"
MAX_TRIALS = 64
"""A search ends here; more trials of a Gaussian process would take hours."""


class Strategy(Protocol):
    """A search strategy."""

    def choices(self, task: Task) -> Iterator[Choice]:
        """Yields the configuration that it would promote, as its compute grows."""


@dataclass(frozen=True)
class Corner:
    """The smallest batch size and the smallest d_coef, without a trial."""

    def choices(self, task: Task) -> Iterator[Choice]:
        yield Choice(0, Configuration(min(task.curves.batch_sizes), float(task.curves.d_coefs.min())))


@dataclass
class Trial:
    """A configuration's last loss."""

    configuration: Configuration
    value: float = np.inf
    is_pruned: bool = False


@dataclass
class Search:
    """An Optuna study on recorded curves."""

    study: optuna.Study
    """It has each trial's losses as intermediate values; the step is in samples."""
    runs: Runs
    trials: list[Trial]
    """By their number in the study."""


def rank_complete(search: Search) -> list[Trial]:
    """Complete trials, the lowest loss first."""
    complete = [trial for trial in search.trials if not trial.is_pruned]
    return sorted(complete, key=lambda trial: trial.value)


def rank_recommended(search: Search) -> list[Trial]:
    """As `rank_complete`, with the trial first that the tuner recommends."""
    curves, ranked = search.runs.curves, rank_complete(search)
    space: dict[str, BaseDistribution] = {
        BATCH_SIZE: CategoricalDistribution(curves.batch_sizes),
        D_COEF: FloatDistribution(curves.d_coefs[0], curves.d_coefs[-1], log=True),
    }
    records = [
        replace(TrialRecord.read(frozen), params={BATCH_SIZE: own.batch_size, D_COEF: own.d_coef})
        for frozen, own in zip(search.study.trials, (trial.configuration for trial in search.trials), strict=True)
    ]
    found = recommend(space, records, minimized=True, horizon=curves.length / 2)
    return sorted(ranked, key=lambda trial: found is None or trial is not search.trials[found["trial"]])


@dataclass(frozen=True)
class OptunaSearch:
    """An Optuna sampler and pruner, over trials of one length."""

    sampler: Callable[[Task], BaseSampler]
    pruner: Callable[[], BasePruner] = optuna.pruners.NopPruner
    share: int = 60
    """A trial has a full run's length over this."""
    with_baseline: bool = False
    """The user's settings are trial 0, and are not pruned."""
    spare_rising: bool = False
    """A trial is not pruned while its d rises."""
    ordered: bool = False
    """The batch size is an ordered integer, its index, and not a category as a study.toml's choices are."""
    rank: Callable[[Search], Sequence[Trial]] = rank_complete
    """The trials that may be promoted, the best first."""

    def searches(self, task: Task) -> Iterator[Search]:
        """The search after each trial."""
        # Hyperband derives a trial's bracket from the study's name.
        name = f"replay-{task.seed}"
        study = optuna.create_study(study_name=name, sampler=self.sampler(task), pruner=self.pruner())
        if self.with_baseline:
            batch_size = task.curves.batch_sizes.index(BASELINE.batch_size) if self.ordered else BASELINE.batch_size
            study.enqueue_trial({BATCH_SIZE: batch_size, D_COEF: BASELINE.d_coef})
        search = Search(study, Runs(task.curves), [])
        while search.runs.spent < task.budget and len(search.trials) < MAX_TRIALS:
            asked = study.ask()
            search.trials.append(trial := Trial(self._suggest(asked, task.curves)))
            self._run(search, asked, trial, task)
            state = TrialState.PRUNED if trial.is_pruned else TrialState.COMPLETE
            study.tell(asked, None if trial.is_pruned else trial.value, state=state)
            yield search

    def choices(self, task: Task) -> Iterator[Choice]:
        yield Choice(0, BASELINE)
        for search in self.searches(task):
            if best := self.rank(search)[:1]:
                yield search.runs.choose(best[0].configuration, task.train_seed)

    def _suggest(self, asked: optuna.Trial, curves: Curves) -> Configuration:
        if self.ordered:
            batch_size = curves.batch_sizes[asked.suggest_int(BATCH_SIZE, 0, len(curves.batch_sizes) - 1)]
        else:
            batch_size = asked.suggest_categorical(BATCH_SIZE, curves.batch_sizes)
        return Configuration(batch_size, asked.suggest_float(D_COEF, curves.d_coefs[0], curves.d_coefs[-1], log=True))

    def _run(self, search: Search, asked: optuna.Trial, trial: Trial, task: Task) -> None:
        """Report each loss, up to the end or until the trial is pruned."""
        curves, length = task.curves, task.curves.length // self.share
        losses = curves.losses(trial.configuration, task.train_seed).tolist()
        rising = curves.rising(trial.configuration, task.train_seed)
        d = curves.d_at(trial.configuration, task.train_seed)
        for samples, loss, rises in zip(curves.points.tolist(), losses, rising, strict=True):
            trial.value = loss
            asked.report(loss, samples)
            is_spared = (self.with_baseline and asked.number == 0) or (self.spare_rising and rises)
            # As the objective does: pruning at the last point saves nothing.
            trial.is_pruned = samples < length and not is_spared and asked.should_prune()
            if trial.is_pruned or samples >= length:
                break
        write_trial(asked, d=d[: curves.points.searchsorted(samples) + 1])
        search.runs.train(trial.configuration, task.train_seed, samples)


@dataclass(frozen=True)
class Confirmed:
    """A search whose best trials continue from their checkpoints to a longer rung; the lowest loss there is chosen."""

    search: OptunaSearch
    rung: int = 20
    """Its length is a full run's over this."""
    num_trials: int = 3
    is_annealed: bool = False
    """Judged by the loss after a decay to the rung's length, and not by that at the constant rate."""

    def choices(self, task: Task) -> Iterator[Choice]:
        """Each choice is that of a search that ends with a confirmation here, and pays for it in full."""
        yield Choice(0, BASELINE)
        for search in self.search.searches(task):
            best = [trial.configuration for trial in self.search.rank(search)[: self.num_trials]]
            if best and self.search.with_baseline and BASELINE not in best:
                best.append(BASELINE)
            if best:
                runs = search.runs.copy()
                values = [self._judge(runs, task, configuration) for configuration in best]
                yield runs.choose(best[int(np.argmin(values))], task.train_seed)

    def _judge(self, runs: Runs, task: Task, configuration: Configuration) -> float:
        """The loss at the rung."""
        length = task.curves.length // self.rung
        if self.is_annealed:
            return runs.anneal(configuration, task.train_seed, length)
        return float(runs.train(configuration, task.train_seed, length)[-1])
