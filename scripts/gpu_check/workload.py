"""IndexTTS-2's GPT on made-up utterances: no files, no tokenizer, no network."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated

import numpy as np
from pydantic import Field

from scripts.bench.roofline import Model, count_flops
from studies.indextts2 import IndexTTS2
from studies.indextts2.dataset import Utterance, utterance_length
from studies.indextts2.model import NUM_CONDITION, GPTConfig
from trainer.config import PositiveInt, Role

TINY = GPTConfig(
    model_dim=32,
    layers=1,
    heads=2,
    number_text_tokens=64,
    number_mel_codes=130,
    start_mel_token=128,
    stop_mel_token=129,
)
NUM_SPEAKERS = 64


class Utterances:
    """Utterances whose numbers of codes are log-normal, about 300; in the tiny size a tenth of it."""

    mapped = True

    def __init__(self, number: int, config: GPTConfig, seed: int) -> None:
        random = np.random.default_rng(seed)
        scale = 10 if config.num_codes < 1000 else 1
        self.codes = np.clip(random.lognormal(5.65, 0.45, number), 60, 720).astype(np.int64) // scale
        self.text = np.clip(self.codes // 5, 2, 150)
        self.lengths = utterance_length(self.text, self.codes).astype(np.int32)
        self._config = config
        self._condition = random.standard_normal((NUM_SPEAKERS, NUM_CONDITION, config.model_dim)).astype(np.float32)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int, /) -> Utterance:
        # Each code follows from the one before, so that the loss can fall.
        codes = (np.arange(self.codes[index]) * 7 + index) % min(97, self._config.num_codes)
        text = np.random.default_rng(index).integers(2, 50, self.text[index])
        condition = self._condition[index % NUM_SPEAKERS]
        return Utterance(text.astype(np.int32), codes.astype(np.int32), condition, condition[0])


class Synthetic(IndexTTS2):
    """The published size by default."""

    train_manifests: Annotated[list[str], Role.FREE] = Field(["made-up"])
    val_manifests: Annotated[list[str], Role.FREE] = Field(["made-up"])
    gpt: GPTConfig | None = GPTConfig()
    num_samples: PositiveInt = 4096

    @cached_property
    def _made_up(self) -> tuple[Utterances, Utterances]:
        return Utterances(self.num_samples, self.gpt_config, 1), Utterances(64, self.gpt_config, 2)

    def train_data(self) -> Utterances:
        return self._made_up[0]

    def val_data(self) -> Utterances:
        return self._made_up[1]

    def val_part(self, index: int) -> str:
        return ""

    def input_files(self) -> tuple[()]:
        return ()

    def data_digest(self) -> str:
        return "made-up"

    def flops_per_sample(self) -> float:
        """Operations of forward and backward, of real positions alone, on average."""
        config, data = self.gpt_config, self.train_data()
        model = Model(
            width=config.model_dim,
            layers=config.layers,
            text_tokens=config.number_text_tokens + 1,
            codes=config.number_mel_codes,
        )
        lengths = data.lengths.astype(np.float64)
        flops = count_flops(
            model,
            positions=lengths.sum(),
            squares=(lengths**2).sum(),
            text_targets=float((data.text + 1).sum()),
            code_targets=float((data.codes + 1).sum()),
        )
        return sum(flops.values()) / len(data)


def build_workload(tiny: bool, **options: object) -> Synthetic:
    """The workload of all stages."""
    size = {"gpt": TINY, "num_samples": 256} if tiny else {}
    return Synthetic.model_validate(size | options)
