"""The mean of several checkpoints' weights, which is often better than each of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import read_checkpoint
from trainer.errors import UserError
from trainer.export import write_weights
from trainer.state_form import check_form, weights_in

log = logging.getLogger(__name__)


def average_checkpoints(sources: Sequence[Path], path: Path) -> int:
    """Write the mean of checkpoints as weights that `export`, `--init` and `evaluate` read; returns their number.

    A file that is given under several names counts once. The mean is computed in float32 (float64 for such weights) and
    stored in the types of the first checkpoint, whose integers are kept, as is its lineage.

    Raises:
        UserError: There are fewer than two, one can't be read, their weights differ in name or shape or are not finite,
            or `path` exists or is no .pth.
    """
    if path.suffix != ".pth":
        raise UserError(f"{path}: an average is a .pth file; tuner export writes its weights in other formats.")
    if path.exists():
        raise UserError(f"{path} exists: choose another name.")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it first.")
    sources = _list_files(sources)
    if len(sources) < 2:
        raise UserError(f"{len(sources)} checkpoint: an average needs at least two.")
    first = read_checkpoint(sources[0], mmap=True)
    if "lineage" in first:
        check_form(first, sources[0])
    weights = weights_in(first, sources[0])
    if any(".lora_A." in name for name in weights):
        raise UserError(
            f"{sources[0]} holds LoRA adapters, and the product of two means is not the mean of the products: export "
            "the checkpoints, and average the exported files."
        )
    mean = {name: tensor.to(_wide(tensor)) for name, tensor in weights.items() if tensor.is_floating_point()}
    for number, source in enumerate(sources[1:], 2):
        others = weights_in(read_checkpoint(source, mmap=True), source)
        _check_like(weights, others, sources[0], source)
        for name, so_far in mean.items():
            # Not a sum: the mean of equal weights is exactly these.
            mean[name] = so_far + (others[name].to(so_far.dtype) - so_far) / number
    if broken := [name for name, tensor in mean.items() if not tensor.isfinite().all()]:
        raise UserError(f"{broken[0]} is not finite in one of the checkpoints: leave out those of a run that diverged.")
    model = {name: mean[name].to(tensor.dtype) if name in mean else tensor for name, tensor in weights.items()}
    known = ("step", "samples", "identity", "lineage") if "model" in first else ()
    about: dict[str, Any] = {key: first[key] for key in known if key in first}
    if "lineage" in about:
        about["lineage"] = {**about["lineage"], "averaged": [str(source.resolve()) for source in sources]}
    write_weights({"model": model, **about}, path)
    return len(sources)


def _list_files(sources: Sequence[Path]) -> list[Path]:
    """Without further names of the same file: in a run directory one state has several."""
    files: list[Path] = []
    for source in sources:
        same = next((file for file in files if source.exists() and file.exists() and source.samefile(file)), None)
        if same is None:
            files.append(source)
        else:
            log.warning("%s is another name of %s, and counts once", source, same)
    return files


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _check_like(one: Mapping[str, Tensor], other: Mapping[str, Tensor], first: Path, source: Path) -> None:
    """Raises UserError where the weights are not of the same model."""
    if names := sorted(one.keys() ^ other.keys()):
        where = first if names[0] in one else source
        raise UserError(f"{source} is of another model than {first}: {names[0]} is in {where} only.")
    for name, tensor in one.items():
        if tensor.shape != other[name].shape:
            shapes = f"{list(tensor.shape)} and {list(other[name].shape)}"
            raise UserError(f"{source} is of another model than {first}: {name} has the shapes {shapes}.")
