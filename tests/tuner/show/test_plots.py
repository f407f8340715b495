"""The plots: axes, scales, labels, and the hover text of each point."""

from __future__ import annotations

import json
from typing import Any

import optuna
import pytest

from tests.tuner.show.made_studies import GRID, add_five_trials, add_full_run, add_trial, new_study, read
from tuner.show import plots
from tuner.study.keys import write_study


def traces(figure: plots.Figure | None) -> dict[str, dict[str, Any]]:
    """The traces in the legend, by their names."""
    assert figure is not None
    return {trace["name"]: trace for trace in json.loads(figure.to_json())["data"] if trace["showlegend"]}


def hovers(figure: plots.Figure | None) -> dict[tuple[float, float], str]:
    """The hover text of each point of a plot of points."""
    assert figure is not None
    with_hover = [trace for trace in figure.data if trace["hoverinfo"] == "text"]
    return {(x, y): text for t in with_hover for x, y, text in zip(t["x"], t["y"], t["hovertext"], strict=True)}


def test_roles_differ_by_dash_and_marker(study: optuna.Study) -> None:
    add_full_run(study, {40: 3.9, 8000: 1.9}, trial=1, run_dir="/runs")
    figure = plots.learning_curves(read(study))
    lines = traces(figure)
    styles = [(trace["line"]["dash"], trace["marker"]["symbol"]) for trace in lines.values()]
    assert len(set(styles)) == len(styles) == 6
    assert figure is not None and figure.layout["xaxis"]["type"] == "log"


def test_labels_are_at_baseline_best_and_full_run_alone(study: optuna.Study) -> None:
    add_full_run(study, {40: 3.9, 8000: 1.9}, trial=1, run_dir="/runs")
    lines = traces(plots.learning_curves(read(study)))
    labels = {
        name: (trace["text"][-1].strip(), trace["textposition"]) for name, trace in lines.items() if trace["text"]
    }
    assert labels == {
        "baseline": ("0 baseline", "top right"),
        "best trial": ("1 best", "bottom left"),
        "full run": ("full run 1", "middle right"),
    }
    points = traces(plots.loss_and_hours(read(study)))
    assert {trace["text"]: trace["textposition"] for trace in points.values() if trace["text"]} == {
        "0 baseline": "top center",
        "1 best": "bottom center",
    }


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_every_point_names_its_own_trial(direction: str) -> None:
    study = new_study(**{"study.direction": direction})
    for number in range(12):
        add_trial(study, [5.0 + 0.01 * number] * 4, d_coef=1.0 + number / 2, full_hours=2.0 + (number * 5) % 12)
    record = read(study)
    assert hovers(plots.loss_and_hours(record)).keys() == {(t.full_hours, t.value) for t in record.trials}
    assert hovers(plots.landscape(record)).keys() == {(8, t.params["train.d_coef"]) for t in record.trials}
    for (hours, value), text in hovers(plots.loss_and_hours(record)).items():
        number = int(text.split()[1])
        assert (record.trials[number].full_hours, record.trials[number].value) == (hours, value)
    for (_, d_coef), text in hovers(plots.landscape(record)).items():
        assert text.startswith(f"trial {2 * (d_coef - 1):.0f} ")


@pytest.mark.parametrize(
    ("budget", "factor"), [({"trial.samples": 160}, 1), ({"trial.steps": 160}, 16), ({"trial.seconds": 160}, 10)]
)
def test_curves_are_drawn_over_samples_whatever_the_budget(budget: dict[str, int], factor: int) -> None:
    study = new_study(without="" if "trial.samples" in budget else "trial.samples", **budget, **{"full.samples": 8_000})
    add_trial(study, [4.0, 3.0, 2.0, 1.0], batch_size=16, samples_per_second=10.0)
    lines = traces(plots.learning_curves(read(study)))["best trial"]
    assert (lines["x"], lines["y"]) == ([factor * point for point in GRID], [4.0, 3.0, 2.0, 1.0])


def test_infeasible_trials_are_off_the_colour_scale(study: optuna.Study) -> None:
    figure = plots.landscape(read(study))
    lines = traces(figure)
    assert (lines["best trial"]["x"], lines["best trial"]["y"]) == ([4], [0.5])
    assert lines["best trial"]["marker"]["color"] == [2.5]
    assert lines["infeasible"]["marker"]["color"].startswith("#")
    assert figure is not None and figure.layout["coloraxis"]["cmin"] == 2.5
    assert figure.layout["xaxis"]["tickvals"] == [4, 8, 16]


def test_role_is_best_baseline_or_the_state(study: optuna.Study) -> None:
    record = read(study)
    assert [plots.role_of(record, t) for t in record.trials] == ["baseline", "best", "complete", "pruned", "infeasible"]
    other = new_study()
    infeasible = add_trial(other, [1.0], baseline=True, infeasible="out of memory")
    assert plots.role_of(read(other), infeasible) == "infeasible"


def test_landscape_has_one_axis_for_one_searched_number_and_is_left_out_without(study: optuna.Study) -> None:
    spec, optimizers = read(study).spec, {"choices": ["prodigy", "adamw"]}
    d_coef = spec["search"]["train.d_coef"]
    write_study(study, spec={**spec, "search": {"train.d_coef": d_coef, "train.optimizer": optimizers}})
    lines = traces(plots.landscape(read(study)))["best trial"]
    assert (lines["x"], lines["y"]) == ([0.5], [2.5])
    write_study(study, spec={**spec, "search": {"train.optimizer": optimizers}})
    assert plots.landscape(read(study)) is None


def test_ring_marks_d_that_still_rises(study: optuna.Study) -> None:
    lines = traces(plots.d_over_samples(read(study)))
    assert lines["best trial"]["y"] == [1e-6, 1e-5, 1e-4, 1e-3]
    ring = lines[plots.D_RISING]
    assert (ring["x"], ring["y"]) == ([160], [1e-3])


def test_line_joins_the_pareto_front(study: optuna.Study) -> None:
    lines = traces(plots.loss_and_hours(read(study)))
    front = lines["no other trial is better in both"]
    assert (front["x"], front["y"]) == ([30.0, 36.25], [3.0, 2.5])
    assert lines["complete"]["x"] == [40.0] and "infeasible" not in lines


def test_trials_without_hours_and_d_have_no_such_plots() -> None:
    study = new_study()
    assert plots.figures(read(study)) == {}
    add_trial(study, [4.0, 3.0, 2.0, float("inf")])
    figures = plots.figures(read(study))
    assert set(figures) == {"learning-curves", "landscape"}
    json.loads(figures["learning-curves"].to_json(), parse_constant=pytest.fail)


def test_maximized_metric_has_its_best_trial_above() -> None:
    maximized = read(add_five_trials(new_study(**{"study.direction": "maximize"})))
    lines = traces(plots.learning_curves(maximized))
    assert (lines["best trial"]["text"][-1].strip(), lines["best trial"]["textposition"]) == ("2 best", "top left")
    assert lines["baseline"]["textposition"] == "bottom right"
