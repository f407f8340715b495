"""Plotly's own JSON: styles, curves, points, axes, figures. plotly itself is not needed.

Colours are Okabe and Ito's and Cividis. Each role also has its own dash and marker, and hovering names the trial.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from tuner.show.palette import BLUE, GREEN, PURPLE, SKY_BLUE, VERMILLION, YELLOW

FULL_RUN = "full run"


@dataclass(frozen=True)
class Style:
    colour: str
    dash: str
    marker: str
    width: float
    legend: str


# In the order of drawing: the later ones cover the earlier ones.
STYLES = {
    "failed": Style(YELLOW, "longdashdot", "hexagon-open", 1, "failed"),
    "running": Style(GREEN, "longdash", "circle-open", 1.5, "running"),
    "infeasible": Style(PURPLE, "dashdot", "x", 1.5, "infeasible"),
    "pruned": Style(SKY_BLUE, "dot", "triangle-down-open", 1.5, "pruned"),
    "complete": Style("#999999", "solid", "circle", 1, "complete"),
    "baseline": Style("#000000", "dash", "square", 2.5, "baseline"),
    "best": Style(VERMILLION, "solid", "star", 3, "best trial"),
    FULL_RUN: Style(BLUE, "longdash", "diamond", 3, FULL_RUN),
}
MARKER_SIZES = {"star": 13, "x": 10, "diamond": 9, "square": 9}
GAP = "\u00a0\u00a0"
LABEL = {"textfont": {"size": 11, "color": "#000000"}, "cliponaxis": False}


@dataclass(frozen=True)
class Figure:
    """A figure as optuna-dashboard stores it: it asks for the JSON alone."""

    data: list[dict[str, Any]]
    layout: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps({"data": self.data, "layout": self.layout}, separators=(",", ":"))


def line_trace(
    role: str, x: Sequence[float], y: Sequence[float | None], *, hover: str, label: str = ""
) -> dict[str, Any]:
    """A curve with its marker, and its label if it has one, at its end."""
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
        "text": [""] * inner + [f"{GAP}{escape(label)}{GAP}"] * bool(x) if label else "",
        "textposition": "middle right",
        "hovertext": escape(hover),
        "hoverinfo": "x+y+text",
        **LABEL,
    }


def point_trace(
    role: str,
    x: Sequence[float],
    y: Sequence[float | None],
    *,
    hover: Sequence[str],
    label: str = "",
    values: Sequence[float | None] | None = None,
) -> dict[str, Any]:
    """Points of one role.

    Args:
        label: Text at each point.
        values: Colour the points by these, on the figure's colour axis.
    """
    style = STYLES[role]
    colour: dict[str, Any] = {"color": style.colour}
    if values is not None:
        colour = {"color": [rounded(value) for value in values], "coloraxis": "coloraxis"}
    return {
        "type": "scatter",
        "mode": "markers+text" if label else "markers",
        "name": style.legend,
        "x": [rounded(value) for value in x],
        "y": [rounded(value) for value in y],
        "text": escape(label),
        "textposition": "top center",
        "hovertext": [escape(text) for text in hover],
        "hoverinfo": "text",
        "marker": {
            "symbol": style.marker.removesuffix("-open"),
            "size": MARKER_SIZES.get(style.marker, 8) + 3,
            "line": {"width": 1, "color": "#000000"},
            **colour,
        },
        **LABEL,
    }


def place_labels(traces: Sequence[dict[str, Any]], above: str, below: str) -> None:
    """Place the labels of traces: `below` for the lower one of two ends, else `above`."""
    labelled = [trace for trace in traces if trace["text"] and trace["y"] and trace["y"][-1] is not None]
    for i, trace in enumerate(sorted(labelled, key=lambda trace: trace["y"][-1])):
        trace["textposition"] = below if i == 0 and len(labelled) > 1 else above


def build_axis(title: str, *, log: bool = False) -> dict[str, Any]:
    axis = {"title": {"text": escape(title)}, "gridcolor": "#E5E5E5", "zeroline": False, "automargin": True}
    return {**axis, "type": "log", "dtick": "D2"} if log else axis


def pad_axis(axis: dict[str, Any], values: Sequence[float]) -> dict[str, Any]:
    """The axis with a range that leaves room at both ends."""
    scaled = [math.log10(v) for v in values] if axis.get("type") == "log" else list(values)
    room = 0.15 * (max(scaled) - min(scaled)) or 0.5
    return {**axis, "range": [rounded(min(scaled) - room), rounded(max(scaled) + room)]}


def build_figure(
    title: str, traces: Sequence[dict[str, Any]], x: dict[str, Any], y: dict[str, Any], **layout: Any
) -> Figure | None:
    """A figure whose legend has each name once; None without a point."""
    traces = [trace for trace in traces if trace["x"]]
    if not traces:
        return None
    names = set()
    for trace in traces:
        trace["showlegend"] = trace["name"] not in names
        names.add(trace["name"])
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
    """Six digits, None for a non-finite value: a figure is stored in pieces of 2 kB, each a commit of its own."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
