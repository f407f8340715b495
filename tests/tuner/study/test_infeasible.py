"""Trials that can't be trained: the sampler learns each kind, its memory is freed, and the study continues."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tests.toy import Toy
from tests.tuner.studies_for_tests import build
from trainer import UserError
from trainer.acceleration import Capabilities, detect
from trainer.checkpoint import read_checkpoint
from trainer.config import TrainConfig
from trainer.micro_batches import MemoryFit
from trainer.tracking import Tracker, Trackers
from tuner import launch
from tuner.show.status import status
from tuner.spec.setups import trial_setup
from tuner.spec.study_toml import StudySpec
from tuner.study import objective
from tuner.study.objective import _decide_micro_batches, is_out_of_memory
from tuner.study.peak_memory import PeakMemory
from tuner.study.record import StudyRecord
from tuner.study.storage import load_study, open_storage
from tuner.study.tracked_run import Runtime

ERRORS: dict[str, Callable[[], Exception]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nMore on it"),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "python": MemoryError,
}


class Exploding(Toy):
    """Goes wrong in training batches of 16."""

    how: str = "cuda"
    models: ClassVar[list[weakref.ref[nn.Module]]] = []

    def build_model(self) -> nn.Module:
        model = super().build_model()
        # As a compiled model is, or one with hooks: no count of references frees it.
        model.__dict__["itself"] = model
        self.models.append(weakref.ref(model))
        return model

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sums = super().loss_sums(model, inputs)
        if model.training and len(inputs["tokens"]) == 16:
            if self.how == "gradient":
                return {name: value * torch.nan for name, value in sums.items()}
            if self.how in ERRORS:
                raise ERRORS[self.how]()
            model.get_buffer("factor").fill_(torch.nan)
        return sums


class Invalid(Exploding):
    """Its validation loss is not finite."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        model.register_buffer("factor", torch.ones(()))
        return model

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sums = super().loss_sums(model, inputs)
        return sums if model.training else {name: value * model.factor for name, value in sums.items()}


class Witness:
    """Notes after each trial how many models are still in memory."""

    def __init__(self) -> None:
        self.alive: list[int] = []

    def trial_started(self, trial: optuna.Trial, resumed: bool) -> Tracker:
        return Trackers([])

    def trial_ended(self, trial: FrozenTrial) -> None:
        models = [model for ref in Exploding.models if (model := ref()) is not None]
        # The memory estimate keeps a model without contents.
        self.alive.append(sum(not isinstance(model.get_parameter("head.weight"), FakeTensor) for model in models))


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/tuner.db"


