"""A causal transformer that predicts the next character of the law texts in the package konlpy."""

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from trainer import Batch, Role, UserError, Workload

PADDING, UNKNOWN, NUM_SPECIAL = 0, 1, 2
HEAD_SIZE = 32


def read_documents() -> list[str]:
    """The constitution and ten bills, one line each. Raises UserError if konlpy is not installed."""
    spec = importlib.util.find_spec("konlpy")  # importing it needs Java
    folders = spec.submodule_search_locations if spec else None
    paths = sorted(Path(folders[0]).glob("data/corpus/*/*.txt")) if folders else []
    if not paths:
        raise UserError("the texts are in the package konlpy, which is missing: pip install 'prodigy-tuner[demo]'")
    return [" ".join(path.read_text(encoding="utf-8").split()) for path in paths]


class Windows:
    """Every `context` characters of each text, and the character after them; starts are `stride` apart."""

    def __init__(self, texts: list[np.ndarray], context: int, stride: int) -> None:
        self.samples = [text[i : i + context + 1] for text in texts for i in range(0, len(text) - 1, stride)]
        self.lengths = np.array([len(sample) - 1 for sample in self.samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int, /) -> np.ndarray:
        return self.samples[index]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unflatten(2, (3, -1, HEAD_SIZE)).permute(2, 0, 3, 1, 4)
        # Padding is at the end, where causal attention never looks: no mask, so the flash kernel can be used.
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        result: Tensor = x + self.mlp(self.norm_mlp(x))
        return result


class CharModel(nn.Module):
    def __init__(self, num_chars: int, context: int, width: int, layers: int) -> None:
        super().__init__()
        self.chars, self.positions = nn.Embedding(num_chars, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_chars))

    def forward(self, chars: Tensor) -> Tensor:
        # Padding may reach past the last position.
        places = torch.arange(chars.shape[1], device=chars.device).clamp(max=self.positions.num_embeddings - 1)
        logits: Tensor = self.head(self.blocks(self.chars(chars) + self.positions(places)))
        return logits


class KoreanChars(Workload):
    context: Annotated[PositiveInt, Role.MEASURE] = 64  # the validation windows depend on it
    width: int = Field(96, gt=0, multiple_of=HEAD_SIZE)
    layers: PositiveInt = 2

    @property
    def loss_weights(self) -> Mapping[str, float]:
        return {"char_loss": 1.0}

    @cached_property
    def _texts(self) -> tuple[list[np.ndarray], list[np.ndarray], int]:
        """Training texts, validation texts (the last tenth of each document), and the number of characters."""
        documents = read_documents()
        cuts = [len(document) * 9 // 10 for document in documents]
        train = [document[:cut] for document, cut in zip(documents, cuts, strict=True)]
        val = [document[cut:] for document, cut in zip(documents, cuts, strict=True)]
        ids = {char: NUM_SPECIAL + i for i, char in enumerate(sorted(set("".join(train))))}
        encoded = [[np.array([ids.get(c, UNKNOWN) for c in text]) for text in split] for split in (train, val)]
        return encoded[0], encoded[1], NUM_SPECIAL + len(ids)

    def build_model(self) -> nn.Module:
        return CharModel(self._texts[2], self.context, self.width, self.layers)

    def train_data(self) -> Windows:
        return Windows(self._texts[0], self.context, stride=max(1, self.context // 2))

    def val_data(self) -> Windows:
        return Windows(self._texts[1], self.context, stride=self.context)

    def collate(self, samples: Sequence[np.ndarray], pad_multiple: int = 1) -> Batch:
        count, longest = sum(len(sample) - 1 for sample in samples), max(len(sample) - 1 for sample in samples)
        rows = np.full((len(samples), 1 + longest + -longest % pad_multiple), PADDING)
        for row, sample in zip(rows, samples, strict=True):
            row[: len(sample)] = sample
        counts = {"char_loss": count, "char_top1": count}
        return Batch({"chars": torch.from_numpy(rows)}, counts, len(samples), count, num_slots=rows[:, 1:].size)

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        targets = inputs["chars"][:, 1:].flatten()
        logits = model(inputs["chars"][:, :-1]).flatten(0, 1).float()
        loss = F.cross_entropy(logits, targets, ignore_index=PADDING, reduction="sum")
        # Padding does not count as a correct prediction.
        right = (logits.argmax(1) == targets) & (targets != PADDING)
        return {"char_loss": loss, "char_top1": right.float().sum()}

    def data_digest(self) -> str:
        return hashlib.sha256("\n".join(read_documents()).encode()).hexdigest()
