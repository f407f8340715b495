"""How long a trial should be, by the trials so far: from which point on d rests and their order is that of the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import correlation, mean

from trainer.config import TrainConfig
from tuner.study.record import StudyRecord

MIN_TRIALS = 5
"""Complete trials before which nothing is concluded."""
SETTLED = 0.9
"""Rank correlation with the trials' end from which on their order counts as settled."""
RISING = 1.01
"""Prodigy's d rises if it grows by more than this factor from one evaluation to the next."""


@dataclass(frozen=True)
class TrialLength:
    """From which point of the evaluation grid on a trial tells as much as at its end."""

    unit: str
    length: int
    """Of a trial, in `unit`."""
    num_trials: int
    d_rests: int | None
    """The point from which on no trial's d rises; None if one still rises at the end."""
    uses_d: bool
    """Whether one of them was trained with Prodigy."""
    settled: int | None
    """The point from which on the order of the trials is that of their end; None if only at the end."""

    def __str__(self) -> str:
        by = f"by {self.num_trials} trials of {self.length:,} {self.unit}"
        if self.d_rests is None:
            return f"{by}, d still rises at their end for some settings: longer trials would predict better"
        if self.settled is None:
            return f"{by}, their order still changes at the end: longer trials would predict better"
        enough = max(self.settled, self.d_rests)
        if enough == self.length:
            return f"{by}, d rests only at their end: longer trials would predict better"
        then = "d rests, and their order" if self.uses_d else "their order"
        return f"{by}, trials of {enough:,} {self.unit} would do: then {then} is that of the end"


def judge_trial_length(record: StudyRecord) -> TrialLength | None:
    """Judge the length of the trials; None until enough complete ones have the same points, and unlike ends."""
    complete = [trial for trial in record.trials if trial.state == "complete" and len(trial.curve) > 1]
    points = sorted(set[int]().union(*(trial.curve for trial in complete)))
    trials = [trial for trial in complete if len(trial.curve) == len(points)]
    at_end = [trial.curve[points[-1]] for trial in trials]
    if len(trials) < MIN_TRIALS or len({*at_end}) == 1:
        return None
    orders = [rank_correlation([trial.curve[point] for trial in trials], at_end) >= SETTLED for point in points]
    rest = max(find_rest(trial.d) for trial in trials)
    optimizer = record.spec["train"].get("optimizer", TrainConfig.model_fields["optimizer"].default)
    return TrialLength(
        unit=record.unit,
        length=points[-1],
        num_trials=len(trials),
        uses_d=any(trial.params.get("train.optimizer", optimizer) == "prodigy" for trial in trials),
        d_rests=None if any(trial.d_is_rising for trial in trials) else points[rest],
        settled=find_settled(points, orders),
    )


def find_settled(points: Sequence[int], orders: Sequence[bool]) -> int | None:
    """The first point from which on the order is that of the end; None if it is only at the end."""
    unlike = [place for place, is_settled in enumerate(orders) if not is_settled]
    first = unlike[-1] + 1 if unlike else 0
    return points[first] if first < len(points) - 1 else None


def is_rising(d: Sequence[float], d0: float) -> bool:
    """Whether Prodigy's d rose since the evaluation before, or is still at `d0`; True after a single evaluation."""
    return len(d) < 2 or d[-1] > RISING * d[-2] or d[-1] <= RISING * d0


def find_rest(d: Sequence[float]) -> int:
    """The evaluation from which on d does not grow any more, counted from 0."""
    rises = [place for place, (earlier, later) in enumerate(pairwise(d), start=1) if later > RISING * earlier]
    return rises[-1] if rises else 0


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 if all values of one side are equal."""
    if len({*one}) == 1 or len({*other}) == 1:
        return 0.0
    return correlation(_ranks(one), _ranks(other))


def _ranks(values: Sequence[float]) -> list[float]:
    """Equal values have the mean of their ranks."""
    ordered = sorted(values)
    ranks = {value: mean(at for at, other in enumerate(ordered) if other == value) for value in {*values}}
    return [ranks[value] for value in values]
