"""The checks at the start of `launch`, `promote` and `train`."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.toy import Toy
from tests.tuner.studies_for_tests import TOML, build, write
from trainer import UserError
from tuner.cli import main
from tuner.doctor import quick as module
from tuner.doctor.check import Check
from tuner.doctor.examine import examine
from tuner.doctor.quick import report_checks, run_spec_checks
from tuner.spec.study_toml import StudySpec
from tuner.study.storage import open_storage

MISSING = TOML.replace("tests.toy:Toy", "tests.tuner.doctor.test_data:Listed").replace(
    "num_train = 128", 'num_train = 128\nlists = ["/none/train.jsonl::ko"]'
)


def test_healthy_machine_prints_nothing(tmp_path: Path) -> None:
    output = io.StringIO()
    report_checks(run_spec_checks(build(), tmp_path / "runs", storage=f"sqlite:///{tmp_path}/tuner.db"), output)
    assert output.getvalue() == "" and list(tmp_path.iterdir()) == []


def test_quick_checks_cost_little(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tuner.db"
    open_storage(url).engine.dispose()
    started = time.process_time()
    assert list(run_spec_checks(build(), tmp_path, storage=url))
    assert time.process_time() - started < 0.3


def test_warning_is_printed_and_fail_raises() -> None:
    output = io.StringIO()
    checks = [Check("clock", "warn", "is late", "set it"), Check("disk", "ok", "9 GB"), Check("a", "fail", "b", "c")]
    with pytest.raises(UserError, match=r"^d e; f\.$"):
        report_checks([*checks, Check("d", "fail", "e", "f")], output)
    assert output.getvalue() == "tuner: warning: clock is late; set it.\ntuner: a b; c.\n"
    report_checks(checks[:2], output)


class Judged(Toy):
    def check_data(self, *, whole: bool = False, progress: Any = None) -> Iterator[Check]:
        yield Check("self pairs", "fail", f"whole: {whole}", "pair them")


def test_fault_of_the_data_is_a_warning_at_a_start_and_a_fail_for_the_doctor(tmp_path: Path) -> None:
    spec = write(tmp_path, TOML.replace("tests.toy:Toy", "tests.tuner.doctor.test_quick:Judged"))
    output = io.StringIO()
    report_checks(run_spec_checks(StudySpec.load(spec), tmp_path / "runs"), output)
    assert output.getvalue() == "tuner: warning: self pairs whole: False; pair them.\n"
    found = examine(spec, run_root=tmp_path / "runs", storage=f"sqlite:///{tmp_path}/tuner.db", whole_data=True)
    assert Check("self pairs", "fail", "whole: True", "pair them") in found


def test_gpu_invisible_to_torch_is_a_warning_unless_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "list_known_gpus", lambda: ["NVIDIA GeForce RTX 4090"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (found,) = (check for check in run_spec_checks(build(), tmp_path) if check.name == "device")
    assert found.state == "warn" and "does not see NVIDIA GeForce RTX 4090" in found.message
    on_cpu = build(**{"train.device": "cpu"})
    assert not [check for check in run_spec_checks(on_cpu, tmp_path) if check.name == "device"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(module, "check_gpus", lambda: [])
    assert not [check for check in run_spec_checks(build(), tmp_path) if check.name == "device"]


@pytest.mark.parametrize("command", ["launch", "train"])
def test_missing_input_file_stops_a_run_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    write(tmp_path, MISSING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TUNER_STORAGE", raising=False)
    monkeypatch.setattr(sys, "argv", ["tuner", command, "study.toml", "--no-track"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tuner: data /none/train.jsonl, which workload.lists names, does not exist;")
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]


def test_promote_looks_at_the_storage_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.db").write_text("no database\n" * 100)
    url = f"sqlite:///{tmp_path}/text.db"
    command = ["tuner", "promote", "toy", "--storage", url, "--run-root", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert f"tuner: storage {url}: can't be opened" in capsys.readouterr().err
