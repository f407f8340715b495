"""How well a short run's losses rank the configurations: by the annealed loss at full length."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from scripts.bench.search.curves import Curves, Floats

SHARES = (120, 60, 20, 5, 1)
"""Lengths: a full run's over these."""


def list_measures(curves: Curves, share: int) -> dict[str, Floats]:
    """[batch size, d_coef, seed] of each loss that is recorded at this length."""
    at = curves.points.searchsorted(curves.length // share)
    measures = {"raw": curves.loss[..., at], "averaged": curves.average[..., at]}
    if (annealed := np.flatnonzero(curves.lengths == curves.length // share)).size and share > 1:
        measures["annealed"] = curves.annealed[..., annealed[0]]
    return measures


def rank(measure: Floats, truth: Floats, shown: NDArray[np.bool_]) -> float | None:
    """Spearman's rank correlation, the mean over the training seeds; None for fewer than 3 configurations."""
    if shown.sum() < 3:
        return None
    values = [spearmanr(measure[..., seed][shown], truth[shown]).statistic for seed in range(measure.shape[2])]
    return round(float(np.mean(values)), 3)


def correlate(curves: Curves) -> list[dict[str, Any]]:
    """Each loss at each length: its rank correlation with the truth among all configurations and among the best third,
    and the regret of the configuration where it is lowest. The truth is NaN where nothing is recorded."""
    truth = curves.truth
    known = np.isfinite(truth)
    best_third = truth <= np.sort(truth[known])[max(known.sum() // 3, 1) - 1]
    rows = []
    for share in SHARES:
        for name, measure in list_measures(curves, share).items():
            lowest = np.where(known[..., None], measure, np.inf).reshape(truth.size, -1).argmin(axis=0)
            rows.append(
                {
                    "share": share,
                    "loss": name,
                    "all": rank(measure, truth, known),
                    "best_third": rank(measure, truth, known & best_third),
                    "regret": round(float((truth.flat[lowest] / np.nanmin(truth) - 1).mean()), 5),
                }
            )
    return rows


def format_correlations(rows_by_task: dict[str, list[dict[str, Any]]]) -> str:
    """A table, a row for each length and loss."""
    tasks = list(rows_by_task)
    lines = [f"{'':20}" + "".join(f"{task:^26}" for task in tasks)]
    lines += [f"{'loss':20}" + f"{'all':>8}{'best 3rd':>9}{'regret':>9}" * len(tasks)]
    for rows in zip(*rows_by_task.values(), strict=True):
        name = f"{rows[0]['loss']} at 1/{rows[0]['share']}"
        lines.append(f"{name:20}" + "".join(format_row(row) for row in rows))
    return "\n".join(lines)


def format_row(row: dict[str, Any]) -> str:
    shown = (f"{row[key]:.2f}" if row[key] is not None else "-" for key in ("all", "best_third"))
    return "{:>8}{:>9}".format(*shown) + f"{row['regret']:>9.2%}"
