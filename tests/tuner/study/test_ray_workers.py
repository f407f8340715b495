"""`launch --engine ray`: workers on a cluster of two nodes, of which one is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import optuna
import pytest
from optuna.trial import TrialState

from tests.tuner.studies_for_tests import build
from trainer import UserError
from tuner import launch
from tuner.study.ray_workers import RaySupervisor, RayWorker, _check_storage, share_resources
from tuner.study.record import TrialRecord
from tuner.study.tracked_run import Runtime
from tuner.study.worker_process import Job

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of this process's own, with one node of one core; its workers import what this process imports."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    # `Together` lets the first trial train only when a second worker is there.
    meeting = tmp_path / str(os.getpid())
    meeting.mkdir()
    monkeypatch.setenv("MEETING", str(meeting))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


class Losing:
    """A display that adds a node when the first trial starts, and takes it away once two trials have been validated."""

    def __init__(self, cluster: Any) -> None:
        self.cluster, self.validated = cluster, set[int]()
        self.started: list[int] = []
        self.ended: list[int] = []
        self.resumed: list[int] = []
        self.node: Any = None
        self.is_lost = False

    def trial_started(self, trial: TrialRecord, resumed: bool) -> Follower:
        (self.resumed if resumed else self.started).append(trial.number)
        if self.node is None:
            self.node = self.cluster.add_node(num_cpus=1)
        return Follower(self, trial.number)

    def trial_ended(self, trial: TrialRecord) -> None:
        self.ended.append(trial.number)

    def note(self, number: int) -> None:
        self.validated.add(number)
        if len(self.validated) == 2 and not self.is_lost:
            self.is_lost = True
            self.cluster.remove_node(self.node, allow_graceful=False)


class Follower:
    def __init__(self, display: Losing, number: int) -> None:
        self.display, self.number = display, number

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        if "val/loss" in values:
            self.display.note(self.number)

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.slow  # starting Ray takes half a minute, and the extra `dev` does not have it
def test_worker_on_a_node_that_joined_later_is_used_and_its_trial_goes_on_when_it_is_lost(
    cluster: Any, runtime: Runtime, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"train.save_every": 5, "trial.samples": 4000, "full.samples": 8000}
    changes["study.workload"] = "tests.tuner.study.test_workers:Together"
    display = Losing(cluster)
    study = launch(
        build(**changes, **{"trial.num_trials": 3}),
        storage=f"sqlite:///{tmp_path}/tuner.db",
        runtime=runtime,
        num_workers=2,
        engine="ray",
        display=display,
    )
    assert display.is_lost
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    assert sorted(display.started) == sorted(display.ended) == [0, 1, 2] and display.resumed == [1]
    assert study.user_attrs["ended"] == "the study has its 3 trials"


@pytest.mark.parametrize(
    ("workers", "cluster", "device", "expected"),
    [
        (4, {"CPU": 64.0, "GPU": 8.0}, "auto", {"num_gpus": 1, "num_cpus": 8}),
        (4, {"CPU": 64.0, "GPU": 8.0}, "cpu", {"num_gpus": 0, "num_cpus": 16}),
        (8, {"CPU": 4.0}, "auto", {"num_gpus": 0, "num_cpus": 1}),
    ],
)
def test_each_worker_reserves_a_gpu_or_its_share_of_the_cores(
    workers: int, cluster: dict[str, float], device: str, expected: dict[str, float]
) -> None:
    assert share_resources(workers, cluster, device=device) == expected


def test_several_machines_do_not_share_an_sqlite_file(tmp_path: Path) -> None:
    job = Job("toy", {}, tmp_path, "sqlite:///tuner.db", tmp_path, track=False, total=2)
    _check_storage(job, ["10.0.0.1", "10.0.0.1"])
    with pytest.raises(UserError, match="2 machines can't share an SQLite file: use PostgreSQL"):
        _check_storage(job, ["10.0.0.1", "10.0.0.2"])


def test_worker_that_dies_right_after_it_ended_its_trial_ends_no_launch(tmp_path: Path) -> None:
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/tuner.db")
    study.tell(study.ask(), 1.0)
    job = Job("toy", {}, tmp_path, "sqlite:///tuner.db", tmp_path, track=False, total=2)
    others: dict[str, Any] = {"study": study, "stop": lambda: False, "display": None, "on_trial_end": lambda: None}
    supervisor = RaySupervisor(job, 2, device="cpu", **others)
    worker = MagicMock(spec=RayWorker, trial=0, has_exited=False)
    supervisor._workers, supervisor._stopping = [worker], 0.0
    supervisor._handle_death(worker)
    assert supervisor._workers == [] and "alive" not in study.trials[0].user_attrs
