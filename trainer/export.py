"""Exports weights for use elsewhere: written whole or not at all, in torch's format or as safetensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from trainer.checkpoint import explain_write_error, num_bytes
from trainer.errors import UserError
from trainer.units import format_bytes

WeightsFormat = Literal["pth", "safetensors"]
WriteFile = Callable[[Path], None]
"""Writes a file to a path. Raises UserError or OSError where the path can't be written."""
FOREIGN = (".onnx", ".gguf", ".h5", ".npz", ".tflite")
"""Endings of other formats."""


def write_weights(content: Mapping[str, Any], path: Path, *, format: WeightsFormat = "pth") -> None:
    """Write tensors by name so that at every moment `path` is absent, the old file, or the whole new one.

    Tensors that are mapped from a checkpoint are copied from file to file and take no memory of their own.

    Args:
        content: A state dict; for "pth" also a nested one, such as {"model": ...}.

    Raises:
        UserError: The disk is full or can't be written to, the package safetensors is missing, or the name ends as
            that of another format.
    """
    if path.suffix in FOREIGN:
        known = " or ".join(get_args(WeightsFormat))
        raise UserError(f"{path}: weights are written as {known}: name it so.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if format == "safetensors":
            _save_safetensors(content, temporary)
        else:
            with open(temporary, "wb") as file:
                torch.save(dict(content), file)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if (reason := explain_write_error(error)) is None:
            raise
        size = format_bytes(num_bytes(dict(content)))
        raise UserError(
            f"{path} could not be written ({reason}): it needs {size}; free some space or choose another folder."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _save_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("writing safetensors needs the package safetensors: pip install safetensors") from None
    storages: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # The format does not support shared tensors: tied weights are written once for each name.
        tensor = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        storages.add(tensor.untyped_storage().data_ptr())
        apart[name] = tensor.contiguous()
    try:
        # Other libraries expect this metadata.
        safetensors.torch.save_file(apart, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
