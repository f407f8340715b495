"""The rooms of the project: imports run one way, and the trainer knows nothing of studies."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "trainer": {"trainer"},
    "studies": {"studies", "trainer"},
    "tuner": {"tuner", "trainer"},
}
NEVER = {"trainer": {"optuna", "optuna_dashboard"}, "studies": {"optuna"}, "tuner": set()}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        ours = imported(path) & ALLOWED.keys()
        assert ours <= ALLOWED[package], f"{path} imports {ours - ALLOWED[package]}"
        assert not imported(path) & NEVER[package], path
