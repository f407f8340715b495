"""Okabe and Ito's colours, which the colour-blind tell apart. They only underline what words say."""

from __future__ import annotations

ORANGE, SKY_BLUE, GREEN = "#E69F00", "#56B4E9", "#009E73"
VERMILLION, PURPLE = "#D55E00", "#CC79A7"

STATE_STYLES = {
    "complete": GREEN,
    "running": SKY_BLUE,
    "interrupted": PURPLE,
    "pruned": ORANGE,
    "infeasible": VERMILLION,
    "failed": f"bold {VERMILLION}",
    "waiting": "dim",
}
