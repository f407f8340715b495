"""Curves as characters, and the status that renews itself."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console

from tests.tuner.studies_for_tests import build
from trainer import UserError
from tuner.launcher import open_study
from tuner.show.sparklines import ASCII_BLOCKS, Scale, curves_table, resample, sparkline
from tuner.show.status import watch
from tuner.trials import BASELINE


def add(study: optuna.Study, curve: dict[int, float], state: TrialState = TrialState.COMPLETE, **attrs: Any) -> None:
    study.add_trial(
        optuna.trial.create_trial(
            state=state,
            value=curve[max(curve)] if state == TrialState.COMPLETE else None,
            params={"train.d_coef": 1.0},
            distributions={"train.d_coef": optuna.distributions.FloatDistribution(0.1, 10.0, log=True)},
            intermediate_values=curve,
            user_attrs=attrs,
        )
    )


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    study = open_study(build(), f"sqlite:///{tmp_path}/tuner.db")
    add(study, {40: 5.0, 80: 4.5, 120: 4.0, 160: 3.5}, **{BASELINE: True})
    add(study, {40: 4.5, 80: 4.0, 120: 3.5, 160: 3.0})
    add(study, {40: 5.0}, TrialState.PRUNED)
    return study


def test_blocks_rise_with_the_value_and_what_is_not_finite_stands_out() -> None:
    scale = Scale(0.0, 8.0)
    assert sparkline([0.0, 1.0, 4.0, 7.9, 8.0], scale) == "▁▂▅██"
    assert sparkline([8.0, math.nan, math.inf, None, -1.0, 99.0], scale) == "█xx ▁█"
    assert sparkline([0.0, 8.0], scale, ASCII_BLOCKS) == "_#"
    assert sparkline([3.0, 3.0], Scale(3.0, 3.0)) == "▁▁"


def test_the_scale_is_common_and_one_that_diverged_does_not_press_the_others_flat() -> None:
    assert Scale.of([3.0, 5.0, math.nan]) == Scale(3.0, 5.0)
    assert Scale.of([3.0, 3.5, 4.0, 4.5, 5.0, 1e6]) == Scale(3.0, 5.0)
    assert Scale.of([math.inf]) is None
    assert Scale.of([2.0]) == Scale(2.0, 2.0)


def test_many_points_become_few_and_the_last_of_each_part_stands() -> None:
    curve = {at: float(at) for at in range(1, 7)}
    assert resample([1, 2, 3, 4, 5, 6], curve, 3) == [2.0, 4.0, 6.0]
    assert resample([1, 2, 3, 4, 5, 6], {1: 1.0, 2: 2.0, 3: 3.0}, 3) == [2.0, 3.0, None]
    assert resample([1, 2], curve, 40) == [1.0, 2.0]


def lines(study: optuna.Study, **options: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    table = curves_table(study, **options)
    assert table is not None and isinstance(console.file, io.StringIO)
    console.print(table)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines() if line.strip()]


def test_all_trials_stand_on_one_scale_and_one_axis(study: optuna.Study) -> None:
    assert lines(study)[0] == "val/loss over samples: ▁ is 3.0000, █ 5.0000"
    assert "samples 40 to 160" in lines(study)[1]
    assert lines(study)[3:] == ["0 █▇▅▃ 3.5000", "1 ▇▅▃▁ 3.0000", "2 █ 5.0000"]
    assert lines(study, last=1)[3:] == ["2 █ 5.0000"]
    assert lines(study, ascii_only=True)[3] == "0 #*=- 3.5000"


def test_before_the_first_validation_there_is_no_curve(tmp_path: Path) -> None:
    assert curves_table(open_study(build(), f"sqlite:///{tmp_path}/other.db")) is None


def test_the_full_run_is_drawn_on_the_same_scale(study: optuna.Study, tmp_path: Path) -> None:
    full = optuna.create_study(study_name="toy.full", storage=study._storage)
    attrs = {"trial": 1, "run_dir": str(tmp_path), "steps": 60, "step": 60}
    add(full, {40: 4.5, 480: 2.0}, **attrs)
    assert lines(study)[0] == "val/loss over samples: ▁ is 2.0000, █ 5.0000"
    assert lines(study)[-1] == "full 1 ▇▁ 2.0000"


def test_watching_renews_what_is_shown_until_ctrl_c(study: optuna.Study) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=50)
    assert isinstance(console.file, io.StringIO)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            raise KeyboardInterrupt
        add(study, {40: 4.9, 80: 4.2}, TrialState.PRUNED)

    watch(study._storage, study, interval=3.0, console=console, sleep=sleep)
    first, _, second = console.file.getvalue().partition("Ctrl-C ends")
    assert slept == [3.0, 3.0]
    assert "▇▅" in first and "4.2000" not in first and "4.2000" in second


def test_all_studies_can_be_watched_too(study: optuna.Study) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    assert isinstance(console.file, io.StringIO)

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    watch(study._storage, None, interval=2.0, console=console, sleep=stop)
    assert "toy: 2 complete, 1 pruned; best val/loss 3.0000 (trial 1)" in console.file.getvalue()


def test_without_a_terminal_there_is_nothing_to_renew(study: optuna.Study) -> None:
    with pytest.raises(UserError, match="--watch renews a terminal's screen, and there is none: leave it out"):
        watch(study._storage, study, interval=2.0, console=Console(file=io.StringIO()))
