"""A workload that trains in milliseconds: next-token prediction on made-up sequences of many lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer import Batch, DamagedSample, Role, Workload

VOCABULARY = 17


class Sequences:
    def __init__(self, num_samples: int, seed: int, damaged: Sequence[int] = ()) -> None:
        random = np.random.default_rng(seed)
        self.lengths = random.integers(3, 40, num_samples)
        starts = random.integers(0, VOCABULARY, num_samples)
        # Each sequence counts upwards by a step of its own, so there is something to learn.
        self.samples = [
            (start + np.arange(length + 1) * (1 + start % 3)) % VOCABULARY
            for start, length in zip(starts, self.lengths, strict=True)
        ]
        self.damaged = set(damaged)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int, /) -> np.ndarray:
        if index in self.damaged:
            raise DamagedSample(f"sample-{index}: tokens.npy is missing")
        return self.samples[index]


class ToyModel(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.dropout(self.embedding(tokens)))))


class Toy(Workload):
    width: int = 16
    dropout: float = 0.1
    num_train: int = 256
    damaged: Annotated[tuple[int, ...], Role.FREE] = ()
    digest: Annotated[str, Role.FREE] = "toy"
    explode_at_batch_size: int | None = None
    """Raise torch's out-of-memory error in batches of so many samples or more."""

    @property
    def loss_weights(self) -> Mapping[str, float]:
        return {"token_loss": 1.0}

    def build_model(self) -> nn.Module:
        return ToyModel(self.width, self.dropout)

    @cached_property
    def _train(self) -> Sequences:
        return Sequences(self.num_train, 1, self.damaged)

    def train_data(self) -> Sequences:
        return self._train

    def val_data(self) -> Sequences:
        return Sequences(40, 2)

    def collate(self, samples: Sequence[Any], pad_multiple: int = 1) -> Batch:
        longest = max(len(sample) for sample in samples) - 1
        longest += -longest % pad_multiple
        tokens = np.zeros((len(samples), longest), np.int64)
        targets = np.full((len(samples), longest), -100, np.int64)
        for row, sample in enumerate(samples):
            tokens[row, : len(sample) - 1], targets[row, : len(sample) - 1] = sample[:-1], sample[1:]
        count = sum(len(sample) - 1 for sample in samples)
        return Batch(
            inputs={"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)},
            counts={"token_loss": count},
            num_samples=len(samples),
            num_tokens=count,
            num_slots=tokens.size,
        )

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.explode_at_batch_size and model.training and len(inputs["tokens"]) >= self.explode_at_batch_size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        logits = model(inputs["tokens"]).flatten(0, 1)
        return {"token_loss": F.cross_entropy(logits.float(), inputs["targets"].flatten(), reduction="sum")}

    def data_digest(self) -> str:
        return self.digest

    def best_checkpoints(self) -> Mapping[str, str]:
        return {"val/token_loss": "best_token_model.pth"}
