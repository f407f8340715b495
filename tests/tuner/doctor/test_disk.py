"""Room for checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tuner.doctor.disk import MIN_FREE, check_checkpoints, check_free, check_run_root


def checkpoint(folder: Path, num_bytes: int) -> None:
    folder.mkdir(parents=True)
    with open(folder / "step_000000001.pth", "wb") as file:
        file.truncate(num_bytes)
    os.link(folder / "step_000000001.pth", folder / "latest.pth")


@pytest.mark.parametrize(("free", "state"), [(450e6, "ok"), (350e6, "warn"), (150e6, "fail")])
def test_next_checkpoint_is_as_large_as_the_last(tmp_path: Path, free: float, state: str) -> None:
    checkpoint(tmp_path / "toy" / "trial-00000", 200_000_000)
    found = check_free(tmp_path, "toy", free=free)
    assert found.state == state and bool(found.remedy) == (state != "ok")
    assert check_free(tmp_path, "other", free=free).state == "ok", "of another study nothing is known"


def test_full_disk_fails_for_a_new_study_too(tmp_path: Path) -> None:
    assert check_free(tmp_path / "runs", "toy", free=MIN_FREE - 1).state == "fail"
    assert check_free(tmp_path / "runs", "toy", free=MIN_FREE).state == "ok"
    assert not (tmp_path / "runs").exists()


def test_unusable_run_root_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "runs"):
        found = check_run_root(place)
        assert found is not None and found.state == "fail" and "is no folder" in found.message
    assert check_run_root(tmp_path / "runs") is None
    # Asked in the way of a user who may not write: root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    found = check_run_root(tmp_path / "runs")
    assert found is not None and found.state == "fail" and f"{tmp_path} is not writable" in found.message


def test_existing_checkpoints_count_as_free_room(tmp_path: Path) -> None:
    checkpoint(tmp_path / "toy" / "trial-00000", 3_000_000)
    found = check_checkpoints(tmp_path, "toy", checkpoint=10, best=5, num_trials=2, num_full=2)
    assert "3.0 MB in its existing ones" in found.message, "linked files once"
    assert found.state == "ok"
    assert check_checkpoints(tmp_path, "toy", checkpoint=10**15, best=5, num_trials=2, num_full=2).state == "fail"
