"""The replay of searches, on curves that are written here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from scripts.bench.search.contenders import CONTENDERS, OURS, RANDOM
from scripts.bench.search.correlations import correlate
from scripts.bench.search.curves import Configuration, Curves
from scripts.bench.search.external_search import ExternalSearch
from scripts.bench.search.replay import COMPUTE, bootstrap_interval, compute_to_goal, find_compute, replay
from scripts.bench.search.runs import Choice, Runs, Task
from scripts.bench.search.strategies import BASELINE, Confirmed, Corner
from trainer.errors import UserError

LENGTH = 245_760
LENGTHS = [LENGTH // share for share in (60, 20, 5, 1)]
POINTS = sorted({*range(512, 4_097, 512), *range(8_192, LENGTH + 1, 4_096)})
SIZES, D_COEFS, NUM_BEST = [2, 8], [0.1, 1.0, 10.0], 1
BEST = Configuration(2, 1.0)
OTHER = Configuration(8, 0.1)


def make_curve(batch_size: int, d_coef: float, seed: int) -> dict[str, Any]:
    """At full length 1 and an excess that grows with the distance from `BEST`, and 0.02 more for each seed."""
    excess = 0.1 * abs(np.log10(d_coef)) + 0.05 * (batch_size == 8) + 0.02 * seed
    losses = [1 + excess + 100 / points for points in POINTS]
    return {
        "batch_size": batch_size,
        "d_coef": d_coef,
        "seed": seed,
        "annealed": {str(length): 1 + excess + 10 / length - 10 / LENGTH for length in LENGTHS},
        "loss": losses,
        "average": losses,
        "d": [1e-3] * len(POINTS),
    }


def write_curves(path: Path, curves: list[dict[str, Any]]) -> Path:
    grid = {"batch_sizes": SIZES, "d_coefs": D_COEFS, "num_best": NUM_BEST}
    path.write_text(json.dumps({"length": LENGTH, "points": POINTS, "grid": grid, "curves": curves}), encoding="utf-8")
    return path


@pytest.fixture
def all_curves() -> list[dict[str, Any]]:
    """The grid on seed 0, `BEST` on seed 1 and `OTHER` on seed 2."""
    grid = [make_curve(batch_size, d_coef, 0) for batch_size in SIZES for d_coef in D_COEFS]
    return [*grid, make_curve(BEST.batch_size, BEST.d_coef, 1), make_curve(OTHER.batch_size, OTHER.d_coef, 2)]


@pytest.fixture
def curves(all_curves: list[dict[str, Any]], tmp_path: Path) -> Curves:
    return Curves.load(write_curves(tmp_path / "curves.json", all_curves))


@pytest.fixture
def task(curves: Curves) -> Task:
    return Task(curves, train_seed=0, seed=3, budget=LENGTH // 4)


def test_missing_curves_of_the_grid_are_refused(all_curves: list[dict[str, Any]], tmp_path: Path) -> None:
    path = write_curves(tmp_path / "curves.json", all_curves[1:])
    with pytest.raises(UserError, match="1 curves of seed 0 are missing"):
        Curves.load(path)
    assert np.isfinite(Curves.load(path, fill=True).truth).all()


def test_filled_curve_is_between_its_neighbours(all_curves: list[dict[str, Any]], tmp_path: Path) -> None:
    filled = Curves.load(write_curves(tmp_path / "curves.json", all_curves[1:]), fill=True)
    missing = filled.losses(Configuration(2, 0.1), 0)[-1]
    assert filled.losses(BEST, 0)[-1] < missing < filled.losses(Configuration(2, 10.0), 0)[-1]


def test_configuration_without_the_seed_has_the_curve_of_seed_0(curves: Curves) -> None:
    assert curves.num_seeds == 3
    assert curves.losses(OTHER, 1).tolist() == curves.losses(OTHER, 0).tolist()
    assert curves.losses(BEST, 1)[-1] > curves.losses(BEST, 0)[-1]


def test_diverged_run_has_an_infinite_loss(all_curves: list[dict[str, Any]], tmp_path: Path) -> None:
    diverged = all_curves[0]
    for name in ("loss", "average", "d"):
        diverged[name] = diverged[name][:5]
    diverged["annealed"] = dict.fromkeys(diverged["annealed"])
    curves = Curves.load(write_curves(tmp_path / "curves.json", all_curves))
    losses = curves.losses(Configuration(2, 0.1), 0)
    assert np.isfinite(losses[:5]).all() and np.isinf(losses[5:]).all()
    assert curves.regret(Configuration(2, 0.1)) == np.inf and curves.regret(BEST) == 0
    assert np.isfinite(correlate(curves)[0]["all"])


def test_regret_is_over_the_annealed_loss_at_full_length_and_recorded_seeds(curves: Curves) -> None:
    assert curves.regret(BEST) == 0  # its mean over two seeds is 1.01
    assert curves.regret(OTHER) == pytest.approx(1.17 / 1.01 - 1)


def test_regret_between_two_d_coefs_is_weighted_by_log_distance(curves: Curves) -> None:
    ends = [curves.regret(Configuration(8, d_coef)) for d_coef in (1.0, 10.0)]
    assert curves.regret(Configuration(8, 10**0.25)) == pytest.approx(0.75 * ends[0] + 0.25 * ends[1])


def test_annealed_loss_is_only_at_recorded_lengths(curves: Curves) -> None:
    with pytest.raises(UserError, match="no annealed loss at 2,048 samples"):
        curves.annealed_loss(BEST, 0, LENGTH // 120)


def test_continued_run_is_counted_once(curves: Curves) -> None:
    runs = Runs(curves)
    short, long = runs.train(BEST, 0, 1_024), runs.train(BEST, 0, 4_096)
    assert len(short) == 2 and len(long) == 8
    assert runs.spent == 4_096
    runs.train(BEST, 0, 2_048)
    assert runs.spent == 4_096
    runs.train(BEST, 1, 1_024)
    assert runs.spent == 5_120


def test_decay_branches_off_the_run(curves: Curves) -> None:
    runs = Runs(curves)
    runs.train(BEST, 0, LENGTH // 60)
    assert runs.anneal(BEST, 0, LENGTH // 20) == curves.annealed_loss(BEST, 0, LENGTH // 20)
    assert runs.spent == LENGTH // 20
    # The full run continues from before the decay.
    choice = runs.choose(BEST, 0)
    assert choice.contained == LENGTH // 20 * 4 // 5
    runs.anneal(BEST, 0, LENGTH // 5)
    assert runs.spent == LENGTH // 5 + LENGTH // 20 // 5 + 1  # 12,288 has no whole fifth


def test_trials_of_one_length_cost_the_same(task: Task) -> None:
    choices = list(replace(RANDOM, share=60).choices(task))
    assert [choice.spent for choice in choices] == [number * LENGTH // 60 for number in range(16)]
    assert {choice.contained for choice in choices[1:]} == {LENGTH // 60}


@dataclass(frozen=True)
class PruneFrom(optuna.pruners.BasePruner):
    samples: int

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return (trial.last_step or 0) >= self.samples


def test_pruned_trial_costs_its_samples_and_is_not_chosen(task: Task) -> None:
    search = replace(OURS, pruner=lambda: PruneFrom(1_024), share=120)
    choices = list(search.choices(replace(task, budget=4_096)))
    # The baseline is not pruned; two points of the next trials are in their first 1,024 samples.
    assert [choice.spent for choice in choices] == [0, 2_048, 3_072, 4_096]
    assert {choice.configuration for choice in choices} == {BASELINE}


def test_confirmation_pays_the_rest_of_the_rung(task: Task) -> None:
    choices = list(Confirmed(replace(RANDOM, share=60), rung=20).choices(task))
    trial, rung = LENGTH // 60, LENGTH // 20
    assert [choice.spent for choice in choices[:5]] == [0, rung, 2 * rung, 3 * rung, 3 * rung + trial]
    assert choices[4].contained == rung


def test_confirmation_after_decay_contains_the_part_before_it(task: Task) -> None:
    rung = LENGTH // 20
    choices = list(Confirmed(replace(OURS, share=60), rung=20, is_annealed=True).choices(task))
    assert choices[1] == Choice(rung, BASELINE, rung * 4 // 5)


def test_replay_takes_the_last_choice_that_it_can_pay(task: Task) -> None:
    class Costly:
        def choices(self, task: Task) -> Iterator[Choice]:
            yield Choice(0, OTHER)
            yield Choice(LENGTH // 4, BEST, LENGTH // 8)
            yield Choice(LENGTH // 2, OTHER)
            yield Choice(LENGTH * 3 // 8, BEST)

    regrets, outside = replay(Costly(), task)
    other = task.curves.regret(OTHER)
    budgets = {1 / 8: other, 1 / 4: 0, 2**-1.125: 0, 1 / 2: 0}
    assert {budget: regrets[find_compute(budget)] for budget in budgets} == budgets
    assert outside[find_compute(1 / 4)] == 1 / 8 and outside[find_compute(1 / 2)] == 3 / 8


def test_corner_needs_no_compute(task: Task) -> None:
    (choice,) = Corner().choices(task)
    assert choice == (0, Configuration(2, 0.1), 0)


TOOL = """
print("a tool may print when it is imported")
from scripts.bench.search.external import client
search = client.read_line()
print("and later, without an end of the line", end="")
config = {"batch_size": search["batch_sizes"][0], "d_coef": 1.0}
incumbent = client.Incumbent()
for d_coef in (1.0, 3.0):
    incumbent.train(config | {"d_coef": d_coef}, search["points"][0])
