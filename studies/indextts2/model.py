"""The IndexTTS-2 GPT, in the form that its training needs.

Each row contains one sample without gaps, with padding only at the end:

    32 condition vectors + emo_vec | 2 duration vectors | start_text text stop_text | start_mel codes | ...

so a causal model needs no mask, can use the flash kernel, and the loss of a sample does not depend on its batch.
`collate` in `workload.py` makes this layout. The parameters have the names and shapes of the published `gpt.pth`,
without its encoders, which are not trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.cross_entropy import cross_entropy_sum

NUM_CONDITION = 32
"""Vectors that describe the speaker."""
NUM_DURATION = 2
PREFIX = NUM_CONDITION + NUM_DURATION
"""Positions of a row before its start_text token."""
NO_TARGET = -100
"""A target that only fills up the shape. It has no loss."""
EVAL_ROWS = 1024
"""Targets per chunk of logits when only the first-ranked code is needed."""


class GPTConfig(BaseModel):
    """The `gpt:` section of a config.yaml. The defaults are the published model's; keys about the encoders
    and about inference are accepted and ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    model_dim: PositiveInt = 1280
    layers: PositiveInt = 24
    heads: PositiveInt = 20
    max_text_tokens: PositiveInt = 600
    max_mel_tokens: PositiveInt = 1815
    number_text_tokens: PositiveInt = 12_000
    number_mel_codes: PositiveInt = 8194
    start_text_token: int = 0
    stop_text_token: int = 1
    start_mel_token: int = 8192
    stop_mel_token: int = 8193

    @model_validator(mode="after")
    def _check(self) -> GPTConfig:
        if self.model_dim % self.heads:
            raise ValueError(f"model_dim {self.model_dim} is not a multiple of heads {self.heads}")
        for name, size in (("text", self.number_text_tokens + 1), ("mel", self.number_mel_codes)):
            for end in ("start", "stop"):
                token = getattr(self, f"{end}_{name}_token")
                if not 0 <= token < size:
                    raise ValueError(f"{end}_{name}_token {token} is outside its table of {size} rows")
        return self

    @property
    def num_codes(self) -> int:
        """Size of the speech codebook: the ids below the start and stop tokens."""
        return min(self.start_mel_token, self.stop_mel_token)


