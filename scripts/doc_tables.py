"""Writes the tables of measurements in README.md and docs/ from scripts/records/.

    python scripts/doc_tables.py            # write them
    python scripts/doc_tables.py --check    # exit 1 if a page differs from the records

A table is the text between `<!-- table: NAME -->` and `<!-- /table -->`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "scripts" / "records"
DOCS = ("benchmarks", "search", "scale", "operations")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in DOCS)]
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.S)
Record = dict[str, Any]

BUDGETS = ("1/32", "1/16", "1/8", "1/4", "1/2")
"""Compute of a search, in full runs, as its record has them."""
QUARTER = BUDGETS.index("1/4")
NOT_ON_A_GPU = "Not run on a GPU yet."


def format_spread(values: Record, scale: float = 1.0, digits: int = 0) -> str:
    """Median and quartiles."""
    median, low, high = (f"{values[key] * scale:,.{digits}f}" for key in ("median", "q1", "q3"))
    return f"{median} ({low}-{high})"


def format_source(record: Record, runs: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"`{record['command']}`: {record['device']}, {runs}; {versions}."


def format_optimizer(record: Record) -> Iterator[str]:
    rows = record["optimizers"]
    runs = rows["prodigyopt"]["step_s"]["runs"]
    yield f"{record['parameters'] / 1e6:.1f} M parameters in {record['tensors']} tensors."
    yield format_source(record, f"median and quartiles of {runs} rounds")
    yield ""
    yield "| | ms a step | speed-up | over the bandwidth bound | first step, s | 100 steps, s | memory, MB |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name, row in rows.items():
        yield (
            f"| {name} | {format_spread(row['step_s'], 1e3, 1)} | {row['speedup_over_prodigyopt']['median']:.2f} "
            f"| {row['over_bound']['median']:.2f} | {row['first_step_s']['median']:.2f} "
            f"| {row['100_steps_s']['median']:.1f} | {row['memory_added_mb']['median']:.0f} |"
        )


def format_loader(record: Record) -> Iterator[str]:
    runs = record["ways"]["packed, 0 workers"]["samples_a_second"]["runs"]
    yield f"{record['corpus']['num_samples']:,} samples, batches of {record['batch_size']}."
    yield format_source(record, f"median and quartiles of {runs} rounds")
    yield ""
    yield "| | samples/s | packed is |"
    yield "|---|---:|---:|"
    for name, row in record["ways"].items():
        faster = row["speedup_of_packed"]["median"]
        yield f"| {name} | {format_spread(row['samples_a_second'])} | {f'{faster:.1f}x' if faster != 1 else ''} |"


def format_loss(record: Record) -> Iterator[str]:
    cases = record["cases"]
    runs = next(iter(next(iter(cases.values())).values()))["seconds"]["runs"]
    yield format_source(record, f"medians of {runs} rounds")
    yield ""
    forms = list(next(iter(cases.values())))
    yield "| | " + " | ".join(f"{form}, ms | MB" for form in forms) + " |"
    yield "|---|" + "---:|---:|" * len(forms)
    for case, rows in cases.items():
        cells = [f"{row['seconds']['median'] * 1e3:.0f} | {row['memory_mb']['median']:.0f}" for row in rows.values()]
        yield f"| {case} | " + " | ".join(cells) + " |"


def format_training(record: Record) -> Iterator[str]:
    for number, (size, measured) in enumerate(record["sizes"].items()):
        rows = measured["contenders"]
        runs = rows["ours"]["tokens_a_second"]["runs"]
        yield from [""] if number else []
        yield f"{size.capitalize()}: {measured['parameters'] / 1e6:.1f} M parameters, {measured['precision']}."
        yield format_source(record, f"median and quartiles of {runs} rounds of {record['steps_a_turn']} steps")
        yield ""
        yield "| | real tokens/s | ms a step | real tokens | / bare loop |"
        yield "|---|---:|---:|---:|---:|"
        for name, row in rows.items():
            yield (
                f"| {name} | {format_spread(row['tokens_a_second'])} | {row['step_s']['median'] * 1e3:.0f} "
                f"| {row['real_token_share']:.1%} | {format_spread(row['over_bare_loop'], 1, 3)} |"
            )


def format_end_to_end(record: Record) -> Iterator[str]:
    for size, measured in record["sizes"].items():
        rows, steps = measured["contenders"], record["end_to_end_steps"]
        yield f"{size.capitalize()}, {steps:,} steps from the start of the process."
        yield format_source(record, "one after the other")
        yield ""
        yield "| | seconds | real tokens/s |"
        yield "|---|---:|---:|"
        for name, row in rows.items():
            yield f"| {name} | {row['end_to_end']['seconds']:.0f} | {row['end_to_end']['tokens_a_second']:,.0f} |"


def format_search(record: Record) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    yield "![mean regret over compute](../scripts/records/search.svg)"
    yield ""
    yield (
        f"`{record['command']}`: mean of {record['seeds']} seeds on each of {' and '.join(record['tasks'])}; "
        f"in brackets the 95% interval over seeds, by bootstrap; {versions}."
    )
    yield ""
    yield f"| mean regret at N full runs | {' | '.join(BUDGETS)} | to 0.5% | not in the full run |"
    yield "|---|" + "---:|" * (len(BUDGETS) + 2)
    for row in record["rows"]:
        name = f"**{row['name']}**" if row["name"].startswith("ours") else row["name"]
        variant = f" ({row['variant']})" if row["variant"] else ""
        values = [f"{regret:.2%}" for regret in row["regret"]]
        values[QUARTER] = format_regret(row)
        reached = "never" if row["compute_to_goal"] is None else f"{row['compute_to_goal']:.2g}"
        yield f"| {name}{variant} | {' | '.join(values)} | {reached} | {row['outside'][QUARTER]:.2f} |"


def format_regret(row: Record) -> str:
    """The mean regret at a quarter of a full run's compute, and its interval."""
    low, high = row["interval"][QUARTER]
    return f"{row['regret'][QUARTER]:.2%} ({low:.2%}-{high:.2%})"


