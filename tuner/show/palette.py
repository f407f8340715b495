"""Colours by Okabe and Ito, which colour-blind people can tell apart. They only repeat what words or markers show."""

from __future__ import annotations

ORANGE, SKY_BLUE, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"

STATE_STYLES = {
    "complete": GREEN,
    "running": SKY_BLUE,
    "interrupted": PURPLE,
    "pruned": ORANGE,
    "infeasible": VERMILLION,
    "failed": f"bold {VERMILLION}",
    "waiting": "dim",
}
