"""The chart of mean regret over compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.bench.search.replay import BUDGETS, COMPUTE, GOAL

PALETTE = ("#0072B2", "#D55E00", "#000000", "#E69F00", "#009E73", "#56B4E9", "#CC79A7", "#888888", "#882255")
"""Okabe and Ito's, and two more."""
CHARTED = (
    "ours",
    "ours, confirmed",
    "ours, confirmed after decay",
    "TPE, no pruner",
    "Syne Tune's ASHA",
    "Optuna's GP, no pruner",
    "Optuna's GP set up by hand, no pruner",
    "random",
    "always the corner",
)


def write_chart(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """A line for each of `CHARTED`; ours are thick, and styles differ too."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.hashsalt": "prodigy-tuner", "svg.fonttype": "none"}
    figure, axes = pyplot.subplots(figsize=(8.5, 4.2), layout="constrained")
    for number, row in enumerate(sorted(filter(is_charted, rows), key=lambda row: CHARTED.index(row["name"]))):
        is_ours = row["name"].startswith("ours")
        style = ("-", "--", "-.", ":")[number % 4 if is_ours else 1 + number % 3]
        color, width = PALETTE[number % len(PALETTE)], 2.5 if is_ours else 1.3
        label = f"{row['name']} ({row['variant']})" if row["variant"] else row["name"]
        axes.plot(COMPUTE, [100 * value for value in row["mean"]], style, color=color, lw=width, label=label)
    axes.axhline(100 * GOAL, color="grey", lw=0.8)
    axes.set(xscale="log", yscale="log", xlabel="compute, in full runs", ylabel="mean regret, %", title=title)
    axes.set_xticks(BUDGETS, ["1/32", "1/16", "1/8", "1/4", "1/2"])
    axes.set_xticks([], minor=True)
    low, high = axes.get_ylim()
    ticks = [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, metadata={"Date": None})


def is_charted(row: dict[str, Any]) -> bool:
    return row["name"] in CHARTED
