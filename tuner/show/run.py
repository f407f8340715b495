"""One run for a person: a live block on a terminal, plain lines at each validation elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trainer.clock import clock
from trainer.device_monitor import CPU_MEMORY, GPU_MEMORY, GPU_UTILIZATION
from tuner.show.live import Renewed, share_done
from tuner.show.palette import GREEN

if TYPE_CHECKING:
    from trainer import TrainResult


@dataclass(frozen=True)
class Saved:
    """A checkpoint."""

    name: str
    step: int
    at: float
    """Time on the monotonic clock."""


class RunDisplay:
    """Shows one run. A context manager; a `CheckpointTracker`.

    Args:
        name: Such as "full run of trial 7".
        plain: Print plain lines on a terminal too.
        quiet: Print no plain lines, because the trainer's log is shown.
    """

    as_json = False

    def __init__(self, name: str, console: Console, *, plain: bool = False, quiet: bool = False) -> None:
        self.name, self.console, self._quiet = name, console, quiet
        self.step = self.samples = 0
        self.interval: dict[str, float] = {}
        """Values of the last log interval."""
        self.validation: dict[str, float] = {}
        """Values of the last validation, and the best ones so far."""
        self.saved: dict[str, Saved] = {}
        self._live = Renewed(self.render, console) if console.is_terminal and not plain else None

    def __enter__(self) -> RunDisplay:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        self.step, self.samples = step, samples
        if "val/loss" in values:
            self.validation = dict(values)
            if not self._live and not self._quiet:
                losses = _losses(values, "val/")
                text = f"{self.name}: step {step:,}, {samples:,} samples, {losses}"
                self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self.interval = dict(values)

    def checkpoint(self, name: str, *, step: int) -> None:
        self.saved = {**self.saved, name: Saved(name, step, time.monotonic())}

    def close(self) -> None:
        """Do nothing: `ended` prints the result."""

    def ended(self, result: TrainResult) -> None:
        """Print the result of the run."""
        values = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
        print(f"step {result.step}, {result.samples} samples: {values or 'not validated yet'}")
        print(f"checkpoints: {result.run_dir}")

    def render(self, now: float | None = None) -> RenderableType:
        """The block: progress, losses, speed, device, checkpoints, as far as they are known."""
        now = time.monotonic() if now is None else now
        interval, validation, saved = self.interval, self.validation, self.saved
        rows = [
            ("step", self._progress(interval)),
            ("train", _losses(interval, "train/", bare=True)),
            ("validation", _losses(validation, "val/", bare=True)),
            ("best", _losses(validation, "best/", bare=True)),
            ("rate", _rate(interval)),
            ("device", device_figures(interval)),
        ]
        rows += [
            (name.removesuffix(".pth"), f"step {one.step:,}, {clock(now - one.at)} ago")
            for name, one in sorted(saved.items(), key=lambda item: (not item[0].startswith("latest"), item[0]))
        ]
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column()
        for label, text in rows:
            if text:
                grid.add_row(Text(label, style="dim"), text)
        done = share_done(interval, self.samples)
        bar = ProgressBar(total=1.0, completed=done, width=60, complete_style=GREEN)
        return Group(Text(self.name, style="bold"), grid, bar)

    def _progress(self, interval: Mapping[str, float]) -> str:
        if not self.step:
            return "starting"
        text = f"{self.step:,}, {self.samples:,} samples"
        if "train/seconds_left" in interval:
            done = share_done(interval, self.samples)
            text += f", {done:.1%} done, about {clock(interval['train/seconds_left'])} left"
        return text


def device_figures(values: Mapping[str, float]) -> str:
    """`GPU 11.2 GB, 97% busy`, or the process's memory without a GPU."""
    parts = []
    if GPU_MEMORY in values:
        parts.append(f"GPU {_gigabytes(values[GPU_MEMORY])}")
    if GPU_UTILIZATION in values:
        parts.append(f"{values[GPU_UTILIZATION]:.0%} busy")
    if CPU_MEMORY in values:
        parts.append(f"{_gigabytes(values[CPU_MEMORY])} in the process")
    return ", ".join(parts)


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def _losses(values: Mapping[str, float], prefix: str, *, bare: bool = False) -> str:
    named = {name: value for name, value in values.items() if name.startswith(prefix) and name.endswith("loss")}
    return ", ".join(f"{name.removeprefix(prefix) if bare else name} {value:.4f}" for name, value in named.items())


def _rate(values: Mapping[str, float]) -> str:
    if "train/samples_per_second" not in values:
        return ""
    text = f"{values['train/samples_per_second']:.1f} samples/s, {values['train/tokens_per_second']:,.0f} tokens/s"
    wait = values.get("train/data_wait", 0.0)
    return f"{text}, learning rate {values['train/lr']:.3g}" + (f", {wait:.0%} waiting for data" if wait > 0.05 else "")
