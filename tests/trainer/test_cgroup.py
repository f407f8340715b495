"""The memory that a container may take, read from files such as the kernel shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from trainer import memory
from trainer.cgroup import memory_left, memory_limit
from trainer.memory import available_memory

GB = 10**9


def group(folder: Path, limit: str, used: int = 0, cached: int = 0) -> None:
    """A control group of version 2."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"memory.max": limit, "memory.current": str(used), "memory.stat": f"anon 5\ninactive_file {cached}\n"}
    write(folder, files)


def write(folder: Path, files: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def member(folder: Path, text: str) -> Path:
    path = folder / "cgroup"
    path.write_text(text)
    return path


def test_container_memory_counts_the_file_cache_as_free(tmp_path: Path) -> None:
    group(tmp_path, f"{8 * GB}\n", used=5 * GB, cached=2 * GB)
    own = member(tmp_path, "0::/\n")
    assert memory_limit(tmp_path, own) == 8 * GB
    assert memory_left(tmp_path, own) == 5 * GB


def test_tightest_of_the_groups_above_counts(tmp_path: Path) -> None:
    group(tmp_path / "user.slice/run.scope", "max", used=1 * GB)
    group(tmp_path / "user.slice", str(6 * GB), used=4 * GB)
    group(tmp_path, str(100 * GB), used=4 * GB)
    own = member(tmp_path, "0::/user.slice/run.scope\n")
    assert (memory_limit(tmp_path, own), memory_left(tmp_path, own)) == (6 * GB, 2 * GB)


def test_version_1_is_read_too_and_its_largest_number_is_no_limit(tmp_path: Path) -> None:
    files = {"memory.usage_in_bytes": str(GB), "memory.stat": "inactive_file 1\ntotal_inactive_file 0\n"}
    write(tmp_path / "memory", files | {"memory.limit_in_bytes": str(4 * GB)})
    # The path is the host's, and leads nowhere from inside.
    own = member(tmp_path, "9:name=systemd:/\n4:memory:/docker/abc\n0::/\n")
    assert (memory_limit(tmp_path, own), memory_left(tmp_path, own)) == (4 * GB, 3 * GB)
    write(tmp_path / "memory", {"memory.limit_in_bytes": "9223372036854771712"})
    assert memory_left(tmp_path, own) is None


def test_no_limit_and_no_control_groups_are_none(tmp_path: Path) -> None:
    assert memory_left(tmp_path, tmp_path / "missing") is None
    assert memory_left(tmp_path, member(tmp_path, "0::/nowhere\n")) is None


def test_more_than_the_limit_leaves_nothing(tmp_path: Path) -> None:
    group(tmp_path, str(GB), used=2 * GB)
    assert memory_left(tmp_path, member(tmp_path, "0::/\n")) == 0


def test_run_may_use_the_memory_left_by_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_left", lambda: 123)
    assert available_memory("cpu") == 123
    monkeypatch.setattr(memory, "memory_left", lambda: 10**15)
    assert available_memory("cpu") <= psutil.virtual_memory().total
