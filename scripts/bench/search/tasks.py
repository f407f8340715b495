"""The two tasks of the search benchmark: a small GPT predicts the next byte of Korean text, or the next code of speech.

A full run sees no sample twice. A sample is a window of `WINDOW` tokens.

- text: the Korean lines, each once and in an order drawn by a fixed seed, of manuals, help pages and messages in the
  Debian packages of `PACKAGES` (bookworm), as bytes of UTF-8: 4.5 MB, 83% of them Hangul. `apt-get download` brings the
  packages. Windows share 15 of their 32 bytes with the next one, at other positions.
- speech: the sentences of that text, each in two of the four espeak-ng voices of the Korean demo; 25 codes a second by
  k-means of the log-mel. Windows are disjoint. Making it takes about 5 minutes on 2 cores and 5 GB of memory.

Both are kept in data/search_tasks. The last 5% of the lines or sentences are for validation.
"""

from __future__ import annotations

import hashlib
import html
import os
import re
import struct
import subprocess
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.bench.common import ROOT
from studies.korean_demo import speech
from trainer import Batch, Role, UserError, Workload

PACKAGES = (
    "libreoffice-help-ko",
    "libreoffice-l10n-ko",
    "gimp-help-ko",
    "gnome-user-docs",
    "installation-guide-amd64",
    "debian-faq-ko",
    "crawl-common",
    "evolution-common",
    "gimp-data",
    "krita-l10n",
    "freeciv-data",
    "gnome-control-center-data",
    "nautilus-data",
)
FOLDER = ROOT / "data/search_tasks"
SEED = 2026
VOCABULARY, WINDOW = 256, 32
STRIDES = {"text": 17, "speech": WINDOW}
VALIDATION_SHARE = 0.05
HANGUL = re.compile("[가-힣]")
BLOCK_TAGS = r"</?(?:p|h\d|li|td|tr|div|br|pre|ul|ol|table|title|item|dt|dd)\b[^>]*>"


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a page, a text or a message catalogue (.mo), without markup."""
    if path.suffix == ".mo":
        data = path.read_bytes()
        count, _, table = struct.unpack_from("<3I", data, 8)
        spans = [struct.unpack_from("<2I", data, table + 8 * number) for number in range(count)]
        text = "\n".join(data[start : start + size].decode(errors="replace") for size, start in spans)
    else:
        text = path.read_text(encoding="utf-8", errors="replace")
        text = re.sub(r"(?s)<(script|style|head|info)\b.*?</\1>", " ", text)
        text = re.sub(BLOCK_TAGS, "\n", text)
    text = html.unescape(re.sub(r"<[^<>]*>", "", text)).replace("\0", "\n")
    yield from (" ".join(line.split()) for line in text.split("\n"))


def make_text() -> list[str]:
    """Download the packages and return their lines of at least a tenth Hangul, each once, in a shuffled order."""
    lines: dict[str, None] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # apt's own user has to read it
        for package in PACKAGES:
            subprocess.run(["apt-get", "-qq", "download", package], cwd=folder, check=True)
            root = Path(folder, package)
            archive = next(Path(folder).glob(f"{package}_*.deb"))
            subprocess.run(["dpkg", "-x", archive, root], check=True)
            for path in sorted(root.rglob("*")):
                if "ko" in path.parts and path.suffix in (".html", ".page", ".txt", ".mo"):
                    pieces = read_lines(path)
                    lines |= dict.fromkeys(line for line in pieces if len(HANGUL.findall(line)) > 0.1 * len(line))
    kept = list(lines)
    return [kept[index] for index in np.random.default_rng(SEED).permutation(len(kept))]


def make_codes(text: list[str]) -> np.ndarray:
    """Speak each sentence of the text in two voices; the codes of all, one utterance after the other."""
    sentences: dict[str, None] = {}
    for line in text:
        for raw in re.split(r"(?<=[.!?:;])\s+", line):
            clean = " ".join(re.sub(r"[^가-힣0-9 .,%]+", " ", raw).split()).strip(" ,")
            pieces = textwrap.wrap(clean, speech.MAX_CHARACTERS)
            sentences |= dict.fromkeys(each for each in pieces if len(each) >= 6 and len(HANGUL.findall(each)) > 3)
    first_val, num_voices = (1 - VALIDATION_SHARE) * len(sentences), len(speech.SPEAKERS)
    utterances = [
        speech.Utterance(
            id=f"{number}-{turn}",
            text=sentence,
            speaker=speech.SPEAKERS[(number + turn) % num_voices],
            split="train" if number < first_val else "val",
        )
        for number, sentence in enumerate(sentences)
        for turn in range(2)
    ]
    codes, _ = speech.quantize(utterances, speech.speak(utterances, os.cpu_count() or 1, lambda: None))
    return np.concatenate([codes[one.id] for one in utterances]).astype(np.uint8)


def read_tokens(task: str) -> np.ndarray:
    """uint8 tokens of a task; made and written at the first call."""
    path = FOLDER / f"{task}.bin"
    if not path.exists():
        text_path = FOLDER / "text.bin"
        text = text_path.read_text(encoding="utf-8").split("\n") if text_path.exists() else make_text()
        made = make_codes(text).tobytes() if task == "speech" else "\n".join(text).encode()
        FOLDER.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        draft.write_bytes(made)
        draft.replace(path)
    return np.fromfile(path, np.uint8)


class Windows:
    """`WINDOW` tokens and the one after each; starts are `stride` apart."""

    def __init__(self, tokens: np.ndarray, stride: int) -> None:
        self.samples: np.ndarray = np.lib.stride_tricks.sliding_window_view(tokens, WINDOW + 1)[::stride]
        self.lengths = np.full(len(self.samples), WINDOW)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int, /) -> np.ndarray:
        sample: np.ndarray = self.samples[index]
        return sample


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        result: Tensor = x + self.mlp(self.norm_mlp(x))
        return result


class SmallGPT(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Parameter(torch.empty(WINDOW, width))
        for table in (self.tokens.weight, self.positions):
            nn.init.normal_(table, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.tokens(tokens) + self.positions))
        return logits


class NextToken(Workload):
    """Next-token prediction on windows of one task's tokens."""

    task: Literal["text", "speech"]
    width: int = 48
    layers: int = 2
    heads: int = 2
    min_samples: Annotated[int, Role.FREE] = 0
    """How many samples a full run sees."""

    @property
    def loss_weights(self) -> Mapping[str, float]:
        return {"token_loss": 1.0}

    @cached_property
    def _splits(self) -> tuple[np.ndarray, np.ndarray]:
        tokens = read_tokens(self.task)
        cut = round((1 - VALIDATION_SHARE) * len(tokens))
        return tokens[:cut], tokens[cut:]

    def build_model(self) -> nn.Module:
        return SmallGPT(self.width, self.layers, self.heads)

    def train_data(self) -> Windows:
        """Raises UserError where a full run would see samples twice."""
        data = Windows(self._splits[0], STRIDES[self.task])
        if len(data) < self.min_samples:
            raise UserError(f"{self.task} has {len(data):,} samples, and a full run sees {self.min_samples:,}.")
        return data

    def val_data(self) -> Windows:
        return Windows(self._splits[1], WINDOW)

    def collate(self, samples: Sequence[Any], pad_multiple: int = 1) -> Batch:
        tokens, count = torch.from_numpy(np.stack(samples)).long(), len(samples) * WINDOW
        return Batch({"tokens": tokens}, {"token_loss": count}, len(samples), num_tokens=count, num_slots=count)

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits = model(inputs["tokens"][:, :-1]).flatten(0, 1)
        return {"token_loss": F.cross_entropy(logits, inputs["tokens"][:, 1:].flatten(), reduction="sum")}

    def data_digest(self) -> str:
        return hashlib.sha256(read_tokens(self.task).tobytes()).hexdigest()

    def best_checkpoints(self) -> Mapping[str, str]:
        return {}
