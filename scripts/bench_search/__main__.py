"""Search strategies on recorded learning curves: how good is what they would promote, for how much compute.

    pip install -e '.[bench]'
    python scripts/bench_search [--grid demo] [--seeds 50] [--only NAME ...] [--json scripts/records/search_GRID.json]
                                [--chart scripts/records/search_GRID.svg]

record.py recorded the curves; nothing is trained here. Regret is the share by which the full-length loss of the
configuration that a strategy would promote (the mean over the recorded training seeds) lies above the best recorded
one. Compute is in full runs: all samples trained by the search, over the full run's. Each strategy searches under
`--seeds` seeds, which take the recorded training seeds by turns. The strategies were chosen on the grid "demo";
"other" (another width, depth, split of the corpus, and other training seeds) shows whether the choice holds.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from contenders import STRATEGIES
from curves import Curves
from replay import COMPUTE, GOAL, RECORDS, judge, regrets

TRIAL_LENGTHS = (400, 600, 800, 1_000, 1_200, 1_600, 2_400, 3_200)


def print_table(rows: list[dict[str, Any]]) -> None:
    shown = [0.4, 0.6, 0.8, 1, 1.5, 2, 3, 4]
    places = [int(np.searchsorted(COMPUTE, at - 1e-6)) for at in shown]
    width = max(len(row["name"]) for row in rows)
    print(f"{'':{width}}  mean regret after so many full runs' compute{'compute to':>42}")
    print(f"{'strategy':{width}} " + "".join(f"{at:>9g}" for at in shown) + f"{f'{GOAL:.0%}':>12}")
    for row in rows:
        values = "".join(f"{row['mean'][place]:>9.2%}" for place in places)
        reached = "never" if row["compute_to_goal"] is None else f"{row['compute_to_goal']:g}"
        print(f"{row['name']:{width}} {values}{reached:>12}")


def write_chart(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Mean regret over compute, a line a strategy; the parts of ours, and full-length trials, stand in the table."""
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


def write_record(path: Path, record: dict[str, Any]) -> None:
    """A strategy a line."""
    head = json.dumps({key: value for key, value in record.items() if key != "rows"})
    rows = ",\n  ".join(json.dumps(row) for row in record["rows"])
    path.write_text(f'{head[:-1]},\n "rows": [\n  {rows}\n]}}\n', encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="demo")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the strategies, those whose names start so")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chart", type=Path)
    args = parser.parse_args()
    path = RECORDS / f"curves_{args.grid}.json"
    try:
        curves = Curves.load(path)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    names = [name for name in STRATEGIES if not args.only or name.startswith(tuple(args.only))]
    if not names:
        parser.error(f"--only {' '.join(args.only)}: the strategies are {', '.join(STRATEGIES)}")
    correlations = {samples: round(curves.rank_correlation(samples), 3) for samples in TRIAL_LENGTHS}
    print(f"{path.name}: {np.prod(curves.losses.shape[:2])} configurations x {len(curves.seeds)} seeds")
    resting = {samples: round(curves.rank_correlation(samples, resting=True), 3) for samples in TRIAL_LENGTHS}
    for whose, values in (("", correlations), (", where d rests", resting)):
        print(f"rank correlation with full length, by trial length{whose}: ", end="")
        print(", ".join(f"{samples:,}: {value:.2f}" for samples, value in values.items()), flush=True)
    tasks = [(name, args.grid, seed) for name in names for seed in range(args.seeds)]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        found = np.array(pool.map(regrets, tasks, chunksize=5)).reshape(len(names), args.seeds, -1)
    rows = [judge(name, each) for name, each in zip(names, found, strict=True)]
    print_table(rows)
    if args.chart:
        write_chart(args.chart, rows, f"Grid {args.grid}: {args.seeds} seeds")
    if args.json:
        record = {
            "command": shlex.join(["python", "scripts/bench_search", *sys.argv[1:]]),
            "versions": {name: version(name) for name in ("optuna", "ray")},
            "grid": args.grid,
            "seeds": args.seeds,
            "length": curves.length,
            "rank_correlation": correlations,
            "rank_correlation_where_d_rests": resting,
            "compute": COMPUTE.tolist(),
            "rows": rows,
        }
        write_record(args.json, record)


if __name__ == "__main__":
    main()
