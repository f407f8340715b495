"""The guard on recorded and synthetic curves: silent in all healthy ones, in time in all ruined ones."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from trainer.guard import Guard

RECORDS = Path(__file__).parents[2] / "scripts" / "records"
ONSET = 1.10
"""A run is ruined from the first validation that is this much above its best one."""


def recorded() -> Iterator[list[float]]:
    """Validation losses at constant rates: every combination of batch size and d_coef."""
    for task in ("text", "speech"):
        yield from (c["loss"] for c in json.loads((RECORDS / f"curves_{task}.json").read_text())["curves"])


def synthetic(rng: random.Random) -> list[float]:
    """A power law with noise that is flat over its last two thirds, or falls in a decay at its end."""
    size, exponent, floor, noise = rng.uniform(1, 3), rng.uniform(0.1, 0.7), rng.uniform(1, 3), rng.uniform(0.001, 0.02)
    num, flat, curve = rng.choice([50, 100, 200]), rng.random() < 0.5, []
    for i in range(1, num + 1):
        loss = floor + size * min(i, num // 3 if flat else i) ** -exponent
        decay = 0 if flat else rng.uniform(0.04, 0.06) * max(0.0, i / num - 0.8) / 0.2
        curve.append(loss * (1 - decay) * (1 + noise * rng.gauss(0, 1)))
    return curve


def ruined(last: float) -> dict[str, list[float]]:
    """Continuations of a curve from its last value."""
    return {
        "jump": [1.3 * last] * 5,
        "small jump": [1.15 * last] * 5,
        "slow exponential rise": [last * (1 + 0.005 * 1.15**i) for i in range(40)],
        "fast exponential rise": [last * (1 + 0.01 * 2**i) for i in range(10)],
        "plateau at a higher level": [last * (1 + 0.05 * min(i, 4)) for i in range(12)],
        "growing oscillation": [last * (1 + 0.02 * 1.5**i * (-1) ** i) for i in range(10)],
    }


def healthy() -> list[list[float]]:
    rng = random.Random(0)
    return [*recorded(), *(synthetic(rng) for _ in range(80))]


def test_no_alarm_in_healthy_curves_and_one_in_time_in_every_ruined_one() -> None:
    curves = healthy()
    assert len(curves) >= 100
    alarms = [number for number, curve in enumerate(curves) if any(map(Guard().add_validation, curve))]
    assert alarms == []
    rng, late = random.Random(1), []
    for number, curve in enumerate(recorded()):
        for end in (40, 46, 52):  # before that the slowest curves still fall by more than a small jump
            for kind, values in ruined(curve[end - 1]).items():
                guard, best = Guard(), min(curve[:end])
                assert not any(map(guard.add_validation, curve[:end]))
                values = [value * (1 + rng.gauss(0, 0.003)) for value in values]
                onset = next(i for i, value in enumerate(values) if value >= ONSET * best)
                alarm = next((i for i, value in enumerate(values) if guard.add_validation(value)), math.inf)
                late += [(number, end, kind, onset, alarm)] if alarm > onset + 2 else []
    assert late == []


def test_training_loss_is_judged_by_its_own_noise() -> None:
    """Log intervals: many more values, noisier than validations; an outlier is no decline."""
    for seed in range(20):
        rng = random.Random(seed)
        noise = rng.uniform(0.005, 0.05)
        curve = [(2 + i**-0.5) * (1 + noise * rng.gauss(0, 1)) for i in range(1, 2000)]
        curve[500] = curve[1000] = curve[1001] = 50.0
        guard = Guard()
        assert not any(map(guard.add_train, curve))
        jump = [guard.add_train(value * 1.7) for value in curve[-5:]]
        assert jump.count("declined") == 1, noise
        assert guard.declined.startswith("train/loss is at least")


def test_patience_counts_validations_without_a_new_best() -> None:
    guard = Guard()
    events = [guard.add_validation(loss, patience=3) for loss in (3.0, 2.0, 2.01, 2.02, 2.01, 2.03, 1.9, 1.95)]
    assert events == [None, None, None, None, "declined", None, "recovered", None]


@pytest.mark.parametrize("sign", [1, -1])
def test_guard_continues_from_its_state(sign: int) -> None:
    """Losses may be negative."""
    values = [sign * 2 + 1 / i for i in range(1, 30)]
    guard = Guard()
    for value in values:
        guard.add_train(value)
        guard.add_validation(value)
    again = TypeAdapter(Guard).validate_python(json.loads(json.dumps(asdict(guard))))
    assert again == guard and again.declined == ""
    assert [again.add_validation(value) for value in [sign * 2 + 1.0] * 3] == [None, "declined", None]
