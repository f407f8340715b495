"""The pictures of README.md and docs/: the dashboard, Aim and the terminal, of the quickstart's study.

    bash scripts/quickstart.sh        # minutes; earlier results are reused
    python -m scripts.screenshots [--run-root runs] [--only note] [--to scripts/screenshots]

Needs the system's Chromium and the extra `dev`. Each picture is a PNG, some 1,200 points across.
"""

from __future__ import annotations

import argparse
import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from PIL import Image
from rich.console import Console

from tests.browser.chromium import find_chromium, open_browser
from trainer.errors import UserError
from trainer.tracking import aim_run
from tuner.show.page import StudyPage
from tuner.show.server import make_dashboard
from tuner.show.status import status_parts
from tuner.study.optuna_internals import id_of, storage_of
from tuner.study.record import StudyRecord, full_study
from tuner.study.storage import load_study, open_storage

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_MS = 300_000
COLOURS = 256
PLOTS = ("Learning curves", "Prodigy's d", "Loss against time", "val/loss over the search space")
MARGIN = 12

# The pictures show no path of the machine that they were taken on.
REPLACE_THE_FOLDER = """
    folder => {
        const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        while (texts.nextNode()) {
            const node = texts.currentNode;
            if (node.data.includes(folder)) node.data = node.data.replaceAll(folder, '~/prodigy-tuner');
        }
    }
"""
# The browser finds the plots by their titles; the boxes are those of the surrounding cards.
BOXES = """
    titles => [...document.querySelectorAll('.js-plotly-plot')]
        .filter(plot => titles.some(title => plot.querySelector('.gtitle')?.textContent.startsWith(title)))
        .map(plot => plot.closest('.MuiCard-root') ?? plot).map(card => card.getBoundingClientRect().toJSON())
"""


class Pictures:
    """Takes the pictures of one study.

    Args:
        run_root: The folder of its runs and its Aim repository.
        to: The folder of the pictures.
    """

    def __init__(self, page: Page, study: optuna.Study, run_root: Path, to: Path) -> None:
        self.page, self.study, self.run_root, self.to = page, study, run_root, to

    def plots(self, dashboard: str) -> None:
        """The study's four plots, uncropped."""
        self.page.goto(f"{dashboard}/dashboard/studies/{id_of(self.study)}")
        self.page.wait_for_function(f"titles => ({BOXES})(titles).length == {len(PLOTS)}", arg=list(PLOTS))
        self._settle()
        boxes = self.page.evaluate(BOXES, list(PLOTS))
        left, top = min(box["x"] for box in boxes) - MARGIN, min(box["y"] for box in boxes) - MARGIN
        right, bottom = max(box["right"] for box in boxes), max(box["bottom"] for box in boxes)
        self._save("study-plots", clip=(left, top, right - left + MARGIN, bottom - top + MARGIN))

    def note(self, dashboard: str) -> None:
        self.page.goto(f"{dashboard}/dashboard/studies/{id_of(self.study)}/note")
        self.page.get_by_role("heading", name="Leaderboard").wait_for()
        self._save("study-note")

    def trial(self, dashboard: str) -> None:
        """The best one."""
        best = StudyRecord.read(self.study).ranked[0].number
        # At this width the values of d fit in one line.
        self.page.set_viewport_size({"width": 1340, "height": 900})
        self.page.goto(f"{dashboard}/dashboard/studies/{id_of(self.study)}/trials?numbers={best}")
        self.page.get_by_text("Intermediate Values").wait_for()
        self._save("trial")
        self.page.set_viewport_size({"width": 1200, "height": 900})

    def full_run(self, dashboard: str) -> None:
        """The full run's curve in the dashboard."""
        curves = full_study(self.study)
        assert curves is not None
        self.page.goto(f"{dashboard}/dashboard/studies/{id_of(curves)}")
        card = self.page.locator(".MuiCard-root", has=self.page.locator("#graph-intermediate-values"))
        # A function: the dashboard's Content-Security-Policy forbids the evaluation of text.
        plot = "document.getElementById('graph-intermediate-values')"
        self.page.wait_for_function(f"() => {plot}?.data?.[0]?.x.length > 1")
        self._settle()
        box = card.first.bounding_box()
        assert box is not None
        self._save("full-run", clip=(box["x"], box["y"], box["width"], box["height"]))

    def aim(self, _: str) -> None:
        """The full run's curves, on its page in Aim."""
        run = aim_run(StudyRecord.read(self.study).full_runs[-1].run_dir)
        with aim_up(self.run_root) as address:
            self.page.goto(f"{address}/runs/{run}/metrics")
            self.page.get_by_text("grad_norm").first.wait_for()
            if (skip := self.page.get_by_role("button", name="Skip")).is_visible():
                skip.click()
            self._settle()
            self._save("aim")

    def terminal(self, _: str) -> None:
        """`tuner status`: the table of a launch, and the curves."""
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            console = Console(record=True, width=100, file=nowhere, force_terminal=True, color_system="truecolor")
            for part in status_parts(StudyRecord.read(self.study)):
                console.print(part)
        title = f"tuner status {self.study.study_name}"
        self.page.set_content(f"<body style='margin:0'>{console.export_svg(title=title)}</body>")
        box = self.page.locator("svg").bounding_box()
        assert box is not None
        self._save("terminal", clip=(0, 0, box["width"], box["height"]))

    def _settle(self) -> None:
        """Wait until two screenshots are equal: plots are drawn in steps."""
        before = b""
        while (now := self.page.screenshot()) != before:
            before = now
            self.page.wait_for_timeout(1000)

    def _save(self, name: str, clip: tuple[float, float, float, float] | None = None) -> None:
        self.page.evaluate(REPLACE_THE_FOLDER, str(ROOT))
        area: Any = None if clip is None else dict(zip(("x", "y", "width", "height"), clip, strict=True))
        taken = self.page.screenshot(clip=area, full_page=clip is not None)
        path = self.to / f"{name}.png"
        # Few colours are enough for text and lines, and a third of the size.
        Image.open(io.BytesIO(taken)).convert("RGB").quantize(COLOURS).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


