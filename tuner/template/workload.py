"""The model, the data and the loss of the study. Replace the parts marked with HERE.

`python workload.py` checks the three laws of a workload, which a fair comparison needs.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer import Batch, Workload

NUM_TOKENS = PADDING = 16


class Sequences:
    """HERE: your data: samples by index, and the length of each. These count up in steps, with random errors."""

    def __init__(self, num_samples: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.lengths = random.integers(8, 33, num_samples)
        steps = [random.integers(1, 4) * (random.random(length) < 0.9) for length in self.lengths]
        self.samples = [np.cumsum(one) % NUM_TOKENS for one in steps]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int, /) -> np.ndarray:
        return self.samples[index]


class Model(nn.Module):
    """HERE: your model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS + 1, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, NUM_TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.gru(self.embedding(tokens))[0])
        return logits


class MyModel(Workload):
    width: int = 32  # HERE: your options, set in [workload] or tuned in [search]; a path is a trainer.DataPath

    @property
    def loss_weights(self) -> Mapping[str, float]:
        return {"token_loss": 1.0}

    def build_model(self) -> nn.Module:
        return Model(self.width)

    def train_data(self) -> Sequences:
        return Sequences(2_000, seed=1)

    def val_data(self) -> Sequences:
        return Sequences(200, seed=2)

    def collate(self, samples: Sequence[np.ndarray], pad_multiple: int = 1) -> Batch:
        count = sum(len(sample) - 1 for sample in samples)  # the first token is given, the others are predicted
        longest = max(len(sample) - 1 for sample in samples)
        rows = np.full((len(samples), 1 + longest + -longest % pad_multiple), PADDING)
        for row, sample in zip(rows, samples, strict=True):
            row[: len(sample)] = sample
        # The number of terms of each sum below: with it the mean over batches of any size is exact.
        counts = {"token_loss": count, "accuracy": count}
        inputs = {"tokens": torch.from_numpy(rows)}
        return Batch(inputs, counts, len(samples), num_tokens=count, num_slots=rows[:, 1:].size)

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # HERE: your loss, summed. A sum without a weight in loss_weights is only a metric.
        targets = inputs["tokens"][:, 1:].flatten()
        logits = model(inputs["tokens"][:, :-1]).flatten(0, 1).float()
        loss = F.cross_entropy(logits, targets, ignore_index=PADDING, reduction="sum")
        return {"token_loss": loss, "accuracy": (logits.argmax(1) == targets).float().sum()}


if __name__ == "__main__":
    from trainer.laws import check_workload

    check_workload(MyModel())
    print("The three laws hold.")
