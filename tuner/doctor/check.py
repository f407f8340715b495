"""How checks are shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from trainer.check import Check as Check
from trainer.check import State as State

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def show(checks: Sequence[Check], console: Console) -> None:
    """Prints a line for each check, with its remedy below."""
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
