"""Formats bytes; `trainer.clock` formats seconds."""

from __future__ import annotations


def format_bytes(number: float) -> str:
    """12.3 GB, 45.6 MB or 789 kB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number / 1e3:.0f} kB"
