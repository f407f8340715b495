"""What `tuner bench` shows: a table on the terminal, and a chart as an SVG that needs no library."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from trainer.errors import UserError

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = {"baseline": "#999999", "cumulative": "#0072B2", "trainer": "#D55E00", "alone": "#56B4E9"}
HEADINGS = {
    "baseline": "",
    "cumulative": "One after the other: each row adds to the one above",
    "trainer": "",
    "alone": "Alone: the baseline and one optimization",
}
LABEL_WIDTH, BAR_WIDTH, END_WIDTH, BAR, LINE = 150, 520, 190, 16, 25

Row = Mapping[str, Any]


def label(row: Row) -> str:
    return f"+ {row['name']}" if row["group"] in ("alone", "cumulative") else str(row["name"])


def print_table(result: Mapping[str, Any], console: Console) -> None:
    """One line a row; notes stand below, for they are long."""
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
    """One line for each note, with the groups that it is true of."""
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
        f"{row['peak_memory_bytes'] / 1e9:.2f} GB",
        f"{row['real_token_share']:.0%}",
        f"{row['first_loss']:.3f}",
    ]


def check_chart_path(path: Path) -> None:
    """Refuse a chart that could not be written, before anything is measured."""
    if path.suffix.lower() != ".svg":
        raise UserError(f"--chart {path}: it is written as SVG; name it {path.with_suffix('.svg')}.")
    if not path.parent.is_dir():
        raise UserError(f"--chart {path}: there is no folder {path.parent}; make it first.")


def write_chart(result: Mapping[str, Any], path: Path) -> None:
    """Horizontal bars of real tokens a second, each with its number; a line from the least to the most round."""
    path.write_text(chart(result), encoding="utf-8")


def chart(result: Mapping[str, Any]) -> str:
    """The SVG."""
    rows: Sequence[Row] = result["rows"]
    most = max((row["spread"]["tokens_per_second"][1] for row in rows if row["tokens_per_second"]), default=1.0)
    width = LABEL_WIDTH + BAR_WIDTH + END_WIDTH
    rounds = "" if result["rounds"] == 1 else ", a thin line from the least to the most"
    subtitle = (
        f"{result['device']}; batches of {result['batch_size']}; "
        f"median of {result['rounds']} x {result['steps']} steps{rounds}"
    )
    parts = [_text(12, 24, "Real tokens a second", size=16, weight="bold"), _text(12, 43, subtitle, fill="#555555")]
    y = 56.0
    for group in HEADINGS:
        members = [row for row in rows if row["group"] == group]
        if members and HEADINGS[group]:
            y += LINE
            parts.append(_text(12, y, HEADINGS[group], weight="bold"))
            y += 8
        for row in members:
            parts += _bar(row, y, BAR_WIDTH / most)
            y += LINE
    height = round(y + 12)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="Helvetica, Arial, sans-serif">\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _bar(row: Row, y: float, scale: float) -> Iterator[str]:
    baseline = y + BAR - 4
    yield _text(LABEL_WIDTH - 8, baseline, label(row), anchor="end")
    if row["tokens_per_second"] is None:
        yield _text(LABEL_WIDTH, baseline, textwrap.shorten(row["note"], 90), fill="#777777", style="italic")
        return
    least, most = (value * scale for value in row["spread"]["tokens_per_second"])
    length, colour = row["tokens_per_second"] * scale, COLOURS[row["group"]]
    yield f'<rect x="{LABEL_WIDTH}" y="{y:.1f}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>'
    middle = y + BAR / 2
    if most > least:
        ends = f'x1="{LABEL_WIDTH + least:.1f}" x2="{LABEL_WIDTH + most:.1f}"'
        yield f'<line {ends} y1="{middle}" y2="{middle}" stroke="#000000" stroke-width="1.5"/>'
    times = "" if row["speedup"] is None else f" ({row['speedup']:.2f}x)"
    yield _text(LABEL_WIDTH + max(length, most) + 7, baseline, f"{row['tokens_per_second']:,.0f}{times}")


def _text(x: float, y: float, text: str, *, size: int = 12, fill: str = "#111111", **attributes: str) -> str:
    names = {"anchor": "text-anchor", "weight": "font-weight", "style": "font-style"}
    more = "".join(f' {names[name]}="{value}"' for name, value in attributes.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}"{more}>{escape(text)}</text>'
