"""Curves as characters, and `tuner status --watch`."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console

from tests.tuner.show.made_studies import add_full_run, add_trial, new_study, read
from trainer import UserError
from tuner.show.sparklines import ASCII_BLOCKS, Scale, curves_table, resample, sparkline
from tuner.show.status import watch
from tuner.study.optuna_internals import storage_of


@pytest.fixture
def study() -> optuna.Study:
    study = new_study()
    add_trial(study, [5.0, 4.5, 4.0, 3.5], baseline=True)
    add_trial(study, [4.5, 4.0, 3.5, 3.0])
    add_trial(study, [5.0])
    return study


def test_blocks_rise_with_the_value_and_mark_non_finite_ones() -> None:
    scale = Scale(0.0, 8.0)
    assert sparkline([0.0, 1.0, 4.0, 7.9, 8.0], scale) == "▁▂▅██"
    assert sparkline([8.0, math.nan, math.inf, None, -1.0, 99.0], scale) == "█xx ▁█"
    assert sparkline([0.0, 8.0], scale, ASCII_BLOCKS) == "_#"
    assert sparkline([3.0, 3.0], Scale(3.0, 3.0)) == "▁▁"


def test_diverged_curve_does_not_flatten_the_others() -> None:
    assert Scale.of([3.0, 5.0, math.nan]) == Scale(3.0, 5.0)
    assert Scale.of([3.0, 3.5, 4.0, 4.5, 5.0, 1e6]) == Scale(3.0, 5.0)
    assert Scale.of([math.inf]) is None
    assert Scale.of([2.0]) == Scale(2.0, 2.0)


def test_resampled_curve_has_the_last_value_of_each_part() -> None:
    curve = {at: float(at) for at in range(1, 7)}
    assert resample([1, 2, 3, 4, 5, 6], curve, 3) == [2.0, 4.0, 6.0]
    assert resample([1, 2, 3, 4, 5, 6], {1: 1.0, 2: 2.0, 3: 3.0}, 3) == [2.0, 3.0, None]
    assert resample([1, 2], curve, 40) == [1.0, 2.0]


def lines(study: optuna.Study, **options: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    table = curves_table(read(study), **options)
    assert table is not None and isinstance(console.file, io.StringIO)
    console.print(table)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines() if line.strip()]


def test_trials_share_one_scale_and_one_axis(study: optuna.Study) -> None:
    assert lines(study)[0] == "val/loss over samples: ▁ is 3.0000, █ 5.0000"
    assert "samples 40 to 160" in lines(study)[1]
    assert lines(study)[3:] == ["0 █▇▅▃ 3.5000", "1 ▇▅▃▁ 3.0000", "2 █ 5.0000"]
    add_trial(study, [4.0])
    assert [line[0] for line in lines(study, last=3)[3:]] == ["0", "1", "3"], "the baseline, the best and the latest"
    add_trial(study, [], state=TrialState.RUNNING)
    assert [line[0] for line in lines(study, last=2)[3:]] == ["2", "3"], "a trial without a curve takes no line"
    assert lines(study, ascii_only=True)[3] == "0 #*=- 3.5000"


def test_no_curve_before_the_first_validation() -> None:
    assert curves_table(read(new_study())) is None


def test_full_run_has_the_same_scale(study: optuna.Study, tmp_path: Path) -> None:
    add_full_run(study, {40: 4.5, 480: 2.0}, trial=1, run_dir=str(tmp_path), steps=60, step=60)
    assert lines(study)[0] == "val/loss over samples: ▁ is 2.0000, █ 5.0000"
    assert lines(study)[-1] == "full 1 ▇▁ 2.0000"


def test_watch_renews_until_ctrl_c(study: optuna.Study) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=50)
    assert isinstance(console.file, io.StringIO)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            raise KeyboardInterrupt
        add_trial(study, [4.9, 4.2])

    watch(storage_of(study), study, interval=3.0, console=console, sleep=sleep)
    first, _, second = console.file.getvalue().partition("Ctrl-C ends")
    assert slept == [3.0, 3.0]
    assert "▇▅" in first and "4.2000" not in first and "4.2000" in second


def test_watch_fits_on_a_small_screen(study: optuna.Study) -> None:
    for _ in range(20):
        add_trial(study, [4.9, 4.2], baseline=True)
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=17)
    assert isinstance(console.file, io.StringIO)
    drawn: list[str] = []

    def stop(_: float) -> None:
        assert isinstance(console.file, io.StringIO)
        drawn.append(console.file.getvalue())
        raise KeyboardInterrupt

    watch(storage_of(study), study, interval=2.0, console=console, sleep=stop)
    assert "Ctrl-C ends" in drawn[0]


def test_watch_shows_all_studies(study: optuna.Study) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    assert isinstance(console.file, io.StringIO)

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    watch(storage_of(study), None, interval=2.0, console=console, sleep=stop)
    assert "toy: 2 complete, 1 pruned; best val/loss 3.0000 (trial 1)" in console.file.getvalue()


def test_watch_needs_a_terminal(study: optuna.Study) -> None:
    with pytest.raises(UserError, match="--watch needs a terminal, and stdout is none: leave it out"):
        watch(storage_of(study), study, interval=2.0, console=Console(file=io.StringIO()))
