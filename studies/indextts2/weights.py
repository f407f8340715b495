"""Weights to start from: a published or fine-tuned `gpt.pth`, or a checkpoint of this trainer.

Files differ in their wrapping (`model`, `_orig_mod.`, LoRA, inference aliases) and in their text vocabulary.
This module removes the differences; the rest must fit the model key for key.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from studies.indextts2.model import GPTConfig, IndexTTS2GPT
from trainer.checkpoint import read_checkpoint
from trainer.errors import UserError

logger = logging.getLogger(__name__)

ENCODERS = (
    "conditioning_encoder.",
    "perceiver_encoder.",
    "emo_conditioning_encoder.",
    "emo_perceiver_encoder.",
    "emo_layer.",
    "emovec_layer.",
)
"""Parts of `gpt.pth` that this training does not touch."""
LORA_BASE = "lora_base"
"""Key of the base checkpoint's digest, in a checkpoint that holds adapters alone."""
TEXT_ROWS = ("text_embedding.weight", "text_head.weight", "text_head.bias")
"""Tables with one row for each piece of the text tokenizer, and one more."""


@dataclass(frozen=True)
class CheckpointWeights:
    """The trained part of a checkpoint. The tensors are mapped from the file, so they cost no memory until
    they are read."""

    path: Path
    published: dict[str, Tensor]
    """All tensors that are kept, with the encoders: by published name, in the file's order."""
    tensors: dict[str, Tensor]
    """The trained tensors; shapes as in the file."""
    encoders: tuple[str, ...]
    """Keys of the encoders, which are not read."""
    dropped: tuple[str, ...]
    """Keys that the model does not have: LoRA's additions, inference aliases, `gpt.wte`."""
    is_wrapped: bool
    """The file holds them under "model"."""
    is_training_checkpoint: bool
    """Written by a trainer, so its text rows are the new tokenizer's already."""


@dataclass(frozen=True)
class LoadReport:
    """The result of loading a checkpoint."""

    dropped: tuple[str, ...]
    shared_pieces: int | None
    """Pieces of both tokenizers; None if no row had to move."""


class _RowMoves(NamedTuple):
    """Rows of the text tables that hold the same piece, pair by pair."""

    rows: Tensor
    """In the model."""
    base_rows: Tensor
    """In the checkpoint."""
    num_shared: int


def read_weights(path: Path) -> CheckpointWeights:
    """Open a checkpoint in any of its forms. Raises UserError where it is none; code in it is never run."""
    content = read_checkpoint(path, mmap=True)
    state = content.get("model", content)
    if not isinstance(state, Mapping) or not state or not all(_is_weight(*item) for item in state.items()):
        raise UserError(f"checkpoint {path} holds no weights: give a gpt.pth or a checkpoint of this trainer")
    refuse_adapters(state, f"checkpoint {path}")
    published: dict[str, Tensor] = {}
    encoders, dropped = [], []
    for key, tensor in state.items():
        name = published_name(key)
        if name is None:
            dropped.append(key)
            continue
        if name in published:
            raise UserError(f"checkpoint {path} holds {name} twice, the second time as {key}")
        published[name] = tensor
        if name.startswith(ENCODERS):
            encoders.append(key)
    tensors = {name: tensor for name, tensor in published.items() if not name.startswith(ENCODERS)}
    is_wrapped = state is not content
    # A best_*.pth has no optimizer, and its run's identity.
    trained = is_wrapped and not {"optimizer", "optimizer_type", "identity"}.isdisjoint(content)
    return CheckpointWeights(path, published, tensors, tuple(encoders), tuple(dropped), is_wrapped, trained)


def refuse_adapters(names: Iterable[str], source: str) -> None:
    """Raises UserError where the keys are those of adapters without their base; `source` is for the message."""
    if LORA_BASE in names:
        raise UserError(f"{source} holds LoRA adapters alone: set lora_rank in [workload] as in its run, or export it")


def published_name(key: str) -> str | None:
    """The name that a key of a checkpoint has in the published file; None if it is not in that file."""
    name = key.replace("_orig_mod.", "").replace(".base_layer.", ".")
    dropped = name.startswith("inference_model.") or ".lora_" in name or name == "gpt.wte.weight"
    return None if dropped else name


def join_few(names: Sequence[str]) -> str:
    """The first five names, as text."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def load_base_checkpoint(
    model: IndexTTS2GPT, path: Path, *, tokenizer: Path | None = None, base_tokenizer: Path | None = None
) -> LoadReport:
    """Copy a checkpoint's weights into `model`, in place, in the model's dtype.

    With both tokenizers, the text rows of a `gpt.pth` are moved by piece: a piece that both know takes its
    base row, the start and stop tokens keep theirs, and the model's other rows stay as they were initialised.
    Raises UserError for keys or shapes that don't fit, listing them; the model is then unchanged.
    """
    weights = read_weights(path)
    state = model.state_dict()
    moves = _find_row_moves(model, weights, tokenizer, base_tokenizer)
    check_keys(weights, state, () if moves is None else TEXT_ROWS)
    with torch.no_grad():
        for name, target in state.items():
            source = weights.tensors[name]
            if moves is None or name not in TEXT_ROWS:
                target.copy_(source)
            else:
                target[moves.rows] = source[moves.base_rows].to(target.dtype)
    # A table with frozen rows is no parameter: its entry in the state dict is a copy.
    model.load_state_dict(state)
    if weights.dropped:
        logger.info("%s: dropped %d keys: %s", path, len(weights.dropped), join_few(weights.dropped))
    if moves is not None:
        logger.info(
            "%s: %s of %s text pieces are the base tokenizer's too and took its rows; the others start fresh",
            path,
            f"{moves.num_shared:,}",
            f"{model.config.number_text_tokens:,}",
        )
    return LoadReport(weights.dropped, None if moves is None else moves.num_shared)


def count_pieces(tokenizer: Path) -> int:
    """Size of a SentencePiece model. Raises UserError where it can't be read."""
    return len(_pieces(tokenizer))


