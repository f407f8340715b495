"""A study's plots for optuna-dashboard: learning curves, d over samples, the search space, loss against time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from optuna.importance import get_param_importances

from trainer.config import TrainConfig
from tuner.show.plotly_json import (
    FULL_RUN,
    STYLES,
    Figure,
    build_axis,
    build_figure,
    line_trace,
    pad_axis,
    place_labels,
    point_trace,
    rounded,
)
from tuner.show.table import format_params, format_value, short_name, trial_marks
from tuner.study.record import StudyRecord, TrialRecord

MAX_CURVES, MAX_POINTS = 40, 200
MIN_FOR_IMPORTANCE = 4
"""Complete trials."""
D_RISING = "d still rises"
OFF_SCALE = ("infeasible", "failed")
"""Roles whose values must not be compared with others."""


def figures(record: StudyRecord) -> dict[str, Figure]:
    """The plots for which the study has data, by their id on the dashboard."""
    plots = {
        "learning-curves": learning_curves(record),
        "landscape": landscape(record),
        "d-over-samples": d_over_samples(record),
        "loss-and-hours": loss_and_hours(record),
    }
    return {name: figure for name, figure in plots.items() if figure is not None}


def role_of(record: StudyRecord, trial: TrialRecord) -> str:
    """`best`, `baseline`, or the trial's state. The best trial is `best` even if it is the baseline; a baseline that
    was pruned, failed or is infeasible has the role of its state."""
    if record.is_best(trial):
        return "best"
    is_plain = trial.state in ("complete", "running", "waiting")
    return "baseline" if is_plain and record.is_baseline(trial) else trial.state


def samples_at(record: StudyRecord, trial: TrialRecord) -> dict[int, float]:
    """Samples at each point of a trial's curve, by the point in the unit of the budget.

    Empty if the budget is in seconds and the trial did not finish, so that its speed is unknown.
    """
    factor: float | None = 1.0
    if record.unit == "steps":
        train = {name.partition(".")[2]: v for name, v in trial.params.items() if name.startswith("train.")}
        factor = TrainConfig.model_validate({**record.spec["train"], **train, "steps": 1}).effective_batch_size
    elif record.unit == "seconds":
        factor = trial.samples_per_second
    return {} if factor is None else {point: point * factor for point in sorted(trial.curve)}


def learning_curves(record: StudyRecord) -> Figure | None:
    """Every trial on one axis of samples, and the full runs over them."""
    curves = []
    for trial in _drawn_trials(record):
        samples = samples_at(record, trial)
        values = [trial.curve[point] for point in samples]
        curves.append(_trial_curve(record, trial, list(samples.values()), values))
    # A full run continues the best curve to the right.
    above, below = ("top right", "bottom left") if record.minimized else ("top left", "bottom right")
    place_labels(curves, above, below)
    longest_trial = max((curve["x"][-1] for curve in curves if curve["x"]), default=0)
    for run in record.full_runs:
        points = sorted(run.curve)
        hover = f"full run of trial {run.trial}: {format_params(run.params)}"
        values = [run.curve[point] for point in points]
        curves.append(line_trace(FULL_RUN, points, values, hover=hover, label=f"full run {run.trial}"))
    longest = max((curve["x"][-1] for curve in curves if curve["x"]), default=0)
    # A full run is a hundred trials long: on a linear axis all trials would be one stroke at the left edge.
    log = longest > 4 * longest_trial > 0
    left_out = sum(bool(t.curve) for t in record.trials) + len(record.full_runs) - len(curves)
    title = "Learning curves" + (f"; {left_out} trials are not drawn" if left_out > 0 else "")
    return build_figure(title, curves, build_axis("samples", log=log), build_axis(record.metric))


def d_over_samples(record: StudyRecord) -> Figure | None:
    """Prodigy's d at each validation; a ring marks an end at which it still rose."""
    curves, rising = [], []
    ranked = {trial.number for trial in record.ranked}
    for trial in _drawn_trials(record):
        # A logarithmic axis has no zero, and AdamW has no d at all.
        pairs = [(x, d) for x, d in zip(samples_at(record, trial).values(), trial.d, strict=False) if d]
        curves.append(_trial_curve(record, trial, [x for x, _ in pairs], [d for _, d in pairs]))
        if pairs and trial.ended_with_d_rising and trial.number in ranked:
            rising.append(pairs[-1])
    place_labels(curves, "top right", "bottom right")
    rings = _circles(D_RISING, [x for x, _ in rising], [d for _, d in rising], size=18)
    d_axis = {**build_axis("d", log=True), "dtick": 1, "exponentformat": "power"}
    return build_figure("Prodigy's d", [*curves, rings], build_axis("samples"), d_axis)


