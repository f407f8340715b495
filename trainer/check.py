"""A check: its verdict, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """The result of a check, and the remedy."""

    name: str
    state: State
    """"fail": a run is impossible, or its result worth nothing; "warn": it takes longer, or some of it is affected."""
    message: str
    remedy: str = ""
