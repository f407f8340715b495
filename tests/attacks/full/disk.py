"""A disk that refuses: each write, flush and rename below a folder fails once with each error, and so do all later."""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.attacks.full.common import Job, Result, fork, join, last_line
from tests.attacks.test_packed_bytes import Samples, is_equal, opened
from trainer import checkpoint
from trainer.checkpoint import Checkpoints, find_state, read_checkpoint
from trainer.export import write_weights
from trainer.tracking import AimTracker, aim_run
from tuner.study.storage import open_storage
from tuner.study.tracked_run import log_file

Scenario = tuple[Callable[[Path], None], Callable[[Path], None], Callable[[Path], bool]]
"""What is there before, what writes, and whether all that was there before is whole."""


def refuse_disk(job: Job) -> Result:
    """The stage: in a process of its own, since the calls are replaced when it starts."""
    shim = job.folder / "shim.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-o", shim, Path(__file__).with_name("shim.c"), "-ldl"], check=True
    )
    command = [sys.executable, "-W", "ignore", "-m", "tests.attacks.full.disk", job.folder, str(job.size)]
    command.append(str(job.end - time.monotonic()))
    ended = subprocess.run(command, env={**os.environ, "LD_PRELOAD": str(shim)}, capture_output=True, text=True)
    if ended.returncode:
        return Result(1, [ended.stderr[-500:]])
    return Result(**json.loads(ended.stdout.splitlines()[-1]))


def state(step: int) -> dict[str, Any]:
    return {"step": step, "model": {"weight": torch.full((3000,), float(step))}}


def save(step: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        checkpoint.RETRY_S, checkpoint.GIVE_UP_S = 0.01, 0.03
        with Checkpoints(folder, keep=1) as checkpoints:
            checkpoints.save(state(step), also=("best.pth",))
            checkpoints.save_weights(state(step), ["best_model.pth"])

    return write


def has_state(folder: Path) -> bool:
    found = find_state(folder)
    whole = [read_checkpoint(path) for path in folder.glob("*.pth")]
    return found is not None and all(
        bool((each["model"]["weight"] == each["step"]).all()) for each in [found[1], *whole]
    )


def export(value: float) -> Callable[[Path], None]:
    return lambda folder: write_weights({"a": torch.full((5000,), value)}, folder / "a.pth")


def pack(folder: Path) -> None:
    data = Samples()
    samples = opened(data, folder)
    assert all(is_equal(samples[index], data[index]) for index in range(len(data)))


def tell(folder: Path) -> None:
    import optuna

    storage = open_storage(f"sqlite:///{folder}/s.db")
    study = optuna.create_study(study_name="toy", storage=storage, load_if_exists=True)
    for _ in range(3):
        trial = study.ask()
        trial.report(1.0, 1)
        study.tell(trial, 1.0)


def has_trials(folder: Path) -> bool:
    import optuna

    trials = optuna.load_study(study_name="toy", storage=f"sqlite:///{folder}/s.db").trials
    return len([trial for trial in trials if trial.state.is_finished()]) >= 3 and trials[0].value == 1.0


def write_log(folder: Path) -> None:
    with log_file(folder):
        for number in range(5):
            logging.getLogger("trainer").warning("line %d", number)


def track(folder: Path, patience: float = 10.0) -> None:
    AimTracker.PATIENCE_S = patience
    tracker = AimTracker(folder, run_dir=folder / "run", experiment="toy", params={})
    for step in range(5):
        tracker.track({"train/loss": 1.0}, step=step, samples=step)
    tracker.close()


def copy_tracked(folder: Path) -> None:
    """A repository with one run; Aim takes seconds to make it."""
    made = folder.parent / "tracked"
    if not made.exists():
        (made / "run").mkdir(parents=True)
        track(made, 60.0)
    shutil.copytree(made, folder, dirs_exist_ok=True)
    (folder / "run").rename(folder / "first")
    (folder / "run").mkdir()


def has_first_run(folder: Path) -> bool:
    def read() -> None:
        import aim
        from aim.storage.context import Context

        run = aim.Repo(str(folder)).get_run(aim_run(folder / "first"))
        metric = run.get_metric("loss", Context({"subset": "train"}))
        assert len(metric.values.sparse_numpy()[0]) == 5

    return join(fork(read, folder.parent / "again")) == 0


SCENARIOS: dict[str, Scenario] = {
    "checkpoint": (save(1), save(2), has_state),
    "export": (export(1.0), export(2.0), lambda folder: read_checkpoint(folder / "a.pth")["a"].unique().numel() == 1),
    "store": (lambda folder: None, pack, lambda folder: fork_pack(folder)),
    "database": (tell, tell, has_trials),
    "aim": (copy_tracked, track, has_first_run),
    "log": (write_log, write_log, lambda folder: "line 4" in (folder / "train.log").read_text()),
}
EVERY = {"aim": 8}
"""Which calls fail, where each attempt takes seconds."""


def fork_pack(folder: Path) -> bool:
    return join(fork(lambda: pack(folder), folder.parent / "again")) == 0


def main(folder: Path, size: int, seconds: float) -> None:
    """Print the result as JSON."""
    shim: Any = ctypes.CDLL(os.environ["LD_PRELOAD"])
    result, end = Result(), time.monotonic() + seconds
    for name, (before, write, is_whole) in SCENARIOS.items():
        for code in (errno.ENOSPC, errno.EIO):
            for number in range(1, size + 1, EVERY.get(name, 1)):
                place, output = folder / f"{name}-{code}-{number}", folder / "output"
                place.mkdir()
                join(fork(lambda p=place, b=before: b(p), output))

                def attack(p: Path = place, w: Callable[[Path], None] = write, n: int = number, c: int = code) -> None:
                    shim.arm(str(p).encode(), n, c)
                    try:
                        w(p)
                    finally:
                        (folder / "calls").write_text(str(shim.calls()))

                ended = join(fork(attack, output))
                where = f"{name}, {errno.errorcode[code]} at call {number}"
                if int((folder / "calls").read_text()) < number or time.monotonic() > end:
                    break
                result.attempts += 1
                result.count(f"{name}: exit {ended}")
                text = output.read_text(errors="replace")
                result.check(ended in (0, 2) and "Traceback" not in text, f"{where}: {ended}, {last_line(output)}")
                try:
                    result.check(is_whole(place), f"{where}: an earlier file is not whole")
                except Exception as error:
                    result.failures.append(f"{where}: {type(error).__name__}: {str(error)[:100]}")
    print(json.dumps(vars(result)))


if __name__ == "__main__":
    np.seterr(all="ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
