"""The wheel has all files of the packages, and its `tuner new` works outside of a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tuner.new import FILES

ROOT = Path(__file__).parent.parent
PACKAGES = ("trainer", "tuner", "studies")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def test_wheel_is_complete_and_writes_a_study(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "77", reason="the build needs setuptools 77: pip install -U setuptools")
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    # The build leaves folders of its own in the source.
    ours = {path.relative_to(ROOT) for p in PACKAGES for path in (ROOT / p).rglob("*") if path.is_file()}
    ours = {path for path in ours if path.suffix in (".py", ".toml", ".typed")}
    packed = {path.relative_to(unpacked) for p in PACKAGES for path in (unpacked / p).rglob("*") if path.is_file()}
    assert packed == ours
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-P", "-m", "tuner", "new", "mine"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == sorted(FILES)
