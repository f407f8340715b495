"""The report in a real browser: its plots are drawn, its sample plays, nothing is loaded, and no text runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.tuner.studies_for_tests import finished_study
from tuner.show.report import write_report
from tuner.study.record import StudyRecord

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser


def test_report_draws_its_plots_and_loads_nothing(page: Page, tmp_path: Path) -> None:
    path = write_report(StudyRecord.read(finished_study(tmp_path)), tmp_path / "study.html")
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url.partition(":")[0]))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_function("() => document.querySelectorAll('.plot .gtitle').length == 5")
    for title in ("Learning curves", "val/loss over the search space", "Parameter importance, by 11 trials"):
        page.get_by_text(title).first.wait_for()
    page.wait_for_function("() => document.querySelector('audio').duration == 1")
    assert page.title() == "Study toy", "text of the study ran as a script"
    assert set(requests) <= {"file", "data", "blob"} and errors == []
