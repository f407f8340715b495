"""SIGKILL of training runs, and of launches with workers."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import psutil

from tests.attacks.full.common import Job, Result, fork, join, last_line
from tests.toy import Toy
from tests.tuner.studies_for_tests import build
from trainer import TrainConfig, UserError, train
from trainer.checkpoint import read_checkpoint
from tuner.api import launch
from tuner.study.tracked_run import Runtime

CONFIG = TrainConfig(steps=240, save_every=3, log_every=20, eval_every=80, precision="fp32", device="cpu")


def digest(state: Mapping[str, Any]) -> str:
    """Of weights and optimizer state, bit for bit."""
    hasher = hashlib.sha256()
    for tensor in state["model"].values():
        hasher.update(tensor.numpy().tobytes())
    for values in state["optimizer"]["state"].values():
        for value in values.values():
            hasher.update(value.numpy().tobytes() if hasattr(value, "numpy") else str(value).encode())
    return hasher.hexdigest()


def kill_training(job: Job) -> Result:
    """Kill a run again and again, half of the times in the middle of a write, until it has ended; then the next run."""
    result, generator = Result(), random.Random(0)
    reference = job.folder / "reference"
    join(fork(lambda: train(Toy(), CONFIG, run_dir=reference), job.folder / "log"))
    expected = digest(read_checkpoint(reference / "latest.pth"))
    while result.attempts < job.size and job.in_time:
        run_dir = job.folder / f"run-{result.figures.get('runs', 0)}"
        while True:
            pid = fork(lambda folder=run_dir: train(Toy(), CONFIG, run_dir=folder), job.folder / "log")
            if result.attempts < job.size:
                await_moment(run_dir, generator, is_write=bool(result.attempts % 2))
                os.kill(pid, signal.SIGKILL)
            code = join(pid)
            if code == -signal.SIGKILL:
                result.attempts += 1
            else:
                result.check(code == 0, f"run ended with {code}: {last_line(job.folder / 'log')}")
                break
            for path in run_dir.glob("*.pth"):
                try:
                    read_checkpoint(path)
                except UserError as error:
                    result.failures.append(f"unreadable: {error}")
        result.count("runs")
        result.check(digest(read_checkpoint(run_dir / "latest.pth")) == expected, f"{run_dir.name} has other weights")
        shutil.rmtree(run_dir)
    return result


def await_moment(run_dir: Path, generator: random.Random, *, is_write: bool) -> None:
    """Wait for a random time; then, for a write, until a file is half written."""
    time.sleep(generator.uniform(0.02, 0.5))
    end = time.monotonic() + 1
    while is_write and time.monotonic() < end and not any(run_dir.glob("*.tmp")):
        time.sleep(0.0002)


def kill_launch(job: Job) -> Result:
    """Kill workers and supervisors of launches in turn; then let the launch end, and compare its trials."""
    changes = {"trial.num_trials": 8, "train.save_every": 2}
    result, generator = Result(), random.Random(0)
    spec = build(**changes).model_copy(update={"sampler": build().sampler.model_copy(update={"name": "random"})})

    def values(name: str) -> dict[int, float]:
        study = optuna.load_study(study_name="toy", storage=url(name))
        complete = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
        result.check(len(complete) == len(study.trials) == 8, f"{name}: {[trial.state.name for trial in study.trials]}")
        return {trial.number: trial.value for trial in complete}

    def url(name: str) -> str:
        return f"sqlite:///{job.folder}/{name}.db"

    def start(name: str) -> int:
        runtime = Runtime(job.folder / name, track=False)
        return fork(lambda: launch(spec, storage=url(name), runtime=runtime, num_workers=2), job.folder / f"{name}.log")

    result.check(join(start("reference")) == 0, "the reference failed")
    expected = values("reference")
    while result.attempts < job.size and job.in_time:
        name = f"launch-{result.figures.get('launches', 0)}"
        while True:
            pid = start(name)
            if result.attempts >= job.size:
                code = join(pid)
                break
            time.sleep(generator.uniform(2, 25))
            workers = psutil.Process(pid).children() if psutil.pid_exists(pid) else []
            victim = generator.choice(workers).pid if workers and result.attempts % 2 == 0 else pid
            os.kill(victim, signal.SIGKILL)
            code = join(pid) if victim == pid else None
            result.attempts += code in (None, -signal.SIGKILL)
            if code is None:
                code = join(pid)
            if code != -signal.SIGKILL:
                break
            psutil.wait_procs(workers, timeout=60)
        result.check(code == 0, f"{name} ended with {code}: {last_line(job.folder / f'{name}.log')}")
        result.count("launches")
        result.check(values(name) == expected, f"{name} has other values")
    return result
