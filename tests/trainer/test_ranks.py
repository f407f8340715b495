"""A run on several ranks: the numbers of one process, one writer, and one end for all. Over gloo, on the CPU."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests.toy import Toy
from trainer import TrainConfig
from trainer.acceleration import detect
from trainer.checkpoint import read_checkpoint
from trainer.data.batching import deal
from trainer.loop import follow
from trainer.micro_batches import decide_micro_batch_size
from trainer.ranks import RankLost, Ranks
from trainer.state import Run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ROOT = Path(__file__).parents[2]
LIMIT_S = 300.0


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_batch_is_dealt_whole_and_near_equal_in_samples_and_tokens(count: int) -> None:
    lengths = np.random.default_rng(0).integers(3, 400, 100)
    batch = np.random.default_rng(1).permutation(100)[:32]
    parts = [deal(batch, lengths[batch], rank, count) for rank in range(count)]
    assert sorted(np.concatenate(parts)) == sorted(batch)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    tokens = [int(lengths[part].sum()) for part in parts]
    assert max(tokens) - min(tokens) <= 0.05 * sum(tokens) / count


def test_micro_batches_are_of_a_ranks_part(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainConfig] = []

    def estimate(workload: Any, config: TrainConfig, *_: Any) -> Any:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.micro_batches.estimate_fit", estimate)
    config = TrainConfig(steps=1, batch_size=9, micro_batch_size="auto", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        decide_micro_batch_size(Toy(), config, detect("cpu"), Ranks(count=4))
    assert [(each.batch_size, each.grad_accumulation) for each in seen] == [(3, 2)]


def test_a_follower_gives_up_a_run_before_it_builds_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[weakref.ref[Any]] = []

    class Begin:
        config, acceleration = TrainConfig(steps=1, device="cpu"), SimpleNamespace(device="cpu")

        def adopt(self) -> None: ...

        def build(self, ranks: Ranks) -> Run:
            assert not any(before() for before in built), "two runs in the memory of one device"
            run = Run.build(Toy(), self.config, "cpu", data_digest="")
            run.lineage = {"cycle": run}
            built.append(weakref.ref(run))
            return run

    class Scripted(Ranks):
        def gather(self, value: Any) -> Any:
            if len(built) == 3:
                raise RankLost("the end")
            return [Begin()]

    for name in ("apply", "_loop"):
        monkeypatch.setattr(f"trainer.loop.{name}", lambda *_: None)
    with pytest.raises(RankLost):
        follow(Scripted(1, 2))


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    command = [*TORCHRUN, "-m", "tests.trainer.ranks_scenario", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for case in ("plain", "prodigy", "poisoned", "damaged"):
        alone, shared = found[f"{case}-1"], found[f"{case}-2"]
        assert [list(each) for each in shared] == [list(each) for each in alone]
        for one, other in zip(alone, shared, strict=True):
            assert other == pytest.approx(one, rel=1e-5, nan_ok=True), case
    skipped = [each.get("train/skipped_updates", 0) for each in found["poisoned-2"]]
    assert 0 < sum(skipped) < 30, "the gradient of one rank was not finite, and both skipped"

    whole, parts = (read_checkpoint(tmp_path / name / "latest.pth") for name in ("plain-1", "parts"))
    assert parts["step"] == whole["step"] and parts["metrics"] == pytest.approx(whole["metrics"], rel=1e-5)
    for name, value in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], value, rtol=1e-4, atol=1e-6)

    assert found["interface"] == "lo"
    assert re.fullmatch(r"Prodigy's d differs between the processes .*", found["drifting"])
    assert "another process of this run has ended" in torch.load(tmp_path / "follower.pt", weights_only=True)


def test_a_signal_to_any_rank_stops_all_with_a_checkpoint(tmp_path: Path) -> None:
    with training(tmp_path) as run:
        wait_until(lambda: "[Step " in output(tmp_path), run)
        rank(run, 1).send_signal(signal.SIGTERM)
        run.wait(LIMIT_S)
    assert_stopped(tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_after_the_loss_of_a_rank(tmp_path: Path) -> None:
    with training(tmp_path, "--max-restarts", "1") as run:
        wait_until((tmp_path / "run" / "latest.pth").exists, run)
        rank(run, 1).kill()
        wait_until(lambda: "[Step " in output(tmp_path).partition("continuing from")[2], run)
        rank(run, 1).send_signal(signal.SIGTERM)
        run.wait(LIMIT_S)
    assert "continuing from" in output(tmp_path)
    assert_stopped(tmp_path)


def environment() -> dict[str, str]:
    """That of a process with one thread, which finds this repository."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@contextmanager
def training(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A long `tuner train` on two ranks; its output is in `folder`."""
    spec = '[study]\nname = "toy"\nworkload = "tests.toy:Toy"\n[train]\nsave_every = 20\nlog_every = 10\n'
    spec += "[trial]\nsamples = 100\nevaluations = 1\n"
    (folder / "study.toml").write_text(spec + "[full]\nsteps = 1_000_000\n")
    command = [*TORCHRUN, *options, "-m", "tuner", "train", "study.toml", "--no-track", "--run-dir", "run"]
    with open(folder / "output", "w") as file:
        run = subprocess.Popen(command, cwd=folder, env=environment(), stdout=file, stderr=file, text=True)
        try:
            yield run
        finally:
            for process in (*psutil.Process(run.pid).children(recursive=True), run) if run.poll() is None else ():
                process.kill()


def output(folder: Path) -> str:
    return (folder / "output").read_text()


def wait_until(is_reached: Callable[[], bool], run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_reached():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def rank(run: subprocess.Popen[str], number: int) -> psutil.Process:
    """The process of a rank."""
    children = psutil.Process(run.pid).children()
    return next(child for child in children if child.environ().get("RANK") == str(number))


def assert_stopped(folder: Path) -> None:
    """All ranks have ended, the first alone has reported it, and the newest step is saved."""
    text = output(folder)
    assert text.count("Stopped with a checkpoint") == 1, text
    steps = [int(number) for number in re.findall(r"\[Step (\d+)\]", text)]
    assert len(steps) == len(set(steps)) or "continuing from" in text, "two ranks report"
    assert read_checkpoint(folder / "run" / "latest.pth")["step"] >= max(steps)
