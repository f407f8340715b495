"""Snapshots in kept memory are the same files as others."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkpoint import (
    LATEST,
    Checkpoints,
    is_checkpoint,
    read_checkpoint,
    snapshot,
    tensors_in,
    write_checkpoint,
)
from trainer.host_buffer import HostBuffer, lock_pages


class Pages:
    """Page locks, counted."""

    def __init__(self, possible: bool = True) -> None:
        self.locked: list[int] = []
        self.possible = possible

    def lock(self, address: int, size: int) -> bool:
        if self.possible:
            self.locked.append(address)
        return self.possible

    def unlock(self, address: int) -> None:
        self.locked.remove(address)


def state() -> dict[str, Any]:
    return {
        "model": {"weight": torch.randn(33, 7), "half": torch.randn(5).bfloat16(), "empty": torch.zeros(0)},
        "optimizer": [{"step": torch.tensor(3.0, dtype=torch.float64)}, (torch.arange(9), torch.tensor([True]))],
        "transposed": torch.randn(4, 6).t(),
        "step": 3,
    }


def take(buffer: HostBuffer, tree: Any) -> Any:
    buffer.begin(buffer.count(tensors_in(tree)))
    return snapshot(tree, buffer)


@pytest.mark.parametrize("possible", [True, False])
def test_snapshot_in_the_buffer_is_equal_and_independent(possible: bool, tmp_path: Path) -> None:
    pages = Pages(possible)
    buffer, tree = HostBuffer("cpu", lock=pages.lock, unlock=pages.unlock), state()
    kept = take(buffer, tree)
    before = snapshot(tree)
    for tensor in tensors_in(tree):
        tensor.zero_()
    write_checkpoint(kept, tmp_path / "kept.pth")
    found = read_checkpoint(tmp_path / "kept.pth")
    for one, other in zip(tensors_in(found), tensors_in(before), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    # Each tensor has a storage of its own: the file is as small as another one.
    write_checkpoint(before, tmp_path / "plain.pth")
    assert (tmp_path / "kept.pth").stat().st_size == pytest.approx((tmp_path / "plain.pth").stat().st_size, abs=512)
    assert is_checkpoint(tmp_path / "kept.pth")


def test_memory_is_kept_until_a_larger_snapshot_or_the_end() -> None:
    pages = Pages()
    buffer = HostBuffer("cpu", lock=pages.lock, unlock=pages.unlock)
    first = take(buffer, {"a": torch.ones(100)})["a"].data_ptr()
    again = take(buffer, {"a": torch.zeros(100)})["a"]
    assert again.data_ptr() == first and pages.locked == [first] and not again.any()
    larger = take(buffer, {"a": torch.ones(10_000), "b": torch.ones(3)})
    assert pages.locked == [larger["a"].data_ptr()] and buffer.size >= 40_012
    assert larger["a"].all() and larger["b"].tolist() == [1, 1, 1]
    buffer.close()
    assert pages.locked == [] and buffer.size == 0


def test_refused_page_lock_leaves_no_error_for_the_next_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in CUDA: the error stays, PyTorch raises it when it launches a kernel, and is then without it."""
    errors: list[int] = []

    class Cudart:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            errors.append(304)
            return 304

    def launch(*_: object, **__: object) -> None:
        if errors:
            raise torch.AcceleratorError(f"CUDA error {errors.pop()}")

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    monkeypatch.setattr(torch, "ones", launch)
    assert not lock_pages(64, 64)
    launch()


def test_tensors_of_other_devices_are_left_to_the_caller() -> None:
    buffer = HostBuffer("cuda", lock=Pages().lock, unlock=Pages().unlock)
    buffer.begin(1000)
    assert buffer.copy(torch.ones(3)) is None
    assert buffer.count([torch.ones(3)]) == 0
    assert torch.equal(snapshot({"a": torch.ones(3)}, buffer)["a"], torch.ones(3))


def test_checkpoints_use_the_buffer_when_it_is_free(tmp_path: Path) -> None:
    pages, may_write = Pages(), threading.Event()

    def hold(path: Path, kind: str, step: int) -> None:
        may_write.wait(30)

    with Checkpoints(tmp_path, keep=9, on_written=hold) as checkpoints:
        checkpoints._buffer = HostBuffer("cpu", lock=pages.lock, unlock=pages.unlock)
        weight = torch.zeros(50)
        for step in (1, 2, 3):
            weight.fill_(step)
            # The first is still being written when the second comes, which therefore has memory of its own.
            checkpoints.save({"step": step, "weight": weight})
            if step == 2:
                assert len(pages.locked) == 1
                may_write.set()
                checkpoints._wait()
    assert pages.locked == []
    for step in (1, 2, 3):
        assert read_checkpoint(tmp_path / f"step_{step:09d}.pth")["weight"].tolist() == [step] * 50
    assert (tmp_path / LATEST).samefile(tmp_path / "step_000000003.pth")
