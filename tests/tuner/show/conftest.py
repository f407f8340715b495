"""A study in memory with five trials."""

from __future__ import annotations

import optuna
import pytest

from tests.tuner.show.made_studies import add_five_trials, new_study


@pytest.fixture
def study() -> optuna.Study:
    return add_five_trials(new_study())
