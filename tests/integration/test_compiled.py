"""A compiled run: one graph for all lengths, and no other run than an eager one."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.integration.test_losses import losses
from tests.toy import Toy
from trainer import TrainConfig, UserError, train
from trainer.compilation import compiled_before


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compilations() -> tuple[int, int]:
    """How many graphs were compiled, and how often one had to be given up."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def test_a_compiled_run_is_no_other_run_and_compiles_once(tmp_path: Path) -> None:
    eager = losses(tmp_path, "eager", dropout=0.0, layers=1, compile="off")
    assert compilations() == (0, 0)
    # 20 steps of many lengths: a graph of fixed lengths, or one per length, would be compiled again.
    compiled = losses(tmp_path, "compiled", dropout=0.0, layers=1, compile="on")
    assert compilations() == (1, 0)
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert compiled != eager


def test_with_dropout_and_checkpointing_it_is_one_graph_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The graph is what matters here; generating its code would take most of the time.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    curve = losses(
        tmp_path, "run", dropout=0.1, layers=1, gradient_checkpointing=True, compile="on", grad_accumulation=2
    )
    assert compilations() == (1, 0)
    assert curve[-1] < curve[0]


def test_what_was_compiled_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    workload = Toy(dropout=0.0)
    model = workload.build_model()
    assert not compiled_before(model)
    train(workload, TrainConfig(steps=2, batch_size=4, compile="on"), run_dir=tmp_path / "run")
    assert compiled_before(model)
    assert not compiled_before(Toy(width=17).build_model())


class Asking(Toy):
    """Reads a value on the host in the middle of the loss."""

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sums = super().loss_sums(model, inputs)
        print("", end="", flush=bool(sums["token_loss"].item() > 1e9))
        return sums


def run(folder: Path, **changes: Any) -> Any:
    return train(Asking(dropout=0.0), TrainConfig(steps=3, batch_size=4, **changes), run_dir=folder)


def test_a_model_that_is_no_single_graph_is_refused_where_compilation_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'train.compile "on": loss_sums can\'t be compiled as one graph'):
        run(tmp_path, compile="on")


def test_elsewhere_it_is_said_once_and_the_run_is_eager(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU, for a run long enough.
    monkeypatch.setattr("trainer.acceleration._compile", lambda *_: (True, "it repays"))
    with caplog.at_level(logging.INFO, "trainer"):
        auto = run(tmp_path / "auto")
    assert sum("compile: off: loss_sums can't be compiled" in message for message in caplog.messages) == 1
    assert auto.metrics == pytest.approx(run(tmp_path / "off", compile="off").metrics, rel=1e-6)
