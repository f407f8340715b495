from __future__ import annotations

from typing import Any, Literal, Optional

import pytest

from trainer import TrainConfig
from trainer.config import PositiveFloat, PositiveInt
from tuner.spec.search import Choices, Range, flatten, is_whole, list_types


@pytest.mark.parametrize(
    ("annotation", "whole"),
    [
        (int, True),
        (PositiveInt, True),
        (PositiveInt | None, True),
        (Optional[PositiveInt], True),  # noqa: UP045
        (PositiveInt | Literal["auto"] | None, True),
        (PositiveFloat, False),
        (PositiveFloat | None, False),
        (int | float, False),
        (bool, False),
        (Literal[8, 16], False),
    ],
)
def test_field_type_decides_whether_only_whole_numbers_are_allowed(annotation: Any, whole: bool) -> None:
    assert is_whole(annotation) is whole


def test_types_of_a_field_are_found_under_its_constraints() -> None:
    assert list_types(TrainConfig.model_fields["num_workers"].annotation) == {int, type(None)}
    assert list_types(TrainConfig.model_fields["schedule"].annotation) == {Literal}
    assert list_types(tuple[int, ...]) == {tuple}


def test_range_holds_the_values_of_its_grid() -> None:
    tenths = Range(low=0.1, high=0.7, step=0.1)
    assert all(0.1 + k * 0.1 in tenths for k in range(6)) and 0.3 in tenths and 0.7 in tenths
    assert 0.35 not in tenths and 0.8 not in tenths and 0.0 not in tenths
    assert 0.35 in Range(low=0.1, high=0.7)
    assert True not in Range(low=0, high=2) and "1" not in Range(low=0, high=2) and None not in Range(low=0, high=2)


def test_true_is_not_the_choice_one() -> None:
    assert 1 in Choices(choices=(1, 2)) and True not in Choices(choices=(1, 2))
    assert True in Choices(choices=(True, False)) and 1 not in Choices(choices=(True, False))


def test_all_whole_numbers_of_a_dimension_rise() -> None:
    assert Choices(choices=(16, 4, 8)).list_whole_numbers() == [4, 8, 16]
    assert list(Range(low=4, high=16, step=4).list_whole_numbers()) == [4, 8, 12, 16]
    assert len(Range(low=1, high=10**12, log=True).list_whole_numbers()) == 10**12


def test_tables_are_flattened_and_dimensions_are_not() -> None:
    leaf = {"low": 1, "high": 2}
    tree = {"train": {"d_coef": leaf, "low": leaf}, "workload.width": {"choices": [1, 2]}, "train.lr": {"lo": 1}}
    assert flatten(tree) == {
        "train.d_coef": leaf,
        "train.low": leaf,
        "workload.width": {"choices": [1, 2]},
        "train.lr": {"lo": 1},
    }