def format_tasks(row: Record, at: int) -> str:
    """The mean regret at a place of the compute, and that of each task."""
    tasks = ", ".join(f"{task} {values[at]:.2%}" for task, values in row["tasks"].items())
    return f"{row['mean'][at]:.2%} ({tasks})"


def format_correlations(record: Record) -> Iterator[str]:
    tasks = record["correlations"]
    heads = (f"{task}: all | best third | regret of the lowest" for task in tasks)
    yield f"| loss at a share of the full length | {' | '.join(heads)} |"
    yield "|---|" + "---:|" * 3 * len(tasks)
    for rows in zip(*tasks.values(), strict=True):
        cells = (f"{row['all']:.2f} | {row['best_third']:.2f} | {row['regret']:.2%}" for row in rows)
        yield f"| {rows[0]['loss']}, 1/{rows[0]['share']} | {' | '.join(cells)} |"


def format_gpu_check(record: Record) -> Iterator[str]:
    """The goals of `python -m scripts.gpu_check`."""
    if not record:
        yield NOT_ON_A_GPU
        return
    yield format_source(record, "each figure from one run")
    yield ""
    yield "| goal | wanted | found | |"
    yield "|---|---|---|---|"
    for goal in record["goals"]:
        verdict = {True: "held", False: "**missed**", None: ""}[goal["held"]]
        yield f"| {goal['goal']} | {goal['wanted']} | {goal['found']} | {verdict} |"


def format_gpu_bench(record: Record) -> Iterator[str]:
    """The users' table, from the same record."""
    bench = record.get("stages", {}).get("table", {})
    if "rows" in bench:
        yield from format_bench(bench)
    else:
        yield NOT_ON_A_GPU


