"""Each surface as a whole, as one made study gives it, against a text file in `snapshots/`.

After an intended change, `RENEW_SNAPSHOTS=1 pytest tests/tuner/show/test_snapshots.py` writes the files anew; read them
with `git diff` before you commit them.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from tests.tuner.show.made_studies import add_everything, new_study, read
from tuner.show.files import leaderboard
from tuner.show.json_events import to_json
from tuner.show.note import full_note, promote_command, study_note
from tuner.show.plots import learning_curves
from tuner.show.status import status, status_parts
from tuner.show.table import confirmation_table
from tuner.study.record import StudyRecord

SNAPSHOTS = Path(__file__).parent / "snapshots"
FILES = {"study.toml": "/artifacts/1/a", "leaderboard.csv": "/artifacts/1/b"}


def show_note(record: StudyRecord) -> str:
    note = study_note(record, promote_command(record, Path("/runs")), FILES)
    return re.sub(r"Written [-\d]+ [\d:]+ UTC", "Written DATE TIME UTC", note)


def show_full_note(record: StudyRecord) -> str:
    return full_note(record, promote_command(record, Path("/runs")))


def show_status(record: StudyRecord) -> str:
    return show_on_terminal(*status_parts(record))


def show_confirmation(record: StudyRecord) -> str:
    assert record.confirmation is not None
    return show_on_terminal(confirmation_table(record.confirmation))


def show_on_terminal(*parts: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=120)
    assert isinstance(console.file, io.StringIO)
    console.print(*parts, sep="\n")
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def show_plot(record: StudyRecord) -> str:
    figure = learning_curves(record)
    assert figure is not None
    return json.dumps(json.loads(figure.to_json()), indent=1)


@pytest.mark.parametrize(
    ("name", "render"),
    [
        ("note.md", show_note),
        ("full_note.md", show_full_note),
        ("status.txt", show_status),
        ("status.json", lambda record: to_json(status(record), indent=1)),
        ("confirmation.txt", show_confirmation),
        ("leaderboard.csv", leaderboard),
        ("learning_curves.json", show_plot),
    ],
)
def test_surface_is_as_stored(name: str, render: Callable[[StudyRecord], str]) -> None:
    text = render(read(add_everything(new_study()))).rstrip("\n") + "\n"
    path = SNAPSHOTS / name
    if os.environ.get("RENEW_SNAPSHOTS"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
