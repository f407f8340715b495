"""Search strategies on recorded learning curves: the quality of what they would promote, over compute.

    pip install -e '.[bench]'
    python -m scripts.bench.search [--grid demo] [--seeds 50] [--only NAME ...]
                                   [--json scripts/records/search_GRID.json] [--chart scripts/records/search_GRID.svg]

scripts.bench.search.record recorded the curves; nothing is trained here. Regret is the share by which the full-length
loss of the configuration that a strategy would promote (the mean over the recorded training seeds) is above the best
recorded one. Compute is in full runs: all samples trained by the search, over the full run's. Each strategy searches
under `--seeds` seeds, which take the recorded training seeds in rotation. The strategies were chosen on the grid
"demo"; "other" (another width, depth, split of the corpus, and other training seeds) shows whether the choice holds.
"""

import argparse
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench.common import Record, build_parser, run_benchmark
from scripts.bench.search.contenders import STRATEGIES
from scripts.bench.search.curves import Curves, find_curves
from scripts.bench.search.replay import COMPUTE, GOAL, compute_regrets, summarize_regrets
from trainer.errors import UserError

TRIAL_LENGTHS = (400, 600, 800, 1_000, 1_200, 1_600, 2_400, 3_200)


def print_table(rows: list[dict[str, Any]]) -> None:
    shown = [0.4, 0.6, 0.8, 1, 1.5, 2, 3, 4]
    places = [int(np.searchsorted(COMPUTE, at - 1e-6)) for at in shown]
    width = max(len(row["name"]) for row in rows)
    print(f"{'':{width}}  mean regret after the compute of N full runs{'compute to':>42}")
    print(f"{'strategy':{width}} " + "".join(f"{at:>9g}" for at in shown) + f"{f'{GOAL:.0%}':>12}")
    for row in rows:
        values = "".join(f"{row['mean'][place]:>9.2%}" for place in places)
        reached = "never" if row["compute_to_goal"] is None else f"{row['compute_to_goal']:g}"
        print(f"{row['name']:{width}} {values}{reached:>12}")


def write_chart(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Mean regret over compute, a line a strategy; variants of ours and full-length trials are in the table only."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Okabe and Ito's palette; ours are the thick ones, and styles differ too.
    palette = ["#0072B2", "#D55E00", "#000000", "#E69F00", "#009E73", "#56B4E9", "#CC79A7"]
    matplotlib.rcParams |= {"svg.hashsalt": "prodigy-tuner", "svg.fonttype": "none"}
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    shown = [row for row in rows if not row["name"].startswith("ours") and "full length" not in row["name"]]
    for number, row in enumerate(shown):
        style = "-" if number < 2 else ("--", "-.", ":")[number // len(palette)]
        color, width = palette[number % len(palette)], 3 if number < 2 else 1.3
        axes.plot(COMPUTE, [100 * value for value in row["mean"]], style, color=color, lw=width, label=row["name"])
    axes.axhline(100 * GOAL, color="grey", lw=0.8)
    axes.set(yscale="log", ylim=(0.04, 12), xlabel="compute, in full runs", ylabel="mean regret, %", title=title)
    ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, metadata={"Date": None})


def measure(arguments: argparse.Namespace) -> Record:
    path = find_curves(arguments.grid)
    curves = Curves.load(path)
    names = [name for name in STRATEGIES if not arguments.only or name.startswith(tuple(arguments.only))]
    if not names:
        raise UserError(f"--only {' '.join(arguments.only)}: the strategies are {', '.join(STRATEGIES)}")
    print(f"{path.name}: {np.prod(curves.losses.shape[:2])} configurations x {len(curves.seeds)} seeds")
    correlations, resting = (
        {samples: round(curves.rank_correlation(samples, resting=rests), 3) for samples in TRIAL_LENGTHS}
        for rests in (False, True)
    )
    for which, values in (("", correlations), (", where d rests", resting)):
        print(f"rank correlation with full length, by trial length{which}: ", end="")
        print(", ".join(f"{samples:,}: {value:.2f}" for samples, value in values.items()), flush=True)
    tasks = [(name, arguments.grid, seed) for name in names for seed in range(arguments.seeds)]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        regrets = np.array(pool.map(compute_regrets, tasks, chunksize=5)).reshape(len(names), arguments.seeds, -1)
    rows = [summarize_regrets(name, each) for name, each in zip(names, regrets, strict=True)]
    print_table(rows)
    if arguments.chart:
        write_chart(arguments.chart, rows, f"Grid {arguments.grid}: {arguments.seeds} seeds")
    return {
        "grid": arguments.grid,
        "seeds": arguments.seeds,
        "length": curves.length,
        "rank_correlation": correlations,
        "rank_correlation_where_d_rests": resting,
        "compute": COMPUTE.tolist(),
        "rows": rows,
    }


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--grid", default="demo")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only strategies whose names start with NAME")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="where the SVG chart is written")
    run_benchmark(parser, measure, packages=("optuna", "ray"), rows="rows")


if __name__ == "__main__":
    main()