def format_bench(record: Record) -> Iterator[str]:
    yield format_source(
        record, f"batches of {record['batch_size']}, medians of {record['rounds']} rounds of {record['steps']} steps"
    )
    yield ""
    yield "| | real tokens/s | speed-up | least-most | peak memory, MB | real tokens |"
    yield "|---|---:|---:|---:|---:|---:|"
    titles = {"cumulative": "one after the other", "alone": "alone"}
    group = "baseline"
    for row in record["rows"]:
        if row["group"] != group:
            group = row["group"]
            if group in titles:
                yield f"| *{titles[group]}* | | | | | |"
        name = f"+ {row['name']}" if group in titles else f"**{row['name']}**"
        if row["speedup"] is None:
            yield f"| {name} | {row['note'].partition(':')[0]} | | | | |"
            continue
        low, high = row["spread"]["speedup"]
        yield (
            f"| {name} | {row['tokens_per_second']:,.0f} | {row['speedup']:.2f} | {low:.2f}-{high:.2f} "
            f"| {row['peak_memory_bytes'] / 1e6:,.0f} | {row['real_token_share']:.1%} |"
        )


def format_headline(search: Record, training: Record, end_to_end: Record, *records: Record) -> Iterator[str]:
    """The README's six figures."""
    epyc, xeon, bench, loader, memory = records
    quarter = search["compute"].index(0.25)
    regrets = {row["name"]: format_tasks(row, quarter) for row in search["rows"]}
    ray = regrets.get("Ray's ASHA")
    seconds = {
        name: f"{row['end_to_end']['seconds']:.0f}" for name, row in end_to_end["sizes"]["demo"]["contenders"].items()
    }
    loops = [format_spread(size["contenders"]["ours"]["over_bare_loop"], 1, 2) for size in training["sizes"].values()]
    prodigy = [record["optimizers"]["ours, d rests"]["speedup_over_prodigyopt"]["median"] for record in (epyc, xeon)]
    trainer = next(row for row in bench["rows"] if row["group"] == "trainer")
    low, high = trainer["spread"]["speedup"]
    packed = loader["ways"]["npy, 0 workers"]["speedup_of_packed"]["median"]
    ratios = memory["estimate_over_measured"].values()
    error = max(abs(1 - ratio[end]) for ratio in ratios for end in ("min", "max"))
    yield "| | measured | compared with |"
    yield "|---|---|---|"
    for name, page, figure, reference in (
        (
            "search",
            "search.md",
            f"for a quarter of a full run's compute, {regrets.get('ours')} above the best setting's loss",
            f"Optuna's default sampler: {regrets.get('TPE, no pruner')}; Ray's ASHA: "
            f"{ray}; on speech, within the noise of training",
        ),
        (
            "training",
            "benchmarks.md#training-frameworks",
            f"{end_to_end['end_to_end_steps']:,} steps in {seconds['ours']} s; tokens/s over a bare loop at two sizes: "
            f"{' and '.join(loops)}",
            f"transformers {seconds['transformers']} s, Lightning {seconds['lightning']} s, "
            f"bare loop {seconds['bare loop']} s",
        ),
        (
            "optimizations",
            "benchmarks.md#each-optimization",
            f"{trainer['speedup']:.2f} ({low:.2f}-{high:.2f}) times the tokens/s",
            "an eager float32 loop with AdamW",
        ),
        (
            "Prodigy's step",
            "benchmarks.md#prodigys-step",
            f"{prodigy[0]:.2f} and {prodigy[1]:.2f} times as fast on two CPUs, while d is constant",
            "prodigyopt",
        ),
        (
            "packed data",
            "benchmarks.md#reading-data",
            f"{packed:.1f} times the samples/s",
            ".npy files without loader workers",
        ),
        (
            "memory estimate",
            "benchmarks.md#memory",
            f"within {error:.1%} at {memory['estimate_over_measured']['training_ratio']['runs']} sizes (float32)",
            "measured peak on a CPU",
        ),
    ):
        yield f"| [{name}](docs/{page}) | {figure} | {reference} |"


