"""The real configuration, once, on a machine of 24 GB: gpt.pth -> train -> checkpoint -> resume -> export.

    scripts/test.sh -m slow -n 0 -s tests/integration/test_full_size.py

527 M trained parameters with Prodigy are 12.9 GB (weights, gradients, four states) and their checkpoint 10.8 GB, so no
second copy fits anywhere. Takes minutes, 40 GB of disk, and prints the time and the memory of each part.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from studies.indextts2.weights import ENCODERS
from tests.studies.tiny_corpus import write_tiny_corpus
from trainer.checkpoint import read_checkpoint

KEYS = Path(__file__).parent.parent / "studies" / "gpt_pth_keys.tsv"
SPEC = """
[study]
name = "full-size"
workload = "studies.indextts2:IndexTTS2"
[workload]
train_manifests = ["train_pairs.jsonl"]
val_manifests = ["val_pairs.jsonl"]
gpt = {}
base_checkpoint = "gpt.pth"
[train]
batch_size = 2
save_every = 1
keep_checkpoints = 1
[trial]
samples = 2
evaluations = 1
num_trials = 1
[full]
steps = 1
"""
STATE_GB = 12.9
"""Weights, gradients, and Prodigy's exp_avg, exp_avg_sq, s and p0: 24 B a parameter."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(psutil.virtual_memory().total < 22e9, reason="needs 24 GB of memory"),
]


def write_gpt(path: Path) -> None:
    """Random weights under every published key. In a process of its own, whose memory is free afterwards."""
    code = f"""
import torch
torch.manual_seed(0)
lines = open({str(KEYS)!r}).read().splitlines()[1:]
shapes = [(key, [int(n) for n in shape.split("x") if n]) for key, shape, _ in (line.split("\\t") for line in lines)]
torch.save({{key: torch.randn(shape).mul_(0.02) for key, shape in shapes}}, {str(path)!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def tuner(folder: Path, *arguments: str) -> float:
    """Run a command; returns its peak of memory of its own in GB (mapped files are the system's to drop)."""
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "tuner", *arguments], cwd=folder)
    while process.poll() is None:
        try:
            memory = Path(f"/proc/{process.pid}/status").read_text()
        except FileNotFoundError:
            break
        peak = max(peak, next((int(line.split()[1]) for line in memory.splitlines() if "RssAnon" in line), 0))
        time.sleep(0.1)
    assert process.wait() == 0, arguments
    seconds, gb = time.perf_counter() - started, peak * 1024 / 1e9
    print(f"tuner {arguments[0]}: {seconds:.0f} s, {gb:.1f} GB at its peak")
    return gb


def test_real_configuration_runs_in_24_gb(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 45e9:
        pytest.skip("needs 45 GB of disk")
    write_tiny_corpus(tmp_path, num_train=8, num_val=2, width=1280, max_text_len=30, max_code_len=120)
    (tmp_path / "study.toml").write_text(SPEC)
    write_gpt(tmp_path / "gpt.pth")
    run = tmp_path / "run"
    common = ("train", "study.toml", "--run-dir", str(run), "--no-track")

    assert tuner(tmp_path, *common) < 1.15 * STATE_GB
    assert tuner(tmp_path, *common, "--set", "full.steps=2") < 1.15 * STATE_GB
    state = read_checkpoint(run / "latest.pth", mmap=True)
    assert state["step"] == 2
    assert sum(tensor.numel() for tensor in state["model"].values()) > 520e6

    assert tuner(tmp_path, "export", str(run), "--to", "out.pth", "--checkpoint", "latest") < 3
    before, after = (torch.load(tmp_path / name, weights_only=True, mmap=True) for name in ("gpt.pth", "out.pth"))
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith(ENCODERS))
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert "mel_head.weight" in changed and "gpt.h.23.mlp.c_fc.weight" in changed
