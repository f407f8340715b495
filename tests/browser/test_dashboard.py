"""The dashboard as a person meets it, in a real browser. The pages draw slowly: every test waits for texts."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
import pytest

from tests.browser.conftest import at
from tuner import promote
from tuner.study.storage import load_study, open_storage
from tuner.study.tracked_run import Runtime

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

Serve = Callable[..., str]
# Functions: the dashboard's Content-Security-Policy forbids the evaluation of text.
FULL_CURVE_HAS = "number => document.getElementById('graph-intermediate-values')?.data?.[0]?.x?.length == number"
HAS_THREE_CURVES = """
    () => [...document.querySelectorAll('.js-plotly-plot')]
    .find(plot => plot.querySelector('.gtitle')?.textContent.startsWith('Learning curves'))?.data.length >= 3
"""


def test_browser_without_the_token_is_shown_the_way_in(serve: Serve, page: Page) -> None:
    page.goto(at(serve(), "/dashboard/studies/1"))
    page.get_by_text("Open the address that `tuner dashboard` printed").wait_for()
    assert "toy" not in page.inner_text("body")


def test_address_that_the_command_prints_opens_the_list_of_studies(url: str, page: Page) -> None:
    command = [sys.executable, "-m", "tuner", "dashboard", "--port", "0", "--storage", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().split()[1]
            page.goto(address)
            page.get_by_text("1. toy").wait_for()
        finally:
            process.terminate()
    assert "token=" in address and "token" not in page.url, "the token must not stay in the address bar"


def test_study_opens_with_its_plots_and_its_note(serve: Serve, page: Page) -> None:
    blocked: list[str] = []
    page.on("console", lambda message: blocked.append(message.text) if "Security Policy" in message.text else None)
    page.goto(serve())
    page.get_by_text("1. toy").click()
    for title in ("Learning curves", "Prodigy's d", "Loss against time", "val/loss over the search space"):
        page.get_by_text(title, exact=False).first.wait_for()
    page.wait_for_function(HAS_THREE_CURVES)
    page.get_by_title("Note").click()
    page.get_by_role("heading", name="Leaderboard").wait_for()
    note = page.inner_text("body")
    assert "the lowest val/loss after 160 samples" in note
    assert "baseline" in note and "tuner promote toy" in note
    assert blocked == [], "the page needs what the policy forbids"


def test_trial_shows_its_intermediate_values(url: str, serve: Serve, page: Page) -> None:
    trial = load_study("toy", open_storage(url)).trials[0]
    page.goto(serve())
    page.get_by_text("1. toy").click()
    page.get_by_title("Trials (List)").click()
    page.get_by_text("Trial 0", exact=True).first.click()
    page.get_by_text("Intermediate Values").wait_for()
    assert sorted(trial.intermediate_values) == [40, 80, 120, 160]
    for step, value in trial.intermediate_values.items():
        page.get_by_text(f"{step} {value}").wait_for()


class Gate:
    """A tracker that holds a run at each validation until it is let on."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)

    def let_on(self, validations: int = 1) -> None:
        self._permits.release(validations)

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        if "val/loss" in values:
            assert self._permits.acquire(timeout=300), "the run got no permit"

    def close(self) -> None:
        """Nothing to write at the end."""


def test_curve_of_a_full_run_grows_on_an_open_page(url: str, run_root: Path, serve: Serve, page: Page) -> None:
    gate, results = Gate(), []

    def train() -> None:
        study = load_study("toy", open_storage(url))
        results.append(promote(study, runtime=Runtime(run_root, track=False), trackers=[gate]))

    training = threading.Thread(target=train, daemon=True)
    training.start()
    try:
        page.goto(serve())
        reload, full = page.get_by_role("button", name="Reload"), page.get_by_text("2. toy.full")
        while not full.is_visible() and training.is_alive():
            reload.click()
            page.wait_for_timeout(200)
        full.click()
        # The curve of the trial from which it continues; each validation then adds a point, without a click.
        page.wait_for_function(FULL_CURVE_HAS, arg=4)
        gate.let_on()
        page.wait_for_function(FULL_CURVE_HAS, arg=5)
        assert training.is_alive()
    finally:
        gate.let_on(100)
        training.join()
    (result,) = results
    assert result.finished
    page.reload()
    page.get_by_text("Best Trial").wait_for()
    (curve,) = optuna.load_study(study_name="toy.full", storage=url).trials
    page.wait_for_function(FULL_CURVE_HAS, arg=len(curve.intermediate_values))
    assert len(curve.intermediate_values) > 5


def delete_study(page: Page, name: str) -> int:
    """As a person does it on the list of studies; the status of the answer."""
    card = page.locator(".MuiCard-root", has=page.get_by_text(name))
    card.get_by_role("button", name="delete study").click()
    with page.expect_response(lambda response: response.request.method == "DELETE") as answer:
        page.get_by_role("dialog").get_by_role("button", name="Yes").click()
    return answer.value.status


def test_read_only_dashboard_refuses_to_delete_a_study_with_a_message(url: str, serve: Serve, page: Page) -> None:
    page.goto(serve(read_only=True))
    page.get_by_text("1. toy").wait_for()
    assert delete_study(page, "1. toy") == 403
    page.get_by_text("Failed to delete study (id=1)").wait_for()
    page.reload()
    page.get_by_text("1. toy").wait_for()
    assert "toy" in optuna.get_all_study_names(url)


def test_with_the_token_a_study_can_be_deleted_in_the_browser(url: str, serve: Serve, page: Page) -> None:
    number = optuna.create_study(study_name="scratch", storage=url)._study_id
    page.goto(serve())
    assert delete_study(page, f"{number}. scratch") == 200
    page.get_by_text(f"Success to delete a study (id={number})").wait_for()
    page.get_by_text(f"{number}. scratch").wait_for(state="detached")
    page.get_by_text("1. toy").wait_for()
    assert "scratch" not in optuna.get_all_study_names(url)