def format_attacks(record: Record) -> Iterator[str]:
    yield f"`{record['command']}`: {record['device']}."
    yield ""
    yield "| attack | attempts | failures | seconds |"
    yield "|---|---:|---:|---:|"
    for name, row in record["stages"].items():
        yield f"| {name.replace('_', ' ')} | {row['attempts']:,} | {row['num_failures']} | {row['seconds']:,.0f} |"


def format_workers(record: Record) -> Iterator[str]:
    yield format_source(record, f"{record['reports']} reports a trial, one every {record['period_s']:g} s")
    yield ""
    yield "| storage | workers | a report, ms | 95% of them, ms | between two trials, s |"
    yield "|---|---:|---:|---:|---:|"
    for kind, rows in record["workers"].items():
        for row in rows:
            report, gap = row["report_s"], row["gap_s"]
            yield (
                f"| {kind} | {row['workers']} | {1e3 * report['median']:.0f} | {1e3 * report['p95']:.0f} "
                f"| {gap['median']:.2f} |"
            )


def format_trials(record: Record) -> Iterator[str]:
    columns = {
        "first_ask_s": "first ask",
        "ask_s": "next ask",
        "page_s": "page's update",
        "dashboard_s": "dashboard's page",
        "status_s": "`tuner status`",
    }
    yield f"| storage | trials | {' | '.join(f'{title}, s' for title in columns.values())} |"
    yield "|---|---:|" + "---:|" * len(columns)
    for kind, rows in record["trials"].items():
        for row in rows:
            yield f"| {kind} | {row['trials']:,} | {' | '.join(f'{row[key]:.2f}' for key in columns)} |"


TABLES: dict[str, tuple[Callable[..., Iterator[str]], list[str]]] = {
    "headline": (
        format_headline,
        [
            "search",
            "training_cpu",
            "end_to_end_cpu",
            "optimizer_epyc",
            "optimizer_xeon",
            "bench_cpu",
            "loader_cpu",
            "memory_cpu",
        ],
    ),
    "optimizer_epyc": (format_optimizer, ["optimizer_epyc"]),
    "optimizer_xeon": (format_optimizer, ["optimizer_xeon"]),
    "loss": (format_loss, ["loss_cpu"]),
    "loader": (format_loader, ["loader_cpu"]),
    "training": (format_training, ["training_cpu"]),
    "end_to_end": (format_end_to_end, ["end_to_end_cpu"]),
    "bench": (format_bench, ["bench_cpu"]),
    "gpu_check": (format_gpu_check, ["gpu_check"]),
    "gpu_bench": (format_gpu_bench, ["gpu_check"]),
    "search": (format_search, ["search"]),
    "correlations": (format_correlations, ["search"]),
    "attacks": (format_attacks, ["attacks"]),
    "scale_workers": (format_workers, ["scale"]),
    "scale_trials": (format_trials, ["scale"]),
}
"""By name: what formats a table, and the records that it reads."""


def read_record(name: str) -> Record:
    """An empty record if the GPU is not measured yet."""
    path = RECORDS / f"{name}.json"
    if name == "gpu_check" and not path.exists():
        return {}
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


def fill_tables(text: str) -> str:
    """Returns the page with each table written from its records."""

    def format_table(match: re.Match[str]) -> str:
        form, names = TABLES[match[2]]
        records = [read_record(name) for name in names]
        return match[1] + "\n".join(form(*records)) + "\n" + match[3]

    return BLOCK.sub(format_table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = fill_tables(text)
        if check and filled != text:
            sys.exit(f"{page.relative_to(ROOT)} differs from scripts/records: run scripts/doc_tables.py")
        if not check:
            page.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
