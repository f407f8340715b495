"""Whether the best trial is at an edge of the search space: a better one may be outside. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tuner.study.record import StudyRecord

MIN_TRIALS = 5
"""Complete trials before which the best one is no optimum yet."""
EDGE_SHARE = 0.05
"""Share of a range, at each end, that is its edge."""
MIN_CHOICES = 3
"""Of two choices, each is an edge."""


def describe_edges(record: StudyRecord) -> list[str]:
    """One sentence for each searched number of the best trial that is at an edge of its space; of the recommended
    one, if the study recommends another."""
    best = record.recommended
    if best is None or len(record.ranked) < MIN_TRIALS:
        return []
    sentences = []
    for name, space in record.spec["search"].items():
        value = best.params.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        edge, extent = _find_edge(value, space), _describe_space(space)
        if edge is not None:
            word = "best" if record.is_best(best) else "recommended"
            sentences.append(
                f"{word} {name} = {_format(value)} is at the {edge} edge of {extent}: widen it in [search]"
            )
    return sentences


def _find_edge(value: float, space: Mapping[str, Any]) -> str | None:
    """`lower`, `upper` or None."""
    if "choices" in space:
        choices = space["choices"]
        if len(choices) < MIN_CHOICES or not all(_is_number(choice) for choice in choices):
            return None
        low, high, share = min(choices), max(choices), 0.0
    else:
        low, high, share = space["low"], space["high"], EDGE_SHARE
    # No size is below 1, no rate below 0.
    is_least = low == 0 or (isinstance(value, int) and low == 1)
    place = _place(value, low, high, bool(space.get("log")))
    if place <= share and not is_least:
        return "lower"
    return "upper" if place >= 1 - share else None


def _format(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _place(value: float, low: float, high: float, log: bool) -> float:
    """From 0 at `low` to 1 at `high`."""
    return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)


def _describe_space(space: Mapping[str, Any]) -> str:
    if "choices" in space:
        return ", ".join(str(choice) for choice in space["choices"])
    return f"{space['low']:.3g} to {space['high']:.3g}"