class Conv1D(nn.Module):
    """GPT-2's linear layer: its weight is stored [in, out]."""

    def __init__(self, num_in: int, num_out: int, std: float = 0.02) -> None:
        super().__init__()
        # peft reads the sizes under these names.
        self.input_size, self.output_size = num_in, num_out
        self.weight = nn.Parameter(torch.empty(num_in, num_out).normal_(std=std))
        self.bias = nn.Parameter(torch.zeros(num_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, residual_std: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.c_attn = Conv1D(width, 3 * width)
        self.c_proj = Conv1D(width, width, residual_std)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.c_attn(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return F.dropout(self.c_proj(y.transpose(1, 2).reshape(x.shape)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, width: int, dropout: float, residual_std: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.c_fc = Conv1D(width, 4 * width)
        self.c_proj = Conv1D(4 * width, width, residual_std)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, dropout: float) -> None:
        super().__init__()
        width = config.model_dim
        residual_std = 0.02 / math.sqrt(2 * config.layers)
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, config.heads, dropout, residual_std)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, dropout, residual_std)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        y: Tensor = self.mlp(self.ln_2(x))
        return x + y


class Trunk(nn.Module):
    """GPT-2's blocks and last norm. Its own token and position embeddings are unused and left out."""

    def __init__(self, config: GPTConfig, dropout: float) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block(config, dropout) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.model_dim)


class LearnedPositions(nn.Module):
    def __init__(self, num_positions: int, width: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(num_positions, width)

    def forward(self, positions: Tensor) -> Tensor:
        return self.emb(positions)  # type: ignore[no-any-return]


class IndexTTS2GPT(nn.Module):
    """Text and speech codes under one causal transformer, each with its own embedding, positions and head.

    `dropout` acts on embeddings, attention and residuals. `condition_dropout` is the share of the training samples
    whose speaker and emotion are zeros. `duration` is the first of the two duration vectors (the second is always
    `speed_emb[0]`, "free"): "binary" is `speed_emb[1]`, "length" the mel position embedding at the number of codes + 1,
    from which the model learns the utterance's length. `gradient_checkpointing` keeps one activation per block and
    computes the others again in the backward pass.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        dropout: float = 0.1,
        condition_dropout: float = 0.0,
        duration: Literal["binary", "length"] = "binary",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        width = config.model_dim
        self.config = config
        self.dropout = dropout
        self.condition_dropout = condition_dropout
        self.duration = duration
        self.gradient_checkpointing = gradient_checkpointing
        self.text_embedding = nn.Embedding(config.number_text_tokens + 1, width)
        self.mel_embedding = nn.Embedding(config.number_mel_codes, width)
        self.gpt = Trunk(config, dropout)
        self.mel_pos_embedding = LearnedPositions(config.max_mel_tokens + 3, width)
        self.text_pos_embedding = LearnedPositions(config.max_text_tokens + 2, width)
        self.final_norm = nn.LayerNorm(width)
        self.text_head = nn.Linear(width, config.number_text_tokens + 1)
        self.mel_head = nn.Linear(width, config.number_mel_codes)
        self.speed_emb = nn.Embedding(2, width)
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the batch, scalars in float32: `text_loss` and `mel_loss` (nats), and in eval mode
        `mel_top1`, the number of codes that the model ranks first.

        For B rows of `length` positions, of which `length - PREFIX` hold tokens:
          condition [B, 32, width], emo_vec [B, width]: float32
          ids, positions, is_mel [B, length - PREFIX]: both vocabularies share one layout; `is_mel` (bool)
            selects the tables of a position
          code_lengths [B]: number of codes of each row
          text_index, mel_index [N]: positions in the flattened [B * length] at which the heads are computed
          text_targets, mel_targets [N]: the next token there; NO_TARGET fills up the shape
        All shapes depend on the padded sizes alone, and no value is read on the host.
        """
        num_text = inputs["text_index"].shape[0]
        x = self._hidden(inputs, torch.cat((inputs["text_index"], inputs["mel_index"])))
        text, mel = x[:num_text], x[num_text:]
        sums = {
            "text_loss": cross_entropy_sum(text, self.text_head, inputs["text_targets"], ignore_index=NO_TARGET),
            "mel_loss": cross_entropy_sum(mel, self.mel_head, inputs["mel_targets"], ignore_index=NO_TARGET),
        }
        if not self.training:
            # A filling entry's target is no code, so it never counts as a hit.
            chunks = zip(torch.split(mel, EVAL_ROWS), torch.split(inputs["mel_targets"], EVAL_ROWS), strict=True)
            hits = [(self.mel_head(part).argmax(-1) == target).float().sum() for part, target in chunks]
            sums["mel_top1"] = torch.stack(hits).sum()
        return sums

    def mel_logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """[N, number_mel_codes]: scores of the next code at `mel_index`; `inputs` as `forward` takes them."""
        logits: Tensor = self.mel_head(self._hidden(inputs, inputs["mel_index"]))
        return logits

    def _hidden(self, inputs: Mapping[str, Tensor], index: Tensor) -> Tensor:
        """[N, width]: the input of the heads at N positions."""
        x = F.dropout(self._embed(inputs), self.dropout, self.training)
        for block in self.gpt.h:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        hidden: Tensor = self.final_norm(self.gpt.ln_f(x.flatten(0, 1).index_select(0, index)))
        return hidden

    def _embed(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """[B, length, width]: the whole row, as vectors."""
        condition = inputs["condition"] + inputs["emo_vec"].unsqueeze(1)
        if self.training and self.condition_dropout:
            kept = torch.rand(len(condition), 1, 1, device=condition.device) >= self.condition_dropout
            condition = condition * kept
        free = self.speed_emb.weight[0].expand(condition.shape[0], -1)
        if self.duration == "length":
            last = self.config.max_mel_tokens + 2
            control = self.mel_pos_embedding((inputs["code_lengths"] + 1).clamp(max=last))
        else:
            control = self.speed_emb.weight[1].expand_as(free)
        ids, positions, is_mel = inputs["ids"], inputs["positions"], inputs["is_mel"]
        # Looking a position up in both pairs of tables costs memory traffic, but keeps the shapes fixed.
        of_text, of_mel = (~is_mel).long(), is_mel.long()
        text = self.text_embedding(ids * of_text) + self.text_pos_embedding(positions * of_text)
        mel = self.mel_embedding(ids * of_mel) + self.mel_pos_embedding(positions * of_mel)
        tokens = torch.where(is_mel.unsqueeze(-1), mel, text)
        return torch.cat((condition, control.unsqueeze(1), free.unsqueeze(1), tokens), dim=1)
