"""Search strategies on recorded learning curves: the quality of what they would promote, over compute.

    pip install -e '.[bench]'
    python -m scripts.bench.search --correlations
    python -m scripts.bench.search [--seeds 24] [--only NAME ...] [--json scripts/records/search.json]
                                   [--chart scripts/records/search.svg]

scripts.bench.search.record recorded the curves; nothing is trained here. Regret is the share by which the annealed loss
at full length of the configuration that a strategy would promote (the mean over the recorded training seeds) is above
the best recorded one. Compute is in full runs: all samples trained by the search, over the full run's; a run that is
continued is counted once. Each strategy searches each task under `--seeds` seeds, which take the recorded training
seeds in rotation. Of a strategy's trial lengths the best by mean regret at a quarter of a full run is reported. With
--only, the record keeps its rows of other strategies.
"""

import argparse
import json
import multiprocessing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench.common import Record, build_parser, run_benchmark
from scripts.bench.search.chart import write_chart
from scripts.bench.search.contenders import CONTENDERS
from scripts.bench.search.correlations import correlate, format_correlations
from scripts.bench.search.curves import Curves, Floats, find_curves
from scripts.bench.search.replay import (
    BUDGETS,
    COMPUTE,
    GOAL,
    JUDGED_AT,
    Job,
    find_compute,
    run_job,
    summarize_regrets,
)
from trainer.errors import UserError

TASKS = ("text", "speech")


class Replays:
    """The searches of all strategies, on several processes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.tasks, self.seeds, self.fill = arguments.tasks, arguments.seeds, arguments.fill
        self.pool = multiprocessing.get_context("spawn").Pool(arguments.workers)

    def run(self, contender: str, variants: Iterable[str], budget: float) -> dict[str, Floats]:
        """[task, seed, 2, compute] by variant."""
        jobs = [
            Job(contender, variant, task, seed, budget, self.fill)
            for variant in variants
            for task in self.tasks
            for seed in range(self.seeds)
        ]
        results = self.pool.map(run_job, jobs, chunksize=5)
        shape = (-1, len(self.tasks), self.seeds, 2, len(COMPUTE))
        return dict(zip(variants, np.array(results).reshape(shape), strict=True))

    def summarize(self, contender: str) -> dict[str, Any]:
        """The row of its best variant. The others are replayed only up to the compute at which they are compared."""
        variants, at = list(CONTENDERS[contender]), find_compute(JUDGED_AT)
        results = self.run(contender, variants, JUDGED_AT)
        regrets = {variant: round(float(result[:, :, 0, at].mean()), 5) for variant, result in results.items()}
        best = min(regrets, key=lambda variant: regrets[variant])
        row = summarize_regrets(self.run(contender, [best], COMPUTE[-1])[best], self.tasks)
        return {"name": contender, "variant": best, **row, "variants": regrets}


def format_row(row: dict[str, Any], width: int) -> str:
    values = "".join(f"{regret:>8.2%}" for regret in row["regret"])
    reached = "never" if row["compute_to_goal"] is None else f"{row['compute_to_goal']:.3g}"
    outside = row["outside"][BUDGETS.index(JUDGED_AT)]
    return f"{row['name']:{width}}{row['variant']:18}{values}{reached:>9}{outside:>9.3f}"


def replay_all(arguments: argparse.Namespace, names: Sequence[str]) -> list[dict[str, Any]]:
    """Replay and print the strategies, one after the other."""
    width = max(map(len, names)) + 2
    head = "".join(f"{budget:>8g}" for budget in BUDGETS)
    print(f"{'':{width}}{'':18}  mean regret after the compute of N full runs")
    print(f"{'strategy':{width}}{'trial length':18}{head}{f'to {GOAL:.1%}':>9}{'outside':>9}")
    rows, replays = [], Replays(arguments)
    with replays.pool:
        for name in names:
            rows.append(replays.summarize(name))
            print(format_row(rows[-1], width), flush=True)
    return rows


def print_correlations(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    curves = {task: Curves.load_recorded(find_curves(task)) for task in arguments.tasks}
    for task, each in curves.items():
        known = each.recorded
        print(f"{task}: {known[..., 0].sum()} of {known[..., 0].size} configurations, {known.sum()} curves")
    rows = {task: correlate(each) for task, each in curves.items()}
    print("rank correlation with the annealed loss at full length, and the regret of the lowest")
    print(format_correlations(rows), flush=True)
    return rows


def measure(arguments: argparse.Namespace) -> Record:
    names = [name for name in CONTENDERS if not arguments.only or name.startswith(tuple(arguments.only))]
    if not names:
        raise UserError(f"--only {' '.join(arguments.only)}: the strategies are {', '.join(CONTENDERS)}")
    curves = {} if arguments.correlations else load_all(arguments)
    correlations = print_correlations(arguments)
    kept = read_kept_rows(arguments, names)
    rows = [] if arguments.correlations else [*kept, *replay_all(arguments, names)]
    # A kept row's tool may not be installed here.
    order = {name: place for place, name in enumerate(CONTENDERS)}
    rows.sort(key=lambda row: order.get(row["name"], len(order)))
    if arguments.chart and rows:
        write_chart(arguments.chart, rows, f"{' and '.join(arguments.tasks)}, {arguments.seeds} seeds each")
    return {
        "tasks": arguments.tasks,
        "seeds": arguments.seeds,
        "length": {task: each.length for task, each in curves.items()},
        "budgets": BUDGETS,
        "compute": COMPUTE.round(5).tolist(),
        "correlations": correlations,
        "rows": rows,
    }


def read_kept_rows(arguments: argparse.Namespace, names: Sequence[str]) -> list[dict[str, Any]]:
    """The other strategies' rows of the record. Raises UserError if they were measured under other seeds."""
    if not (arguments.only and arguments.json and arguments.json.exists()):
        return []
    record = json.loads(arguments.json.read_text(encoding="utf-8"))
    if (record["seeds"], record["tasks"]) != (arguments.seeds, arguments.tasks):
        raise UserError(f"{arguments.json} has --seeds {record['seeds']} --tasks {' '.join(record['tasks'])}")
    return [row for row in record["rows"] if row["name"] not in names]


def load_all(arguments: argparse.Namespace) -> dict[str, Curves]:
    """Raises UserError where a curve is missing, before anything is replayed."""
    return {task: Curves.load(find_curves(task), fill=arguments.fill) for task in arguments.tasks}


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--correlations", action="store_true", help="only these, also of unfinished recordings")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--workers", type=int, help="processes. Default: one a core")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only strategies whose names start with NAME")
    parser.add_argument("--fill", action="store_true", help="for trying: missing curves are those of their neighbours")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="where the SVG chart is written")
    run_benchmark(parser, measure, packages=("optuna",), rows="rows")


if __name__ == "__main__":
    main()
