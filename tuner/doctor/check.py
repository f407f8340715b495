"""What a check says, and how it is shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

State = Literal["ok", "warn", "fail"]
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Check:
    """What was looked at, how it is, and what to do about it."""

    name: str
    state: State
    """A run can't do with a "fail"; a "warn" costs time, or concerns some of a study's trials."""
    message: str
    remedy: str = ""


def show(checks: Sequence[Check], console: Console) -> None:
    """A line for each check, its remedy below it."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        line = Text(f"{check.state:5}", STYLES[check.state]) + Text(f"{check.name:{width}}  {check.message}")
        console.print(line, soft_wrap=True)
        if check.remedy:
            console.print(Text(f"{'':5}{'':{width}}  -> {check.remedy}"), soft_wrap=True)


def as_json(checks: Iterable[Check]) -> list[dict[str, Any]]:
    return [asdict(check) for check in checks]


def has_failed(checks: Iterable[Check]) -> bool:
    return any(check.state == "fail" for check in checks)
