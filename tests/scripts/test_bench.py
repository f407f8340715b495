"""The benchmarks' shared helpers, and the records that they wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from scripts.bench import scale
from scripts.bench.common import RECORDS, read_memory, run_child, summarize, summarize_ratio, write_record
from trainer import UserError


def test_summary_of_several_values() -> None:
    summary = summarize([4.0, 1.0, 3.0, 2.0, 5.0])
    assert summary == {"median": 3.0, "min": 1.0, "q1": 1.5, "q3": 4.5, "max": 5.0, "runs": 5}


def test_summary_of_one_value() -> None:
    assert summarize([2.0]) == {"median": 2.0, "min": 2.0, "q1": 2.0, "q3": 2.0, "max": 2.0, "runs": 1}


def test_ratios_are_of_the_same_round() -> None:
    assert summarize_ratio([2.0, 30.0], [1.0, 10.0])["median"] == 2.5


def test_record_is_written_unchanged(tmp_path: Path) -> None:
    recorded = RECORDS / "optimizer_epyc.json"
    write_record(tmp_path / "new" / "record.json", json.loads(recorded.read_text(encoding="utf-8")))
    assert (tmp_path / "new" / "record.json").read_bytes() == recorded.read_bytes()


def test_long_list_is_written_a_row_a_line(tmp_path: Path) -> None:
    record = {"seeds": 2, "rows": [{"name": "ours", "mean": [0.1, 0.2]}, {"name": "random", "mean": [0.3, 0.4]}]}
    write_record(tmp_path / "record.json", record, rows="rows")
    text = (tmp_path / "record.json").read_text(encoding="utf-8")
    assert json.loads(text) == record and '{"name": "ours", "mean": [0.1, 0.2]},\n' in text


def test_child_process_returns_the_result() -> None:
    assert 1e6 < run_child(read_memory, "VmHWM") < 1e10


def test_failed_child_process_ends_the_benchmark() -> None:
    with pytest.raises(SystemExit, match="read_memory exited with 1"):
        run_child(read_memory, "no such line")


def test_benchmark_runs_as_a_module() -> None:
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", "scripts.bench.loss", "--help"]
    output = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    assert output.startswith("usage: python -m scripts.bench.loss")


def test_scale_keeps_the_figures_of_what_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {"reports": 20, "workers": {"proxy": [1]}, "trials": {"sqlite": [2], "postgresql": [3]}}
    path = tmp_path / "scale.json"
    path.write_text(json.dumps(before), encoding="utf-8")
    monkeypatch.setattr(scale, "measure_trials", lambda _, size: {"trials": size})
    asked = Namespace(json=path, parts=["trials"], storages=["sqlite"], sizes=[10], reports=20)
    record = scale.measure(asked)
    assert record["workers"] == before["workers"]
    assert record["trials"] == {"sqlite": [{"trials": 10}], "postgresql": [3]}
    asked.reports = 3
    with pytest.raises(UserError, match=r"--reports 3: .* has figures of 20: name another file"):
        scale.measure(asked)
