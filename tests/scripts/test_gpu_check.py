"""The check of the GPU path: every stage runs on a CPU, and nothing that fails or hangs takes others with it."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.gpu_check import __main__ as check
from scripts.gpu_check import ceilings, optimizer, recovery, table, training
from scripts.gpu_check.report import format_page, judge
from scripts.gpu_check.workload import build_workload
from trainer.laws import check_workload

MODULES = {"ceilings": ceilings, "optimizer": optimizer, "training": training, "recovery": recovery, "table": table}


@pytest.fixture(autouse=True)
def _compile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "compile", torch.compile)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["ceilings", "kernels", "optimizer"])
def test_stage_of_measurements_alone_runs(name: str, tmp_path: Path) -> None:
    check.run_stage(name, tmp_path, tiny=True)
    assert json.loads((tmp_path / f"{name}.json").read_text())["seconds"] >= 0


def test_stages_of_training_give_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: dict[str, Any] = {}
    for name in ("eager", "compiled", "checkpoint", "out_of_memory"):
        module, _ = check.STAGES[name]
        stages[name] = json.loads(json.dumps(getattr(MODULES[module], name)(True)))
    verdicts = {goal["goal"]: goal["held"] for goal in judge(stages)}
    # On a CPU a continued run is equal bit for bit, and nothing waits.
    assert verdicts["first loss after a continuation"]
    assert stages["checkpoint"]["losses_differ_by"] == 0
    assert verdicts["waits between log lines, eager"] and verdicts["compilations of a run"]
    assert stages["out_of_memory"]["recognized"] and len(stages["out_of_memory"]["losses_after"]) == 3
    assert verdicts["MFU on real tokens, batch 8"] is None
    assert stages["eager"]["profile"]["ms_by_kind"] and stages["eager"]["flops_a_second"] > 0
    page = "\n".join(format_page(stages, {"command": "c", "device": "d", "versions": {"torch": "t"}}))
    assert "| eager |" in page and "| compilations of a run | 1, no break | 1, 0 breaks | held |" in page


@pytest.mark.parametrize("name", list(check.STAGES))
def test_every_stage_exists(name: str) -> None:
    module, seconds = check.STAGES[name]
    assert callable(getattr(MODULES[module], name)) and seconds > 0


def test_made_up_data_keeps_the_laws() -> None:
    check_workload(build_workload(True))


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_stage_that_fails_hangs_or_dies_keeps_what_it_saved(tmp_path: Path) -> None:
    run = functools.partial(check.run_process, environment=dict(os.environ))
    good = run(python(f"open({str(tmp_path / 'good.json')!r}, 'w').write('{{\"ms\": 1}}')"), tmp_path / "good", 30)
    assert good == {"ms": 1}
    failed = run(python("raise SystemExit('no device')"), tmp_path / "failed", 30)
    assert failed["failed"] == "exit code 1" and "no device" in failed["tail"]
    code = f"import time; open({str(tmp_path / 'slow.json')!r}, 'w').write('{{\"rows\": 2}}'); time.sleep(60)"
    slow = run(python(code), tmp_path / "slow", 3)
    assert slow["failed"] == "cut off after 3 s" and slow["rows"] == 2


def test_later_stages_run_after_a_failed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"ceilings": {"failed": "exit code 1", "tail": "boom"}, "kernels": {"slices": {}, "seconds": 1}}
    monkeypatch.setattr(check, "start", lambda name, *_: dict(found[name]))
    record = check.run_all(list(found), tmp_path, 100, True)
    assert list(record["stages"]) == list(found)
    assert "## ceilings: exit code 1" in (tmp_path / "report.md").read_text()
    over = check.run_all(["kernels"], tmp_path, 1, True)
    assert over["stages"]["kernels"]["failed"] == "not run: 1 s were over"
    assert json.loads((tmp_path / "gpu_check.json").read_text())["stages"] == over["stages"]


def test_goals_are_judged_by_the_card() -> None:
    stages: dict[str, Any] = {
        "ceilings": {"device": {"name": "NVIDIA GeForce RTX 4090"}, "copy_bytes_a_second": 1e12},
        "compiled": {"graphs": 1, "graph_breaks": 0, "waits": {}, "mfu": 0.5, "ms_a_step": 120.0},
        "optimizer": {"bytes": {"rests": 24e9}, "rests_ms, slice_p 1": 30.0},
        "checkpoint": {"stalls_s": [4.0, 0.5], "first_loss_differs_by": 0.0, "losses_differ_by": 1e-4},
        "warm": {"first_step_s": 61.0},
    }
    found = {goal["goal"].split(",")[0]: (goal["found"], goal["held"]) for goal in judge(stages)}
    assert found["MFU on real tokens"] == ("50.0%", False)
    assert found["Prodigy's update while d rests"] == ("1.25", False)
    assert found["stall by checkpoints"] == ("0.42%", True)
    assert found["first step with a warm cache"] == ("61 s", False)
    stages["ceilings"]["device"]["name"] = "NVIDIA H100 80GB HBM3"
    assert {goal["goal"]: goal["held"] for goal in judge(stages)}["MFU on real tokens, batch 8"]


def test_kernels_are_sorted_by_their_names() -> None:
    names = {
        "void pytorch_flash::flash_fwd_kernel<...>": "attention",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_nn": "products",
        "nvjet_tst_128x256_64x4": "products",
        "triton_red_fused_native_layer_norm_3": "compiled code",
        "first_pass": "optimizer",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "void at::native::vectorized_elementwise_kernel<4, ...>": "other operations",
    }
    assert {name: training.classify(name) for name in names} == names


# What a borrowed GPU machine may lack: everything that is no part of the trainer and of trials.
LACKING = [
    "aim",
    "optuna_dashboard",
    "rich",
    "typer",
    "click",
    "markdown_it",
    "plotly",
    "scipy",
    "tomli_w",
    "yaml",
    "safetensors",
    "sentencepiece",
    "pynvml",
    "matplotlib",
    "transformers",
    "lightning",
    "sklearn",
    "konlpy",
    "tensorboard",
    "wandb",
]


def test_check_needs_neither_aim_nor_dashboards() -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys({LACKING!r}))
import scripts.gpu_check.__main__
from scripts.gpu_check import ceilings, optimizer, recovery, table, training
import tuner.bench.table, tuner.bench.measurement, tuner.study.objective
"""
    root = Path(check.__file__).parent.parent.parent
    check.subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_table_is_saved_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    # A row's process that fails at once: the loop around it is what counts.
    monkeypatch.setattr("tuner.bench.table.CHILD", python("raise SystemExit('no device')"))
    saved: list[Any] = []
    record = table.table(True, saved.append)
    assert [row["name"] for row in record["rows"]] == ["baseline"] and saved == [record]
    assert "no device" in record["rows"][0]["note"]


@pytest.mark.slow
def test_whole_check_runs_on_a_cpu(tmp_path: Path) -> None:
    record = check.run_all(list(check.STAGES), tmp_path, 900, tiny=True)
    assert [name for name, stage in record["stages"].items() if "failed" in stage] == []
