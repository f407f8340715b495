"""The README's tables of measurements, made from scripts/records/.

    python scripts/readme_tables.py            # write them
    python scripts/readme_tables.py --check    # exit 1 where the README says something else than the records

In the README a table stands between `<!-- table: NAME -->` and `<!-- /table -->`.
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
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.S)
Record = dict[str, Any]


def spread(values: Record, scale: float = 1.0, digits: int = 0) -> str:
    """Median and quartiles."""
    median, low, high = (f"{values[key] * scale:,.{digits}f}" for key in ("median", "q1", "q3"))
    return f"{median} ({low}-{high})"


def source(record: Record, runs: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"`{record['command']}`: {record['device']}, {runs}; {versions}."


def optimizer(record: Record) -> Iterator[str]:
    rows = record["optimizers"]
    runs = rows["prodigyopt"]["step_s"]["runs"]
    yield f"{record['parameters'] / 1e6:.1f} M parameters in {record['tensors']} tensors."
    yield source(record, f"median and quartiles of {runs} rounds")
    yield ""
    yield "| | ms a step | speed-up | over the bandwidth bound | first step, s | 100 steps, s | memory, MB |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name, row in rows.items():
        yield (
            f"| {name} | {spread(row['step_s'], 1e3, 1)} | {row['speedup_over_prodigyopt']['median']:.2f} "
            f"| {row['over_bound']['median']:.2f} | {row['first_step_s']['median']:.2f} "
            f"| {row['100_steps_s']['median']:.1f} | {row['memory_added_mb']['median']:.0f} |"
        )


def loader(record: Record) -> Iterator[str]:
    runs = record["ways"]["packed, 0 workers"]["samples_a_second"]["runs"]
    yield f"{record['corpus']['num_samples']:,} samples, batches of {record['batch_size']}."
    yield source(record, f"median and quartiles of {runs} rounds")
    yield ""
    yield "| | samples/s | packed is |"
    yield "|---|---:|---:|"
    for name, row in record["ways"].items():
        faster = row["speedup_of_packed"]["median"]
        yield f"| {name} | {spread(row['samples_a_second'])} | {f'{faster:.1f}x' if faster != 1 else ''} |"


def loss(record: Record) -> Iterator[str]:
    cases = record["cases"]
    runs = next(iter(next(iter(cases.values())).values()))["seconds"]["runs"]
    yield source(record, f"medians of {runs} rounds")
    yield ""
    forms = list(next(iter(cases.values())))
    yield "| | " + " | ".join(f"{form}, ms | MB" for form in forms) + " |"
    yield "|---|" + "---:|---:|" * len(forms)
    for case, rows in cases.items():
        cells = [f"{row['seconds']['median'] * 1e3:.0f} | {row['memory_mb']['median']:.0f}" for row in rows.values()]
        yield f"| {case} | " + " | ".join(cells) + " |"


def training(record: Record) -> Iterator[str]:
    for number, (size, measured) in enumerate(record["sizes"].items()):
        rows = measured["contenders"]
        runs = rows["ours"]["tokens_a_second"]["runs"]
        yield from [""] if number else []
        yield f"{size.capitalize()}: {measured['parameters'] / 1e6:.1f} M parameters, {measured['precision']}."
        yield source(record, f"median and quartiles of {runs} rounds of {record['steps_a_turn']} steps")
        yield ""
        yield "| | real tokens/s | ms a step | real tokens | / bare loop |"
        yield "|---|---:|---:|---:|---:|"
        for name, row in rows.items():
            yield (
                f"| {name} | {spread(row['tokens_a_second'])} | {row['step_s']['median'] * 1e3:.0f} "
                f"| {row['real_token_share']:.1%} | {spread(row['over_bare_loop'], 1, 3)} |"
            )


def end_to_end(record: Record) -> Iterator[str]:
    for size, measured in record["sizes"].items():
        rows, steps = measured["contenders"], record["end_to_end_steps"]
        yield f"{size.capitalize()}, {steps:,} steps from the start of the process."
        yield source(record, "one after the other")
        yield ""
        yield "| | seconds | real tokens/s |"
        yield "|---|---:|---:|"
        for name, row in rows.items():
            yield f"| {name} | {row['end_to_end']['seconds']:.0f} | {row['end_to_end']['tokens_a_second']:,.0f} |"


def search(record: Record) -> Iterator[str]:
    shown = (0.5, 0.75, 1, 1.5, 2, 4)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    yield f"`{record['command']}`: mean of {record['seeds']} seeds; {versions}."
    yield ""
    yield "| mean regret after so many full runs' compute | " + " | ".join(f"{at:g}" for at in shown) + " | to 1% |"
    yield "|---|" + "---:|" * (len(shown) + 1)
    for row in record["rows"]:
        values = " | ".join(f"{row['mean'][record['compute'].index(at)]:.2%}" for at in shown)
        reached = "never" if row["compute_to_goal"] is None else f"{row['compute_to_goal']:g}"
        name = f"**{row['name']}**" if row["name"].startswith("prodigy-tuner") else row["name"]
        yield f"| {name} | {values} | {reached} |"


def bench(record: Record) -> Iterator[str]:
    yield source(
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


TABLES: dict[str, tuple[str, Callable[[Record], Iterator[str]]]] = {
    "optimizer_epyc": ("optimizer_epyc.json", optimizer),
    "optimizer_xeon": ("optimizer_xeon.json", optimizer),
    "loss": ("loss_cpu.json", loss),
    "loader": ("loader_cpu.json", loader),
    "training": ("training_cpu.json", training),
    "end_to_end": ("end_to_end_cpu.json", end_to_end),
    "bench": ("bench_cpu.json", bench),
    "search_demo": ("search_demo.json", search),
    "search_other": ("search_other.json", search),
}


def with_tables(text: str) -> str:
    """The README with every table as the records have it."""

    def table(match: re.Match[str]) -> str:
        file, form = TABLES[match[2]]
        record = json.loads((RECORDS / file).read_text(encoding="utf-8"))
        return match[1] + "\n".join(form(record)) + "\n" + match[3]

    return BLOCK.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    made = with_tables(text)
    if parser.parse_args().check:
        sys.exit("README.md: run scripts/readme_tables.py" if made != text else 0)
    readme.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
