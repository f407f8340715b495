"""Hooks: they run beside the training on a checkpoint that stays, one at a time, within limits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tuner.studies_for_tests import TOML, values, write
from trainer import UserError
from trainer.checkpoint import read_checkpoint
from tuner import Runtime, StudySpec, launch, promote
from tuner.spec.beside import HooksSection
from tuner.study import hooks
from tuner.study.hooks import Hook, HookRunner
from tuner.study.process import run_in_shell
from tuner.study.samples import Samples


class Run:
    """A run directory whose checkpoints are written by hand."""

    def __init__(self, folder: Path, command: str, *, stop: Callable[[], bool] = lambda: False, **section: Any) -> None:
        self.folder, self.found = folder / "run dir", list[Samples]()
        self.folder.mkdir(exist_ok=True)
        self.runner = HookRunner(
            Hook(
                HooksSection(command=f"{command} # {{checkpoint}}", **section), folder, {"study": "toy", "trial": "7"}
            ),
            self.folder,
            best="best.pth",
            num_steps=100,
            stop=stop,
            on_samples=self.found.append,
        )

    def write(self, name: str, kind: str, step: int) -> None:
        (self.folder / "new").write_text(f"{name} at {step}")
        (self.folder / "new").rename(self.folder / name)
        self.runner.written(self.folder / name, kind, step)

    def started(self, step: int) -> Path:
        """Wait until the command of a step has made the file `started`."""
        path = self.folder / f"samples/step_{step:09d}.running/started"
        while not path.exists():
            time.sleep(0.005)
        return path.parent

    @property
    def folders(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "samples").iterdir())


def test_command_gets_checkpoint_step_folder_study_and_trial(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        "cp {checkpoint} {out}/seen.txt; echo {step} {study} {trial} ${{HOME:+home}}; pwd".replace("{{", "{").replace(
            "}}", "}"
        ),
    )
    run.write("best.pth", "best", 40)
    run.runner.close()
    (samples,) = run.found
    assert samples.step == 40 and [path.name for path in samples.files] == ["seen.txt"]
    assert (samples.folder / "seen.txt").read_text() == "best.pth at 40"
    assert (samples.folder / "hook.log").read_text() == f"40 toy 7 home\n{tmp_path}\n"
    assert sorted(path.name for path in samples.folder.iterdir()) == ["hook.log", "seen.txt"]


def test_command_of_a_rank_does_not_join_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MY_RANK", "3")
    run = Run(tmp_path, "env > {out}/env.txt")
    run.write("best.pth", "best", 1)
    run.runner.close()
    lines = (run.found[0].folder / "env.txt").read_text().splitlines()
    assert not {line.partition("=")[0] for line in lines} & set(names) and "MY_RANK=3" in lines


def test_events_are_new_bests_milestones_and_the_last_state(tmp_path: Path) -> None:
    written = [("best_other.pth", "best", 10), ("best.pth", "best", 20), ("step_30.pth", "state", 30)]
    written += [("kept.pth", "milestone", 40), ("step_100.pth", "state", 100)]
    for on, steps in ((("best", "end"), [20, 100]), (("milestone",), [40]), ((), [])):
        folder = tmp_path / str(len(on))
        folder.mkdir()
        run = Run(folder, "true", on=on)
        for name, kind, step in written:
            run.write(name, kind, step)
            while run.runner._waiting or len(run.found) < sum(each <= step for each in steps):
                time.sleep(0.005)
        run.runner.close()
        assert [samples.step for samples in run.found] == steps


def test_one_command_at_a_time_and_of_the_waiting_the_newest(tmp_path: Path) -> None:
    run = Run(tmp_path, "touch {out}/started; until [ -e go ]; do sleep 0.02; done; cat {checkpoint}")
    run.write("best.pth", "best", 10)
    first = run.started(10)
    for step in (20, 30):
        run.write("best.pth", "best", step)
    (run.folder / "best.pth").unlink()
    assert run.folders == ["step_000000010.running", "step_000000030.running"]
    assert (first / "checkpoint.pth").read_text() == "best.pth at 10", "as it was, however many newer ones came"
    (tmp_path / "go").touch()
    run.runner.close()
    assert run.folders == ["step_000000010", "step_000000030"]
    assert (run.folder / "samples/step_000000030/hook.log").read_text() == "best.pth at 30"


def test_last_state_of_a_step_that_was_sampled_is_not_sampled_again(tmp_path: Path) -> None:
    command = "echo {step} >> ran"
    run = Run(tmp_path, command)
    run.write("best.pth", "best", 100)
    run.write("step_100.pth", "state", 100)
    run.runner.close()
    again = Run(tmp_path, command)
    again.write("step_100.pth", "state", 100)
    again.runner.close()
    assert (tmp_path / "ran").read_text() == "100\n"


def test_failed_command_is_a_warning_with_its_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path, "echo no such voice >&2; touch {out}/half.wav; false")
    for step in (10, 10, 20):
        run.write("best.pth", "best", step)
        run.runner.close()
        run = Run(tmp_path, "echo no such voice >&2; touch {out}/half.wav; false")
    assert run.found == [] and run.folders == [
        "step_000000010.failed",
        "step_000000010.failed-2",
        "step_000000020.failed",
    ]
    failed = run.folder / "samples/step_000000010.failed"
    assert (failed / "hook.log").read_text() == "no such voice\n" and not (failed / "checkpoint.pth").exists()
    # Whether the runner waits for the first command depends on how fast the command is.
    first = next(message for message in caplog.messages if not message.startswith("waiting for the hook"))
    assert first == f"hook: step 10 failed (exit code 1): its log is {failed}/hook.log"


STUBBORN = "trap '' TERM; (sleep 600; true) & echo $! > {out}/started; wait"


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def child_of(folder: Path) -> int:
    while not (text := (folder / "started").read_text()):
        time.sleep(0.005)
    return int(text)


def test_command_over_its_time_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hooks, "GRACE_S", 0.1)
    run = Run(tmp_path, STUBBORN, timeout=1.0)
    run.write("best.pth", "best", 10)
    pid = child_of(run.started(10))
    run.runner.close()
    assert run.folders == ["step_000000010.failed"] and "it took over 1.0s" in caplog.text
    assert not is_alive(pid)


def test_what_a_command_leaves_running_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a server, which would keep its memory of the GPU."""
    monkeypatch.setattr(hooks, "GRACE_S", 0.1)
    run = Run(tmp_path, "sleep 600 & echo $! > {out}/started")
    run.write("best.pth", "best", 10)
    run.runner.close()
    assert run.folders == ["step_000000010"]
    pid = child_of(run.folder / "samples/step_000000010")
    for _ in range(1000):  # SIGKILL was sent, and acts a moment later
        if not is_alive(pid):
            return
        time.sleep(0.01)
    raise AssertionError("it still runs")


