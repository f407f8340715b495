"""What `tuner doctor` finds, and how it says it."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from tests.toy import Toy
from tests.tuner.studies_for_tests import TOML, write
from trainer.config import TrainConfig
from trainer.memory import Probe
from tuner import doctor
from tuner.cli import main
from tuner.doctor import Check, examine, show

LARGE = TOML.replace("num_train = 128", "num_train = 128\nwidth = 512")


class ValueReader(Toy):
    """Reads its loss at every step."""

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sums = super().loss_sums(model, inputs)
        assert all(value.item() >= 0 for value in sums.values())
        return sums


def named(checks: list[Check]) -> dict[str, Check]:
    found = {check.name: check for check in checks}
    assert len(found) == len(checks), "every check has a name of its own"
    return found


def needed(batch_size: int) -> int:
    """Bytes that LARGE needs on a CUDA device."""
    config = TrainConfig(steps=1, batch_size=batch_size)
    return Probe(Toy(width=512, num_train=128), config, device="cuda", precision="fp32").estimate().total


def test_the_installation_that_runs_these_tests_is_sound() -> None:
    found = named(examine())
    assert list(found) == ["python", "torch", "prodigyopt", "compiler", "device"]
    assert {check.state for check in found.values()} <= {"ok", "warn"}
    assert found["torch"].message == torch.__version__


def test_a_study_that_fits_has_no_fail(tmp_path: Path) -> None:
    found = named(examine(write(tmp_path), run_root=tmp_path / "runs"))
    batches = ["memory, batch 8", "memory, batch 4", "memory, batch 16"]
    assert list(found)[5:] == ["spec", "data", *batches, "snapshot", "disk"]
    assert all(check.state == "ok" for check in list(found.values())[5:])
    assert found["data"].message == "128 samples to train on, 40 to validate, at most 39 tokens each"
    assert not (tmp_path / "runs").exists(), "looking changes nothing"


def test_a_baseline_that_does_not_fit_fails_with_the_largest_batch_size_that_does(tmp_path: Path) -> None:
    found = named(examine(write(tmp_path, LARGE), run_root=tmp_path, gpu_memory=needed(6)))
    baseline = found["memory, batch 8"]
    assert baseline.state == "fail"
    assert "train.batch_size = 6 is the largest that fits" in baseline.remedy
    assert "train.slice_p = 11" in baseline.remedy
    assert found["memory, batch 4"].state == "ok" and not found["memory, batch 4"].remedy
    assert found["memory, batch 16"].state == "warn"
    assert "end as infeasible" in found["memory, batch 16"].remedy and "is 6" in found["memory, batch 16"].remedy


def test_a_searched_batch_size_that_does_not_fit_is_only_a_warning(tmp_path: Path) -> None:
    checks = examine(write(tmp_path, LARGE), run_root=tmp_path, gpu_memory=needed(12))
    assert not doctor.has_failed(checks)
    found = named(checks)
    assert found["memory, batch 16"].state == "warn" and found["memory, batch 8"].state == "ok"


def test_a_model_that_fits_with_no_batch_size_says_so(tmp_path: Path) -> None:
    found = named(examine(write(tmp_path, LARGE), run_root=tmp_path, gpu_memory=100e6))
    assert "no batch size fits: use train.slice_p = 11 or a smaller model" in found["memory, batch 8"].remedy


def test_the_ends_of_a_range_are_judged(tmp_path: Path) -> None:
    text = TOML.replace("{ choices = [4, 8, 16] }", "{ low = 2, high = 128, log = true }")
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
def test_what_can_not_run_is_a_fail(tmp_path: Path, old: str, new: str, name: str, message: str) -> None:
    if name == "device" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    checks = examine(write(tmp_path, TOML.replace(old, new)), run_root=tmp_path)
    (failed,) = (check for check in checks if check.state == "fail")
    assert failed.name == name and message in failed.message and failed.remedy


def test_a_damaged_sample_is_named(tmp_path: Path) -> None:
    checks = examine(write(tmp_path, TOML.replace("num_train = 128", "num_train = 128\ndamaged = [0]")))
    found = named(checks)["data"]
    assert found.state == "warn" and "sample-0: tokens.npy is missing" in found.message


def test_a_model_without_an_estimate_is_a_warning(tmp_path: Path) -> None:
    text = TOML.replace("tests.toy:Toy", "tests.tuner.test_doctor:ValueReader")
    found = named(examine(write(tmp_path, text), run_root=tmp_path))
    assert found["memory"].state == "warn" and "reads the values" in found["memory"].message


def test_a_disk_too_small_for_the_checkpoints_is_a_fail(tmp_path: Path) -> None:
    # 2e6 wide: 16 TB of parameters, of which nothing is ever allocated.
    text = TOML.replace("num_train = 128", "num_train = 128\nwidth = 2_000_000")
    found = named(examine(write(tmp_path, text), run_root=tmp_path / "runs"))
    assert found["disk"].state == "fail" and f"free in {tmp_path}" in found["disk"].message
    assert found["snapshot"].state == "warn" and "training waits" in found["snapshot"].message


def test_checkpoints_that_are_there_count_as_room_for_themselves(tmp_path: Path) -> None:
    trial = tmp_path / "toy" / "trial-00000"
    trial.mkdir(parents=True)
    (trial / "step_000000001.pth").write_bytes(bytes(3_000_000))
    os.link(trial / "step_000000001.pth", trial / "latest.pth")
    found = named(examine(write(tmp_path), run_root=tmp_path))
    assert "beside 3 MB of them" in found["disk"].message


def test_the_compiler_is_found_as_the_kernels_find_it(tmp_path: Path) -> None:
    gcc = tmp_path / "gcc"
    gcc.write_text("#!/bin/sh\n")
    gcc.chmod(0o755)
    assert doctor.check_compiler({"PATH": str(tmp_path)}) == Check("compiler", "ok", str(gcc))
    missing = doctor.check_compiler({"PATH": str(tmp_path / "empty")})
    assert missing.state == "warn" and missing.remedy == "install gcc"
    chosen = doctor.check_compiler({"PATH": str(tmp_path), "CC": "icc -O3"})
    assert chosen.state == "warn" and "$CC names icc" in chosen.message


def test_the_state_is_a_word_at_the_start_of_its_line_and_a_remedy_stands_below() -> None:
    checks = [Check("python", "ok", "3.11"), Check("disk", "fail", "12 GB of [100]", "free some space")]
    plain = io.StringIO()
    show(checks, Console(file=plain, width=20))
    assert plain.getvalue() == "ok   python  3.11\nfail disk    12 GB of [100]\n             -> free some space\n"
    colours = io.StringIO()
    show(checks, Console(file=colours, force_terminal=True, color_system="standard"))
    assert "\x1b[" in colours.getvalue()
    assert re.sub(r"\x1b\[[\d;]*m", "", colours.getvalue()) == plain.getvalue()


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["--gpu-memory", "1"], 1)])
def test_the_command_prints_json_and_exits_1_on_a_fail(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
) -> None:
    text = TOML.replace("num_train = 128", "num_train = 128\nwidth = 6_000")
    spec = write(tmp_path, text.replace("[4, 8, 16]", "[8]"))
    command = ["tuner", "doctor", str(spec), "--json", "--run-root", str(tmp_path), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert ended.value.code == code
    assert {row["state"] for row in found} <= {"ok", "warn", "fail"} and "message" in found[0]
    memory = next(row for row in found if row["name"] == "memory, batch 8")
    assert memory["state"] == ("fail" if code else "ok")
