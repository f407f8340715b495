"""Checkpoints, exact continuation, and what an out-of-memory error leaves."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scripts.gpu_check.timing import DEVICE
from scripts.gpu_check.training import logged_lines
from scripts.gpu_check.workload import build_workload
from trainer import TrainConfig, train
from trainer.checkpoint import step_file
from trainer.memory import Probe

SAVE_EVERY, STEPS = 4, 10


class Times:
    """A tracker and `stop`: the loss of each step, when it began, and when each state was whole on disk."""

    def __init__(self, fail_before: int | None = None) -> None:
        self.losses: list[float] = []
        self.starts: list[float] = []
        self.whole: dict[int, float] = {}
        self.fail_before = fail_before

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        if "train/loss" in values:
            self.losses.append(values["train/loss"])

    def written(self, path: Path, kind: str, step: int) -> None:
        if kind == "state":
            self.whole[step] = time.perf_counter()

    def close(self) -> None:
        """Nothing to close."""

    def stop(self) -> bool:
        self.starts.append(time.perf_counter())
        if len(self.starts) == self.fail_before:
            raise torch.OutOfMemoryError("CUDA out of memory: made up, there is no GPU")
        return False


def run(times: Times, tiny: bool, folder: Path, *, resume: Path | str = "auto", **changes: Any) -> None:
    settings: dict[str, Any] = {"steps": STEPS, "batch_size": 4, "log_every": 1, "save_every": None, "compile": "off"}
    config = TrainConfig(device=DEVICE, **{**settings, **changes})
    train(build_workload(tiny), config, run_dir=folder, tracker=times, stop=times.stop, resume=resume)


def checkpoint(tiny: bool) -> dict[str, Any]:
    """How long a checkpoint stalls training and is written; the losses after a continuation against those without."""
    with tempfile.TemporaryDirectory() as folder, logged_lines() as lines:
        whole, later = Times(), Times()
        run(whole, tiny, Path(folder, "whole"), save_every=SAVE_EVERY, keep_checkpoints=3)
        path = Path(folder, "whole", step_file(SAVE_EVERY))
        size, started = path.stat().st_size, time.perf_counter()
        run(later, tiny, Path(folder, "later"), resume=path)
        resumed = later.starts[0] - started
    gaps = [after - before for before, after in itertools.pairwise(whole.starts)]
    # The first steps compile kernels; a gap after a save holds the save and a step.
    saves = [gaps[step] for step in range(SAVE_EVERY, STEPS, SAVE_EVERY)]
    rest = [gap for step, gap in enumerate(gaps) if step > 2 and step % SAVE_EVERY]
    differences = [abs(a - b) for a, b in zip(whole.losses[SAVE_EVERY:], later.losses, strict=True)]
    return {
        "bytes": size,
        "stalls_s": [round(save - statistics.median(rest), 3) for save in saves],
        "written_s": [round(whole.whole[s] - whole.starts[s], 2) for s in range(SAVE_EVERY, STEPS, SAVE_EVERY)],
        "resumed_s": round(resumed, 2),
        "losses": whole.losses,
        "losses_after_resuming": later.losses,
        "first_loss_differs_by": differences[0],
        "losses_differ_by": max(differences),
        "log": lines[-40:],
    }


def out_of_memory(tiny: bool) -> dict[str, Any]:
    """The estimate beside the measured peak; an error of the device, what is left after it, and another run."""
    from tuner.study.objective import is_out_of_memory, release_memory

    record: dict[str, Any] = {"estimated_bytes": {}}
    started = time.perf_counter()
    probe = Probe(build_workload(tiny), TrainConfig(steps=1), device="cuda", precision="bf16")
    for batch_size in (8, 32):
        record["estimated_bytes"][batch_size] = probe.estimate(batch_size).total
    record["estimate_s"] = round(time.perf_counter() - started, 1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            many: dict[str, Any] = {} if DEVICE == "cpu" else {"batch_size": 1024}
            run(Times(fail_before=3 if DEVICE == "cpu" else None), tiny, Path(folder, "fails"), **many)
            record["error"] = ""
        except RuntimeError as error:
            record |= {"error": str(error)[:300], "recognized": is_out_of_memory(error)}
        release_memory()
        if DEVICE == "cuda":
            record["left_bytes"] = {
                "allocated": torch.cuda.memory_allocated(),
                "reserved": torch.cuda.memory_reserved(),
            }
        after = Times()
        run(after, tiny, Path(folder, "after"), steps=3)
    record["losses_after"] = after.losses
    return record
