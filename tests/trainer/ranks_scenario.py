"""What `test_ranks.py` runs under torchrun, as two processes: each case on both of them and on one alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.toy import Toy
from trainer import Evaluation, TrainConfig, UserError, train
from trainer.loop import follow
from trainer.ranks import ALONE, RankLost, Ranks, join
from trainer.tracking import Tracker

CONFIG = {"batch_size": 7, "micro_batch_size": 2, "eval_every": 35, "log_every": 4, "precision": "fp32", "steps": 30}


class Parts(Toy):
    """Its second part has one batch: only one of the ranks has it."""

    def val_part(self, index: int) -> str:
        return "ko" if index < 30 else "en"


class Poisoned(Toy):
    """In training, the longest sample has no finite loss; with two ranks it is on one of them."""

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sums = super().loss_sums(model, inputs)
        has_longest = inputs["tokens"].shape[1] == self.train_data().lengths.max()
        return {"token_loss": sums["token_loss"] * (float("nan") if has_longest and model.training else 1.0)}


class Drifting(Toy):
    """The weights of the second rank change on their own."""

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if os.environ["RANK"] == "1" and model.training:
            with torch.no_grad():
                next(model.parameters()).add_(0.01)
        return super().loss_sums(model, inputs)


class Curves(Tracker):
    """Keeps what a run reports."""

    def __init__(self) -> None:
        self.values: list[Mapping[str, float]] = []

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        kept = ("val/", "train/loss", "train/skipped", "train/grad_norm")
        self.values.append({"step": step, **{name: value for name, value in values.items() if name.startswith(kept)}})

    def close(self) -> None: ...


def run_cases(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Every case's curves by its name and the number of ranks."""
    adamw = {"optimizer": "adamw", "lr": 1e-3}
    cases: dict[str, tuple[Toy, dict[str, Any]]] = {
        "plain": (Parts(dropout=0.0, num_train=100), {**adamw, "grad_accumulation": 2}),
        "prodigy": (Toy(dropout=0.0), {"steps": 12}),
        "poisoned": (Poisoned(dropout=0.0, num_train=40), adamw),
        # Each rank has one sample of a batch: one of them has none of the damaged one's batch.
        "damaged": (Toy(dropout=0.0, num_train=128, damaged=(5,)), {**adamw, "batch_size": 2, "steps": 70}),
    }
    found: dict[str, Any] = {}
    for name, (workload, changes) in cases.items():
        for how in (ALONE, ranks):
            curves = Curves()
            key = f"{name}-{how.count}"
            config = TrainConfig(**{**CONFIG, **changes})
            train(workload, config, run_dir=folder / key, tracker=curves, ranks=how)
            found[key] = curves.values
    return found


def continue_on_other_ranks(folder: Path, ranks: Ranks) -> None:
    """The case "plain" in three parts: on two ranks, alone, on two ranks."""
    workload = Parts(dropout=0.0, num_train=100)
    config = TrainConfig(**CONFIG, optimizer="adamw", lr=1e-3, grad_accumulation=2)
    for how, steps in ((ranks, 9), (ALONE, 10), (ranks, 99)):
        left = iter(range(steps))
        train(workload, config, run_dir=folder / "parts", ranks=how, stop=lambda: next(left, None) is None)  # noqa: B023


def main(folder: Path) -> None:
    """Run all cases, and store what the first rank has seen and how the other one ended."""
    torch.set_num_threads(1)
    with join() as ranks:
        if not ranks.is_first:
            try:
                follow(ranks)
            except RankLost as error:
                torch.save(str(error), folder / "follower.pt")
            return
        found = {**run_cases(folder, ranks), "interface": os.environ["GLOO_SOCKET_IFNAME"]}
        continue_on_other_ranks(folder, ranks)
        listened: list[Evaluation] = []
        try:
            train(
                Drifting(dropout=0.0),
                TrainConfig(**CONFIG),
                run_dir=folder / "drifting",
                on_eval=listened.append,
                ranks=ranks,
            )
        except UserError as error:
            found["drifting"] = str(error)
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