def test_what_another_user_runs_on_does_not_fail_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(group: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr("tuner.study.process.os.killpg", refuse)
    assert run_in_shell("exit 7", timeout=60.0, grace=10.0) == 7


def test_command_that_fills_the_disk_with_its_log_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hooks, "MAX_LOG_BYTES", 1000)
    run = Run(tmp_path, "while :; do echo 0123456789; done", timeout=100.0)
    run.write("best.pth", "best", 10)
    run.runner.close()
    assert run.folders == ["step_000000010.failed"] and "(its log has over 1 kB)" in caplog.text


def test_stopped_run_ends_its_command_and_runs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "GRACE_S", 0.1)
    run = Run(tmp_path, STUBBORN, stop=lambda: True)
    run.write("best.pth", "best", 10)
    pid = child_of(run.started(10))
    run.write("best.pth", "best", 20)
    run.runner.close()
    assert run.folders == ["step_000000010.failed"] and not is_alive(pid)


def test_run_that_failed_ends_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hooks, "GRACE_S", 0.1)
    run = Run(tmp_path, STUBBORN, timeout=30.0)
    run.write("best.pth", "best", 10)
    run.started(10)
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        run.runner.close()
    assert run.folders == ["step_000000010.failed"] and "failed (the run stopped)" in caplog.text


