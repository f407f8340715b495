"""A compiled run: one graph for all lengths, and no other run than an eager one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.integration.test_losses import Losses, losses
from tests.toy import Toy
from trainer import TrainConfig, UserError, cross_entropy, train
from trainer.compilation import TrainingLoss, was_compiled


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compilations() -> tuple[int, int]:
    """How many graphs were compiled, and how often one had to be given up."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def toy_losses(folder: Path, name: str, **changes: Any) -> list[float]:
    """The training loss of each of 20 steps of the toy model, of many lengths."""
    recorder = Losses()
    settings = {"steps": 20, "batch_size": 4, "precision": "fp32", "device": "cpu", "d0": 1e-4, "log_every": 1}
    config = TrainConfig(**{**settings, **changes})
    train(Toy(dropout=0.0), config, run_dir=folder / name, tracker=recorder)
    return recorder.values


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(toy_losses, id="toy"),
        # Most of a minute; the tests of its graph below leave the generated code out.
        pytest.param(partial(losses, dropout=0.0, layers=1), id="IndexTTS-2", marks=pytest.mark.slow),
    ],
)
def test_compiled_run_equals_the_eager_run_and_compiles_once(tmp_path: Path, run: Callable[..., list[float]]) -> None:
    eager = run(tmp_path, "eager", compile="off")
    assert compilations() == (0, 0)
    # 20 steps of many lengths: a graph of fixed lengths, or one per length, would be compiled again.
    compiled = run(tmp_path, "compiled", compile="on")
    assert compilations() == (1, 0)
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert compiled != eager


def test_dropout_and_checkpointing_are_one_graph_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The test needs the graph alone; code generation takes most of the time.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    curve = losses(
        tmp_path, "run", dropout=0.1, layers=1, gradient_checkpointing=True, compile="on", grad_accumulation=2
    )
    assert compilations() == (1, 0)
    assert curve[-1] < curve[0]


def test_compiled_models_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    workload = Toy(dropout=0.0)
    model = workload.build_model()
    assert not was_compiled(workload, model)
    train(workload, TrainConfig(steps=2, batch_size=4, compile="on"), run_dir=tmp_path / "run")
    assert was_compiled(workload, model)
    assert not was_compiled(Toy(dropout=0.5), model)


def test_number_of_targets_does_not_recompile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    # So that some batches stay below the number from which on the eager loss is cut into chunks.
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 24 * 34)
    compiled = losses(tmp_path, "run", dropout=0.0, layers=1, compile="on", batch_size=2, steps=30)
    assert compilations() == (1, 0)
    eager = losses(tmp_path, "eager", dropout=0.0, layers=1, compile="off", batch_size=2, steps=30)
    assert compiled == pytest.approx(eager, rel=1e-4)


def test_micro_batches_of_all_sizes_are_one_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    # Micro-batches of 2, 2 and 1 samples: torch would compile the last ones again.
    split = toy_losses(tmp_path, "split", compile="on", batch_size=5, micro_batch_size=2)
    assert compilations() == (1, 0)
    assert split == pytest.approx(toy_losses(tmp_path, "whole", compile="off", batch_size=5), rel=1e-4)


def test_first_batch_of_one_sample_does_not_leave_the_run_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    work = Toy(dropout=0.0)
    loss, data = TrainingLoss(work, work.build_model(), compile=True), work.train_data()
    for count, graphs in ((1, 1), (4, 2), (3, 2), (1, 2), (2, 2)):
        loss(work.collate([data[index] for index in range(count)]).inputs)
        assert compilations() == (graphs, 0)
    eager: list[int] = []
    monkeypatch.setattr(loss, "_eager", lambda inputs: eager.append(1) or {})
    for count in (4, 1, 3):
        loss(work.collate([data[index] for index in range(count)]).inputs)
    assert len(eager) == 1, "the batch of one sample"


def test_backward_pass_that_can_not_be_compiled_leaves_the_run_eager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import default_partition

    def fail(*_: Any) -> Any:
        raise NotImplementedError("no code for this device")

    backend = aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=fail, partition_fn=default_partition)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr("trainer.acceleration._compile", lambda *_: (True, "it repays"))
    with caplog.at_level(logging.INFO, "trainer"):
        result = train(Toy(dropout=0.0), TrainConfig(steps=3, batch_size=4), run_dir=tmp_path)
    assert result.finished
    assert any("can't be compiled as one graph" in message for message in caplog.messages)
    assert not any(message.startswith("compiled in") for message in caplog.messages)


def test_many_trials_of_one_process_each_have_their_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    # Past as many graphs of one function torch would give up compiling it.
    with torch._dynamo.config.patch(recompile_limit=2):
        for number in range(4):
            config = TrainConfig(steps=1, batch_size=4, compile="on")
            train(Toy(dropout=number / 20), config, run_dir=tmp_path / str(number))
    assert compilations() == (4, 0)


class Asking(Toy):
    """Reads a value on the host in the middle of the loss."""

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sums = super().loss_sums(model, inputs)
        print("", end="", flush=bool(sums["token_loss"].item() > 1e9))
        return sums


def run(folder: Path, **changes: Any) -> Any:
    return train(Asking(dropout=0.0), TrainConfig(steps=3, batch_size=4, **changes), run_dir=folder)


def test_model_with_a_graph_break_is_refused_when_compile_is_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'train.compile "on": loss_sums can\'t be compiled as one graph'):
        run(tmp_path, compile="on")


def test_model_with_a_graph_break_runs_eagerly_when_compile_is_auto(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU, for a run long enough.
    monkeypatch.setattr("trainer.acceleration._compile", lambda *_: (True, "it repays"))
    with caplog.at_level(logging.INFO, "trainer"):
        auto = run(tmp_path / "auto")
    assert sum("compile: off: loss_sums can't be compiled" in message for message in caplog.messages) == 1
    assert auto.metrics == pytest.approx(run(tmp_path / "off", compile="off").metrics, rel=1e-6)
