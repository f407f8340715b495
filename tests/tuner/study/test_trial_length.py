"""How long a trial should be: judged by d and by the order of the trials."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.tuner.show.made_studies import add_trial, new_study, read
from tuner.study.trial_length import TrialLength, find_rest, judge_trial_length

END = [1.0, 2.0, 3.0, 4.0, 5.0]
RESTING = [0.1, 0.2, 0.2, 0.2]


def judge(points: Sequence[Sequence[float]], d: Sequence[float] = RESTING, **attrs: bool) -> TrialLength | None:
    """By trials with these values at each of the four points; the last one has `d`, and the others rest."""
    study = new_study()
    for number, values in enumerate(zip(*points, strict=True)):
        is_last = number == len(points[0]) - 1
        add_trial(study, list(values), d=list(d) if is_last else RESTING, **attrs if is_last else {})
    return judge_trial_length(read(study))


def test_shorter_trials_do_where_the_order_is_that_of_the_end() -> None:
    length = judge([[5.0, 4.0, 3.0, 2.0, 1.0], END, END, END])
    assert length is not None and (length.d_rests, length.settled) == (80, 80)
    assert str(length) == (
        "by 5 trials of 160 samples, trials of 80 samples would do: then d rests, and their order is that of the end"
    )


def test_order_that_turns_once_more_has_not_settled_before() -> None:
    length = judge([END, [5.0, 4.0, 3.0, 2.0, 1.0], END, END])
    assert length is not None and length.settled == 120
    length = judge([END, END, [2.0, 1.0, 5.0, 3.0, 4.0], END])
    assert length is not None and length.settled is None
    assert "their order still changes at the end: longer trials" in str(length)


@pytest.mark.parametrize(
    ("d", "attrs", "phrase"),
    [
        ([0.1, 0.1, 0.1, 0.2], {"d_rising": True}, "d still rises at their end for some settings"),
        ([0.1, 0.1, 0.1, 0.2], {}, "d rests only at their end"),
        ([0.1, 0.1, 0.2, 0.2], {}, "trials of 120 samples would do"),
    ],
)
def test_length_waits_for_d(d: list[float], attrs: dict[str, bool], phrase: str) -> None:
    assert phrase in str(judge([END] * 4, d, **attrs))


def test_equal_values_have_no_order() -> None:
    assert judge([[1.0] * 5] * 4) is None
    length = judge([[1.0] * 5, END, END, END])
    assert length is not None and length.settled == 80


def test_few_trials_prove_nothing() -> None:
    assert judge([END[:4]] * 4) is None


def test_optimizer_without_d_is_judged_by_the_order() -> None:
    length = judge([END] * 4, [])
    assert length is not None and length.settled == 40


def test_d_rests_after_its_last_rise() -> None:
    assert find_rest([1.0, 2.0, 2.0, 3.0, 3.0]) == 3
    assert find_rest([1.0, 1.005]) == find_rest([]) == 0
