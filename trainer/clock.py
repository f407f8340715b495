"""Durations as text."""

from __future__ import annotations


def clock(seconds: float) -> str:
    """12.3s below a minute, else 4:05 or 12:34:56."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_hours(hours: float) -> str:
    """45.0 s, 1:28 min, 35.9 h or 1,036 h."""
    seconds = 3600 * hours
    if seconds < 60:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        return f"{clock(seconds)} min"
    return f"{hours:,.1f} h" if hours < 100 else f"{hours:,.0f} h"
