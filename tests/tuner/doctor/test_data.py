"""A spec's data: there, packed, and on its way to the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from tests.toy import Toy
from trainer import Role
from trainer.acceleration import Capabilities, RunSize, plan
from trainer.config import TrainConfig
from trainer.workload import DataPath
from tuner.doctor.check import Check
from tuner.doctor.data import check_loader, check_packing, check_paths
from tuner.spec.setups import Setup


class Rows:
    """Samples that can be packed: 400 bytes each."""

    lengths = np.ones(50, np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, ...]:
        return (np.full(100, index, np.int32),)


class Listed(Toy):
    """Reads the lists that it names, "PATH" or "PATH::language"; packs."""

    lists: tuple[str, ...] = ()
    output: Annotated[DataPath | None, Role.FREE] = None
    keep: Literal["auto"] | bool = "auto"

    def input_files(self) -> list[tuple[str, Path]]:
        return [("lists", Path(entry.partition("::")[0])) for entry in self.lists]

    def unpacked(self) -> Listed:
        return self.model_copy(update={"keep": False})

    def train_data(self) -> Any:
        return Rows()

    def val_data(self) -> Any:
        return Rows()


def paths(*lists: Path | str, **options: Any) -> list[Check]:
    return list(check_paths(Listed(lists=tuple(map(str, lists)), **options)))


def test_input_files_that_exist_have_no_check(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    assert paths(tmp_path / "train.jsonl", f"{tmp_path}/train.jsonl::ko") == []


def test_missing_or_empty_input_file_fails_by_name(tmp_path: Path) -> None:
    (found,) = paths(f"{tmp_path}/none.jsonl::ko")
    assert found.state == "fail" and f"{tmp_path}/none.jsonl, which workload.lists names" in found.message
    assert found.message.endswith("does not exist")
    (tmp_path / "empty.jsonl").touch()
    (found,) = paths(tmp_path / "empty.jsonl")
    assert found.state == "fail" and found.message.endswith("is empty")


def test_another_path_may_be_one_that_the_workload_makes(tmp_path: Path) -> None:
    (found,) = paths(output=tmp_path / "none.pth")
    assert found.state == "warn" and "correct workload.output" in found.remedy


def packing(mode: Any, free: float | None = None) -> tuple[Check, bool]:
    workload = Listed(keep=mode)
    return check_packing(workload, workload.unpacked(), free=free)


@pytest.mark.parametrize(
    ("mode", "free", "state", "packs"),
    [("auto", 1e6, "ok", True), ("auto", 60e3, "warn", False), (True, 60e3, "ok", True), (True, 30e3, "fail", False)],
)
def test_disk_must_hold_the_packed_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any, free: float, state: str, packs: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    found, mapped = packing(mode, free)
    assert (found.state, mapped) == (state, packs), found
    assert ("workload.keep = " in found.remedy) == (state != "ok")
    assert list(tmp_path.iterdir()) == [], "looking packs nothing"


def test_existing_store_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "data/index/train.packed"
    store.mkdir(parents=True)
    for done, state in ((50, "ok"), (20, "fail")):
        (store / "header.json").write_text(json.dumps({"num_samples": 50, "num_done": done}))
        assert packing(True, free=0)[0].state == state


def test_samples_that_are_no_arrays_are_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Listed, "train_data", Toy.train_data)
    found, mapped = packing("auto")
    assert found.state == "warn" and "no tuples of numpy arrays" in found.message and not mapped


def loader(shared: float, device: Capabilities | None = None, **config: Any) -> Check:
    toy = Setup(Toy(), TrainConfig(steps=10, batch_size=8, **config))
    device = device or Capabilities("cuda", "GPU", cores=4, memory=10**10, compute_capability=(8, 9))
    chosen = plan(device, toy.config, RunSize(1000, 5, 100.0, 10))
    return check_loader(toy, chosen, device, 16, shared=shared)


def test_batches_that_wait_must_go_into_shared_memory() -> None:
    # Three workers, four batches each of 16 samples of 40 tokens (39 and padding), ids and targets in int64.
    needed = 3 * 4 * 16 * 40 * 2 * 8
    assert loader(needed).state == "ok"
    found = loader(needed - 1)
    assert found.state == "fail" and "--shm-size" in found.remedy and "3 workers on 4 cores" in found.message


def test_more_workers_than_cores_are_a_warning() -> None:
    assert loader(1e9, num_workers=9).state == "warn"
    assert loader(1e9, num_workers=4).state == "ok"


def test_without_workers_shared_memory_does_not_matter() -> None:
    found = loader(0, Capabilities("cpu", "CPU", cores=2, memory=10**10))
    assert found == Check("loader", "ok", "no workers: the cores are busy computing")
