"""What a confirmation found, as the study keeps it: each run's curve as it is drawn, and the whole at its end.

Imports no torch: what only looks is quick.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import optuna
from pydantic import TypeAdapter

CONFIRMATION = "confirmation"
"""Attribute of a study: what was asked of its last confirmation (`asked`), and what it found (`found`) once it did."""


@dataclass(frozen=True)
class ConfirmedTrial:
    """A trial's values at the rung's end."""

    number: int
    params: dict[str, Any]
    values: dict[int, float]
    """By training seed."""
    failed: str = ""
    """What ended one of its runs before the rung's end; such a trial can't win."""

    @property
    def mean(self) -> float:
        return mean(self.values.values())

    @property
    def spread(self) -> float:
        """Largest minus smallest value over the seeds."""
        return max(self.values.values()) - min(self.values.values())


@dataclass(frozen=True)
class Confirmation:
    """What the longer runs found."""

    metric: str
    minimized: bool
    unit: str
    rung: int
    """How long the runs were, in `unit`: samples, steps or seconds."""
    trials: list[ConfirmedTrial]
    """The best mean first; those that failed last."""
    baseline: int | None
    """Number of the baseline among them."""

    @property
    def winner(self) -> ConfirmedTrial:
        return self.trials[0]

    def margin(self, trial: ConfirmedTrial) -> float | None:
        """By how much its mean is better than the baseline's; None where one of them has none."""
        base = next((each for each in self.trials if each.number == self.baseline), None)
        if base is None or base.failed or trial.failed:
            return None
        return base.mean - trial.mean if self.minimized else trial.mean - base.mean

    @property
    def noise(self) -> float | None:
        """The spread over seeds, pooled (root mean square) over the trials; None where there is one seed."""
        spreads = [trial.spread for trial in self.trials if not trial.failed and len(trial.values) > 1]
        return math.sqrt(mean(spread**2 for spread in spreads)) if spreads else None

    @property
    def verdict(self) -> str:
        """What it says of the winner, in a line."""
        name, margin, noise = f"trial {self.winner.number}", self.margin(self.winner), self.noise
        if self.winner.number == self.baseline:
            return f"the baseline ({name}) is the best of them: the study found nothing better"
        if margin is None:
            return f"{name} is the best of them; there is no baseline at the rung's end to compare it with"
        if noise is None:
            return f"{name} is {margin:.4f} better than the baseline; one seed does not say how much of it is noise"
        if margin < noise:
            return f"{name} is within noise of the baseline: {margin:.4f} better, and seeds alone differ by {noise:.4f}"
        return f"{name} is {margin:.4f} better than the baseline, and seeds alone differ by {noise:.4f}"


@dataclass(frozen=True)
class Asked:
    """What a confirmation was asked for, as the command line says it."""

    num_trials: int
    num_seeds: int
    rung: int
    best: int
    """Number of the study's best trial when it began."""

    @property
    def options(self) -> str:
        return f"--confirm {self.num_trials} --seeds {self.num_seeds} --rung {self.rung}"


def keep_asked(study: optuna.Study, asked: Asked) -> None:
    """Remember that a confirmation is under way."""
    study.set_user_attr(CONFIRMATION, {"asked": asdict(asked)})


def keep_found(study: optuna.Study, asked: Asked, found: Confirmation) -> None:
    """Remember what it found."""
    study.set_user_attr(CONFIRMATION, {"asked": asdict(asked), "found": asdict(found)})


def stored_asked(study: optuna.Study) -> Asked | None:
    """What was asked of the study's last confirmation; None where there was none."""
    kept = study.user_attrs.get(CONFIRMATION)
    return Asked(**kept["asked"]) if kept else None


def stored_confirmation(study: optuna.Study) -> Confirmation | None:
    """What the study's last confirmation found; None where there was none, or it has not come to its end."""
    found = study.user_attrs.get(CONFIRMATION, {}).get("found")
    return None if found is None else _confirmation.validate_python(found)


# Stored as JSON, whose keys are text: seeds become numbers again.
_confirmation = TypeAdapter(Confirmation)


def record_name(number: int, seed: int) -> str:
    """Of a confirmation run: its directory, and the study's attribute that holds its record."""
    return f"confirm-{number:05d}-seed-{seed}"


def read_record(study: optuna.Study, number: int, seed: int) -> dict[str, Any]:
    """What is known of a confirmation run: `run_dir`, `curve` (value by point, as text) and `failed`; {}: nothing."""
    record: dict[str, Any] = study.user_attrs.get(record_name(number, seed), {})
    return record


def points_of(record: Mapping[str, Any]) -> dict[int, float]:
    return {int(point): value for point, value in record.get("curve", {}).items()}
