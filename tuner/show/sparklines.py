"""A study's learning curves in a line each, drawn with characters on one scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles

import optuna
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tuner.full.runs import newest_curves
from tuner.show.palette import SKY_BLUE
from tuner.show.table import budget_unit
from tuner.trials import ranking, stored_values

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
GAP, NOT_FINITE = " ", "x"
WIDTH = 40
"""Characters of a curve at most."""


@dataclass(frozen=True)
class Scale:
    """From the lowest to the highest block; what lies outside is drawn as the nearest of them."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Scale | None:
        """Over all finite values, but not stretched by the few far above the others: one run that diverged would
        press all curves flat. None where there is no finite value."""
        finite = sorted(value for value in values if math.isfinite(value))
        if not finite:
            return None
        high = finite[-1]
        if len(finite) >= 4:
            first, _, third = quantiles(finite, n=4)
            high = min(high, max(third + 1.5 * (third - first), first))
        return cls(finite[0], max(value for value in finite if value <= high))


def sparkline(values: Sequence[float | None], scale: Scale, blocks: str = BLOCKS) -> str:
    """One character for each value: a block, a gap for None, `x` for what is not finite."""
    return "".join(_character(value, scale, blocks) for value in values)


def _character(value: float | None, scale: Scale, blocks: str) -> str:
    if value is None:
        return GAP
    if not math.isfinite(value):
        return NOT_FINITE
    span = scale.high - scale.low
    share = (value - scale.low) / span if span else 0.0
    return blocks[min(len(blocks) - 1, max(0, int(share * len(blocks))))]


def resample(points: Sequence[float], curve: Mapping[int, float], width: int) -> list[float | None]:
    """A curve over a grid of points, as at most `width` values: the last one of each part of the grid."""
    per_value = max(1, math.ceil(len(points) / width))
    parts = [points[start : start + per_value] for start in range(0, len(points), per_value)]
    return [next((curve[int(at)] for at in reversed(part) if at in curve), None) for part in parts]


def curves_table(
    study: optuna.Study, *, last: int = 1000, ascii_only: bool = False, width: int = WIDTH
) -> Group | None:
    """The curve of each trial, and below them of each full run; None before the first validation.

    All stand on one scale of the metric; trials share one axis of samples (or steps, or seconds), and each full run
    has its own from start to end.
    """
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.intermediate_values]
    drawn = [(curve.user_attrs["trial"], curve.intermediate_values) for curve in newest_curves(study)]
    full = [(number, curve) for number, curve in drawn if curve]
    curves = [trial.intermediate_values for trial in trials] + [curve for _, curve in full]
    scale = Scale.of(value for curve in curves for value in curve.values())
    if scale is None:
        return None
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    unit = budget_unit(study)
    grid = sorted({at for trial in trials for at in trial.intermediate_values})
    clipped = any(value > scale.high for curve in curves for value in curve.values())
    metric, highest = stored_values(study)["study"]["metric"], f"{scale.high:.4f}{' and above' if clipped else ''}"
    title = Text(f"{metric} over {unit}: {blocks[0]} is {scale.low:.4f}, {blocks[-1]} {highest}", style="italic")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column(f"{unit} {grid[0]:,} to {grid[-1]:,}" if grid else "curve", no_wrap=True)
    table.add_column("loss", justify="right", no_wrap=True)
    best = next(iter(ranking(study, trials)), None)
    for trial in trials[-last:]:
        _add(table, str(trial.number), resample(grid, trial.intermediate_values, width), scale, blocks, trial is best)
    for number, curve in full:
        _add(table, f"full {number}", resample(sorted(curve), curve, width), scale, blocks, False)
    return Group(title, table)


def _add(table: Table, name: str, values: Sequence[float | None], scale: Scale, blocks: str, best: bool) -> None:
    last = next(value for value in reversed(values) if value is not None)
    style = "bold" if best else None
    table.add_row(name, Text(sparkline(values, scale, blocks), style=SKY_BLUE), f"{last:.4f}", style=style)
