"""The docs are true: their code runs, and their tables, trees, keys and links are right."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from trainer import TrainConfig
from trainer.config import Role, role_of
from trainer.laws import check_workload
from tuner import StudySpec
from tuner.study.keys import FullRunKeys, PromotionKeys, StudyKeys, TrialKeys

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README, TUNE, WORKLOAD, ARCHITECTURE = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/tune.md", "docs/workload.md", "docs/architecture.md")
)
PACKAGES = ("trainer", "tuner", "studies")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.S)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The README's study.toml beside the workload of docs/workload.md, as the working directory."""
    workload, _ = blocks(WORKLOAD, "python")
    (study,) = blocks(README, "toml")
    (tmp_path / "my_workload.py").write_text(workload)
    (tmp_path / "study.toml").write_text(study)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TUNER_STORAGE", raising=False)
    monkeypatch.delitem(sys.modules, "my_workload", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_workload_keeps_the_laws(folder: Path) -> None:
    spec = StudySpec.load("study.toml")
    assert spec.study.workload in WORKLOAD
    check_workload(spec.build_workload())


@pytest.mark.parametrize("page", [README, WORKLOAD], ids=["README", "workload"])
def test_python_of_the_page_runs(folder: Path, page: str) -> None:
    names: dict[str, Any] = ModuleType("page").__dict__
    exec(blocks(page, "python")[-1], names)
    assert names["result"].finished and (names["result"].run_dir / "latest.pth").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_toml_is_toml(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "toml"):
        tomllib.loads(block)


def test_tables_are_those_of_the_records() -> None:
    script = ROOT / "scripts" / "doc_tables.py"
    assert subprocess.run([sys.executable, str(script), "--check"]).returncode == 0


def section(page: str, heading: str) -> str:
    """The text below a heading, up to the next one of its level."""
    return page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def documented_keys(heading: str) -> dict[str, str]:
    """Keys of a section of study.toml, and their defaults as docs/tune.md has them."""
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section(TUNE, heading), re.M))


def check_keys(model: type[BaseModel], names: set[str], heading: str) -> None:
    documented = documented_keys(heading)
    assert documented.keys() == names
    for name in names:
        default = model.model_fields[name].default
        if default is PydanticUndefined:
            assert documented[name] in ("required", "")
        elif default is not None:
            found = documented[name].strip("`")
            assert found == json.dumps(default) or float(found) == default, f"{heading} {name}: {found}, not {default}"


@pytest.mark.parametrize("name", ["study", "trial", "full", "notify", "hooks"])
def test_keys_of_the_section_are_documented_with_their_defaults(name: str) -> None:
    annotation = StudySpec.model_fields[name].annotation
    model = next(each for each in (annotation, *get_args(annotation)) if isinstance(each, type))
    check_keys(model, set(model.model_fields), f"[{name}]")


def test_keys_of_train_are_documented_with_their_defaults() -> None:
    names = {
        name for name in TrainConfig.model_fields if role_of(TrainConfig, name) not in (Role.BUDGET, Role.SCHEDULE)
    }
    check_keys(TrainConfig, names, "[train]")


def files_of_the_tree() -> Iterator[str]:
    """Paths of the tree in docs/architecture.md; a folder ends with a slash."""
    folders: list[str] = []
    for line in blocks(section(ARCHITECTURE, "The tree"), "")[0].splitlines():
        name = line.split()[0]
        folders[(len(line) - len(line.lstrip())) // 2 :] = [name]
        yield "".join(folders)


def test_every_file_of_the_tree_exists() -> None:
    paths = list(files_of_the_tree())
    assert paths
    assert [
        path for path in paths if not ((ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file())
    ] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_of_the_package_is_in_the_tree(package: str) -> None:
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
    ours = {path for path in found if not path.endswith("__init__.py") and "/template/" not in path}
    assert ours - set(files_of_the_tree()) == set()


def test_readme_has_at_most_150_lines() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings: lower case, blanks as hyphens, without punctuation."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_stored_keys_are_those_of_the_record() -> None:
    table = ARCHITECTURE.partition("<!-- record keys -->")[2].partition("<!-- /record keys -->")[0]
    rows = [line.split("|") for line in table.splitlines() if line.count("|") >= 4]
    schemas: dict[str, type] = {"trial": TrialKeys, "full run": FullRunKeys}
    for on, schema in schemas.items():
        documented = {key for row in rows if row[1].strip() == on for key in re.findall(r"`(\w+)`", row[2])}
        assert documented == schema.__annotations__.keys()
    of_study = {key for row in rows if "study" in row[1] for key in re.findall(r"`(\w+)`", row[2])}
    assert of_study == StudyKeys.__annotations__.keys()
    (promotions,) = (row[3] for row in rows if "`promotions`" in row[2])
    assert set(re.findall(r"`(\w+)`", promotions)) == PromotionKeys.__annotations__.keys()
