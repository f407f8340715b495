"""`launch --workers N`: the shares of a machine, the shared study, and workers that stop, fail or die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from torch import nn

from tests.commands import Command
from tests.toy import Toy
from tests.tuner.studies_for_tests import TOML, build, write
from trainer import UserError
from trainer.tracking import Tracker
from tuner import launch
from tuner.cli import watchdog
from tuner.study import worker_process
from tuner.study.record import TrialRecord
from tuner.study.storage import for_other_processes, load_study, open_storage
from tuner.study.supervisor import MAX_DEATHS, Supervisor, WorkerError, worker_environments
from tuner.study.tracked_run import Runtime
from tuner.study.worker import WorkerPipe
from tuner.study.worker_process import GRACE_S, Job, WorkerProcess

# A worker's side of the pipe without the imports that take seconds: it ignores the job, and knows its number.
PRETEND = """
import os, signal, sys, time
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
pipe.recv_bytes()
number = 1
while True:
    try:
        os.mkdir(os.environ["STARTS"] + f"-{number}")
        break
    except FileExistsError:
        number += 1
"""
EXIT = 'pipe.send(("exit", "done", ""))\n'
UNTIL_STOPPED = "pipe.recv()\n" + EXIT


class Witness:
    """A display that records its calls, and may act on them."""

    def __init__(self, do: Callable[[str, int], None] = lambda *_: None) -> None:
        self.seen: list[tuple[str, int]] = []
        self._do = do

    def note(self, what: str, number: int) -> None:
        self.seen.append((what, number))
        self._do(what, number)

    def numbers(self, what: str) -> list[int]:
        return sorted(number for event, number in self.seen if event == what)

    def trial_started(self, trial: TrialRecord, resumed: bool) -> Tracker:
        self.note("resumed" if resumed else "started", trial.number)
        return Follower(self, trial.number)

    def trial_ended(self, trial: TrialRecord) -> None:
        assert trial.is_finished
        self.note("ended", trial.number)


class Follower:
    def __init__(self, witness: Witness, number: int) -> None:
        self.witness, self.number = witness, number

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        if "val/loss" in values:
            self.witness.note("validated", self.number)

    def checkpoint(self, name: str, *, step: int) -> None:
        self.witness.note(f"{name} at step {step}", self.number)

    def close(self) -> None:
        self.witness.note("closed", self.number)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/tuner.db"


@pytest.fixture
def supervise(tmp_path: Path) -> Callable[..., Supervisor]:
    """A supervisor of two workers that run `PRETEND` and this code."""

    def make(code: str, display: Witness | None = None, stop: Callable[[], bool] = lambda: False) -> Supervisor:
        study = optuna.create_study(study_name="toy", storage=InMemoryStorage())
        environment = {"OMP_NUM_THREADS": "1", "STARTS": str(tmp_path / "starts")}
        job = Job("toy", {}, tmp_path, "sqlite://", tmp_path, track=False, total=2)
        return Supervisor(
            job,
            [environment] * 2,
            study=study,
            stop=stop,
            display=display,
            on_trial_end=lambda: None,
            start=PRETEND + code,
        )

    return make


def num_starts(folder: Path) -> int:
    return len(list(folder.glob("starts-*")))


def children() -> list[psutil.Process]:
    """Of this process; another test of it may have left Python's own tracker of shared memory."""
    living = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in living if not any("resource_tracker" in part for part in child.cmdline())]


def test_each_worker_has_a_gpu_of_its_own_and_its_share_of_the_threads() -> None:
    environments = worker_environments(2, ["3", "GPU-5ebe9f43"], threads=12, cores=8)
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == ["3", "GPU-5ebe9f43"]
    assert [environment["OMP_NUM_THREADS"] for environment in environments] == ["6", "6"]
    spared = worker_environments(1, ["0", "1"], threads=12, cores=8)
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in spared] == ["0"]


@pytest.mark.parametrize(("num_workers", "threads", "share"), [(2, 8, "4"), (3, 8, "2"), (4, 2, "1")])
def test_without_gpus_each_worker_has_its_share_of_the_threads(num_workers: int, threads: int, share: str) -> None:
    environments = worker_environments(num_workers, [], threads, cores=8)
    assert [environment["OMP_NUM_THREADS"] for environment in environments] == [share] * num_workers
    assert not any("CUDA_VISIBLE_DEVICES" in environment for environment in environments)


def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match=r"--workers 3: 2 GPUs can be used, .*: give --workers 2, or more in CUDA_"):
        worker_environments(3, ["0", "1"], threads=8, cores=8)


def test_more_workers_than_cores_are_refused() -> None:
    with pytest.raises(UserError, match=r"^--workers 1000000: this machine has 8 cores: give at most 8"):
        worker_environments(1_000_000, [], threads=8, cores=8)


def test_storage_in_memory_is_refused_and_a_database_is_opened_by_its_url(url: str) -> None:
    with pytest.raises(UserError, match="can't share a storage in memory: use a database"):
        for_other_processes(InMemoryStorage())
    study = optuna.create_study(storage=open_storage(url))
    assert for_other_processes(study._storage) == url