def landscape(record: StudyRecord) -> Figure | None:
    """The metric over the two numeric parameters that are searched, batch size and d_coef before others."""
    names = _numeric_parameters(record)
    if not names:
        return None
    if len(names) == 1:
        return _over_one_parameter(record, names[0])
    x, y = names[:2]
    trials = [trial for trial in record.finished if {x, y} <= trial.params.keys()]
    compared = [t.value for t in trials if t.value is not None and role_of(record, t) not in OFF_SCALE]
    values = sorted(compared, key=record.sortable)
    if not values:
        return None
    # One bad trial would press all others into one shade: the scale ends with the worst quarter.
    ends = [values[0], values[len(values) * 3 // 4]]
    axes = pad_axis(_parameter_axis(record, x), [t.params[x] for t in trials]), _parameter_axis(record, y)
    traces = _points(record, trials, lambda t: t.params[x], lambda t: t.params[y], coloured=True)
    coloraxis = {
        "colorscale": "Cividis",
        "reversescale": not record.minimized,
        "cmin": rounded(min(ends)),
        "cmax": rounded(max(ends)),
        "colorbar": {"title": {"text": escape(record.metric)}, "thickness": 14, "len": 0.9},
    }
    return build_figure(f"{record.metric} over the search space", traces, *axes, coloraxis=coloraxis)


def loss_and_hours(record: StudyRecord) -> Figure | None:
    """The metric against the full run's projected hours; a line joins the Pareto front."""
    hours = {trial.number: record.full_hours(trial) or 0.0 for trial in record.ranked}
    timed = [trial for trial in record.ranked if hours[trial.number]]
    if not timed:
        return None
    unit, per_hour = ("hours", 1) if max(hours.values()) >= 1 else ("minutes", 60)

    def duration(trial: TrialRecord) -> float:
        return hours[trial.number] * per_hour

    front = sorted((t for t in timed if t.number in record.pareto_front), key=duration)
    line = _circles("no other trial is better in both", list(map(duration, front)), [t.value for t in front], size=20)
    line |= {
        "mode": "lines+markers",
        "line": {"color": STYLES[FULL_RUN].colour, "dash": "dot", "width": 2, "shape": "hv"},
    }
    x = pad_axis(build_axis(f"projected {unit} of the full run"), list(map(duration, timed)))
    points = _points(record, timed, duration, lambda t: t.value)
    return build_figure("Loss against time", [line, *points], x, build_axis(record.metric))


def parameter_importance(record: StudyRecord) -> Figure | None:
    """How much each parameter decides whether a trial is among the best, by Optuna's PED-ANOVA.

    It leaves out a parameter whose range changed during the study. The dashboard has its own.
    """
    if len(record.ranked) < MIN_FOR_IMPORTANCE:
        return None
    shares = get_param_importances(record.study)
    bars = {
        "type": "bar",
        "orientation": "h",
        "name": "importance",
        "x": [rounded(share) for share in shares.values()],
        "y": [escape(short_name(name)) for name in shares],
        "marker": {"color": STYLES[FULL_RUN].colour},
        "hoverinfo": "x",
    }
    y = {**build_axis(""), "type": "category", "autorange": "reversed"}
    left_out = [short_name(name) for name in record.spec["search"] if name not in shares]
    title = f"Parameter importance, by {len(record.ranked)} trials"
    title += f"; without {', '.join(left_out)}, whose range changed" if left_out else ""
    return build_figure(title, [bars], build_axis("share"), y, showlegend=False)


def _over_one_parameter(record: StudyRecord, name: str) -> Figure | None:
    trials = [t for t in record.finished if name in t.params and t.value is not None]
    x = pad_axis(_parameter_axis(record, name), [t.params[name] for t in trials] or [1])
    points = _points(record, trials, lambda t: t.params[name], lambda t: t.value)
    return build_figure(f"{record.metric} over {short_name(name)}", points, x, build_axis(record.metric))


def _trial_curve(record: StudyRecord, trial: TrialRecord, x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    hover, label = _hover(record, trial), _label(record, trial)
    return line_trace(role_of(record, trial), x, y, hover=hover, label=label)


def _points(
    record: StudyRecord,
    trials: Sequence[TrialRecord],
    x: Callable[[TrialRecord], float],
    y: Callable[[TrialRecord], float | None],
    *,
    coloured: bool = False,
) -> list[dict[str, Any]]:
    """Points, one trace a role; coloured by the metric unless their values must not be compared."""
    traces = []
    for role in STYLES:
        members = [trial for trial in trials[:MAX_POINTS] if role_of(record, trial) == role]
        if not members:
            continue
        trace = point_trace(
            role,
            [x(trial) for trial in members],
            [y(trial) for trial in members],
            hover=[_hover(record, trial) for trial in members],
            label=_label(record, members[0]),
            values=[trial.value for trial in members] if coloured and role not in OFF_SCALE else None,
        )
        traces.append(trace)
    place_labels(traces, "top center", "bottom center")
    return traces


def _circles(name: str, x: Sequence[float], y: Sequence[float | None], *, size: int) -> dict[str, Any]:
    """Rings around points of other traces."""
    colour = STYLES[FULL_RUN].colour
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "legendgroup": name,
        "x": [rounded(value) for value in x],
        "y": [rounded(value) for value in y],
        "text": "",
        "marker": {"symbol": "circle-open", "size": size, "color": colour, "line": {"width": 2}},
        "cliponaxis": False,
        "hoverinfo": "skip",
    }


def _label(record: StudyRecord, trial: TrialRecord) -> str:
    is_labelled = role_of(record, trial) in ("baseline", "best")
    return " ".join([str(trial.number), *trial_marks(record, trial)]) if is_labelled else ""


def _hover(record: StudyRecord, trial: TrialRecord) -> str:
    value = "" if trial.value is None else f", {record.metric} {trial.value:.4f}"
    state = ", ".join([trial.state, *trial_marks(record, trial)])
    return f"trial {trial.number} ({state}): {format_params(trial.params)}{value}"


def _numeric_parameters(record: StudyRecord) -> list[str]:
    """Names of the searched parameters that are numbers, batch size and d_coef first."""

    def is_numeric(space: Mapping[str, Any]) -> bool:
        return all(isinstance(c, int | float) and not isinstance(c, bool) for c in space.get("choices", ()))

    names = [name for name, space in record.spec["search"].items() if is_numeric(space)]
    first = ("train.batch_size", "train.d_coef")
    return sorted(names, key=lambda name: first.index(name) if name in first else len(first))


def _drawn_trials(record: StudyRecord) -> list[TrialRecord]:
    """The trials that are drawn as curves: all, or else the baseline, the best, and the latest others."""
    trials = [t for t in record.trials if t.curve]
    if len(trials) > MAX_CURVES:
        kept = {t.number for t in (*record.ranked[: MAX_CURVES // 2], *trials[-MAX_CURVES // 4 :])}
        trials = [t for t in trials if t.number in kept or record.is_baseline(t)]
    order = list(STYLES)
    return sorted(trials, key=lambda t: order.index(role_of(record, t)))


def _parameter_axis(record: StudyRecord, name: str) -> dict[str, Any]:
    """A parameter's axis: its scale is that of the search, and choices are its ticks."""
    space = record.spec["search"][name]
    values = sorted(space.get("choices", ()))
    # Batch sizes are powers of two; other choices that span a factor of four or more read better so as well.
    log = bool(space.get("log")) or bool(values and values[0] > 0 and values[-1] >= 4 * values[0])
    axis = build_axis(short_name(name), log=log)
    return {**axis, "tickvals": values, "ticktext": [format_value(v) for v in values]} if values else axis
