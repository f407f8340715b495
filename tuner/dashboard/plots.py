"""A study's plots for optuna-dashboard, as figures that plotly's own JSON describes; plotly itself is not needed.

Colours are Okabe and Ito's and Cividis, which the colour-blind tell apart, and nothing is told by colour alone: roles
have dashes and markers of their own, and what matters has its label beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from optuna.trial import FrozenTrial

from tuner.dashboard.findings import Findings
from tuner.dashboard.plot_labels import AROUND, RIGHT, UPWARDS, beside, place_labels
from tuner.display import format_params, format_value
from tuner.trials import last_value, state_of

MAX_CURVES, MAX_POINTS, MAX_LABELS = 40, 200, 40
FULL_RUN = "full run"
OFF_SCALE = ("infeasible", "failed")
"""Roles whose value, if they have one, is not to be compared."""


@dataclass(frozen=True)
class Style:
    colour: str
    dash: str
    marker: str
    width: float
    legend: str


# In the order in which they are drawn: the later ones lie above.
STYLES = {
    "failed": Style("#F0E442", "longdashdot", "hexagon-open", 1, "failed"),
    "running": Style("#009E73", "longdash", "circle-open", 1.5, "running"),
    "infeasible": Style("#CC79A7", "dashdot", "x", 1.5, "infeasible"),
    "pruned": Style("#56B4E9", "dot", "triangle-down-open", 1.5, "pruned"),
    "complete": Style("#999999", "solid", "circle", 1, "complete"),
    "baseline": Style("#000000", "dash", "square", 2.5, "baseline"),
    "best": Style("#D55E00", "solid", "star", 3, "best trial"),
    FULL_RUN: Style("#0072B2", "longdash", "diamond", 3, FULL_RUN),
}
MARKER_SIZES = {"star": 13, "x": 10, "diamond": 9, "square": 9}


@dataclass(frozen=True)
class Figure:
    """What optuna-dashboard asks of a plotly figure: its JSON."""

    data: list[dict[str, Any]]
    layout: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps({"data": self.data, "layout": self.layout}, separators=(",", ":"))


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
        curves.append(_curve(found, trial, list(samples.values()), values))
    for run in found.full_runs:
        points = sorted(run.intermediate_values)
        label = f"full run of trial {run.user_attrs['trial']}"
        values = [run.intermediate_values[point] for point in points]
        curves.append(_line(FULL_RUN, points, values, label, f"{label}: {format_params(run.params)}"))
    reach = [max(curve["x"], default=0) for curve in curves if curve["legendgroup"] != FULL_RUN]
    furthest = max((max(curve["x"], default=0) for curve in curves), default=0)
    # A full run is a hundred trials long: on a plain axis these would be one stroke at its left edge.
    log = bool(reach) and furthest > 4 * max(reach) > 0
    axes = _axis("samples", log=log), _axis(found.metric)
    return _curves("Learning curves" + _left_out(found, len(curves)), curves, axes)


def d_over_samples(found: Findings) -> Figure | None:
    """Prodigy's d at each validation; where it still rose at the end, the label says so."""
    curves = []
    for trial in shown(found):
        samples = list(found.samples_at(trial).values())
        # A zero has no place on a logarithmic axis, and AdamW has no d at all.
        pairs = [(x, d) for x, d in zip(samples, trial.user_attrs.get("d", ()), strict=False) if d]
        rising = " still rises" if trial.user_attrs.get("d_rising") and trial in found.ranked else ""
        curves.append(_curve(found, trial, [x for x, _ in pairs], [d for _, d in pairs], rising))
    d_axis = {**_axis("d", log=True), "dtick": 1, "exponentformat": "power"}
    return _curves("Prodigy's d", curves, (_axis("samples"), d_axis))


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
    axes = _padded(_parameter(found, x), [t.params[x] for t in trials]), _parameter(found, y)
    traces = _scatter(found, trials, lambda t: t.params[x], lambda t: t.params[y], axes, coloured=True)
    coloraxis = {
        "colorscale": "Cividis",
        "reversescale": not found.minimized,
        "cmin": _round(min(ends)),
        "cmax": _round(max(ends)),
        "colorbar": {"title": {"text": escape(found.metric)}, "thickness": 14, "len": 0.9},
    }
    return _figure(f"{found.metric} over the search space", traces, *axes, coloraxis=coloraxis)


