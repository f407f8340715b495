"""Between two log lines nothing is read on the host: each read would wait for the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from studies.indextts2 import IndexTTS2
from tests.studies.tiny_corpus import TINY_GPT, write_tiny_corpus
from trainer import Batch, TrainConfig
from trainer.checkpoint import Checkpoints
from trainer.compilation import TrainingLoss
from trainer.data.loader import BatchReader
from trainer.loop import step
from trainer.metrics import IntervalMeter
from trainer.state import Run, prepare

READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2"}
STEPS = 3


class Reads(TorchDispatchMode):
    """Counts the operations whose result the host must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def workload(tmp_path: Path) -> IndexTTS2:
    write_tiny_corpus(tmp_path)
    manifests = {f"{split}_manifests": [str(tmp_path / f"{split}_pairs.jsonl")] for split in ("train", "val")}
    return IndexTTS2(gpt=TINY_GPT, **manifests)


SETTINGS: list[dict[str, Any]] = [
    {"optimizer": "prodigy"},
    {"optimizer": "adamw"},
    {"optimizer": "prodigy", "max_grad_norm": None},
    {"optimizer": "prodigy", "micro_batch_size": 2},
]


def started(workload: IndexTTS2, folder: Path, settings: dict[str, Any]) -> tuple[Run, Iterator[Batch], IntervalMeter]:
    config = TrainConfig(steps=STEPS, batch_size=4, grad_accumulation=2, device="cpu", **settings)
    run = prepare(workload, config, "cpu", Checkpoints(folder / "run", keep=1))
    reader = BatchReader(workload, workload.train_data())
    batches = [reader[np.arange(first, first + 4)] for first in (0, 4, 8)]
    return run, cycle(batches), IntervalMeter(workload.loss_weights)


def steps(run: Run, batches: Iterator[Batch], meter: IntervalMeter, precision: str) -> None:
    loss = TrainingLoss(run.workload, run.model, compile=False)
    for _ in range(STEPS):
        step(run, loss, precision, batches, meter)
        run.progress.step += 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_step_reads_nothing_on_the_host(
    workload: IndexTTS2, tmp_path: Path, settings: dict[str, Any], precision: str
) -> None:
    run, batches, meter = started(workload, tmp_path, settings)
    with Reads() as reads:
        steps(run, batches, meter, precision)
        assert reads.found == []
        values = meter.read()
        assert reads.found != [], "reading the interval's figures is a read, or this test counts nothing"
    assert values["train/loss"] > 0


@pytest.mark.parametrize("settings", SETTINGS)
def test_step_runs_on_tensors_without_values(workload: IndexTTS2, tmp_path: Path, settings: dict[str, Any]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        run, batches, meter = started(workload, tmp_path, settings)
        steps(run, batches, meter, "fp32")
        with pytest.raises(Exception, match=r"_local_scalar_dense|data-dependent"):
            meter.read()
