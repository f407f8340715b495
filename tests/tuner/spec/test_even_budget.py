from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import optuna
import pytest

from tests.tuner.studies_for_tests import values
from trainer import UserError
from tuner.spec.search import MAX_DELAY, MAX_EXCESS, find_unevenness
from tuner.spec.study_toml import StudySpec
from tuner.study.record import read_spec


def seen(samples: int, evaluations: int, step: int) -> list[tuple[float, int]]:
    """(point of the grid, samples at its validation), counted step by step."""
    points = [samples * number / evaluations for number in range(1, evaluations + 1)]
    found, amount = [], 0
    for point in points:
        while amount < point - 1e-6:
            amount += step
        found.append((point, amount))
    return found


def is_even(samples: int, evaluations: int, step: int) -> bool:
    *points, (end, last) = seen(samples, evaluations, step)
    interval = samples / evaluations
    return last - end <= MAX_EXCESS * samples and all(at - point <= MAX_DELAY * interval for point, at in points)


@pytest.mark.parametrize("evaluations", [1, 3, 4, 7])
def test_refused_budgets_are_those_with_uneven_step_counts(evaluations: int) -> None:
    verdicts = set()
    for samples, sizes in product((40, 160, 200, 210, 1000, 1200, 16_000), ([8], [8, 12], [4, 8, 16], [1, 24, 32])):
        for accumulations in ([1], [1, 3]):
            steps = [size * accumulation for size, accumulation in product(sizes, accumulations)]
            reason = find_unevenness(samples, evaluations, sizes, accumulations)
            assert (reason is None) == all(is_even(samples, evaluations, step) for step in steps), (samples, steps)
            verdicts.add(reason is None)
            if reason is not None:
                named = re.search(r"use samples = ([\d_]+)", reason)
                assert named is not None
                better = int(named[1])
                assert better > samples and all(is_even(better, evaluations, step) for step in steps)
    assert verdicts == {True, False}


def test_message_names_the_batch_its_samples_and_a_fitting_budget() -> None:
    assert (
        find_unevenness(40, 1, [8, 32], [1])
        == "samples 40: with a batch of 32 a trial sees 64, 60.0% more; use samples = 64"
    )
    assert find_unevenness(160, 4, [8, 12], [1]) == (
        "samples 160: with a batch of 12 a trial sees 168, 5.0% more; use samples = 192"
    )
    assert find_unevenness(192, 4, [8, 32], [1]) == (
        "evaluations 4: with a batch of 32 the point of 48 samples is validated at 64, and others near it; "
        "use samples = 256, or fewer evaluations"
    )


def test_usual_batches_divide_what_the_studies_give_them() -> None:
    assert find_unevenness(16_000, 8, [4, 8, 16, 32], [1]) is None
    assert find_unevenness(200_000, 10, [8, 16, 24, 32], [1]) is None
    assert find_unevenness(1_200, 6, [4, 8, 16, 32], [1]) is None, "the demo: 1,216 samples are 1.3% more"


def test_huge_range_is_checked_at_once() -> None:
    reason = find_unevenness(10**9, 8, range(1, 10**12), range(1, 10**6))
    assert reason is not None and "use samples = " in reason
    assert find_unevenness(10**15, 8, range(1, 10**9), [1, 2, 4]) is None


def test_stored_study_with_an_uneven_budget_stays_readable(tmp_path: Path) -> None:
    uneven = values(**{"trial.samples": 100})
    with pytest.raises(UserError, match=r"trial\.samples 100: "):
        StudySpec.build(uneven, base_dir=tmp_path)
    study = optuna.create_study()
    study.set_user_attr("spec", uneven)
    study.set_user_attr("base_dir", str(tmp_path))
    assert read_spec(study).trial.samples == 100
