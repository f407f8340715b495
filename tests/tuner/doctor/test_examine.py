"""The checks of `tuner doctor` on a spec, and its output."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from tests.toy import Sequences, Toy
from tests.tuner.studies_for_tests import TOML, write
from trainer.config import TrainConfig
from trainer.memory import Probe
from tuner.cli import main
from tuner.doctor.check import Check, has_failed, show
from tuner.doctor.device import build_cuda_machine, detect_machine
from tuner.doctor.examine import examine
from tuner.doctor.laws import check_laws
from tuner.doctor.memory import check_micro_batches

LARGE = TOML.replace("num_train = 128", "num_train = 128\nwidth = 512")


class ValueReader(Toy):
    """Reads its loss at every step."""

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sums = super().loss_sums(model, inputs)
        assert all(value.item() >= 0 for value in sums.values())
        return sums


class NoModel(Toy):
    def build_model(self) -> nn.Module:
        return {}["encoder"]


class ForgottenReturn(Toy):
    def build_model(self) -> nn.Module:
        return None  # type: ignore[return-value]


class MissingData(Toy):
    def train_data(self) -> Sequences:
        return open("/no/such/corpus.txt")  # type: ignore[return-value]


class WrongData(Toy):
    def val_data(self) -> Sequences:
        raise ValueError("a split of\n0.0 leaves nothing")


class WithoutLengths(Toy):
    def train_data(self) -> Any:
        return [1, 2, 3]


class FewLengths(Toy):
    def val_data(self) -> Any:
        data = Sequences(40, 2)
        data.samples.pop()
        data.__class__ = Sized
        return data


class Saving(Toy):
    def memory_savers(self) -> tuple[str, ...]:
        return ("width = 4", "embed = false")


class Sized(Sequences):
    def __len__(self) -> int:
        return len(self.samples)


class EmptyValidation(Toy):
    def val_data(self) -> Sequences:
        return Sequences(0, 2)


class UnknownLoss(Toy):
    loss_weights = property(lambda self: {"mel_loss": 1.0})  # type: ignore[assignment]


class BreaksInTheLongestBatch(Toy):
    """At the second batch size that is looked at: the lines before it stay."""

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if len(inputs["tokens"]) == 16:
            raise KeyError("sixteen")
        return super().loss_sums(model, inputs)


def named(checks: list[Check]) -> dict[str, Check]:
    found = {check.name: check for check in checks}
    assert len(found) == len(checks), "every check has a name of its own"
    return found


def needed(batch_size: int) -> int:
    """Bytes that LARGE needs on a CUDA device."""
    config = TrainConfig(steps=1, batch_size=batch_size)
    return Probe(Toy(width=512, num_train=128), config, device="cuda", precision="fp32").estimate().total


PACKAGES = ["prodigy-tuner", "trainer", "python", "torch", "optuna", "prodigyopt", "optuna-dashboard", "aim"]
MACHINE = [*PACKAGES, "compiler", "torch.compile", "device", "clock", "storage"]


@pytest.fixture(autouse=True)
def _no_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_STORAGE", f"sqlite:///{tmp_path}/tuner.db")


def test_machine_that_runs_these_tests_is_sound(tmp_path: Path) -> None:
    found = named([check for check in examine(run_root=tmp_path) if not check.name.startswith("gpu ")])
    assert list(found) == [*MACHINE, "disk"]
    assert {check.state for check in found.values()} <= {"ok", "warn"}
    assert found["torch"].message == torch.__version__
    assert found["prodigy-tuner"].message == version("prodigy-tuner")


def test_study_that_fits_has_no_fail(tmp_path: Path) -> None:
    checks = examine(write(tmp_path), run_root=tmp_path / "runs", gpu_memory=24e9)
    found = [check for check in checks if check.name not in MACHINE and not check.name.startswith("gpu ")]
    batches = ["memory, batch 8", "memory, batch 4", "memory, batch 16"]
    last = ["attention", "loader", "laws", "snapshot", "disk"]
    assert [check.name for check in found] == ["spec", "data", *batches, *last]
    assert all(check.state == "ok" for check in found), found
    assert found[1].message == "128 samples to train on, 40 to validate, at most 39 tokens each"
    assert not (tmp_path / "runs").exists() and not (tmp_path / "tuner.db").exists(), "looking changes nothing"


AUTO = LARGE.replace("batch_size = 8", 'batch_size = 8\nmicro_batch_size = "auto"', 1)


def test_auto_micro_batches_are_checked_with_the_launch_decision() -> None:
    config = TrainConfig(steps=1, batch_size=512, micro_batch_size="auto", precision="fp32")
    probe = Probe(Toy(width=64, num_train=1024), config, device="cuda", precision="fp32")
    machine = build_cuda_machine(probe.estimate(512, micro_batch_size=128).total)
    found = check_micro_batches(probe, 512, machine)
    assert found.state == "ok" and found.message.startswith("micro-batches of 128: a batch of 512 needs")
    found = check_micro_batches(probe, 128, machine)
    assert found.state == "ok" and found.message.startswith("micro-batches of 128: the whole batch needs")


def test_auto_micro_batches_fail_where_not_one_sample_fits(tmp_path: Path) -> None:
    found = named(examine(write(tmp_path, AUTO), run_root=tmp_path, gpu_memory=100e6))["memory, batch 8"]
    assert found.state == "fail" and "one sample at a time needs" in found.message
    assert "train.slice_p = 11" in found.remedy


def test_cpu_memory_held_by_others_is_a_warning() -> None:
    config = TrainConfig(steps=1, batch_size=8, micro_batch_size="auto")
    probe = Probe(Toy(width=512), config, device="cpu", precision="fp32")
    machine = replace(detect_machine("cpu"), memory=1_000_000)
    found = check_micro_batches(probe, 8, machine)
    assert found.state == "warn" and "other programs hold the rest" in found.message
    tiny = replace(machine, capabilities=replace(machine.capabilities, memory=1_000_000))
    assert check_micro_batches(probe, 8, tiny).state == "fail"


def test_baseline_that_does_not_fit_fails_with_the_largest_fitting_batch_size(tmp_path: Path) -> None:
    found = named(examine(write(tmp_path, LARGE), run_root=tmp_path, gpu_memory=needed(6)))
    baseline = found["memory, batch 8"]
    assert baseline.state == "fail"
    assert "train.batch_size = 6 is the largest that fits" in baseline.remedy
    assert 'train.micro_batch_size = "auto"' in baseline.remedy
    assert "train.slice_p = 11" in baseline.remedy
    assert found["memory, batch 4"].state == "ok" and not found["memory, batch 4"].remedy
    assert found["memory, batch 16"].state == "warn"
    assert "would be infeasible" in found["memory, batch 16"].remedy and "fits is 6" in found["memory, batch 16"].remedy


def test_searched_batch_size_that_does_not_fit_is_a_warning(tmp_path: Path) -> None:
    checks = examine(write(tmp_path, LARGE), run_root=tmp_path, gpu_memory=needed(12))
    assert not has_failed(checks)
    found = named(checks)
    assert found["memory, batch 16"].state == "warn" and found["memory, batch 8"].state == "ok"


def test_model_that_never_fits_has_a_remedy(tmp_path: Path) -> None:
    found = named(examine(write(tmp_path, LARGE), run_root=tmp_path, gpu_memory=100e6))
    assert "no batch size fits: use train.slice_p = 11 or a smaller model" in found["memory, batch 8"].remedy


def test_memory_savers_of_the_workload_are_the_remedy(tmp_path: Path) -> None:
    spec = write(tmp_path, LARGE.replace("tests.toy:Toy", f"{__name__}:Saving"))
    found = named(examine(spec, run_root=tmp_path, gpu_memory=100e6))
    assert (
        "no batch size fits: use workload.width = 4, workload.embed = false, train.slice_p = 11 or a smaller model"
        in found["memory, batch 8"].remedy
    )


def test_ends_of_a_range_are_checked(tmp_path: Path) -> None:
    text = TOML.replace("{ choices = [4, 8, 16] }", "{ low = 2, high = 128, log = true }")
    text = text.replace("samples = 160", "samples = 6_400").replace("samples = 480", "samples = 12_800")
    found = named(examine(write(tmp_path, text), run_root=tmp_path))
    assert {name for name in found if name.startswith("memory")} == {f"memory, batch {n}" for n in (2, 8, 128)}


@pytest.mark.parametrize(
    ("old", "new", "name", "message"),
    [
        ("[train]", "[train]\nd_ceof = 1.0", "spec", "did you mean train.d_coef?"),
        ("num_train = 128", "num_train = 4", "workload", "4 could be read, too few for a batch of 8"),
        ("tests.toy:Toy", "tests.toy:Nothing", "spec", "no class Nothing"),
        ("batch_size = 8", 'batch_size = 8\ndevice = "cuda"', "device", "there is no CUDA device"),
    ],
)
def test_unrunnable_study_fails(tmp_path: Path, old: str, new: str, name: str, message: str) -> None:
    if name == "device" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    checks = examine(write(tmp_path, TOML.replace(old, new)), run_root=tmp_path)
    (failed,) = (check for check in checks if check.state == "fail")
    assert failed.name == name and message in failed.message and failed.remedy


@pytest.mark.parametrize(
    ("workload", "name", "messages"),
    [
        (NoModel, "workload", [f"KeyError: 'encoder' ({__file__}, line ", 'return {}["encoder"])']),
        (ForgottenReturn, "workload", ["AttributeError: 'NoneType' object", "workload.build_model().train())"]),
        (MissingData, "workload", ["FileNotFoundError: [Errno 2]", "/no/such/corpus.txt", f"({__file__}, line "]),
        (WrongData, "workload", ["ValueError: a split of 0.0 leaves nothing", f"({__file__}, line "]),
        (WithoutLengths, "workload", ["list.lengths is missing: give a numpy array"]),
        (FewLengths, "workload", ["Sized has 39 samples, and its lengths are 40"]),
        (EmptyValidation, "data", ["128 samples to train on, 0 to validate: a split is empty"]),
        (UnknownLoss, "workload", ["UnknownLoss.loss_weights names mel_loss, and its batches count token_loss"]),
        (BreaksInTheLongestBatch, "workload", ["KeyError: 'sixteen'"]),
    ],
)
def test_error_of_the_workload_fails_among_the_other_lines(
    tmp_path: Path, workload: type[Toy], name: str, messages: list[str]
) -> None:
    spec = write(tmp_path, TOML.replace("tests.toy:Toy", f"{__name__}:{workload.__name__}"))
    checks = [check for check in examine(spec, run_root=tmp_path) if not check.name.startswith("gpu ")]
    found = named(checks)
    (failed,) = (check for check in checks if check.state == "fail")
    assert failed.name == name and failed.remedy and "\n" not in failed.message
    assert all(message in failed.message for message in messages), failed.message
    assert list(found)[: len(MACHINE)] == MACHINE
    assert found["spec"].state == found["disk"].state == "ok" and list(found)[-1] == "disk"
    if workload is BreaksInTheLongestBatch:
        assert found["memory, batch 8"].state == "ok" and "memory, batch 16" not in found


def test_damaged_sample_is_named(tmp_path: Path) -> None:
    checks = examine(write(tmp_path, TOML.replace("num_train = 128", "num_train = 128\ndamaged = [0]")))
    found = named(checks)["data"]
    assert found.state == "warn" and "sample-0: tokens.npy is missing" in found.message


def test_model_without_an_estimate_is_a_warning(tmp_path: Path) -> None:
    text = TOML.replace("tests.toy:Toy", "tests.tuner.doctor.test_examine:ValueReader")
    found = named(examine(write(tmp_path, text), run_root=tmp_path))
    assert found["memory"].state == "warn" and "reads the values" in found["memory"].message


def test_disk_too_small_for_the_checkpoints_fails(tmp_path: Path) -> None:
    # 2e6 wide: 16 TB of parameters, of which nothing is ever allocated.
    text = TOML.replace("num_train = 128", "num_train = 128\nwidth = 2_000_000")
    found = named(examine(write(tmp_path, text), run_root=tmp_path / "runs"))
    assert found["disk"].state == "fail" and f"free in {tmp_path}" in found["disk"].message
    assert found["snapshot"].state == "warn" and "training waits" in found["snapshot"].message


def test_state_starts_its_line_and_the_remedy_is_below() -> None:
    checks = [Check("python", "ok", "3.11"), Check("disk", "fail", "12 GB of [100]", "free some space")]
    plain = io.StringIO()
    show(checks, Console(file=plain, width=20))
    assert plain.getvalue() == "ok   python  3.11\nfail disk    12 GB of [100]\n             -> free some space\n"
    colours = io.StringIO()
    show(checks, Console(file=colours, force_terminal=True, color_system="standard"))
    assert "\x1b[" in colours.getvalue()
    assert re.sub(r"\x1b\[[\d;]*m", "", colours.getvalue()) == plain.getvalue()


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["--gpu-memory", "1"], 1)])
def test_command_prints_json_and_exits_1_on_a_fail(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
) -> None:
    text = TOML.replace("num_train = 128", "num_train = 128\nwidth = 6_000")
    spec = write(tmp_path, text.replace("train.batch_size = { choices = [4, 8, 16] }\n", ""))
    command = ["tuner", "doctor", str(spec), "--json", "--run-root", str(tmp_path), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert ended.value.code == code
    assert {row["state"] for row in found} <= {"ok", "warn", "fail"} and "message" in found[0]
    memory = next(row for row in found if row["name"] == "memory, batch 8")
    assert memory["state"] == ("fail" if code else "ok")


class MeanLoss(Toy):
    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value / len(inputs["tokens"]) for name, value in super().loss_sums(model, inputs).items()}


def test_workload_that_breaks_a_law_fails(tmp_path: Path) -> None:
    found = named(examine(write(tmp_path), run_root=tmp_path))["laws"]
    assert found.state == "ok"
    text = TOML.replace("tests.toy:Toy", f"{__name__}:MeanLoss")
    found = named(examine(write(tmp_path, text), run_root=tmp_path))["laws"]
    assert found.state == "fail" and "return sums, not means" in found.message
    assert "not checked: the model has 2.0 GB" in check_laws(Toy(), 2e9).message
