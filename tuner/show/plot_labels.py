"""Labels beside the points of a plot, placed so that none covers another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

# plotly's words for a text's place, in the order in which they are tried.
RIGHT = ("top right", "middle right", "bottom right")
LEVEL = ("middle right", "top right", "bottom right")
AROUND = ("middle right", "middle left", "top center", "bottom center")
UPWARDS = ("top right", "top left", "top center", "bottom center", "bottom right")

# In shares of a plot's width and height, as it stands on the dashboard: half a screen wide, 450 pixels high.
LETTER_WIDTH, HALF_LINE, LINE = 0.015, 0.025, 0.055
HALF_MARKER, GAP = 0.012, 0.055


def place_labels(
    spots: Sequence[tuple[float, float | None]],
    texts: Sequence[str],
    log: Sequence[bool],
    positions: Sequence[str],
    *,
    extent: Sequence[tuple[float, float] | None] = (None, None),
    edges: tuple[float, float] = (-math.inf, math.inf),
) -> list[str]:
    """Where each text stands beside its spot so that none covers another; "" where there is no room left.

    Args:
        log: For x and y, whether the axis is logarithmic.
        positions: plotly's words for the places to try, in this order.
        extent: The least and the greatest value that x and y show. Default: those of the spots.
        edges: Where texts must begin and end, in shares of the width. Default: they may reach into the margins.
    """
    columns = [_unit_interval([spot[i] for spot in spots], is_log, extent[i]) for i, is_log in enumerate(log)]
    # A spot is a box as well: a text that covers a marker would seem to be that marker's.
    taken = [(x - HALF_MARKER, x + HALF_MARKER, y - HALF_LINE, y + HALF_LINE) for x, y in zip(*columns, strict=True)]
    chosen = []
    for i, (x, y) in enumerate(zip(*columns, strict=True)):
        width, found = LETTER_WIDTH * len(texts[i]), ""
        for position in positions if texts[i] else ():
            vertical, _, side = position.partition(" ")
            left = {"left": x - GAP - width, "center": x - width / 2, "right": x + GAP}[side]
            middle = y + {"top": LINE, "middle": 0.0, "bottom": -LINE}[vertical]
            box = (left, left + width, middle - HALF_LINE, middle + HALF_LINE)
            if left < edges[0] or left + width > edges[1]:
                continue
            if not any(_overlap(box, other) for j, other in enumerate(taken) if j != i):
                taken.append(box)
                found = position
                break
        chosen.append(found)
    return chosen


def beside(text: str, position: str) -> str:
    """The text with some distance from its marker; "" where it has no position."""
    gap = "\u00a0" * 3
    before, after = gap * position.endswith("right"), gap * position.endswith("left")
    return f"{before}{escape(text)}{after}" if position else ""


def _unit_interval(values: Sequence[float | None], log: bool, extent: tuple[float, float] | None = None) -> list[float]:
    def scale(value: float | None) -> float:
        return 0.0 if value is None else math.log(value) if log and value > 0 else float(value)

    scaled = [scale(value) for value in values]
    shown = [scale(value) for value in extent] if extent else scaled
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    return [(value - low) / (high - low or 1.0) for value in scaled]


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]
