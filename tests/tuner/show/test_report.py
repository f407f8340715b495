"""tuner report: one file with everything in it, which runs and loads nothing of others, and replaces only its own."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.commands import Command
from tests.tuner.studies_for_tests import HTML, finished_study
from tuner.show import report
from tuner.show.plotly_json import Figure
from tuner.show.plots import parameter_importance
from tuner.show.report import MARK, render_report
from tuner.study.record import StudyRecord


class Tags(HTMLParser):
    """Every start tag with its attributes, and the text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] not in ("script", "style"):
            self.text += data


@pytest.fixture
def record(tmp_path: Path) -> StudyRecord:
    return StudyRecord.read(finished_study(tmp_path))


def test_report_has_every_part(record: StudyRecord) -> None:
    tags = Tags(html := render_report(record))
    for heading in ("Leaderboard", "Infeasible", "Full runs", "Samples", "Lineage", "Notes"):
        assert f"<h3>{heading}</h3>" in html
    plots = ["learning-curves", "landscape", "d-over-samples", "loss-and-hours", "parameter-importance"]
    assert [attrs["id"] for tag, attrs in tags.found if attrs.get("class") == "plot"] == plots
    assert "Heard by " in tags.text and "full run of trial 3, step 60: " in tags.text
    assert "tuner promote" not in html, "its reader can't run commands"


def test_report_loads_nothing_and_takes_no_text_as_html(record: StudyRecord) -> None:
    tags = Tags(render_report(record)).found
    sources = [attrs["src"] or "" for _, attrs in tags if "src" in attrs]
    assert [source.partition(",")[0] for source in sources] == ["data:audio/wav;base64"]
    assert [attrs.keys() for tag, attrs in tags if tag == "script"] == [{"nonce"}, {"nonce"}]
    assert not [tag for tag, attrs in tags if tag in ("img", "link", "iframe") or any(n[:2] == "on" for n in attrs)]


def test_text_of_a_plot_cannot_end_its_script() -> None:
    assert report._scripts({"plot": Figure([{"text": HTML}], {})}, "nonce").count("</script>") == 2


def test_samples_beyond_the_cap_are_counted(record: StudyRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_AUDIO_BYTES", 1000)
    html = render_report(record)
    assert "<audio" not in html and "1 files are left out" in html


def test_importance_is_that_of_the_parameter_that_decides(record: StudyRecord) -> None:
    figure = parameter_importance(record)
    assert figure is not None
    (bars,) = figure.data
    assert (bars["y"][0], len(bars["y"])) == ("d_coef", 3) and bars["x"][0] > 0.5


def test_report_is_replaced_and_other_files_are_kept(run_command: Command, tmp_path: Path) -> None:
    finished_study(tmp_path)
    (tmp_path / "mine.html").write_text("<html>mine</html>")
    (tmp_path / "folder").mkdir()
    command = ("report", "toy", "--storage", f"sqlite:///{tmp_path}/tuner.db", "--to")
    for _ in range(2):
        done = run_command(*command, "study.html")
        assert done.returncode == 0 and "study.html: " in done.stdout
    assert MARK in (tmp_path / "study.html").read_text()
    for name in ("mine.html", "folder"):
        refused = run_command(*command, name)
        assert refused.returncode == 2 and refused.stderr.endswith(
            f"{name} exists and is no report of tuner: choose another file.\n"
        )
    missing = run_command(*command, "nowhere/study.html")
    assert missing.returncode == 2 and "can't be written (No such file or directory)" in missing.stderr
    assert (tmp_path / "mine.html").read_text() == "<html>mine</html>"
    assert not list(tmp_path.glob(".*.partial"))
