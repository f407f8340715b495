"""Writes a trained GPT as a `gpt.pth`: the base checkpoint with its trained part replaced, alone or in a folder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from studies.indextts2.config_file import find_tokenizer, format_config, name_of, parse, read_text, set_vocabulary
from studies.indextts2.model import GPTConfig, IndexTTS2GPT
from studies.indextts2.weights import (
    TEXT_ROWS,
    CheckpointWeights,
    check_keys,
    count_pieces,
    format_shape,
    join_few,
    published_name,
    read_weights,
    refuse_adapters,
)
from trainer.errors import UserError
from trainer.export import WeightsFormat, WriteFile, write_weights

logger = logging.getLogger(__name__)


def export_gpt(
    state: Mapping[str, Tensor], path: Path, *, base_checkpoint: Path | None, format: WeightsFormat = "pth"
) -> None:
    """Write `state` to `path` in the published form: names, order and wrapping of `base_checkpoint`.

    Unchanged tensors keep their bytes and dtype: the encoders, and each trained tensor with its base values. The text
    tables have the rows of the trained vocabulary. Without a base checkpoint, or if it has no encoders, only the
    trained keys are written, with a log line.

    Args:
        state: The model's state dict.

    Raises:
        UserError: The weights are not this model's, they don't belong to the base checkpoint, or `path` can't be
            written.
    """
    trained = _trained_part(state)
    if base_checkpoint is None:
        logger.info(
            "no base_checkpoint: only the %d trained keys are written; inference needs the encoders of a gpt.pth too",
            len(trained),
        )
        write_weights(trained, path, format=format)
        return
    base = read_weights(base_checkpoint)
    check_keys(base, trained, TEXT_ROWS)
    tensors = {
        name: _choose_tensor(tensor, trained[name]) if name in trained else tensor
        for name, tensor in base.published.items()
    }
    # safetensors has no wrapping.
    write_weights({"model": tensors} if base.is_wrapped and format == "pth" else tensors, path, format=format)
    _report(base, trained)


def list_export_files(
    state: Mapping[str, Tensor],
    *,
    config: GPTConfig,
    config_file: Path | None,
    tokenizer: Path | None,
    base_checkpoint: Path | None,
    format: WeightsFormat = "pth",
) -> dict[str, WriteFile]:
    """Name -> function that writes it: weights, config.yaml and tokenizer, with the names that config.yaml gives them.

    config.yaml gets the vocabulary of the weights as `gpt.number_text_tokens`; all other bytes stay. Without a
    `config_file` it has only what the GPT needs.

    Args:
        config: The model's, its vocabulary that of `tokenizer`.
        tokenizer: None: the one beside `config_file`, if there is one.

    Raises:
        UserError: Weights, config and tokenizer do not fit each other.
    """
    text = read_text(config_file) if config_file else format_config(config, "bpe.model", f"gpt.{format}")
    content = parse(text, config_file or Path("config.yaml"))
    name = name_of(content, "tokenizer")
    tokenizer = tokenizer or (find_tokenizer(config_file) if config_file else None)
    _check_fit(_trained_part(state), config, config_file, tokenizer)
    if config_file:
        text = set_vocabulary(text, config.number_text_tokens, config_file)
    weights = name_of(content, "weights") if format == "pth" else f"gpt.{format}"
    files: dict[str, WriteFile] = {
        weights: partial(export_gpt, state, base_checkpoint=base_checkpoint, format=format),
        "config.yaml": partial(_write_text, text),
    }
    if tokenizer is None:
        logger.info("no tokenizer in [workload] nor beside the config: the folder has none")
        return files
    return files | {name: partial(_copy, tokenizer)}


def _write_text(text: str, path: Path) -> None:
    path.write_bytes(text.encode())


def _copy(source: Path, path: Path) -> None:
    shutil.copyfile(source, path)


def _trained_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors by published name."""
    refuse_adapters(state, "the checkpoint")
    trained = {name: tensor for key, tensor in state.items() if (name := published_name(key))}
    if not trained.keys() >= {"final_norm.weight", *TEXT_ROWS}:
        raise UserError("these are not weights of the IndexTTS-2 GPT; name a checkpoint of its training")
    return trained


def _check_fit(
    trained: Mapping[str, Tensor], config: GPTConfig, config_file: Path | None, tokenizer: Path | None
) -> None:
    """Compare weights, config and tokenizer: for N pieces `number_text_tokens` is N, and there are N + 1 text rows."""
    rows = len(trained[TEXT_ROWS[0]])
    if tokenizer and (pieces := count_pieces(tokenizer)) + 1 != rows:
        raise UserError(
            f"the weights have {rows:,} text rows, and the {pieces:,} pieces of {tokenizer} need {pieces + 1:,}: "
            "name the tokenizer that made the text ids of this run, in the study.toml of --spec."
        )
    if config.number_text_tokens + 1 != rows:
        raise UserError(
            f"the weights have {rows:,} text rows, and number_text_tokens {config.number_text_tokens:,} of "
            f"{config_file or '[workload.gpt]'} needs {config.number_text_tokens + 1:,}: set it to {rows - 1}."
        )
    with torch.device("meta"):
        model = IndexTTS2GPT(config)
    for name, tensor in model.state_dict().items():
        found = format_shape(trained[name]) if name in trained else "missing"
        if found != format_shape(tensor):
            raise UserError(
                f"the weights do not fit {config_file or '[workload.gpt]'}: {name} is {found}, and it needs "
                f"{format_shape(tensor)}: name the config of this run, in the study.toml of --spec."
            )


def _choose_tensor(base: Tensor, trained: Tensor) -> Tensor:
    """The trained tensor; the base's own, in its dtype, where the values are the same."""
    return base if base.shape == trained.shape and torch.equal(base.to(trained.dtype), trained) else trained


def _report(base: CheckpointWeights, trained: Mapping[str, Tensor]) -> None:
    if base.dropped:
        logger.info("%s: dropped %d keys: %s", base.path, len(base.dropped), join_few(base.dropped))
    if base.encoders:
        logger.info("%d encoder keys of %s as they are, %d trained keys", len(base.encoders), base.path, len(trained))
    else:
        logger.info(
            "%s has no encoders: only the %d trained keys are written; inference needs the encoders of a gpt.pth too",
            base.path,
            len(trained),
        )