@contextmanager
def dashboard_of(study: optuna.Study) -> Iterator[str]:
    """Serves the study's storage read-only; yields its address with the token."""
    server, address = make_dashboard(storage_of(study), port=0, read_only=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def aim_up(repo: Path) -> Iterator[str]:
    """Serves an Aim repository; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("aim")), "up", "--repo", str(repo), "--host", "127.0.0.1"]
    environment = {**os.environ, "AIM_UI_TELEMETRY_ENABLED": "0"}
    # In its own process group: `aim up` starts workers.
    server = subprocess.Popen(
        [*command, "--port", str(port), "--workers", "1", "--yes"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for(lambda: _answers(port), PATIENCE_MS / 1000)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait_for(ready: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise UserError(f"aim up did not answer within {seconds:.0f} s: start it by hand to see why.")
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-root", type=Path, default=Path("runs"), help="of the quickstart")
    parser.add_argument("--study", default="korean-demo")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="plots, note, trial, full_run, aim, terminal")
    parser.add_argument("--to", type=Path, default=ROOT / "scripts/screenshots")
    arguments = parser.parse_args()
    executable = find_chromium()
    if executable is None:
        raise UserError("no Chromium on this machine: install the system's chromium.")
    run_root = arguments.run_root.resolve()
    if not (run_root / "tuner.db").is_file():
        raise UserError(f"{run_root} has no study: run scripts/quickstart.sh first.")
    study = load_study(arguments.study, open_storage(f"sqlite:///{run_root}/tuner.db"))
    StudyPage(study, run_root).update(now=True)
    arguments.to.mkdir(parents=True, exist_ok=True)
    with open_browser(executable) as browser, dashboard_of(study) as address:
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(PATIENCE_MS)
        page.goto(address)
        page.get_by_text(study.study_name).first.wait_for()
        pictures = Pictures(page, study, run_root, arguments.to)
        for name in arguments.only or ("plots", "note", "trial", "full_run", "aim", "terminal"):
            getattr(pictures, name)(address.partition("/?")[0])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"screenshots: {error}", file=sys.stderr)
        sys.exit(2)
