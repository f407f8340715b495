"""A study's learning curves in a line of characters each, on one scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tuner.show.palette import SKY_BLUE
from tuner.show.table import LAST, list_shown, name_value
from tuner.study.record import StudyRecord

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
GAP, NOT_FINITE = " ", "x"
WIDTH = 40
"""Maximum number of characters of a curve."""


@dataclass(frozen=True)
class Scale:
    """Values of the lowest and the highest block; values outside are drawn as the nearest block."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Scale | None:
        """The scale of all finite values, without the few far above the others: one diverged run would flatten all
        other curves. None without a finite value."""
        finite = sorted(value for value in values if math.isfinite(value))
        if not finite:
            return None
        high = finite[-1]
        if len(finite) >= 4:
            first, _, third = quantiles(finite, n=4)
            high = min(high, max(third + 1.5 * (third - first), first))
        return cls(finite[0], max(value for value in finite if value <= high))


def sparkline(values: Sequence[float | None], scale: Scale, blocks: str = BLOCKS) -> str:
    """One character for each value: a block, a gap for None, `x` for a non-finite value."""
    return "".join(_character(value, scale, blocks) for value in values)


def _character(value: float | None, scale: Scale, blocks: str) -> str:
    if value is None:
        return GAP
    if not math.isfinite(value):
        return NOT_FINITE
    span = scale.high - scale.low
    share = (value - scale.low) / span if span else 0.0
    return blocks[min(len(blocks) - 1, max(0, int(share * len(blocks))))]


def resample(points: Sequence[int], curve: Mapping[int, float], width: int) -> list[float | None]:
    """A curve on a grid of points as at most `width` values: the last one in each part of the grid."""
    per_value = max(1, math.ceil(len(points) / width))
    parts = [points[start : start + per_value] for start in range(0, len(points), per_value)]
    return [next((curve[point] for point in reversed(part) if point in curve), None) for part in parts]


def curves_table(
    record: StudyRecord, *, last: int = LAST, ascii_only: bool = False, width: int = WIDTH
) -> Group | None:
    """The curves of the trials that `list_shown` gives, and of each full run; None before the first validation.

    All have one scale of the metric. Trials share one axis of samples (or steps, or seconds); each full run has its
    own from start to end.
    """
    trials = [trial for trial in record.trials if trial.curve]
    full_runs = [run for run in record.full_runs if run.curve]
    curves = [*(trial.curve for trial in trials), *(run.curve for run in full_runs)]
    scale = Scale.of(value for curve in curves for value in curve.values())
    if scale is None:
        return None
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    grid = sorted({point for trial in trials for point in trial.curve})
    is_clipped = any(value > scale.high for curve in curves for value in curve.values())
    highest = f"{scale.high:.4f}{' and above' if is_clipped else ''}"
    title = f"{record.metric} over {record.unit}: {blocks[0]} is {scale.low:.4f}, {blocks[-1]} {highest}"
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column(f"{record.unit} {grid[0]:,} to {grid[-1]:,}" if grid else "curve", no_wrap=True)
    table.add_column(name_value(record), justify="right", no_wrap=True)

    def add(name: str, points: Sequence[int], curve: Mapping[int, float], style: str | None = None) -> None:
        values = resample(points, curve, width)
        end = next(value for value in reversed(values) if value is not None)
        table.add_row(name, Text(sparkline(values, scale, blocks), style=SKY_BLUE), f"{end:.4f}", style=style)

    for trial in list_shown(record, trials, last):
        add(str(trial.number), grid, trial.curve, "bold" if record.is_best(trial) else None)
    for run in full_runs:
        add(f"full {run.trial}", sorted(run.curve), run.curve)
    return Group(Text(title, style="italic"), table)