def test_dead_worker_is_restarted(supervise: Callable[..., Supervisor], tmp_path: Path) -> None:
    assert supervise("if number == 1: os.kill(os.getpid(), signal.SIGKILL)\n" + EXIT).run()
    assert num_starts(tmp_path) == 3


def test_workers_that_die_again_and_again_end_the_launch(supervise: Callable[..., Supervisor], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{2 * MAX_DEATHS} workers in a row died .* by SIGKILL; .*worker-\d\.log"):
        supervise("os.kill(os.getpid(), signal.SIGKILL)").run()
    assert 2 * MAX_DEATHS <= num_starts(tmp_path) <= 2 * MAX_DEATHS + 1


def test_deaths_with_a_validation_between_do_not_add_up(supervise: Callable[..., Supervisor], tmp_path: Path) -> None:
    last = 3 * MAX_DEATHS
    code = f"if number >= {last}: {EXIT}"
    code += "else: pipe.send(('track', 0, {'val/loss': 1.0}, 1, 8)); os.kill(os.getpid(), signal.SIGKILL)\n"
    assert supervise(code).run()
    assert num_starts(tmp_path) >= last


def test_worker_that_hangs_is_killed_and_replaced(
    supervise: Callable[..., Supervisor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(worker_process, "HANG_S", 1.0)
    monkeypatch.setattr(worker_process, "STOP_HANG_S", 600.0)
    code = "if number == 1: os.kill(os.getpid(), signal.SIGSTOP)\n"
    # The other one lives longer than that, with a sign now and then.
    code += "for _ in range(20 if number == 2 else 0): time.sleep(0.1); pipe.send(('alive',))\n"
    assert supervise(code + EXIT).run()
    assert num_starts(tmp_path) == 3 and not children()
    assert [message for message in caplog.messages if "has hung for 1" in message and "is killed" in message]


def test_long_steps_are_no_hang(supervise: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "HANG_S", 0.4)
    worker = WorkerProcess(0, supervise("").job, {"STARTS": "x"}, "")
    worker.kill()
    for seconds, silent in {600.0: None, 5_900.0: None, 6_100.0: 6_100.0}.items():
        worker._intervals.extend([600.0] * 3)
        worker.alive_at = time.monotonic() - seconds
        assert worker.silence(None) == (None if silent is None else pytest.approx(silent, abs=5))
    assert worker.silence(time.monotonic()) is None, "after a request the wait begins anew"


def test_worker_that_hangs_does_not_keep_a_launch_from_stopping(
    supervise: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "STOP_HANG_S", 0.5)
    began = time.monotonic()
    code = "os.kill(os.getpid(), signal.SIGSTOP) if number == 1 else pipe.recv()\n" + EXIT
    assert not supervise(code, stop=lambda: time.monotonic() > began + 0.3).run()
    assert not children()


def test_worker_gives_a_sign_of_life_at_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.study.worker.SIGN_S", 0.05)
    ours, theirs = multiprocessing.Pipe()
    pipe = WorkerPipe(theirs)
    assert not any(pipe.should_stop() for _ in range(5))
    assert ours.poll(5) and ours.recv() == ("alive",) and not ours.poll()
    time.sleep(0.06)
    pipe.should_stop()
    assert ours.recv() == ("alive",)


def test_user_error_in_one_worker_stops_all_and_is_raised_once(supervise: Callable[..., Supervisor]) -> None:
    code = 'if number == 1: pipe.send(("exit", "mistake", "no weights: give some"))\nelse:\n    ' + UNTIL_STOPPED
    code = code.replace("pipe.recv()\n", "pipe.recv(); ")
    with pytest.raises(UserError, match=r"^no weights: give some$"):
        supervise(code).run()
    assert not children()


def test_defect_in_one_worker_is_raised_with_its_traceback(supervise: Callable[..., Supervisor]) -> None:
    with pytest.raises(WorkerError, match="ZeroDivisionError"):
        supervise('pipe.send(("exit", "defect", "ZeroDivisionError"))').run()


def test_stop_reaches_all_workers(supervise: Callable[..., Supervisor]) -> None:
    began = time.monotonic()
    assert not supervise(UNTIL_STOPPED, stop=lambda: time.monotonic() > began + 0.3).run()
    assert not children()


def test_second_interrupt_leaves_no_worker_behind(supervise: Callable[..., Supervisor]) -> None:
    def interrupted() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise("time.sleep(600)", stop=interrupted).run()
    assert not children()


def test_stubborn_workers_are_ended_together(
    supervise: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def terminate(process: subprocess.Popen[bytes]) -> None:
        asked.append(process.pid)

    def interrupted() -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(worker_process, "GRACE_S", 2)
    monkeypatch.setattr(subprocess.Popen, "terminate", terminate)
    with pytest.raises(KeyboardInterrupt):
        supervise("time.sleep(600)", stop=interrupted).run()
    assert len(set(asked[:2])) == 2 and not children()
    assert watchdog.AT_ONCE_S > 2 * GRACE_S, "the workers are ended before the watchdog ends their supervisor"


class Together(Toy):
    """Waits with its first model until another worker has one to build too."""

    def build_model(self) -> nn.Module:
        meeting = Path(os.environ["MEETING"])
        if meeting.name != str(os.getpid()):  # not in the supervisor
            (meeting / str(os.getpid())).touch()
            while len(list(meeting.iterdir())) < 2:
                time.sleep(0.01)
        return super().build_model()


def test_two_workers_share_a_study_and_none_of_its_trials_runs_twice(
    tmp_path: Path, runtime: Runtime, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting = tmp_path / str(os.getpid())
    meeting.mkdir()
    monkeypatch.setenv("MEETING", str(meeting))
    witness, at_once = Witness(), []
    witness._do = lambda *_: at_once.append(len(witness.numbers("started")) - len(witness.numbers("ended")))
    spec = build(**{"study.workload": f"{__name__}:Together", "trial.num_trials": 6})
    study = launch(spec, storage=url, runtime=runtime, num_workers=2, display=witness)
    assert [trial.state.is_finished() for trial in study.trials] == [True] * 6
    for what in ("started", "ended", "closed"):
        assert witness.numbers(what) == [0, 1, 2, 3, 4, 5]
    assert set(witness.numbers("validated")) == {0, 1, 2, 3, 4, 5} and not witness.numbers("resumed")
    # Which trials are pruned depends on which ran at the same time; a pruned one may have no checkpoint.
    saved = {number for what, number in witness.seen if what.startswith("latest.pth at step ")}
    assert saved >= {trial.number for trial in study.trials if trial.state == TrialState.COMPLETE}
    assert max(at_once) == 2
    # Each trial's sampler has a seed of its own, in whatever process.
    assert len({trial.params["train.d_coef"] for trial in study.trials}) == 6
    assert study.user_attrs["ended"] == "the study has its 6 trials"


def test_trial_of_a_killed_worker_resumes(runtime: Runtime, url: str) -> None:
    killed: list[int] = []

    def kill(what: str, number: int) -> None:
        claim = str(runtime.run_dir("toy", f"trial-{number:05d}") / ".claim")
        for worker in children() if what == "validated" and not killed else []:
            if any(file.path == claim for file in worker.open_files()):
                worker.kill()
                killed.append(number)

    witness = Witness(kill)
    changes: dict[str, Any] = {
        "train.save_every": 5,
        "trial.samples": 2000,
        "full.samples": 4000,
        "trial.num_trials": 3,
    }
    study = launch(build(**changes), storage=url, runtime=runtime, num_workers=2, display=witness)
    assert witness.numbers("resumed") == killed and len(killed) == 1
    assert "continuing from" in (runtime.run_dir("toy", f"trial-{killed[0]:05d}") / "train.log").read_text()
    assert witness.numbers("started") == witness.numbers("ended") == [0, 1, 2]
    assert len(study.trials) == 3 and all(trial.state != TrialState.FAIL for trial in study.trials)


REFUSING = """
from tests.toy import Toy
from trainer import UserError


class Refusing(Toy):
    def build_model(self):
        raise UserError("no weights: give base_checkpoint another value")
"""


def test_mistake_is_one_line_and_exit_code_2(tmp_path: Path, url: str, run_command: Command) -> None:
    (tmp_path / "refusing.py").write_text(REFUSING)
    write(tmp_path, TOML.replace("tests.toy:Toy", "refusing:Refusing"))
    result = run_command("launch", "study.toml", "--storage", url, "--no-track", "--workers", "2")
    assert result.returncode == 2
    assert result.stderr.strip() == "tuner: no weights: give base_checkpoint another value"
    # Nothing is lost: the trials are open.
    states = {trial.state for trial in load_study("toy", open_storage(url)).trials}
    assert states == {TrialState.RUNNING}


def test_ctrl_c_stops_all_workers_with_a_checkpoint(tmp_path: Path, url: str) -> None:
    spec = write(
        tmp_path,
        TOML.replace("samples = 160", "samples = 4_000_000", 1).replace("samples = 480", "samples = 8_000_000"),
    )
    command = [sys.executable, "-m", "tuner", "launch", str(spec), "--storage", url, "--no-track", "--workers", "2"]
    command += ["--run-root", str(tmp_path / "runs")]
    logs = [tmp_path / f"runs/toy/trial-0000{number}/train.log" for number in (0, 1)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while not all(log.exists() and "[Step 5]" in log.read_text() for log in logs) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate()
    assert process.returncode == 130
    assert "The same command continues" in output
    for number in (0, 1):
        assert (tmp_path / f"runs/toy/trial-0000{number}/latest.pth").exists()
    assert [trial.state for trial in load_study("toy", open_storage(url)).trials] == [TrialState.RUNNING] * 2
