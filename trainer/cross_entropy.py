"""The cross-entropy of a large vocabulary, without holding all of its logits.

The logits of 2,400 targets over 8,194 codes take 79 MB in float32, and their gradient as much again. Here the forward
pass computes logits and gradients for one chunk of targets at a time and then drops the logits, as in Liger Kernel
(Hsu et al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training"). No product is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_LOGITS = 1 << 21
"""Logits held at a time: 8 MB in float32, as fast as all at once."""


def cross_entropy_sum(x: Tensor, head: nn.Linear, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Sum of the cross-entropies of `head(x)`: as `F.cross_entropy(head(x).float(), targets, reduction="sum")`.

    Args:
        x: [N, width].
        head: With C outputs and a bias.
        targets: [N] int64, below C; `ignore_index` for no target.

    Returns:
        A scalar in float32, under autocast too: bfloat16 has 8 bits for a sum of thousands of terms. The gradient
        is computed with it, for one backward pass.
    """
    rows = max(1, CHUNK_LOGITS // head.out_features)
    # Compiled code holds all logits in the products' precision, and none in float32. Its graph must not depend on their
    # number, so `is_compiling` is checked first.
    if torch.compiler.is_compiling() or len(targets) <= rows:
        return F.cross_entropy(head(x).float(), targets, ignore_index=ignore_index, reduction="sum")
    parts: tuple[Tensor, ...] = x, head.weight, head.bias
    if not torch.is_grad_enabled():
        parts = x.detach(), head.weight.detach(), head.bias.detach()
    loss: Tensor = _Chunked.apply(*parts, targets, ignore_index, rows)  # type: ignore[no-untyped-call]
    return loss


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, ignore_index: int, rows: int
    ) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        low_x, low_weight, low_bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_x = torch.empty_like(low_x) if wants_x else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        grad_bias = torch.zeros_like(bias) if wants_bias else None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(targets), rows):
                chunk = slice(start, start + rows)
                target = targets[chunk].unsqueeze(1)
                real = target != ignore_index
                target = target.clamp(min=0)
                logits = F.linear(low_x[chunk], low_weight, low_bias).float()
                log_sum = logits.logsumexp(1, keepdim=True)
                total = total + ((log_sum - logits.gather(1, target)) * real).sum()
                if not (wants_x or wants_weight or wants_bias):
                    continue
                # The gradient overwrites the logits: softmax, minus one at the target.
                grad = logits.sub_(log_sum).exp_()
                grad.scatter_add_(1, target, torch.full_like(log_sum, -1.0)).mul_(real)
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                low_grad = grad.to(dtype)
                if grad_x is not None:
                    torch.mm(low_grad, low_weight, out=grad_x[chunk])
                if grad_weight is not None and dtype == weight.dtype:
                    grad_weight.addmm_(low_grad.t(), low_x[chunk])
                elif grad_weight is not None:
                    grad_weight += low_grad.t() @ low_x[chunk]
        ctx.grads = grad_x, grad_weight, grad_bias
        ctx.dtype = x.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = outputs
        grad_x, grad_weight, grad_bias = ctx.grads
        # Scaled in place: there is no second backward pass.
        del ctx.grads
        if grad_x is not None:
            grad_x = grad_x.to(ctx.dtype).mul_(factor)
        for grad in (grad_weight, grad_bias):
            if grad is not None:
                grad.mul_(factor)
        return grad_x, grad_weight, grad_bias, None, None, None