def exploding(how: str, **changes: Any) -> StudySpec:
    name = "Invalid" if how == "validation" else "Exploding"
    return build(
        **{
            "study.workload": f"tests.tuner.study.test_infeasible:{name}",
            "workload.how": how,
            "train.log_every": 2,
            "trial.num_trials": 5,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("how", "constraint", "reason"),
    [
        ("cuda", "memory", "out of memory: CUDA out of memory. Tried to allocate 20.00 GiB"),
        ("cpu", "memory", "DefaultCPUAllocator: can't allocate memory"),
        ("cublas", "memory", "CUBLAS_STATUS_ALLOC_FAILED"),
        ("python", "memory", "out of memory: MemoryError"),
        ("gradient", "finite", "none of the last 6 gradients was finite"),
        ("validation", "finite", "val/loss was nan after 48 samples"),
    ],
)
def test_untrainable_settings_are_infeasible_and_free_their_memory(
    runtime: Runtime, url: str, how: str, constraint: str, reason: str
) -> None:
    witness = Witness()
    study = launch(exploding(how), storage=url, runtime=runtime, display=witness)
    infeasible = [trial for trial in study.trials if trial.params["train.batch_size"] == 16]
    assert infeasible and all(trial.constraints == {constraint: 1.0} for trial in infeasible)
    assert all(trial.state == TrialState.PRUNED for trial in infeasible)
    assert all(reason in trial.user_attrs["infeasible"] for trial in infeasible)
    assert all("\n" not in trial.user_attrs["infeasible"] for trial in infeasible)
    assert status(StudyRecord.read(study))["trials"]["infeasible"] == len(infeasible) < 5 == len(study.trials)
    assert StudyRecord.read(study).ranked[0].params["train.batch_size"] != 16
    assert witness.alive == [0] * 5


def test_sampler_proposes_less_of_what_is_infeasible(runtime: Runtime, url: str) -> None:
    study = launch(exploding("cuda", **{"trial.num_trials": 16}), storage=url, runtime=runtime)
    proposed = [trial.params["train.batch_size"] == 16 for trial in study.trials]
    assert sum(proposed[:6]) >= 1
    assert sum(proposed[6:]) <= 2, "at random three of ten"


def test_another_error_is_a_defect_and_no_infeasible_trial(
    runtime: Runtime, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ERRORS, "cuda", lambda: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        launch(exploding("cuda"), storage=url, runtime=runtime)
    assert not is_out_of_memory(ValueError("CUDA error: out of memory"))


def larger_than_any_machine(**changes: Any) -> StudySpec:
    """Batches of 16 samples would do, but not 4 TB of parameters."""
    values = build(**{"study.workload": "tests.tuner.study.test_infeasible:Exploding", **changes}).to_dict()
    values["search"] = {"workload.width": {"choices": [16, 1_000_000]}}
    return StudySpec.build(values, base_dir=Path.cwd())


@pytest.mark.parametrize("micro_batch_size", [None, "auto"])
def test_too_large_model_is_infeasible_before_it_is_built(
    runtime: Runtime, url: str, micro_batch_size: str | None
) -> None:
    given = {"train.micro_batch_size": micro_batch_size} if micro_batch_size else {}
    spec = larger_than_any_machine(**{"train.batch_size": 4, **given})
    study = launch(spec, storage=url, runtime=runtime, num_trials=5)
    wide = [trial for trial in study.trials if trial.params["workload.width"] > 16]
    assert wide and all(trial.constraints == {"memory": 1.0} for trial in wide)
    for trial in wide:
        assert trial.user_attrs["infeasible"].startswith("needs ")
        assert " GB and the device has " in trial.user_attrs["infeasible"]
        assert "micro_batch_size" not in trial.user_attrs
        assert not list(runtime.run_dir("toy", f"trial-{trial.number:05d}").glob("*.pth"))
    rest = [trial for trial in study.trials if trial not in wide]
    assert rest and all(trial.user_attrs["micro_batch_size"] == 4 for trial in rest)


def test_described_card_is_judged_by_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A described card of 24 GB, on a machine without one."""
    monkeypatch.setattr("tuner.study.objective.available_memory", lambda kind: 24_000_000_000)
    card = Capabilities("cuda", "card", 8, 24_000_000_000, compute_capability=(8, 9))
    trial = optuna.create_study().ask()
    for batch_size, given, found in ((8, None, 8), (8, 3, 3), (64, "auto", 64)):
        values = {"train.batch_size": batch_size, "train.micro_batch_size": given} if given else {}
        spec = build(**values, **{"search.train.batch_size": {"choices": [8, 64]}, "trial.samples": 256})
        setup = _decide_micro_batches(trial, trial_setup(spec, {"train.batch_size": batch_size}), card)
        assert trial.user_attrs["micro_batch_size"] == found
        assert setup.config.num_micro_batches == -(-batch_size // found)
    spec = build(**{"workload.width": 40_000})  # 1.6 G parameters, 6.4 GB; with Prodigy's state six times as much
    with pytest.raises(Exception, match=r"^needs 4\d\.\d GB and the device has 24\.0 GB$"):
        _decide_micro_batches(trial, trial_setup(spec, {}), card)


def test_trial_records_its_cost_and_the_projected_full_run(runtime: Runtime, url: str) -> None:
    study = launch(build(**{"train.micro_batch_size": 3}), storage=url, runtime=runtime, num_trials=2)
    for trial in study.trials:
        attrs = trial.user_attrs
        assert 50e6 < attrs["peak_memory"] < attrs["memory"], "a process with torch takes more than 50 MB"
        checkpoint = read_checkpoint(runtime.run_dir("toy", f"trial-{trial.number:05d}") / "latest.pth")
        progress = checkpoint["progress"]
        seconds = 3 * progress["step"] * progress["seconds"] / progress["timed_steps"]
        assert attrs["full_hours"] == pytest.approx(seconds / 3600, rel=0.2), "480 samples in place of 160"
        assert attrs["d_rising"] is (attrs["d"][-1] > 1.01 * attrs["d"][-2])
        batch_size = trial.params["train.batch_size"]
        assert attrs["micro_batch_size"] == {4: 2, 8: 3, 16: 3}[batch_size]
    assert study.trials[0].user_attrs["d_rising"] is True, "20 steps are few for Prodigy"


def test_adamw_has_no_d_that_rises(runtime: Runtime, url: str) -> None:
    spec = build(**{"train.optimizer": "adamw", "trial.evaluations": 1})
    study = launch(spec, storage=url, runtime=runtime, num_trials=1)
    assert study.trials[0].user_attrs["d_rising"] is False


def test_peak_is_that_of_its_own_time() -> None:
    first = PeakMemory("cpu")
    held = torch.ones(50_000_000)
    large = first.read()
    del held
    second = PeakMemory("cpu")
    small = second.read()
    assert large and small and large > small + 150e6


def test_unresettable_peak_counts_only_when_it_rose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.study.peak_memory.SELF", tmp_path / "none")
    assert PeakMemory("cpu").read() is None, "no /proc"
    monkeypatch.setattr("tuner.study.peak_memory.SELF", tmp_path)
    (tmp_path / "clear_refs").mkdir()
    (tmp_path / "status").write_text("Name: python\nVmHWM:     1000 kB\n")
    peak = PeakMemory("cpu")
    assert peak.read() is None
    (tmp_path / "status").write_text("Name: python\nVmHWM:     2000 kB\n")
    assert peak.read() == 2_048_000


class Killed(BaseException):
    """In place of SIGKILL: the process can't do anything more."""


class Kernel:
    """Ends the process when it asks whether it shall stop, at a boundary of its choice."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self) -> bool:
        self.left -= 1
        if self.left == 0:
            raise Killed
        return False


def killed_launch(
    runtime: Runtime,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    at: int,
    spec: StudySpec | None = None,
    for_memory: bool = True,
) -> None:
    """A launch whose process is killed: the study gets no result. The kernel counts what it kills for memory."""
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "tell", lambda *_, **__: None)
        with pytest.raises(Killed):
            launch(spec or build(), storage=url, runtime=Runtime(runtime.run_root, track=False, stop=Kernel(at)))
    if for_memory:
        KILLS.append(1)


KILLS: list[int] = []


@pytest.fixture(autouse=True)
def _kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    KILLS.clear()
    monkeypatch.setattr("tuner.study.objective.oom_kills", lambda: ("boot", len(KILLS)))


def test_trial_killed_for_memory_three_times_is_infeasible(
    runtime: Runtime, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(build(), storage=url, runtime=runtime, num_trials=1)
    for _ in range(3):
        killed_launch(runtime, url, monkeypatch, at=3)  # before an evaluation at any batch size
        assert load_study("toy", open_storage(url)).trials[1].state == TrialState.RUNNING
    study = launch(build(), storage=url, runtime=runtime, num_trials=3)
    second, third = study.trials[1:]
    assert second.constraints == {"memory": 1.0} and second.state == TrialState.PRUNED
    assert second.user_attrs["infeasible"] == (
        "killed 3 times before it made progress, likely by the kernel's out-of-memory killer"
    )
    assert third.state == TrialState.COMPLETE


def test_new_evaluation_or_clean_stop_resets_the_count(
    runtime: Runtime, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starts() -> list[int]:
        found: list[int] = load_study("toy", open_storage(url)).trials[0].user_attrs["starts"]
        return found[:2]

    killed_launch(runtime, url, monkeypatch, at=5)
    killed_launch(runtime, url, monkeypatch, at=9)  # after the first evaluation, at step 5
    assert starts() == [2, 0]
    killed_launch(runtime, url, monkeypatch, at=5)
    assert starts() == [1, 1]
    asked = iter(range(100))
    launch(build(), storage=url, runtime=Runtime(runtime.run_root, track=False, stop=lambda: next(asked) > 3))
    assert starts() == [0]
    for _ in range(2):
        killed_launch(runtime, url, monkeypatch, at=4)
    study = launch(build(), storage=url, runtime=runtime, num_trials=1)
    assert study.trials[0].state == TrialState.COMPLETE


def test_trial_that_progresses_each_time_is_not_infeasible(
    runtime: Runtime, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = build(**{"train.save_every": 2, "trial.evaluations": 1})
    for _ in range(4):
        # Each gets two steps further, to the next checkpoint.
        killed_launch(runtime, url, monkeypatch, at=6, spec=spec)
    study = launch(spec, storage=url, runtime=runtime, num_trials=1)
    assert study.trials[0].state == TrialState.COMPLETE
    assert "at step 8" in (runtime.run_dir("toy", "trial-00000") / "train.log").read_text()


@pytest.mark.parametrize("key", ["train.micro_batch_size", "train.num_workers", "workload.digest"])
def test_settings_without_effect_on_the_metric_can_not_be_searched(key: str) -> None:
    with pytest.raises(UserError, match=rf'search\."{key}": it changes no result; set it in \['):
        build(**{f"search.{key}": {"choices": [1, 2]}})


@pytest.mark.parametrize("micro", ["auto", None])
def test_smaller_batch_than_one_that_fits_is_not_estimated(monkeypatch: pytest.MonkeyPatch, micro: str | None) -> None:
    estimated: list[int] = []

    def estimate(workload: object, config: TrainConfig, *_: object) -> MemoryFit:
        estimated.append(config.batch_size)
        # Only up to 16 fits as a whole.
        size = min(config.batch_size, 16) if micro else config.batch_size
        return MemoryFit(size, 100 * size if size <= 16 else 10**15, "by the test")

    monkeypatch.setattr(objective, "estimate_fit", estimate)
    monkeypatch.setattr(objective, "_memory_fits", {})
    changes = {"train.micro_batch_size": micro} if micro else {}
    spec = build(without="search.train.batch_size", **changes)
    for batch_size in (8, 32, 16, 4, 8, 16):
        setup = trial_setup(spec, {"train.batch_size": batch_size})
        fit = objective._estimate_memory(setup, detect("cpu"), 10**12, None)
        assert fit.micro_batch_size == (min(batch_size, 16) if micro else batch_size)
        assert fit.fits(10**12) == (batch_size <= 16 or micro is not None)
    assert estimated == [8, 32, 16]
