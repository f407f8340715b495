"""Writes a trained GPT as a `gpt.pth`: the base checkpoint with its trained part replaced."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from studies.indextts2.weights import TEXT_ROWS, CheckpointWeights, check_keys, join_few, published_name, read_weights
from trainer.errors import UserError
from trainer.export import WeightsFormat, write_weights

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
    trained = {name: tensor for key, tensor in state.items() if (name := published_name(key))}
    if not trained.keys() >= {"final_norm.weight", *TEXT_ROWS}:
        raise UserError("these are not weights of the IndexTTS-2 GPT; name a checkpoint of its training")
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
