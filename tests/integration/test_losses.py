"""The losses of training equal the recorded ones, step by step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from studies.indextts2 import IndexTTS2
from tests.studies.tiny_corpus import TINY_GPT, write_tiny_corpus
from trainer import TrainConfig, train

RECORDED = json.loads(Path(__file__).with_name("losses_float32.json").read_text())


class Losses:
    def __init__(self) -> None:
        self.values: list[float] = []

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        if "train/loss" in values:
            self.values.append(values["train/loss"])

    def close(self) -> None:
        pass


def losses(folder: Path, name: str, **changes: Any) -> list[float]:
    """The training loss of each of 20 steps on the tiny corpus."""
    write_tiny_corpus(folder / "corpus")
    manifests = {split: [str(folder / f"corpus/{split}_pairs.jsonl")] for split in ("train", "val")}
    workload = IndexTTS2(
        train_manifests=manifests["train"],
        val_manifests=manifests["val"],
        gpt=TINY_GPT | {"layers": changes.pop("layers", 2)},
        dropout=changes.pop("dropout", 0.1),
        gradient_checkpointing=changes.pop("gradient_checkpointing", False),
    )
    settings = {"steps": 20, "batch_size": 4, "precision": "fp32", "device": "cpu", "d_coef": 2.0, "d0": 1e-4}
    recorder = Losses()
    train(workload, TrainConfig(**{**settings, "log_every": 1, **changes}), run_dir=folder / name, tracker=recorder)
    return recorder.values


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optimizer", ["prodigy", "adamw"])
def test_float32_losses_equal_the_recorded_ones(tmp_path: Path, optimizer: str, accumulation: int) -> None:
    lr = {"prodigy": None, "adamw": 1e-3}[optimizer]
    found = losses(tmp_path, "run", optimizer=optimizer, lr=lr, grad_accumulation=accumulation)
    assert found == pytest.approx(RECORDED[f"{optimizer}, accumulation {accumulation}"], rel=1e-5)