def loss_and_hours(found: Findings) -> Figure | None:
    """The metric against the full run's projected hours; a line joins the trials that none beats in both."""
    known = [t for t in found.ranked if t.user_attrs.get("full_hours") and t.value is not None]
    if not known:
        return None
    longest = max(t.user_attrs["full_hours"] for t in known)
    unit, per_hour = ("hours", 1) if longest >= 1 else ("minutes", 60)

    def duration(trial: FrozenTrial) -> float:
        return float(trial.user_attrs["full_hours"] * per_hour)

    front = sorted(not_beaten(found, known), key=duration)
    line = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "no other trial is better in both",
        "x": [_round(duration(t)) for t in front],
        "y": [_round(t.value) for t in front],
        "line": {"color": "#0072B2", "dash": "dot", "width": 2, "shape": "hv"},
        "marker": {"symbol": "circle-open", "size": 20, "color": "#0072B2", "line": {"width": 2}},
        "hoverinfo": "skip",
    }
    axes = _padded(_axis(f"projected {unit} of the full run"), [duration(t) for t in known]), _axis(found.metric)
    order = [*front, *(t for t in known if t not in front)]
    return _figure(
        "Loss against time", [line, *_scatter(found, order, duration, last_value, axes, positions=UPWARDS)], *axes
    )