def _is_weight(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _find_row_moves(
    model: IndexTTS2GPT, weights: CheckpointWeights, tokenizer: Path | None, base_tokenizer: Path | None
) -> _RowMoves | None:
    """The text rows to copy, and their sources; None if the rows of the checkpoint stay."""
    if tokenizer is None or base_tokenizer is None or TEXT_ROWS[0] not in weights.tensors:
        return None
    num_new = model.config.number_text_tokens + 1
    num_base = len(weights.tensors[TEXT_ROWS[0]])
    if weights.is_training_checkpoint and num_base == num_new:
        return None
    new, base = _pieces(tokenizer), _pieces(base_tokenizer)
    if num_base != len(base) + 1:
        if num_base == num_new:
            return None
        raise UserError(
            f"checkpoint {weights.path} has {num_base} text rows; base_tokenizer {base_tokenizer} has "
            f"{len(base)} pieces, which need {len(base) + 1}: name the tokenizer of the checkpoint"
        )
    num_shared = len(set(new) & set(base))
    moves = find_shared_rows(model.config, tokenizer, base_tokenizer)
    return _RowMoves(torch.tensor(list(moves)), torch.tensor(list(moves.values())), num_shared)


def find_shared_rows(config: GPTConfig, tokenizer: Path, base_tokenizer: Path) -> dict[int, int]:
    """Row of the model's text tables -> row of the base's: of each piece that both tokenizers have."""
    new, base = _pieces(tokenizer), _pieces(base_tokenizer)
    row_of = {piece: row for row, piece in enumerate(base)}
    moves = {row: row_of[piece] for row, piece in enumerate(new) if piece in row_of}
    # These tokens are numbers, not pieces: they keep the rows of their numbers.
    tokens = (config.start_text_token, config.stop_text_token)
    return moves | {token: token for token in tokens if token <= len(base)}


def check_keys(weights: CheckpointWeights, state: Mapping[str, Tensor], moved: Sequence[str]) -> None:
    """Compare the trained keys and shapes of a checkpoint with the model's; the tables in `moved` may differ in
    their number of rows. Raises UserError, listing what does not fit."""
    norm = weights.tensors.get("final_norm.weight")
    width = len(state["final_norm.weight"])
    if norm is not None and norm.ndim == 1 and len(norm) != width:
        raise UserError(
            f"checkpoint {weights.path} is {len(norm)} wide and the config's model_dim is {width}; "
            "use the config that belongs to the checkpoint"
        )
    wrong = []
    for name, target in state.items():
        tensor = weights.tensors.get(name)
        # Moved rows need not agree in number, only in width.
        skip = 1 if name in moved else 0
        if tensor is not None and (tensor.ndim != target.ndim or tensor.shape[skip:] != target.shape[skip:]):
            wrong.append(f"{name} is {format_shape(tensor)}, the model's {format_shape(target)}")
    complaints = []
    for problem, names in (
        ("missing", [name for name in state if name not in weights.tensors]),
        ("unknown", [name for name in weights.tensors if name not in state]),
        ("mis-shaped", wrong),
    ):
        if names:
            complaints.append(f"{len(names)} {problem} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})")
    if complaints:
        remedy = "use the config that belongs to it"
        if any(entry.startswith(TEXT_ROWS) for entry in wrong):
            remedy += "; for another text vocabulary name tokenizer and base_tokenizer"
        raise UserError(f"checkpoint {weights.path} does not fit: {'; '.join(complaints)}: {remedy}")


def format_shape(tensor: Tensor) -> str:
    """Such as "24001x1280"."""
    return "x".join(map(str, tensor.shape))


def load_tokenizer(tokenizer: Path) -> Any:
    """The SentencePieceProcessor of a file. Raises UserError where it can't be read."""
    try:
        import sentencepiece
    except ImportError:
        raise UserError(f"reading {tokenizer} needs sentencepiece: pip install 'prodigy-tuner[indextts2]'") from None
    if not tokenizer.is_file():
        raise UserError(f"tokenizer {tokenizer} does not exist")
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromFile(str(tokenizer))
    except (OSError, RuntimeError):
        raise UserError(f"tokenizer {tokenizer} is not a SentencePiece model") from None
    return processor


def _pieces(tokenizer: Path) -> list[str]:
    processor = load_tokenizer(tokenizer)
    return [processor.IdToPiece(i) for i in range(processor.GetPieceSize())]
