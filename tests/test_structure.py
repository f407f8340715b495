"""The directions of imports: each package imports only those below it, so that no two import each other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from studies.indextts2 import IndexTTS2
from studies.korean_chars import KoreanChars
from trainer.workload import Workload

ROOT = Path(__file__).parent.parent
CORE = {"trainer", "tuner.spec", "tuner.study", "tuner.promotion"}
BELOW = {
    "trainer": set(),
    "studies": {"trainer"},
    "tuner.spec": {"trainer"},
    "tuner.study": {"trainer", "tuner.spec"},
    "tuner.promotion": {"trainer", "tuner.spec", "tuner.study"},
    "tuner.show": CORE,
    "tuner.doctor": CORE,
    "tuner.bench": CORE,
    "tuner.new": {"trainer"},
    "tuner.api": CORE | {"tuner.show"},
    "tuner.cli": CORE | {"tuner", "tuner.api", "tuner.bench", "tuner.doctor", "tuner.new", "tuner.show"},
}
"""What each package may import of ours, besides itself; `tuner` alone is its public API."""
NEVER = {"trainer": {"optuna", "optuna_dashboard"}, "studies": {"optuna"}}


def files_of(package: str) -> list[Path]:
    path = ROOT / package.replace(".", "/")
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "tuner":
            is_module = [(ROOT / "tuner" / alias.name).exists() or alias.name == "api" for alias in node.names]
            yield from (
                f"tuner.{a.name}" if module else "tuner" for a, module in zip(node.names, is_module, strict=True)
            )
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def package_of(module: str) -> str | None:
    """Our package that a module belongs to; None for a module of others."""
    top, _, rest = module.partition(".")
    if top not in ("trainer", "studies", "tuner"):
        return None
    return f"{top}.{rest.partition('.')[0]}" if top == "tuner" and rest else top


@pytest.mark.parametrize("package", BELOW)
def test_package_imports_only_those_below_it(package: str) -> None:
    files = files_of(package)
    assert files
    for path in files:
        if "template" in path.parts:
            continue
        ours = {found for module in imported(path) if (found := package_of(module))} - {package}
        assert ours <= BELOW[package], f"{path} imports {ours - BELOW[package]}"
        others = {module.partition(".")[0] for module in imported(path)}
        assert not others & NEVER.get(package, set()), path


def test_every_package_has_its_place() -> None:
    places = {
        f"tuner.{path.stem}"
        for path in (ROOT / "tuner").iterdir()
        if path.stem[0] not in "_." and path.suffix in ("", ".py")
    }
    assert places - {"tuner.template"} <= BELOW.keys()


def test_no_two_packages_import_each_other() -> None:
    for package, below in BELOW.items():
        assert not [other for other in below if package in BELOW.get(other, ())], package


def test_stored_keys_are_named_in_their_files_alone() -> None:
    for path in files_of("tuner"):
        if path.name not in ("keys.py", "record.py", "optuna_internals.py"):
            assert not re.search(r"user_attrs?\b", path.read_text(encoding="utf-8")), path


def test_private_names_of_optuna_are_in_one_file() -> None:
    private = re.compile(
        r"\._(storage|study_id|trial_id|thread_local|backend|pop_waiting|cached)|\"_backend|optuna[\w.]*\._(?!_)|\"fixed_params"
    )
    for path in files_of("tuner"):
        if path.name != "optuna_internals.py":
            assert not private.search(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("workload", [IndexTTS2, KoreanChars])
def test_tuner_names_no_option_of_a_workload(workload: type[Workload]) -> None:
    for path in files_of("tuner"):
        text = path.read_text(encoding="utf-8")
        options = workload.model_fields.keys() - {
            "dropout",
            "duration",
            "width",
        }  # general words
        named = [option for option in options if f'"{option}"' in text]
        assert "template" in path.parts or not named, f"{path} names {named}"
