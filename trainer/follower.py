"""A rank that is not the first: builds the run that the first rank trains, and writes nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.acceleration import AccelerationPlan
from trainer.checkpoint import read_checkpoint
from trainer.config import TrainConfig
from trainer.ranks import Ranks
from trainer.state import Progress, Run
from trainer.workload import Workload


@dataclass(frozen=True)
class ImportPath:
    """Sent before a `Start`, whose workload is imported when it arrives."""

    folders: tuple[str, ...]

    @classmethod
    def own(cls) -> ImportPath:
        return cls(tuple(sys.path))

    def adopt(self) -> None:
        """Import from these folders too."""
        sys.path += [folder for folder in self.folders if folder not in sys.path]


@dataclass(frozen=True)
class Start:
    """All that another rank needs to take part in a run."""

    workload: type[Workload]
    options: dict[str, Any]
    config: TrainConfig
    data_digest: str
    acceleration: AccelerationPlan
    checkpoint: Path | None
    """The run continues from this one."""
    progress: Progress

    @classmethod
    def of(cls, run: Run, acceleration: AccelerationPlan) -> Start:
        workload, options = type(run.workload), run.workload.model_dump(mode="json")
        return cls(workload, options, run.config, run.data_digest, acceleration, run.checkpoint, run.progress)

    def build(self, ranks: Ranks) -> Run:
        """The same run on another rank; the first rank's weights come with the first step's."""
        workload = self.workload.model_validate(self.options)
        run = Run.build(workload, self.config, self.acceleration.device, data_digest=self.data_digest, ranks=ranks)
        if self.checkpoint is not None:
            run.load(read_checkpoint(self.checkpoint, mmap=True), self.checkpoint)
        run.progress = self.progress
        # Dropout differs from rank to rank, and after a continuation from what it was at the start.
        seed = np.random.SeedSequence((self.config.seed, self.progress.step, ranks.number))
        torch.manual_seed(int(seed.generate_state(1)[0]))
        return run


class NoCheckpoints:
    """The checkpoints of a rank that writes none."""

    def save(self, state: Mapping[str, Any], *, also: Sequence[str] = (), is_last: bool = False) -> None: ...

    def save_weights(self, state: Mapping[str, Any], names: Sequence[str]) -> None: ...

    def check(self) -> None: ...

    def confirm(self, step: int) -> None: ...
