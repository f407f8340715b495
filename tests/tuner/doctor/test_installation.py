"""Python, packages, compilers and the clock."""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from tuner.doctor.check import Check
from tuner.doctor.device import build_cuda_machine, check_device, list_known_gpus
from tuner.doctor.installation import (
    check_clock,
    check_compile,
    check_compiler,
    check_packages,
    check_python,
    check_trainer,
)


def executable(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_python_without_packages_fails() -> None:
    assert check_python((3, 14, 1)).state == "ok"
    assert check_python((3, 15, 0)).state == "fail"


def test_trainer_of_another_distribution_fails(tmp_path: Path) -> None:
    assert check_trainer().state == "ok"
    for place in (str(tmp_path / "trainer/__init__.py"), None):
        found = check_trainer(place)
        assert found.state == "fail" and str(place) in found.message
        assert found.remedy.startswith("pip uninstall coqui-tts-trainer")


def test_installed_packages_are_the_required_ones() -> None:
    found = list(check_packages())
    assert [check.name for check in found] == ["torch", "optuna", "prodigyopt", "optuna-dashboard", "aim"]
    assert {check.state for check in found} == {"ok"}
    assert found[0].message == version("torch")


def test_another_version_fails_and_of_the_dashboard_warns() -> None:
    needed = ["torch~=9.1.0", "optuna-dashboard<0.1", "prodigyopt>=0.1", 'aim; extra == "x"', "numpy>99"]
    torch, dashboard, prodigy = check_packages(needed)
    assert (torch.state, dashboard.state, prodigy.state) == ("fail", "warn", "ok")
    assert torch.message.endswith("; this package needs ~=9.1.0") and torch.remedy == "pip install 'torch~=9.1.0'"


def test_missing_package_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.doctor.installation.PACKAGES", ("no-such-package",))
    (found,) = check_packages(["no-such-package>=1"])
    assert found == Check("no-such-package", "fail", "not installed", "pip install 'no-such-package>=1'")


def test_compiler_is_found_as_the_kernels_find_it(tmp_path: Path) -> None:
    gcc = executable(tmp_path, "gcc")
    assert check_compiler({"PATH": str(tmp_path)}) == Check("compiler", "ok", str(gcc))
    missing = check_compiler({"PATH": str(tmp_path / "empty")})
    assert missing.state == "warn" and missing.remedy == "install gcc"
    chosen = check_compiler({"PATH": str(tmp_path), "CC": "icc -O3"})
    assert chosen.state == "warn" and "$CC names icc" in chosen.message


def test_torch_compile_needs_triton_a_compiler_and_pythons_headers(tmp_path: Path) -> None:
    executable(tmp_path, "gcc")
    here, empty = {"PATH": str(tmp_path)}, {"PATH": str(tmp_path / "empty")}
    (tmp_path / "Python.h").touch()
    assert check_compile("cuda", here, triton=True, headers=tmp_path).state == "ok"
    assert "Triton" in check_compile("cuda", here, triton=False, headers=tmp_path).message
    assert check_compile("cuda", empty, triton=True, headers=tmp_path).remedy == "install gcc"
    assert "python3-dev" in check_compile("cuda", here, triton=True, headers=tmp_path / "empty").remedy
    on_a_cpu = check_compile("cpu", here, triton=False, headers=tmp_path)
    assert on_a_cpu.state == "warn" and on_a_cpu.remedy == "install g++"


def test_clock_behind_the_newest_run_is_a_warning(tmp_path: Path) -> None:
    trial = tmp_path / "toy" / "trial-00000"
    trial.mkdir(parents=True)
    now = time.time()
    assert check_clock(tmp_path, now).state == "ok"
    os.utime(trial, (now + 7200, now + 7200))
    found = check_clock(tmp_path, now)
    assert found.state == "warn" and "written 2.0 h later" in found.message and str(trial) in found.message


def test_clock_that_was_never_set_is_a_warning(tmp_path: Path) -> None:
    assert check_clock(tmp_path / "none", 1_000_000.0).state == "warn"
    assert check_clock(tmp_path / "none").state == "ok"


def test_gpu_unusable_by_torch_is_named(tmp_path: Path) -> None:
    information = tmp_path / "0000:01:00.0" / "information"
    information.parent.mkdir()
    information.write_text("Model: \t\t NVIDIA GeForce RTX 4090\nIRQ:   \t\t 120\n")
    assert list_known_gpus(tmp_path) == ["NVIDIA GeForce RTX 4090"]
    assert list_known_gpus(tmp_path / "none") == []


def test_device_has_its_compute_capability() -> None:
    found = check_device(build_cuda_machine(25.3e9))
    assert found.state == "ok" and "compute capability 8.0, 25.3 GB available, bf16" in found.message
