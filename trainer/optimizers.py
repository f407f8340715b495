"""Optimizers, learning-rate schedules, and the update: clip, check and step without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import TrainConfig
from trainer.errors import UserError
from trainer.prodigy import Prodigy


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build the optimizer that `config` names, for the parameters that are trained.

    Raises:
        UserError: A prefix of `lr_factors` fits none of them.
    """
    params = _group(model, config.lr_factors)
    if config.optimizer == "adamw":
        betas = (config.beta1, config.beta2)
        return torch.optim.AdamW(
            params, config.base_lr, betas=betas, weight_decay=config.weight_decay, fused=config.fused_optimizer
        )
    optimizer = Prodigy(
        params,
        lr=config.base_lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        use_bias_correction=config.use_bias_correction,
        safeguard_warmup=config.safeguard_warmup,
        d0=config.d0,
        d_coef=config.d_coef,
        slice_p=config.slice_p,
    )
    optimizer.use_kernels = config.fused_optimizer
    return optimizer


def _group(model: nn.Module, factors: Mapping[str, float]) -> list[dict[str, Any]]:
    """The parameters that are trained, as one group for each factor on the learning rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for prefix in factors:
        if not any(name.startswith(prefix) for name in names):
            raise UserError(
                f"train.lr_factors names {prefix!r}, and no trained parameter starts so; they are like {names[0]!r}"
            )
    for name in names:
        fitting = [prefix for prefix in factors if name.startswith(prefix)]
        factor = factors[max(fitting, key=len)] if fitting else 1.0
        groups.setdefault(factor, []).append(model.get_parameter(name))
    return [{"params": params, "lr_factor": factor} for factor, params in groups.items()]


def schedule_factor(config: TrainConfig, step: int) -> float:
    """Factor on the learning rate at the update number `step` (from 0).

    Linear warm-up; then constant ("none"), cosine to 0, or warm-up - stable - decay ("wsd": linear to 0 over the
    last `decay_fraction` of the horizon).
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "none":
        return 1.0
    assert config.horizon is not None
    if config.schedule == "cosine":
        share = (step - config.warmup_steps) / max(1, config.horizon - config.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return max(0.0, min(1.0, (config.horizon - step) / config.decay_steps))


def has_same_rates(one: TrainConfig, other: TrainConfig, steps: int) -> bool:
    """Whether the first `steps` updates have the same rates under both schedules: a run may go on under the other."""
    fields = ("schedule", "horizon", "decay_fraction", "warmup_steps")
    if all(getattr(one, name) == getattr(other, name) for name in fields):
        return True
    return all(schedule_factor(one, step) == schedule_factor(other, step) for step in range(steps))


def update(optimizer: Any, *, lr: float, max_grad_norm: float | None) -> tuple[Tensor, Tensor]:
    """One optimizer step: gradients are clipped and checked within it, on the device.

    A gradient that is not finite skips the whole step; one NaN would freeze Prodigy's d for ever.

    Returns:
        The gradient norm before clipping and 1.0 where the step was skipped, both 0-d tensors on the device.
    """
    if isinstance(optimizer, Prodigy):
        for group in optimizer.param_groups:
            group["lr"] = lr
        norm = optimizer.grad_norm()
    else:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
    skipped = (~torch.isfinite(norm)).float()
    # torch's fused optimizers and our Prodigy read both: the divisor of the gradients, and whether to skip.
    optimizer.grad_scale = None if max_grad_norm is None else (norm / max_grad_norm).clamp(min=1.0)
    optimizer.found_inf = skipped
    optimizer.step()
    return norm, skipped


def is_finite(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the weights and the optimizer's state are finite. Waits for the device."""
    groups = [group["params"] for group in optimizer.param_groups]
    tensors = [param.detach() for group in groups for param in group]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    extremes: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            # One pass over memory, and NaN is an extreme too.
            extremes.setdefault(tensor.device, []).extend(value.double() for value in tensor.aminmax())
    return all(bool(torch.stack(values).isfinite().all()) for values in extremes.values())


def step_size(optimizer: torch.optim.Optimizer) -> Tensor | float:
    """Prodigy's d, a 0-d tensor on the device; 1 for other optimizers. The effective rate is d x lr."""
    d: Tensor | float = optimizer.param_groups[0].get("d", 1.0)
    return d