def test_leftovers_of_a_killed_process_are_tidied_up(tmp_path: Path) -> None:
    run = Run(tmp_path, "true")
    left = run.folder / "samples/step_000000010.running"
    left.mkdir(parents=True)
    (left / "checkpoint.pth").touch()
    run.write("best.pth", "best", 10)
    run.runner.close()
    assert run.folders == ["step_000000010", "step_000000010.failed"]
    assert list(run.folder.glob("samples/*/checkpoint.pth")) == []


def test_full_run_has_hooks_and_its_trials_have_none(runtime: Runtime, tmp_path: Path) -> None:
    command = "python -c 'import sys; print(sys.prefix)'; cp {checkpoint} {out}/weights"
    section = {"command": f'{command}; echo \'{{"cer": 0.5, "x": null}}\' > {{out}}/metrics.json', "on": ["end"]}
    spec = StudySpec.build({**values(), "hooks": section}, base_dir=tmp_path)
    study = launch(spec, storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime, num_trials=1)
    assert list(runtime.run_root.rglob("samples")) == []
    result = promote(study, runtime=runtime)
    last = result.run_dir / "samples" / f"step_{result.step:09d}"
    assert read_checkpoint(last / "weights")["step"] == result.step
    assert (last / "hook.log").read_text() == f"{sys.prefix}\n"
    log = (result.run_dir / "train.log").read_text()
    assert f"hook: step {result.step:,}, 0 files in {last}, cer 0.5 (" in log


def test_every_milestone_of_a_run_is_sampled_with_its_own_weights(runtime: Runtime, tmp_path: Path) -> None:
    command = "cp {checkpoint} {out}/weights"
    changes = {"hooks": {"command": command, "on": ["milestone"]}}
    given = values(**{"train.keep_every": 20, "train.batch_size": 8, "trial.num_trials": 1})
    study = launch(
        StudySpec.build({**given, **changes}, base_dir=tmp_path),
        storage=f"sqlite:///{tmp_path}/tuner.db",
        runtime=runtime,
    )
    result = promote(study, runtime=runtime)
    kept = sorted(result.run_dir.glob("milestone_*.pth"))
    assert kept and result.step == 60
    for path in (result.run_dir / "samples").iterdir():
        assert read_checkpoint(path / "weights")["step"] == int(path.name.removeprefix("step_"))
    assert (result.run_dir / f"samples/step_{int(kept[-1].stem.removeprefix('milestone_')):09d}").is_dir()


def test_signal_stops_the_run_and_its_command(tmp_path: Path) -> None:
    spec = write(
        tmp_path,
        TOML.replace("samples = 480", "samples = 8_000_000\neval_every = 800")
        + f"[hooks]\ncommand = '''{STUBBORN.partition('; ')[2]} # {{checkpoint}}'''\n",
    )
    command = [sys.executable, "-m", "tuner", "train", str(spec), "--no-track", "--run-root", str(tmp_path)]
    root = str(Path(__file__).parents[3])
    with subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}) as process:
        while not (started := list(tmp_path.rglob("started"))):
            assert process.poll() is None
            time.sleep(0.02)
        pid = child_of(started[0].parent)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 130
    assert not is_alive(pid) and (tmp_path / "toy/train/latest.pth").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "listen {checkpont} {checkpoint}",
            "hooks: command has the unknown placeholder {checkpont}; known are {checkpoint}",
        ),
        ("listen", "hooks: command has no {checkpoint}"),
    ],
)
def test_mistake_names_the_placeholder(command: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message.replace("{", r"\{")):
        StudySpec.build({**values(), "hooks": {"command": command}}, base_dir=tmp_path)