while True:
    curve = client.train(config, search["longest"])
    assert curve[-1][0] == search["longest"]
    config = config | {"d_coef": config["d_coef"] * 1.01}
"""


def test_external_tool_is_asked_until_the_budget_is_spent(task: Task) -> None:
    choices = list(ExternalSearch((sys.executable, "-c", TOOL), share=60).choices(task))
    assert choices[:3] == [(0, BASELINE, 0), (512, BEST, 512), (1024, BEST, 512)]
    # What is trained after the choice counts, too.
    assert choices[-2].spent < task.budget <= choices[-1].spent
    assert choices[-1][1:] == (BEST, 4096)


def test_external_tool_ends_after_its_trials(task: Task) -> None:
    choices = list(ExternalSearch((sys.executable, "-c", TOOL), share=60, max_trials=3).choices(task))
    assert choices[-1] == (4096 + 512 + 4096, BEST, 4096)


@pytest.mark.parametrize("code", [0, 3])
def test_external_tool_that_ends_early_is_an_error(task: Task, code: int) -> None:
    with pytest.raises(UserError, match="ended before its budget was spent"):
        list(ExternalSearch((sys.executable, "-c", f"raise SystemExit({code})")).choices(task))


def test_compute_to_goal_is_where_regret_stays_low() -> None:
    mean = np.full(len(COMPUTE), 0.001)
    mean[:8] = mean[10] = 0.02
    assert compute_to_goal(mean) == COMPUTE[11]
    mean[-1] = 0.02
    assert compute_to_goal(mean) is None


def test_interval_is_about_the_mean_of_all_tasks() -> None:
    regrets = np.stack([np.full(50, 0.5), np.random.default_rng(1).normal(0.1, 0.05, 50)])
    low, high = bootstrap_interval(regrets)
    assert low < regrets.mean() < high and high - low == pytest.approx(2 * 1.96 * 0.05 / 50**0.5 / 2, rel=0.25)


def test_correlations_have_each_recorded_loss(curves: Curves) -> None:
    rows = correlate(curves)
    names = {(row["share"], row["loss"]) for row in rows}
    assert (120, "annealed") not in names and {(60, "annealed"), (120, "raw"), (5, "averaged")} <= names
    assert all(row["all"] > 0.9 and row["regret"] == 0 for row in rows)


def test_correlations_are_among_recorded_configurations(all_curves: list[dict[str, Any]], tmp_path: Path) -> None:
    some = [curve for curve in all_curves if curve["d_coef"] != 10]
    rows = correlate(Curves.load_recorded(write_curves(tmp_path / "curves.json", some)))
    assert all(row["all"] > 0.9 and row["best_third"] is None and row["regret"] == 0 for row in rows)


def test_each_contender_is_compared_at_several_lengths() -> None:
    assert {len(variants) for variants in CONTENDERS.values()} == {1, 4, 6}
