"""The form of a checkpoint's content: a whole file may hold anything under the names of a state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from torch import Tensor, nn

from trainer.checkpoint_file import read_checkpoint
from trainer.errors import UserError

Step = Annotated[int, Field(ge=0, lt=2**63)]


class _Data(BaseModel):
    contents: str


class _Identity(BaseModel):
    train: dict[str, JsonValue]
    workload: dict[str, JsonValue]
    data: _Data


class _Progress(BaseModel):
    step: Step
    evaluated_step: int
    metrics: dict[str, float]


class _Form(BaseModel):
    """What the trainer writes besides tensors; weights lack some of it, and earlier versions too."""

    model_config = ConfigDict(strict=True)
    step: Step
    samples: Step = 0
    metrics: dict[str, float] = {}
    model: dict[str, Any] = {}
    identity: _Identity = _Identity(train={}, workload={}, data=_Data(contents=""))
    lineage: dict[str, Any] = {}
    progress: _Progress | None = None
    config: dict[str, JsonValue] = {}
    known_good: Step | None = None

    @model_validator(mode="after")
    def _check(self) -> _Form:
        if "progress" in self.model_fields_set and (self.progress is None or self.progress.step != self.step):
            raise ValueError("its progress is of another step")
        return self


def check_form(state: Mapping[str, Any], source: Path) -> None:
    """Raises UserError where a checkpoint has not the form of those of this trainer."""
    try:
        _Form.model_validate({key: state[key] for key in _Form.model_fields if key in state})
    except ValidationError as error:
        raise UserError(f"{source} is no checkpoint of a run ({describe(error)}): name another one.") from None


def describe(error: ValidationError) -> str:
    """The first mistake in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    message = " ".join(first["msg"].split())
    return f"{'.'.join(map(str, first['loc']))}: {message[0].lower()}{message[1:]}"


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint that a run of this trainer has written, its tensors mapped from the file.

    Raises:
        UserError: As `read_checkpoint`; or another program wrote it.
    """
    state = read_checkpoint(path, mmap=True)
    check_form(state, path)
    return state


def weights_in(state: Mapping[str, Any], source: Path, *, extra: bool = False) -> dict[str, Tensor]:
    """The weights of a checkpoint of a run, or of a bare state dict.

    Args:
        extra: Allow what modules keep besides tensors (`get_extra_state`).

    Raises:
        UserError: It has none.
    """
    weights = state.get("model", state)
    if not isinstance(weights, Mapping) or not all(
        isinstance(key, str) and (isinstance(value, Tensor) or (extra and key.endswith("_extra_state")))
        for key, value in weights.items()
    ):
        raise UserError(f"{source} holds no weights by name: name a checkpoint of a run, or a state dict.")
    return dict(weights)


def load_model(model: nn.Module, state: Mapping[str, Any], source: Path, remedy: str = "") -> None:
    """Load the weights of a checkpoint.

    Raises:
        UserError: It has none, or those of another model.
    """
    try:
        model.load_state_dict(weights_in(state, source, extra=True))
    except RuntimeError as error:
        raise UserError(f"{source} does not fit the model ({' '.join(str(error).split())}){remedy}") from error


def find_odd_optimizer(saved: Any, optimizer: torch.optim.Optimizer) -> str | None:
    """Why the state of an optimizer does not fit a new one, in words; None if it fits.

    Fused kernels know addresses only: with a tensor of another shape they would write elsewhere.
    """
    if not isinstance(saved, Mapping) or not isinstance(saved.get("state"), Mapping):
        return "it has no state"
    groups, states = saved.get("param_groups"), saved["state"]
    if not isinstance(groups, list) or len(groups) != len(optimizer.param_groups):
        return "it has other groups of parameters"
    count = 0
    for own, group in zip(optimizer.param_groups, groups, strict=True):
        numbers = list(range(count, count + len(own["params"])))
        count += len(numbers)
        if not isinstance(group, Mapping) or group.get("params") != numbers:
            return "a group has other parameters"
        # Earlier versions had no factors on the learning rate. Prodigy adds numbers of its own.
        for key in (own.keys() | group.keys()) - {"params", *({"lr_factor"} - group.keys())}:
            if not _is_like(group.get(key, "missing"), own.get(key, 0.0)):
                return f"{key} is {str(group.get(key, 'missing'))[:80]!r}"
        for number, param in zip(numbers, own["params"], strict=True):
            state = states.get(number, {})
            if not isinstance(state, Mapping) or (state and not _fits(state, param, own)):
                return f"the state of parameter {number} does not fit its shape {list(param.shape)}"
    return None if states.keys() <= set(range(count)) else "it has the state of other parameters"


def _is_like(value: Any, own: Any) -> bool:
    """Whether a value of a group is of the kind of an optimizer's own."""
    if own is None:
        return value is None or isinstance(value, bool) or _is_number(value)
    if isinstance(own, bool):
        return isinstance(value, bool)
    if isinstance(own, tuple | list):
        return isinstance(value, tuple | list) and len(value) == len(own) and all(map(_is_like, value, own))
    return _is_number(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0
    return isinstance(value, int | float) and not isinstance(value, bool) and not 2**63 <= abs(value) < float("inf")


def _fits(state: Mapping[str, Any], param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the state of a parameter has the shapes that Prodigy or AdamW gives it."""
    shapes: dict[str, list[tuple[int, ...]]] = {"exp_avg_sq": [tuple(param.shape)]}
    if "slice_p" not in group or group["betas"][0] > 0:
        shapes["exp_avg"] = [tuple(param.shape)]
    if "slice_p" in group:
        sliced = (-(-param.numel() // group["slice_p"]),)
        shapes |= {"s": [sliced], "p0": [sliced, ()]}
    tensors = {name: state.get(name) for name in shapes}
    return _is_number(state.get("step")) and all(
        isinstance(tensor, Tensor) and tuple(tensor.shape) in shapes[name] for name, tensor in tensors.items()
    )
