from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from tests.tuner.studies_for_tests import values
from tuner.spec.setups import horizon
from tuner.spec.study_toml import StudySpec
from tuner.study.horizon import BATCH_SIZE, MAX_TRIALS, HorizonModel, build_shift, find_values, recommend
from tuner.study.record import TrialRecord
from tuner.study.surrogate import Surrogate, standardized

SPACE: dict[str, BaseDistribution] = {
    BATCH_SIZE: CategoricalDistribution((4, 8, 16, 32, 64)),
    "train.d_coef": FloatDistribution(0.1, 10.0, log=True),
}
POINTS = (250, 500, 750, 1000)
HORIZON = 60_000
NO_SHIFT = np.zeros(1)


def make_trial(
    number: int, curve: Mapping[int, float], params: dict[str, Any] | None = None, **changes: Any
) -> TrialRecord:
    values = {"state": TrialState.COMPLETE, "value": curve[max(curve)], **changes}
    params = params or {BATCH_SIZE: 8, "train.d_coef": 1.0}
    distributions = {name: SPACE[name] for name in params}
    frozen = create_trial(intermediate_values=dict(curve), params=params, distributions=distributions, **values)
    frozen.number = number
    return TrialRecord.read(frozen)


def loss(batch_size: int, d_coef: float, point: float) -> float:
    """Lowest at d_coef 0.5 and at a batch size that is 4 at 250 samples and grows with the samples' power of 0.6."""
    best = 4 * (point / 250) ** 0.6
    return 10 * point**-0.2 * (1 + 0.02 * math.log2(batch_size / best) ** 2 + 0.02 * math.log2(d_coef / 0.5) ** 2)


def make_grid(points: tuple[int, ...] = POINTS) -> list[TrialRecord]:
    places = [(size, d_coef) for size in (4, 8, 16, 32, 64) for d_coef in (0.2, 0.5, 2.0)]
    return [
        make_trial(
            number,
            {point: loss(size, d_coef, point) for point in points},
            {BATCH_SIZE: size, "train.d_coef": d_coef},
        )
        for number, (size, d_coef) in enumerate(places)
    ]


def find_recommended(trials: list[TrialRecord], horizon: float) -> Mapping[str, Any]:
    found = recommend(SPACE, trials, minimized=True, horizon=horizon)
    assert found is not None
    return found


def test_longer_run_is_given_a_larger_batch_size() -> None:
    trials = make_grid()
    found = find_recommended(trials, HORIZON)
    best, recommended = trials[found["best"]], trials[found["trial"]]
    assert best.params == {BATCH_SIZE: 8, "train.d_coef": 0.5}
    assert recommended.params[BATCH_SIZE] in (32, 64) and recommended.params["train.d_coef"] == 0.5
    assert 0.8 < found["probability"] <= 1
    assert found["growth"] == pytest.approx(60**0.5)
    # As long as a trial: nothing drifts.
    same = find_recommended(trials, POINTS[-1])
    assert same["trial"] == same["best"] and same["growth"] == 1


def test_metric_that_is_maximized_is_recommended_alike() -> None:
    trials = [
        make_trial(trial.number, {point: -value for point, value in trial.curve.items()}, dict(trial.params))
        for trial in make_grid()
    ]
    found = recommend(SPACE, trials, minimized=False, horizon=HORIZON)
    assert found == find_recommended(make_grid(), HORIZON)


def test_trial_that_the_model_leaves_out_may_be_recommended() -> None:
    """Of a large study the model has the best and the newest trials: here none with a large batch size."""
    rest = [
        make_trial(15 + number, {1000: loss(8, d_coef, 1000)}, {BATCH_SIZE: 8, "train.d_coef": d_coef})
        for number, d_coef in enumerate(np.linspace(0.3, 0.8, 2 * MAX_TRIALS).tolist())
    ]
    trials = [*make_grid((1000,)), *rest]
    model = HorizonModel(SPACE, trials, horizon=HORIZON)
    assert model.surrogate._fits[0].inputs[:, 0].max() < 0.5  # a batch size of 8 is at 0.25, 32 at 0.75
    assert model.best.params[BATCH_SIZE] in (32, 64)
    assert 0.5 < model.recommend()["probability"] <= 1


@pytest.mark.parametrize(
    "space",
    [
        {"train.d_coef": SPACE["train.d_coef"]},
        {BATCH_SIZE: IntDistribution(4, 64), "train.d_coef": SPACE["train.d_coef"]},
    ],
)
def test_nothing_is_recommended_where_no_batch_size_has_a_log_scale(space: dict[str, BaseDistribution]) -> None:
    assert recommend(space, make_grid(), minimized=True, horizon=HORIZON) is None


def test_nothing_is_recommended_without_a_length_or_a_complete_trial() -> None:
    assert recommend(SPACE, make_grid(), minimized=True, horizon=None) is None
    pruned = make_trial(0, {250: 4.0}, state=TrialState.PRUNED, value=None)
    assert recommend(SPACE, [pruned], minimized=True, horizon=HORIZON) is None


def test_pruned_trial_informs_about_its_surroundings_and_is_not_recommended() -> None:
    trials = make_grid()
    without = HorizonModel(SPACE, trials).surrogate
    pruned = make_trial(15, {250: 1.0}, {BATCH_SIZE: 64, "train.d_coef": 8.0}, state=TrialState.PRUNED, value=None)
    model = HorizonModel(SPACE, [*trials, pruned])
    corner = np.array([[1.0, 0.95]])
    assert model.surrogate.predict(corner)[0] < without.predict(corner)[0] - 0.1
    assert pruned not in model.tried


