"""Workload: the user's model, its data, and the loss of a batch.

A workload is a pydantic model whose fields are the options of `[workload]` in a study.toml. Three laws
hold for every workload; `check_workload` in `trainer.laws` checks any workload against them:

1. a sample's loss does not depend on its neighbours in the batch, nor on padding;
2. the validation loss is the mean over a fixed set and does not depend on the training batch size;
3. the same seed gives the same batches, whatever the number of loader workers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo
from torch import Tensor, nn

from trainer.check import Check
from trainer.checkpoint import read_checkpoint
from trainer.export import WeightsFormat, WriteFile, write_weights
from trainer.state_form import load_model


def resolve_path(path: Path, info: ValidationInfo) -> Path:
    """Make `path` absolute, relative to the folder of the study.toml that names it, else to the current folder."""
    base = (info.context or {}).get("base_dir", Path.cwd())
    return (Path(base) / path.expanduser()).resolve()


DataPath = Annotated[Path, AfterValidator(resolve_path)]
"""A workload option that names a file or folder: relative to the study.toml, stored absolute."""


class Dataset(Protocol):
    """Samples by index. Their lengths are known beforehand, so that batches are formed without reading samples."""

    @property
    def lengths(self) -> np.ndarray:
        """[len(self)] integers: each sample's length in tokens, as it counts for padding."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any:
        """Read one sample. Raises `DamagedSample` if it can't be read; the message names it."""


@dataclass(frozen=True)
class Batch:
    """Some samples, collated. Counts are known on the host, so that no step has to wait for the device."""

    inputs: dict[str, Tensor]
    """Inputs of `Workload.loss_sums`, by name."""
    counts: dict[str, int]
    """Number of terms in the mean of each loss, by the name of the loss."""
    num_samples: int
    num_tokens: int
    """Real tokens."""
    num_slots: int
    """Tokens with padding, on which the model computes."""
    damaged: tuple[str, ...] = field(default=())
    """One line for each sample that was left out because it can't be read."""
    part: str = ""
    """The part of the validation set that all its samples belong to; see `Workload.val_part`."""

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; from pinned memory the copy does not block."""
        return replace(self, inputs={k: v.to(device, non_blocking=True) for k, v in self.inputs.items()})

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory. `torch.utils.data.DataLoader` calls this by its name."""
        return replace(self, inputs={k: v.pin_memory() for k, v in self.inputs.items()})


class Workload(BaseModel, ABC):
    """A model, its data and its loss. Subclass it; the fields you add are the options of `[workload]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    @abstractmethod
    def loss_weights(self) -> Mapping[str, float]:
        """The named losses and their weights; the loss that is minimized is the weighted sum of their means."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """A new model in float32 on the CPU. Called under the run's seed, so its initialisation repeats."""

    @abstractmethod
    def train_data(self) -> Dataset: ...

    @abstractmethod
    def val_data(self) -> Dataset: ...

    def draw_epoch(self, epoch: int, seed: int) -> np.ndarray | None:
        """[len(train_data())] indices: the samples of an epoch, in any order, some several times and some not at all.
        A pure function of its arguments and the data. Default: None, each sample once."""
        return None

    def val_part(self, index: int) -> str:
        """The part of `val_data()` that a sample belongs to, such as its language. Each part has metrics of its own
        besides those of the whole set: `val/loss/ko`. Default: "", no part."""
        return ""

    @abstractmethod
    def collate(self, samples: Sequence[Any], pad_multiple: int = 1) -> Batch:
        """Put samples side by side; padded lengths are multiples of `pad_multiple` (compiled code then sees
        few shapes)."""

    @abstractmethod
    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """For each entry of `Batch.counts` the sum (a scalar in float32, on the model's device) over its
        terms. Entries without a weight are metrics only, such as an accuracy."""

    def load_weights(self, model: nn.Module, path: Path) -> None:
        """Load the weights of a checkpoint for step 0 (`--init`). Override it to read other formats.

        Raises:
            UserError: The checkpoint can't be read or is of another model.
        """
        load_model(model, read_checkpoint(path, mmap=True), path)

    def export_weights(self, state: Mapping[str, Tensor], path: Path, *, format: WeightsFormat = "pth") -> None:
        """Write the weights of a checkpoint for use elsewhere (`tuner export`). Override it to write the
        format in which the model is published.

        Args:
            state: The model's state dict, mapped from the checkpoint.

        Raises:
            UserError: `path` can't be written, or another file that the options name does not fit.
        """
        write_weights(state, path, format=format)

    def export_files(self, state: Mapping[str, Tensor], *, format: WeightsFormat = "pth") -> Mapping[str, WriteFile]:
        """The files of a folder that can be loaded alone (`tuner export --to FOLDER`): name -> function that writes it.
        Default: the weights. Override it to add configuration and vocabulary, and check here that they fit.

        Args:
            state: As for `export_weights`.

        Raises:
            UserError: The files do not fit each other.
        """
        return {f"weights.{format}": partial(self.export_weights, state, format=format)}

    def input_files(self) -> Sequence[tuple[str, Path]]:
        """(option, file) for each file that must exist before a run. `tuner doctor` and the quick checks refuse a
        missing or empty one. For other options that are paths they only warn: the workload may create them.
        """
        return ()

    def check_data(
        self, *, whole: bool = False, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Iterator[Check]:
        """Judge the content of the data: not whether it can be read, but whether training on it makes sense.

        Args:
            whole: All of it (`tuner doctor --data`). Else a small sample, in a fraction of a second: `launch` and
                `train` warn of what it finds.
            progress: Call it with the numbers of samples read and of all samples.
        """
        return iter(())

    def unpacked(self) -> Workload:
        """The same workload without packing: itself if it packs nothing, else another in which one option, a mode of
        `trainer.data.packed`, is false. `tuner doctor` reads data without copying it, and `tuner bench` measures the
        gain of packing."""
        return self

    def memory_savers(self) -> Sequence[str]:
        """Assignments in `[workload]` that save memory and are not yet in use, such as "gradient_checkpointing = true",
        the first to try first. `tuner doctor` names them if memory is short.
        """
        return ()

    def without_initial_weights(self) -> Workload:
        """The same workload, whose `build_model` reads no weights. `tuner evaluate` replaces them at once, and
        weight files may have gigabytes."""
        return self

    def data_digest(self) -> str:
        """Digest of the files' contents, not of their place: the data, and the model's size if a file determines it.
        A run or a study continues only if the digest is the same."""
        return ""

    def best_checkpoints(self) -> Mapping[str, str]:
        """Validation metric (lower is better) -> file of its best weights. `tuner export` and `tuner evaluate` read the
        first entry's file from a run directory."""
        return {"val/loss": "best_model.pth"}
