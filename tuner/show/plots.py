"""A study's plots for optuna-dashboard: learning curves, d over samples, the search space, loss against time."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from optuna.trial import FrozenTrial

from tuner.show.findings import Findings
from tuner.show.plot_labels import LEVEL, UPWARDS
from tuner.show.plotly_json import (
    FULL_RUN,
    OFF_SCALE,
    STYLES,
    Figure,
    build_axis,
    build_figure,
    line_figure,
    line_trace,
    padded,
    point_traces,
    rounded,
    short_name,
    trial_trace,
)
from tuner.show.table import format_params, format_value, is_rising
from tuner.trials import last_value

MAX_CURVES = 40
STILL_RISES = "d still rises"


def figures(found: Findings) -> dict[str, Figure]:
    """The plots for which the study has data, by their id on the dashboard."""
    drawn = {
        "learning-curves": learning_curves(found),
        "landscape": landscape(found),
        "d-over-samples": d_over_samples(found),
        "loss-and-hours": loss_and_hours(found),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def learning_curves(found: Findings) -> Figure | None:
    """Every trial on one axis of samples, and the full runs over them."""
    curves = []
    for trial in shown(found):
        samples = found.samples_at(trial)
        values = [trial.intermediate_values[point] for point in samples]
        curves.append(trial_trace(found, trial, list(samples.values()), values))
    for run in found.full_runs:
        points = sorted(run.intermediate_values)
        label = f"full run of trial {run.user_attrs['trial']}"
        values = [run.intermediate_values[point] for point in points]
        curves.append(line_trace(FULL_RUN, points, values, label, f"{label}: {format_params(run.params)}"))
    reach = [max(curve["x"], default=0) for curve in curves if curve["legendgroup"] != FULL_RUN]
    furthest = max((max(curve["x"], default=0) for curve in curves), default=0)
    # A full run is a hundred trials long: on a plain axis these would be one stroke at its left edge.
    log = bool(reach) and furthest > 4 * max(reach) > 0
    axes = build_axis("samples", log=log), build_axis(found.metric)
    return line_figure("Learning curves" + _left_out(found, len(curves)), curves, axes)


def d_over_samples(found: Findings) -> Figure | None:
    """Prodigy's d at each validation; where it still rose at the end, a ring of its own is around that end."""
    curves, rising = [], []
    for trial in shown(found):
        samples = list(found.samples_at(trial).values())
        # A zero has no place on a logarithmic axis, and AdamW has no d at all.
        pairs = [(x, d) for x, d in zip(samples, trial.user_attrs.get("d", ()), strict=False) if d]
        curves.append(trial_trace(found, trial, [x for x, _ in pairs], [d for _, d in pairs]))
        if pairs and is_rising(trial) and trial in found.ranked:
            rising.append((rounded(pairs[-1][0]), rounded(pairs[-1][1])))
    ring = {
        "type": "scatter",
        "mode": "markers",
        "name": STILL_RISES,
        "legendgroup": STILL_RISES,
        "x": [x for x, _ in rising],
        "y": [d for _, d in rising],
        "text": "",
        "marker": {"symbol": "circle-open", "size": 18, "color": "#0072B2", "line": {"width": 2}},
        "cliponaxis": False,
        "hoverinfo": "skip",
    }
    d_axis = {**build_axis("d", log=True), "dtick": 1, "exponentformat": "power"}
    return line_figure("Prodigy's d", [*curves, ring], (build_axis("samples"), d_axis), LEVEL)


