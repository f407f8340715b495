"""The output of `tuner bench`: a table on the terminal, and a chart as an SVG."""

from __future__ import annotations

import importlib.util
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from trainer.errors import UserError
from trainer.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLOURS = {"baseline": "#999999", "cumulative": "#0072B2", "trainer": "#D55E00", "alone": "#56B4E9"}
HEADINGS = {
    "baseline": "",
    "cumulative": "One after the other: each row adds to the one above",
    "trainer": "",
    "alone": "Alone: the baseline and one optimization",
}

Row = Mapping[str, Any]


def label(row: Row) -> str:
    return f"+ {row['name']}" if row["group"] in ("alone", "cumulative") else str(row["name"])


def print_table(result: Mapping[str, Any], console: Console) -> None:
    """One line per row, and the notes below the table."""
    if not console.is_terminal:
        console = Console(file=console.file, width=120)
    title = f"{result['device']}; batches of {result['batch_size']}, {result['rounds']} x {result['steps']} steps"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for heading in ("tokens/s", "speed-up", "least - most", "step", "peak memory", "real tokens", "first loss"):
        table.add_column(heading, justify="right", no_wrap=True)
    group = "baseline"
    for row in result["rows"]:
        if row["group"] != group:
            group = row["group"]
            table.add_section()
            if group in ("alone", "cumulative"):
                table.add_row("alone" if group == "alone" else "one after the other", style="italic")
        table.add_row(label(row), *_cells(row), style="bold" if group == "trainer" else None)
    console.print(table)
    lines = [f"tokens/s: real tokens, padding not counted. Peak memory: {result['peak_memory']}."]
    lines += notes(result["rows"])
    busy = ", ".join(f"{load:.1f}" for load in result["load_average"])
    lines += [f"load average at the start: {busy}"]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def notes(rows: Sequence[Row]) -> list[str]:
    """One line for each note, with its groups."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["note"]:
            groups.setdefault((label(row), row["note"]), []).append(row["group"])
    return [
        f"{name}: {note}" if name == where[0] else f"{name} ({', '.join(where)}): {note}"
        for (name, note), where in groups.items()
    ]


def _cells(row: Row) -> list[str]:
    if row["tokens_per_second"] is None:
        left_out = ("not measured", "out of memory", "failed")
        return [next((word for word in left_out if word in row["note"]), "")] + [""] * 6
    spread = row["spread"]["speedup"]
    return [
        f"{row['tokens_per_second']:,.0f}",
        "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        "" if spread is None else f"{spread[0]:.2f} - {spread[1]:.2f}",
        f"{row['step_seconds'] * 1000:,.0f} ms",
        format_bytes(row["peak_memory_bytes"]),
        f"{row['real_token_share']:.0%}",
        f"{row['first_loss']:.3f}",
    ]


def check_chart_path(path: Path) -> None:
    """Refuse a chart that can't be written, before the measurement."""
    if path.suffix.lower() != ".svg":
        raise UserError(f"--chart {path}: the chart is an SVG; name it {path.with_suffix('.svg')}.")
    if not path.parent.is_dir():
        raise UserError(f"--chart {path}: there is no folder {path.parent}; make it first.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--chart {path} can't be written: name another file.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"--chart {path}: matplotlib is not installed: pip install 'prodigy-tuner[bench]'.")


def write_chart(result: Mapping[str, Any], path: Path) -> None:
    """Horizontal bars of real tokens per second, with a line from the slowest to the fastest round."""
    import matplotlib
    from matplotlib.figure import Figure

    rows: Sequence[Row] = result["rows"]
    groups = {group: [row for row in rows if row["group"] == group] for group in HEADINGS}
    num_lines = len(rows) + sum(bool(HEADINGS[group] and members) for group, members in groups.items())
    rounds = "" if result["rounds"] == 1 else ", a thin line from the least to the most"
    subtitle = (
        f"{result['device']}; batches of {result['batch_size']}; "
        f"median of {result['rounds']} x {result['steps']} steps{rounds}"
    )
    # Text stays text. A fixed salt and no date: equal results give equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tuner bench"}):
        figure = Figure((8, 0.24 * num_lines + 0.6), layout="constrained")
        axes = figure.subplots()
        axes.set_title(f"Real tokens a second\n{subtitle}", loc="left", fontsize=10)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(left=False, bottom=False, labelbottom=False)
        y, places = 0, {}
        for group, members in groups.items():
            if members and HEADINGS[group]:
                axes.text(0.01, y, HEADINGS[group], weight="bold", va="center", transform=axes.get_yaxis_transform())
                y += 1
            for row in members:
                _draw_bar(axes, row, y)
                places[y] = label(row)
                y += 1
        axes.set_yticks(list(places), list(places.values()))
        axes.set_ylim(num_lines - 0.4, -0.6)
        axes.margins(x=0.25)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_bar(axes: Axes, row: Row, y: int) -> None:
    style: Any = {"textcoords": "offset points", "va": "center", "fontsize": 9}
    if row["tokens_per_second"] is None:
        axes.annotate(textwrap.shorten(row["note"], 90), (0, y), (4, 0), color="#777777", **style)
        return
    value, (least, most) = row["tokens_per_second"], row["spread"]["tokens_per_second"]
    axes.barh(y, value, height=0.65, color=COLOURS[row["group"]])
    if most > least:
        axes.plot([least, most], [y, y], color="black", linewidth=1)
    times = "" if row["speedup"] is None else f" ({row['speedup']:.2f}x)"
    axes.annotate(f"{value:,.0f}{times}", (max(value, most), y), (5, 0), **style)