def not_beaten(found: Findings, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials to which no other is at least equal in metric and hours and better in one of them."""
    sign = 1 if found.minimized else -1

    def cost(trial: FrozenTrial) -> tuple[float, float]:
        return sign * (trial.value or 0.0), float(trial.user_attrs["full_hours"])

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and one[0] <= other[0] and one[1] <= other[1]

    costs = [cost(trial) for trial in trials]
    return [t for t, own in zip(trials, costs, strict=True) if not any(beats(other, own) for other in costs)]


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


def _curve(
    found: Findings, trial: FrozenTrial, x: Sequence[float], y: Sequence[float], remark: str = ""
) -> dict[str, Any]:
    named = marks(found, trial)
    label = " ".join([str(trial.number), *named]) + remark if remark or named else ""
    return _line(found.role(trial), x, y, label, _hover(found, trial))


def _line(role: str, x: Sequence[float], y: Sequence[float], label: str, hover: str) -> dict[str, Any]:
    """A curve whose end carries its marker and its label."""
    style, inner = STYLES[role], max(0, len(x) - 1)
    size = MARKER_SIZES.get(style.marker, 7)
    return {
        "type": "scatter",
        "mode": "lines+markers+text" if label else "lines+markers",
        "name": style.legend,
        "legendgroup": role,
        "x": [_round(value) for value in x],
        "y": [_round(value) for value in y],
        "line": {"color": style.colour, "dash": style.dash, "width": style.width},
        "marker": {"symbol": style.marker, "color": style.colour, "size": [3] * inner + [size] * bool(x)},
        "text": [""] * inner + [label] * bool(x) if label else "",
        "textfont": {"size": 11, "color": "#000000"},
        "cliponaxis": False,
        "hovertext": escape(hover),
        "hoverinfo": "x+y+text",
    }


def _curves(title: str, curves: list[dict[str, Any]], axes: tuple[dict[str, Any], dict[str, Any]]) -> Figure | None:
    """Lines with their labels at the right ends; the last lines have the first choice of room."""
    curves = [curve for curve in curves if curve["x"]]
    ends = [(curve["x"][-1], curve["y"][-1]) for curve in reversed(curves)]
    texts = [curve["text"][-1] if curve["text"] else "" for curve in reversed(curves)]
    places = place_labels(ends, texts, [axis.get("type") == "log" for axis in axes], RIGHT)
    for curve, place in zip(reversed(curves), places, strict=True):
        curve["textposition"] = place or "middle right"
        # At the same end as others and without a place of its own, a label would only blur theirs.
        curve["text"] = [*curve["text"][:-1], beside(curve["text"][-1], place)] if place else ""
    return _figure(title, curves, *axes)


def _scatter(
    found: Findings,
    trials: Sequence[FrozenTrial],
    x: Callable[[FrozenTrial], float],
    y: Callable[[FrozenTrial], float | None],
    axes: tuple[dict[str, Any], dict[str, Any]],
    coloured: bool = False,
    positions: Sequence[str] = AROUND,
) -> list[dict[str, Any]]:
    """Points, one trace a role, with number and value beside those that have room for it.

    Args:
        trials: The most important one first: it has the first choice of room.
        coloured: By the metric, but for what has no place on its scale.
    """
    trials = trials[:MAX_POINTS]
    spots = [(x(trial), y(trial)) for trial in trials]
    texts = [_label(found, trial) if i < MAX_LABELS else "" for i, trial in enumerate(trials)]
    placed = place_labels(spots, texts, [axis.get("type") == "log" for axis in axes], positions)
    traces = []
    for role, style in STYLES.items():
        mine = [i for i, trial in enumerate(trials) if found.role(trial) == role]
        if not mine:
            continue
        scaled = coloured and role not in OFF_SCALE
        values = [_round(last_value(trials[i])) for i in mine]
        colour = {"color": values, "coloraxis": "coloraxis"} if scaled else {"color": style.colour}
        trace = {
            "type": "scatter",
            "mode": "markers+text",
            "name": style.legend,
            "x": [_round(spots[i][0]) for i in mine],
            "y": [_round(spots[i][1]) for i in mine],
            "text": [beside(texts[i], placed[i]) for i in mine],
            "textposition": [placed[i] or "top center" for i in mine],
            "textfont": {"size": 11, "color": "#000000"},
            "cliponaxis": False,
            "hovertext": [escape(_hover(found, trials[i])) for i in mine],
            "hoverinfo": "text",
            "marker": {
                "symbol": style.marker.removesuffix("-open"),
                "size": MARKER_SIZES.get(style.marker, 8) + 3,
                "line": {"width": 1, "color": "#000000"},
                **colour,
            },
        }
        traces.append(trace)
    return traces


def _padded(axis: dict[str, Any], values: Sequence[float]) -> dict[str, Any]:
    """An axis with room for labels at both ends."""
    scaled = [math.log10(v) for v in values] if axis.get("type") == "log" else list(values)
    room = 0.15 * (max(scaled) - min(scaled)) or 0.5
    return {**axis, "range": [_round(min(scaled) - room), _round(max(scaled) + room)]}


def _label(found: Findings, trial: FrozenTrial) -> str:
    value, role = last_value(trial), found.role(trial)
    told = role if role in OFF_SCALE or value is None else f"{value:.3f}"
    return " ".join([f"{trial.number}: {told}", *marks(found, trial)])


def _over_one(found: Findings, name: str) -> Figure | None:
    trials = [t for t in found.finished if name in t.params and last_value(t) is not None]
    axes = _padded(_parameter(found, name), [t.params[name] for t in trials] or [1]), _axis(found.metric)
    return _figure(
        f"{found.metric} over {_short(name)}",
        _scatter(found, trials, lambda t: t.params[name], last_value, axes),
        *axes,
    )


def _hover(found: Findings, trial: FrozenTrial) -> str:
    value = last_value(trial)
    told = "" if value is None else f", {found.metric} {value:.4f}"
    state = ", ".join([state_of(trial), *marks(found, trial)])
    return f"trial {trial.number} ({state}): {format_params(trial.params)}{told}"


def marks(found: Findings, trial: FrozenTrial) -> list[str]:
    """What is said of a trial in words: that it is the baseline, the best, or both."""
    return ["baseline"] * found.is_baseline(trial) + ["best"] * found.is_best(trial)


def _parameter(found: Findings, name: str) -> dict[str, Any]:
    """A parameter's axis: its scale is that of the search, and choices are its ticks."""
    space = found.spec["search"][name]
    values = sorted(space.get("choices", ()))
    # Batch sizes are powers of two; other choices that span a factor of four or more read better so as well.
    log = bool(space.get("log")) or bool(values and values[0] > 0 and values[-1] >= 4 * values[0])
    axis = _axis(_short(name), log=log)
    return {**axis, "tickvals": values, "ticktext": [format_value(v) for v in values]} if values else axis


def _axis(title: str, *, log: bool = False) -> dict[str, Any]:
    axis = {"title": {"text": escape(title)}, "gridcolor": "#E5E5E5", "zeroline": False, "automargin": True}
    return {**axis, "type": "log", "dtick": "D2"} if log else axis


def _figure(
    title: str, traces: list[dict[str, Any]], x: dict[str, Any], y: dict[str, Any], **layout: Any
) -> Figure | None:
    traces = [trace for trace in traces if trace["x"]]
    if not traces:
        return None
    named = set()
    for trace in traces:
        trace["showlegend"] = trace["name"] not in named
        named.add(trace["name"])
    layout |= {
        "title": {"text": escape(title), "x": 0.02, "font": {"size": 16}},
        "xaxis": x,
        "yaxis": y,
        "font": {"color": "#222222"},
        "paper_bgcolor": "#FFFFFF",
        "plot_bgcolor": "#FFFFFF",
        "hovermode": "closest",
        "autosize": True,
        "margin": {"l": 60, "r": 110, "t": 50, "b": 50},
        "legend": {"orientation": "h", "y": -0.2, "yanchor": "top", "itemsizing": "constant"},
    }
    return Figure(traces, layout)


def _round(value: float | None) -> float | None:
    """Six digits: a figure is stored in pieces of 2 kB, each a commit of its own."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _short(name: str) -> str:
    return name.rpartition(".")[2]
