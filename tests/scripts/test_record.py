"""The recorder of long curves, on a toy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scripts.bench.search.record import (
    PLANS,
    Plan,
    PowerAverage,
    anneal,
    build_config,
    list_configurations,
    record_curves,
)
from tests.toy import Toy
from trainer import train
from trainer.checkpoint import read_checkpoint, step_file

PLAN = Plan(length=960, batch_sizes=(2,), d_coefs=(0.3, 1.0), num_best=1)
FIRST = (2, 0.3, 0)


def record(path: Path, num_curves: int) -> list[dict[str, Any]]:
    """Record at most so many curves more."""
    left = iter([False] * num_curves + [True])
    record_curves(path, Toy(), PLAN, num_seeds=2, is_over=lambda: next(left))
    curves: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["curves"]
    return curves


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the first curve."""
    path = tmp_path_factory.mktemp("record") / "curves.json"
    record(path, 1)
    return path


@pytest.fixture
def curve(recorded: Path) -> dict[str, Any]:
    curves: list[dict[str, Any]] = json.loads(recorded.read_text(encoding="utf-8"))["curves"]
    return curves[0]


def read_weights(run_dir: Path, step: int) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = read_checkpoint(run_dir / step_file(step))["model"]
    return weights


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_points_have_the_shares_that_are_judged(plan: Plan) -> None:
    points = plan.points
    assert points == sorted(set(points)) and len(points) == 52
    assert {plan.length // share for share in (480, 240, 120, 60, 20, 5, 1)} < set(points)
    assert not [point for point in points for size in plan.batch_sizes if point % size]


def test_grid_is_recorded_from_coarse_to_fine() -> None:
    order = list(list_configurations(Plan(), [], num_seeds=3))
    assert len(set(order)) == 30
    assert set(order[:9]) == {(size, d_coef, 0) for size in (2, 8, 32) for d_coef in (0.03, 0.3, 3.0)}


def test_recording_resumes_and_ends_with_further_seeds_of_the_best(recorded: Path, tmp_path: Path) -> None:
    path = tmp_path / "curves.json"
    path.write_bytes(recorded.read_bytes())
    curves = record(path, 9)
    assert curves[:1] == json.loads(recorded.read_text(encoding="utf-8"))["curves"]
    best = min(curves[:2], key=lambda curve: curve["annealed"][str(PLAN.length)])
    names = [(curve["batch_size"], curve["d_coef"], curve["seed"]) for curve in curves]
    assert names == [FIRST, (2, 1.0, 0), (2, best["d_coef"], 1)]


def test_file_of_other_lengths_is_refused(recorded: Path) -> None:
    with pytest.raises(SystemExit, match="another length, points"):
        record_curves(recorded, Toy(), replace(PLAN, length=1_920), num_seeds=1)


def test_curve_is_the_run_that_was_never_interrupted(curve: dict[str, Any], tmp_path: Path) -> None:
    whole = train(Toy(), build_config(FIRST, PLAN.length), run_dir=tmp_path)
    assert curve["loss"][-1] == round(whole.metrics["val/loss"], 5)
    assert {len(curve[name]) for name in ("loss", "average", "d")} == {len(PLAN.points)}


@pytest.mark.parametrize("length", PLAN.lengths)
def test_an_annealed_loss_is_that_of_the_run_with_decay(curve: dict[str, Any], tmp_path: Path, length: int) -> None:
    whole = train(Toy(), build_config(FIRST, length, schedule="wsd"), run_dir=tmp_path)
    assert curve["annealed"][str(length)] == round(whole.metrics["val/loss"], 5)


def test_branch_has_the_weights_of_the_run_with_decay(tmp_path: Path) -> None:
    config = build_config(FIRST, 200, schedule="wsd")
    train(Toy(), build_config(FIRST, (config.decay_start or 0) * 2), run_dir=tmp_path / "constant")
    anneal(Toy(), config, tmp_path / "constant", tmp_path)
    train(Toy(), config, run_dir=tmp_path / "whole")
    branch, whole = (read_weights(tmp_path / name, 100) for name in ("200", "whole"))
    constant = read_weights(tmp_path / "constant", (config.decay_start or 0))
    assert all(branch[name].equal(whole[name]) and not branch[name].equal(constant[name]) for name in whole)


def test_average_weights_late_updates_most(curve: dict[str, Any]) -> None:
    average = PowerAverage(Toy(), every=1)
    optimizer = torch.optim.SGD(Toy().build_model().parameters())
    for update in range(1, 101):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.data.fill_(float(update))
        average(optimizer)
    (mean,) = {float(weights.mean().round(decimals=1)) for weights in average.weights}
    assert 94 < mean < 96  # the mean of k, weighted by k ** 16, is 17 / 18 of 100
    assert len(set(curve["average"]) - set(curve["loss"])) > 30
