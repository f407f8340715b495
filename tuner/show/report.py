"""`tuner report`: a study as one HTML file that needs no network, to send to somebody without access to the storage."""

from __future__ import annotations

import json
import os
import secrets
from base64 import b64encode
from collections.abc import Iterator
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt
from optuna_dashboard import get_note

from trainer.errors import UserError
from tuner.show.files import leaderboard
from tuner.show.note import lineage, own_text, study_note
from tuner.show.plotly_json import Figure
from tuner.show.plots import figures, parameter_importance
from tuner.study.record import StudyRecord
from tuner.study.samples import read_all_samples

MARK = '<meta name="generator" content="prodigy-tuner report">'
"""In the first bytes of every report: only a file with it is replaced. It must never change."""
MAX_AUDIO_BYTES = 15_000_000
"""Of all samples together, before base64 adds a third: mail servers refuse more than some 25 MB."""

STYLE = """
body { font: 15px/1.5 system-ui, "Noto Sans KR", "Malgun Gothic", sans-serif; color: #222; max-width: 1100px;
  margin: 2em auto; padding: 0 1em }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: .25em .6em; border-bottom: 1px solid #ddd }
.plot { height: 460px; margin: 1em 0 }
audio { height: 32px; vertical-align: middle }
"""
DRAW = """
for (const [name, figure] of Object.entries(figures))
  Plotly.newPlot(name, figure.data, figure.layout, {responsive: true, displaylogo: false});
"""


def write_report(record: StudyRecord, path: Path) -> Path:
    """Write a study's report in place of an earlier one.

    Raises:
        UserError: The file exists and is no report, or can't be written.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.exists() and (not path.is_file() or MARK.encode() not in path.read_bytes()[:1000]):
            raise UserError(f"{path} exists and is no report of tuner: choose another file.")
        temporary.write_text(render_report(record), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}): choose another file.") from None
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)
    return path


def render_report(record: StudyRecord) -> str:
    """The HTML of a study's report. No text of the study is taken as HTML, and nothing is loaded from elsewhere."""
    plots = dict(figures(record))
    if (importance := parameter_importance(record)) is not None:
        plots["parameter-importance"] = importance
    own = own_text(get_note(record.study))
    csv = b64encode(leaderboard(record).encode()).decode()
    # The browser runs only scripts with this secret, and loads nothing.
    nonce = secrets.token_urlsafe(16)
    policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src data: blob:"
    title = escape(f"Study {record.name}")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{MARK}
<meta http-equiv="Content-Security-Policy" content="{policy}; media-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
{_html(study_note(record, promote=None, files={}))}
<p><a download="leaderboard.csv" href="data:text/csv;base64,{csv}">leaderboard.csv</a></p>
{"".join(f'<div class="plot" id="{name}"></div>' for name in plots)}
{"".join(_samples(record))}
{_html(lineage(record))}
{f"<h3>Notes</h3>{_html(own)}" if own else ""}
{_scripts(plots, nonce) if plots else ""}
</body></html>
"""


def _html(markdown: str) -> str:
    """Markdown as HTML; HTML and pictures in it stay text, and links can't run a script."""
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    html: str = renderer.render(markdown)
    return html.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")


def _scripts(plots: dict[str, Figure], nonce: str) -> str:
    from plotly.offline import get_plotlyjs

    # A name in the study must not be able to end the script.
    data = json.dumps({name: json.loads(plot.to_json()) for name, plot in plots.items()}).replace("<", "\\u003c")
    tag = f'<script nonce="{nonce}">'
    return f"{tag}{get_plotlyjs()}</script>{tag}const figures = {data};{DRAW}</script>"


def _samples(record: StudyRecord) -> Iterator[str]:
    """Players for the samples of the full runs, the newest first, as far as they fit."""
    sounds = [
        (f"full run of trial {run.trial}, step {samples.step:,}", path)
        for run in reversed(record.full_runs)
        for samples in reversed(read_all_samples(run.run_dir))
        for path in samples.files
        if path.suffix == ".wav"
    ]
    room, heading, left_out = MAX_AUDIO_BYTES, "<h3>Samples</h3>", 0
    for name, path in sounds:
        size = path.stat().st_size
        if size > room:
            left_out += 1
            continue
        room -= size
        data = b64encode(path.read_bytes()).decode()
        caption = escape(f"{name}: {path.stem}")
        yield f'{heading}<p><audio controls src="data:audio/wav;base64,{data}"></audio> {caption}</p>\n'
        heading = ""
    if left_out:
        yield f"{heading}<p>{left_out} files are left out: with them, the samples exceed {MAX_AUDIO_BYTES:,} bytes.</p>"
