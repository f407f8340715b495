"""LoRA (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models") on the attention and MLP layers, by peft.

The base's weights are not trained, and not in the state dict: checkpoints hold the adapters, and what is trained beside
them. The base checkpoint has the rest, and its digest is stored, because adapters are worth nothing on another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from studies.indextts2.model import MLP, Attention, IndexTTS2GPT
from studies.indextts2.weights import LORA_BASE, published_name
from trainer.checkpoint import read_checkpoint
from trainer.errors import UserError


def add_lora(model: IndexTTS2GPT, *, rank: int, alpha: float, also: Sequence[str], digest: str) -> None:
    """Add adapters to a model with the base's weights. They and the parameters that start with one of `also` are
    trained, and are its state dict.

    Args:
        digest: Of the base checkpoint, in hexadecimal digits.

    Raises:
        UserError: peft is missing, or a prefix of `also` fits nothing.
    """
    try:
        # Not under FakeTensorMode, where what an import computes would stay fake.
        with _disable_current_modes():
            from peft import LoraConfig
            from peft.tuners.lora import Linear
    except ImportError:
        raise UserError("workload.lora_rank needs peft: pip install 'prodigy-tuner[lora]'") from None

    class Adapter(Linear):  # type: ignore[misc]
        def _move_adapter_to_device_of_base_layer(self, *_: Any, **__: Any) -> None:
            """Both are on the CPU, and under FakeTensorMode a move fails."""

    names = [name for name, _ in model.named_parameters()]
    for prefix in also:
        if not any(name.startswith(prefix) for name in names):
            raise UserError(f"lora_train names {prefix!r}, and no parameter starts so; they are like {names[0]!r}")
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, fan_in_fan_out=True)
    # Not by peft's own injection, which fails under FakeTensorMode.
    for parent in [module for module in model.modules() if isinstance(module, Attention | MLP)]:
        for name, layer in list(parent.named_children()):
            adapter = Adapter(layer, "default", config=config, r=rank, lora_alpha=alpha)
            # Under autocast the input would be copied to float32, and back.
            adapter.cast_input_dtype_enabled = False
            setattr(parent, name, adapter)
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(also)):
            parameter.requires_grad_(True)
    saved = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    _limit_state_dict(model, saved, torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8))


def _limit_state_dict(model: IndexTTS2GPT, saved: set[str], base: Tensor) -> None:
    """Make the state dict hold the `saved` parameters and the digest alone."""
    missing: list[str] = []

    def drop(_: Any, state: dict[str, Any], *__: Any) -> None:
        for name in state.keys() - saved:
            del state[name]
        state[LORA_BASE] = base

    def check(_: Any, state: dict[str, Any], *__: Any) -> None:
        found = state.pop(LORA_BASE, None)
        if found is not None and not torch.equal(found, base):
            raise UserError("the LoRA adapters were trained on another base_checkpoint: name that one in [workload]")
        missing[:] = sorted(saved - state.keys())

    def complete(_: Any, incompatible: Any) -> None:
        incompatible.missing_keys[:] = missing

    model.register_state_dict_post_hook(drop)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(check)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_post_hook(complete)  # type: ignore[no-untyped-call]


def load_adapters(model: IndexTTS2GPT, path: Path) -> None:
    """Load the adapters of a checkpoint into a model that has adapters.

    Raises:
        UserError: It holds none, or others.
    """
    content = read_checkpoint(path, mmap=True)
    state = content.get("model", content)
    if LORA_BASE not in state:
        raise UserError(
            f"{path} holds whole weights, and with lora_rank checkpoints hold adapters of base_checkpoint alone: name "
            "it as workload.base_checkpoint to train from it, or set workload.lora_rank = 0"
        )
    set_adapters(model, state, str(path))


def set_adapters(model: IndexTTS2GPT, state: Mapping[str, Tensor], source: str) -> None:
    """Load the state dict of adapters; `source` is for the message of a UserError."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{source} does not fit lora_rank and lora_train ({reason[:200]}): set those of its run"
        ) from error


def merge_lora(model: IndexTTS2GPT) -> dict[str, Tensor]:
    """Add the adapters to the base's weights, in place; returns all weights by published name."""
    from peft.tuners.lora import Linear

    for module in model.modules():
        if isinstance(module, Linear):
            module.merge()
    return {name: p.detach() for key, p in model.named_parameters() if (name := published_name(key))}