def test_trial_with_a_value_that_is_no_longer_a_choice_is_left_out() -> None:
    space = {**SPACE, BATCH_SIZE: CategoricalDistribution((8, 16, 32, 64))}
    found = recommend(space, make_grid(), minimized=True, horizon=HORIZON)
    assert found is not None and found["growth"] == pytest.approx(60**0.5)
    assert make_grid()[found["trial"]].params[BATCH_SIZE] != 4


def test_curves_with_an_infinite_loss_are_left_out() -> None:
    ruined = make_trial(15, {250: 3.0, 500: math.inf}, {BATCH_SIZE: 64, "train.d_coef": 8.0}, value=math.inf)
    assert find_recommended([*make_grid(), ruined], HORIZON) == find_recommended(make_grid(), HORIZON)


def test_pruned_trial_is_projected_with_the_gain_of_complete_trials() -> None:
    complete = [
        make_trial(i, {100: end + gain, 200: end}) for i, (end, gain) in enumerate(((3, 1), (3.5, 2), (4, 1.2)))
    ]
    pruned = [
        make_trial(3 + i, curve, state=TrialState.PRUNED, value=None)
        for i, curve in enumerate(({100: 6.0}, {150: 5.0}))
    ]
    assert find_values([*complete, *pruned]) == {0: 3, 1: 3.5, 2: 4, 3: pytest.approx(4.8), 4: 5}


def test_growth_is_that_of_the_batch_size_in_shares_of_its_range() -> None:
    space = {"train.optimizer": CategoricalDistribution(("a", "b", "c")), **SPACE}
    assert build_shift(space, 2.0).tolist() == [0, 0, 0, pytest.approx(0.25), 0]


def test_ruin_does_not_hide_the_differences_of_good_trials() -> None:
    values = standardized([3.0, 3.1, 3.2, 3.3, 1e6])
    assert values[1] - values[0] > 0.2


def test_improvement_is_expected_where_it_is_unknown_or_near_the_best() -> None:
    inputs = np.array([[0.0], [0.2], [0.8], [1.0]])
    values = standardized([4.0, 3.0, 3.2, 4.5])
    model = Surrogate(inputs, values, NO_SHIFT)
    between, at_best, at_worst = model.expected_improvement(inputs, np.array([[0.4], [0.2], [1.0]]))
    assert between > at_best > at_worst >= 0


def test_input_that_no_trial_can_tell_of_at_the_horizon_is_not_tried_for_ever() -> None:
    """A trial at 0 tells of 2 in the longer run, and none tells of 0."""
    rows = 30
    inputs, values = np.zeros((rows, 1)), np.random.default_rng(0).normal(size=rows)
    model = Surrogate(inputs, values, np.full(1, 2.0))
    _, covariance = model.predict(np.zeros((1, 1)))
    improvement = model.expected_improvement(inputs, np.array([[0.0], [2.0]]))
    assert covariance[0, 0] > 0.5
    assert improvement[0] < 0.2 * improvement[1]


@pytest.mark.parametrize(
    ("full", "expected"),
    [
        ({"samples": 9600}, 4800),
        ({"samples": 9600, "schedule": "none"}, 9600),
        ({"steps": 1200}, 4800),  # at the baseline's batch size of 8
        ({"samples": 1280}, None),
    ],
)
def test_horizon_is_half_of_a_run_that_decays(full: dict[str, Any], expected: float | None, tmp_path: Path) -> None:
    spec = StudySpec.build({**values(), "full": full}, base_dir=tmp_path)
    assert spec.trial.unit == "samples" and spec.trial.budget == 160
    assert horizon(spec) == expected


def test_largest_batch_size_stays_the_best_where_it_is() -> None:
    """No trial tells of larger ones. The best d_coef of batch size 8 is another one."""
    places = [(size, d_coef) for size in (8, 16, 32, 64) for d_coef in (0.2, 0.5, 2.0)]
    trials = [
        make_trial(
            number,
            {1000: 3 - 0.15 * math.log2(size) + 0.05 * math.log(d_coef / (0.5 if size > 16 else 2.0)) ** 2},
            {BATCH_SIZE: size, "train.d_coef": d_coef},
        )
        for number, (size, d_coef) in enumerate([*places, (4, 10.0), (8, 10.0)])
    ]
    found = find_recommended(trials, HORIZON)
    assert trials[found["trial"]].params == {BATCH_SIZE: 64, "train.d_coef": 0.5}
    assert found["growth"] == pytest.approx(60**0.5)


def test_smaller_batch_size_than_the_best_one_is_never_recommended() -> None:
    places = [(16, 1.0), (8, 0.3), (4, 3.0), (16, 3.0), (4, 0.3), (16, 0.3)]
    trials = [
        make_trial(
            number,
            {1000: 3 + 0.2 * math.log2(size / 16) ** 2 + 0.3 * math.log(d_coef) ** 2},
            {BATCH_SIZE: size, "train.d_coef": d_coef},
        )
        for number, (size, d_coef) in enumerate(places)
    ]
    assert trials[find_recommended(trials, HORIZON)["trial"]].params[BATCH_SIZE] >= 16
