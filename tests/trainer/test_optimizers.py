"""Factors on the learning rate by the names of parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy import Toy
from trainer import TrainConfig, UserError, train
from trainer.checkpoint import read_checkpoint
from trainer.optimizers import build_optimizer, update

FACTORS = {"head": 0.1, "head.bias": 0.5}


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 6, "batch_size": 4, "save_every": 3, "precision": "fp32", **changes})


@pytest.mark.parametrize("optimizer", ["prodigy", "adamw"])
def test_first_update_is_scaled_by_the_factor_of_the_longest_prefix(optimizer: str) -> None:
    moves = []
    for factors in ({}, FACTORS):
        torch.manual_seed(0)
        model = Toy().build_model()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        settings = config(optimizer=optimizer, lr_factors=factors, weight_decay=0.0, d0=1e-2)
        update(build_optimizer(model, settings), lr=1.0, max_grad_norm=None)
        moves.append({name: (p - before[name]).detach() for name, p in model.named_parameters()})
    for name, move in moves[0].items():
        factor = {"head.weight": 0.1, "head.bias": 0.5}.get(name, 1.0)
        torch.testing.assert_close(moves[1][name], factor * move, rtol=1e-4, atol=1e-7)


def test_run_with_factors_continues_bit_for_bit_and_with_others_not(tmp_path: Path) -> None:
    train(Toy(), config(lr_factors=FACTORS), run_dir=tmp_path / "whole")
    for steps in (3, 6):
        train(Toy(), config(lr_factors=FACTORS, steps=steps), run_dir=tmp_path / "parts")
    whole, parts = (read_checkpoint(tmp_path / name / "latest.pth")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    with pytest.raises(UserError, match=r"train.lr_factors was \{'head': 0.1, 'head.bias': 0.5\} and is now \{\}"):
        train(Toy(), config(steps=9), run_dir=tmp_path / "whole")


def test_prefix_that_fits_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"train.lr_factors names 'heads', .* they are like 'embedding.weight'"):
        build_optimizer(Toy().build_model(), config(lr_factors={"heads": 0.1}))


def test_run_of_an_older_version_without_newer_settings_continues(tmp_path: Path) -> None:
    train(Toy(), config(), run_dir=tmp_path)
    for path in tmp_path.glob("*.sha256"):
        path.unlink()
    latest = max(tmp_path.glob("step_*.pth"))
    state = read_checkpoint(latest)
    del state["identity"]["train"]["lr_factors"], state["identity"]["workload"]["dropout"]
    for group in state["optimizer"]["param_groups"]:
        del group["lr_factor"]
    torch.save(state, latest)
    assert train(Toy(), config(steps=9), run_dir=tmp_path).step == 9
    with pytest.raises(UserError, match=r"workload.dropout was 0.1 and is now 0.2"):
        train(Toy(dropout=0.2), config(steps=12), run_dir=tmp_path)
