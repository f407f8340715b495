"""The API where a notebook or a server calls it: in any thread, inside a running event loop, the process left alone."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import optuna
import pytest

from tests.toy import Toy
from tests.tuner.studies_for_tests import build
from trainer import TrainConfig, train
from trainer.data.packed import PackedDataset, open_packed
from tuner import Runtime, launch, promote

SIGNALS = [number for number in signal.Signals if number not in (signal.SIGKILL, signal.SIGSTOP)]


def note(number: int, frame: object) -> None:
    """A handler of the caller's own."""


class Arrays:
    """Samples to pack: rows of numbers; reading one calls `seen`."""

    def __init__(self, seen: Callable[[], None]) -> None:
        self.lengths = np.ones(40, np.int64)
        self.seen = seen

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray]:
        self.seen()
        return (np.full(3, index),)


class Watched(Toy):
    """Appends the signal handlers in force at each training batch to a list."""

    def loss_sums(self, model: Any, inputs: Any) -> Any:
        seen.append(handlers())
        return super().loss_sums(model, inputs)


seen: list[dict[signal.Signals, Any]] = []


def handlers() -> dict[signal.Signals, Any]:
    return {number: signal.getsignal(number) for number in SIGNALS}


def tune(runtime: Runtime, workload: str = f"{__name__}:Watched") -> tuple[optuna.Study, int]:
    """Launch and promote as a notebook does; returns the study and the full run's samples."""
    url = f"sqlite:///{runtime.run_root.parent}/tuner.db"
    spec = build(**{"study.workload": workload, "trial.num_trials": 2})
    study = launch(spec, storage=url, runtime=runtime)
    return study, promote(study, runtime=runtime).samples


@pytest.fixture(autouse=True)
def _own_handler() -> Any:
    seen.clear()
    before = signal.signal(signal.SIGINT, note)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("main", [True, False], ids=["main thread", "other thread"])
def test_launch_and_promote_leave_signals_and_process_group_to_the_caller(runtime: Runtime, main: bool) -> None:
    before, group, session = handlers(), os.getpgid(0), os.getsid(0)
    if main:
        study, samples = tune(runtime)
    else:
        with ThreadPoolExecutor(1) as pool:
            study, samples = pool.submit(tune, runtime).result()
    assert len(study.trials) == 2 and samples == 480
    # During the runs and after them.
    assert seen and all(during == before for during in [*seen, handlers()])
    assert (os.getpgid(0), os.getsid(0)) == (group, session)


def test_workload_may_be_a_class_of_a_cell(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    # Like a notebook's __main__, this module has no file.
    cell = ModuleType("cell")
    cell.Cell = type("Cell", (Toy,), {"__module__": "cell"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cell", cell)
    assert tune(runtime, "cell:Cell")[1] == 480


def test_launch_and_promote_run_inside_a_running_event_loop(runtime: Runtime) -> None:
    async def cell() -> tuple[optuna.Study, int]:
        asyncio.get_running_loop()
        return tune(runtime)

    study, samples = asyncio.run(cell())
    assert len(study.trials) == 2 and samples == 480


def test_launch_and_promote_in_a_thread_do_not_block_the_event_loop(runtime: Runtime) -> None:
    async def serve() -> tuple[int, int]:
        tuning = asyncio.create_task(asyncio.to_thread(tune, runtime))
        turns = 0
        while not tuning.done():
            await asyncio.sleep(0.005)
            turns += 1
        return (await tuning)[1], turns

    samples, turns = asyncio.run(serve())
    assert samples == 480 and turns > 10


def test_stop_from_another_thread_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    stop = threading.Event()
    config = TrainConfig(steps=100_000, log_every=10, precision="fp32")
    with ThreadPoolExecutor(1) as pool:
        # The first log interval's figures arrive, so it is on its way.
        class Tracker:
            def track(self, values: Any, *, step: int, samples: int) -> None:
                stop.set()

            def close(self) -> None:
                pass

        running = pool.submit(train, Toy(), config, run_dir=tmp_path, tracker=Tracker(), stop=stop.is_set)
        result = running.result(timeout=60)
    assert not result.finished and (tmp_path / "latest.pth").exists()


def test_packing_in_another_thread_keeps_the_handlers(tmp_path: Path) -> None:
    before, during = handlers(), []
    data = Arrays(lambda: during.append(handlers()))
    with ThreadPoolExecutor(1) as pool:
        store = pool.submit(open_packed, data, tmp_path / "store", digest="d", mode=True).result()
    assert isinstance(store, PackedDataset) and len(store) == 40
    assert len(during) >= 40 and all(one == before for one in [*during, handlers()])


def test_packing_in_the_main_thread_defers_signals_and_restores_the_handlers(tmp_path: Path) -> None:
    before, during = handlers(), []
    data = Arrays(lambda: during.append(signal.getsignal(signal.SIGINT)))
    assert isinstance(open_packed(data, tmp_path / "store", digest="d", mode=True), PackedDataset)
    assert any(handler is not note for handler in during), "it holds no signal back"
    assert handlers() == before


def test_failed_packing_restores_the_handlers(tmp_path: Path) -> None:
    before, reads = handlers(), []

    def fail() -> None:
        reads.append(1)
        # Past the probe, which reads each of the 40 once.
        if len(reads) > 60:
            raise RuntimeError("a defect of the dataset")

    with pytest.raises(RuntimeError, match="a defect"):
        open_packed(Arrays(fail), tmp_path / "store", digest="d", mode=True)
    assert handlers() == before
