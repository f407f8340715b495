"""What a study's plots are made of: styles, lines, points, labels and axes, in plotly's own JSON; plotly is not needed.

Colours are Okabe and Ito's and Cividis, which the colour-blind tell apart, and nothing is told by colour alone: roles
have dashes and markers of their own, and what matters has its label beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from optuna.trial import FrozenTrial

from tuner.show.findings import Findings
from tuner.show.plot_labels import AROUND, RIGHT, beside, place_labels
from tuner.show.table import format_params
from tuner.trials import last_value, state_of

MAX_POINTS, MAX_LABELS = 200, 40
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


def trial_trace(found: Findings, trial: FrozenTrial, x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    named = _marks(found, trial)
    label = " ".join([str(trial.number), *named]) if named else ""
    return line_trace(found.role(trial), x, y, label, _hover(found, trial))


def line_trace(role: str, x: Sequence[float], y: Sequence[float], label: str, hover: str) -> dict[str, Any]:
    """A curve whose end carries its marker and its label."""
    style, inner = STYLES[role], max(0, len(x) - 1)
    size = MARKER_SIZES.get(style.marker, 7)
    return {
        "type": "scatter",
        "mode": "lines+markers+text" if label else "lines+markers",
        "name": style.legend,
        "legendgroup": role,
        "x": [rounded(value) for value in x],
        "y": [rounded(value) for value in y],
        "line": {"color": style.colour, "dash": style.dash, "width": style.width},
        "marker": {"symbol": style.marker, "color": style.colour, "size": [3] * inner + [size] * bool(x)},
        "text": [""] * inner + [label] * bool(x) if label else "",
        "textfont": {"size": 11, "color": "#000000"},
        "cliponaxis": False,
        "hovertext": escape(hover),
        "hoverinfo": "x+y+text",
    }


def line_figure(
    title: str,
    curves: list[dict[str, Any]],
    axes: tuple[dict[str, Any], dict[str, Any]],
    positions: Sequence[str] = RIGHT,
) -> Figure | None:
    """Lines with their labels at the right ends; the last lines have the first choice of room."""
    curves = [curve for curve in curves if curve["x"]]
    ends = [(curve["x"][-1], curve["y"][-1]) for curve in reversed(curves)]
    texts = [curve["text"][-1] if curve["text"] else "" for curve in reversed(curves)]
    # The axes span the whole curves: by the ends alone, close ends would seem far apart.
    values = [[v for curve in curves for v in curve[key] if v is not None] for key in ("x", "y")]
    extent = [(min(column), max(column)) if column else None for column in values]
    places = place_labels(ends, texts, [axis.get("type") == "log" for axis in axes], positions, extent=extent)
    for curve, place in zip(reversed(curves), places, strict=True):
        curve["textposition"] = place or "middle right"
        # At the same end as others and without a place of its own, a label would only blur theirs.
        curve["text"] = [*curve["text"][:-1], beside(curve["text"][-1], place)] if place else ""
    return build_figure(title, curves, *axes)


def point_traces(
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
    logs = [axis.get("type") == "log" for axis in axes]
    # To the right of a coloured plot stands its colour bar.
    edges = (0.0, 1.0) if coloured else (-math.inf, math.inf)
    extent = [_shown_range(axis) for axis in axes]
    placed = place_labels(spots, texts, logs, positions, extent=extent, edges=edges)
    traces = []
    for role, style in STYLES.items():
        mine = [i for i, trial in enumerate(trials) if found.role(trial) == role]
        if not mine:
            continue
        scaled = coloured and role not in OFF_SCALE
        values = [rounded(last_value(trials[i])) for i in mine]
        colour = {"color": values, "coloraxis": "coloraxis"} if scaled else {"color": style.colour}
        trace = {
            "type": "scatter",
            "mode": "markers+text",
            "name": style.legend,
            "x": [rounded(spots[i][0]) for i in mine],
            "y": [rounded(spots[i][1]) for i in mine],
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


def build_axis(title: str, *, log: bool = False) -> dict[str, Any]:
    axis = {"title": {"text": escape(title)}, "gridcolor": "#E5E5E5", "zeroline": False, "automargin": True}
    return {**axis, "type": "log", "dtick": "D2"} if log else axis


def padded(axis: dict[str, Any], values: Sequence[float]) -> dict[str, Any]:
    """An axis with room for labels at both ends."""
    scaled = [math.log10(v) for v in values] if axis.get("type") == "log" else list(values)
    room = 0.15 * (max(scaled) - min(scaled)) or 0.5
    return {**axis, "range": [rounded(min(scaled) - room), rounded(max(scaled) + room)]}


def _shown_range(axis: dict[str, Any]) -> tuple[float, float] | None:
    """From which value to which the axis shows; None where plotly chooses."""
    if "range" not in axis:
        return None
    low, high = (10**end if axis.get("type") == "log" else end for end in axis["range"])
    return low, high


def build_figure(
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


def rounded(value: float | None) -> float | None:
    """Six digits: a figure is stored in pieces of 2 kB, each a commit of its own."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def short_name(name: str) -> str:
    return name.rpartition(".")[2]


def _label(found: Findings, trial: FrozenTrial) -> str:
    value, role = last_value(trial), found.role(trial)
    told = role if role in OFF_SCALE or value is None else f"{value:.3f}"
    return " ".join([f"{trial.number}: {told}", *_marks(found, trial)])


def _hover(found: Findings, trial: FrozenTrial) -> str:
    value = last_value(trial)
    told = "" if value is None else f", {found.metric} {value:.4f}"
    state = ", ".join([state_of(trial), *_marks(found, trial)])
    return f"trial {trial.number} ({state}): {format_params(trial.params)}{told}"


def _marks(found: Findings, trial: FrozenTrial) -> list[str]:
    """What is said of a trial in words: that it is the baseline, the best, or both."""
    return ["baseline"] * found.is_baseline(trial) + ["best"] * found.is_best(trial)