def landscape(found: Findings) -> Figure | None:
    """The metric over the two numeric parameters that are searched, batch size and d_coef before others."""
    names = numeric_parameters(found)
    if not names:
        return None
    if len(names) == 1:
        return _over_one(found, names[0])
    x, y = names[:2]
    trials = [trial for trial in found.finished if {x, y} <= trial.params.keys()]
    valued = [last_value(t) for t in trials if found.role(t) not in OFF_SCALE]
    losses = sorted((v for v in valued if v is not None), reverse=not found.minimized)
    if not losses:
        return None
    # One trial that went wrong would press all others into one shade: the scale ends with the worst quarter.
    ends = [losses[0], losses[len(losses) * 3 // 4]]
    axes = padded(_parameter(found, x), [t.params[x] for t in trials]), _parameter(found, y)
    traces = point_traces(found, trials, lambda t: t.params[x], lambda t: t.params[y], axes, coloured=True)
    coloraxis = {
        "colorscale": "Cividis",
        "reversescale": not found.minimized,
        "cmin": rounded(min(ends)),
        "cmax": rounded(max(ends)),
        "colorbar": {"title": {"text": escape(found.metric)}, "thickness": 14, "len": 0.9},
    }
    return build_figure(f"{found.metric} over the search space", traces, *axes, coloraxis=coloraxis)


def loss_and_hours(found: Findings) -> Figure | None:
    """The metric against the full run's projected hours; a line joins the trials that none beats in both."""
    hours = {trial.number: found.full_hours(trial) or 0.0 for trial in found.ranked}
    known = [trial for trial in found.ranked if hours[trial.number]]
    if not known:
        return None
    longest = max(hours.values())
    unit, per_hour = ("hours", 1) if longest >= 1 else ("minutes", 60)

    def duration(trial: FrozenTrial) -> float:
        return hours[trial.number] * per_hour

    front = sorted((t for t in known if t.number in found.not_beaten), key=duration)
    line = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "no other trial is better in both",
        "x": [rounded(duration(t)) for t in front],
        "y": [rounded(t.value) for t in front],
        "line": {"color": "#0072B2", "dash": "dot", "width": 2, "shape": "hv"},
        "marker": {"symbol": "circle-open", "size": 20, "color": "#0072B2", "line": {"width": 2}},
        "hoverinfo": "skip",
    }
    axes = (
        padded(build_axis(f"projected {unit} of the full run"), [duration(t) for t in known]),
        build_axis(found.metric),
    )
    order = [*front, *(t for t in known if t not in front)]
    return build_figure(
        "Loss against time", [line, *point_traces(found, order, duration, last_value, axes, positions=UPWARDS)], *axes
    )


def numeric_parameters(found: Findings) -> list[str]:
    """Names of the searched parameters that are numbers, batch size and d_coef first."""

    def is_numeric(space: Mapping[str, Any]) -> bool:
        return all(isinstance(c, int | float) and not isinstance(c, bool) for c in space.get("choices", ()))

    names = [name for name, space in found.spec["search"].items() if is_numeric(space)]
    first = ("train.batch_size", "train.d_coef")
    return sorted(names, key=lambda name: first.index(name) if name in first else len(first))


def shown(found: Findings) -> list[FrozenTrial]:
    """The trials that are drawn as curves: all, or else the baseline, the best, and the latest others."""
    trials = [t for t in found.trials if t.intermediate_values]
    if len(trials) > MAX_CURVES:
        kept = {t.number for t in found.ranked[: MAX_CURVES // 2]} | {t.number for t in trials[-MAX_CURVES // 4 :]}
        trials = [t for t in trials if t.number in kept or found.is_baseline(t)]
    order = list(STYLES)
    return sorted(trials, key=lambda t: order.index(found.role(t)))


def _left_out(found: Findings, drawn: int) -> str:
    left = sum(bool(t.intermediate_values) for t in found.trials) + len(found.full_runs) - drawn
    return f"; {left} trials are not drawn" if left > 0 else ""


def _over_one(found: Findings, name: str) -> Figure | None:
    trials = [t for t in found.finished if name in t.params and last_value(t) is not None]
    axes = padded(_parameter(found, name), [t.params[name] for t in trials] or [1]), build_axis(found.metric)
    return build_figure(
        f"{found.metric} over {short_name(name)}",
        point_traces(found, trials, lambda t: t.params[name], last_value, axes),
        *axes,
    )


def _parameter(found: Findings, name: str) -> dict[str, Any]:
    """A parameter's axis: its scale is that of the search, and choices are its ticks."""
    space = found.spec["search"][name]
    values = sorted(space.get("choices", ()))
    # Batch sizes are powers of two; other choices that span a factor of four or more read better so as well.
    log = bool(space.get("log")) or bool(values and values[0] > 0 and values[-1] >= 4 * values[0])
    axis = build_axis(short_name(name), log=log)
    return {**axis, "tickvals": values, "ticktext": [format_value(v) for v in values]} if values else axis
