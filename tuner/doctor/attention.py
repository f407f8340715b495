"""The attention calls of a training step, and whether the GPU's flash kernel supports them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from trainer.acceleration import AccelerationPlan, Capabilities
from tuner.doctor.check import Check


@dataclass(frozen=True)
class Attention:
    """The arguments of a call of `scaled_dot_product_attention` that decide its kernel."""

    num_heads: int
    head_dim: int
    value_dim: int
    query_length: int
    key_length: int
    precision: str
    """"bf16", "fp16" or "fp32", under the run's autocast."""
    num_dims: int = 4
    mask: bool = False
    dropout: float = 0.0
    causal: bool = False

    def __str__(self) -> str:
        parts = [f"{self.num_heads} heads of {self.head_dim}", self.precision]
        parts += ["causal"] if self.causal else []
        parts += ["with a mask" if self.mask else "no mask"]
        return ", ".join(parts + ([f"dropout {self.dropout:g}"] if self.dropout else []))


class Recorder(TorchFunctionMode):
    """Counts the calls of `scaled_dot_product_attention`. It does not see calls inside `nn.MultiheadAttention`."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        self.calls: Counter[Attention] = Counter()
        self._precision = precision

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self._count(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _count(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **_: Any,
    ) -> None:
        # Only the training step counts, not the validation.
        if not torch.is_grad_enabled():
            return
        own = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(query.dtype, "fp32")
        self.calls[
            Attention(
                num_heads=query.shape[-3] if query.dim() > 2 else 1,
                head_dim=query.shape[-1],
                value_dim=value.shape[-1],
                query_length=query.shape[-2],
                key_length=key.shape[-2],
                # Autocast casts the inputs of attention.
                precision="bf16" if self._precision == "bf16" and own == "fp32" else own,
                num_dims=query.dim(),
                mask=attn_mask is not None,
                dropout=dropout_p,
                causal=is_causal,
            )
        ] += 1


@contextmanager
def record_attention(precision: str) -> Iterator[Counter[Attention]]:
    """Counts the attention calls made inside."""
    with Recorder(precision) as recorder:
        yield recorder.calls


def check_attention(calls: Mapping[Attention, int], plan: AccelerationPlan, device: Capabilities) -> Check:
    """Whether a step's attention can use the flash kernel. Without a GPU it only lists the calls: PyTorch answers the
    question only on the device."""
    if not calls:
        return Check("attention", "ok", "no call of scaled_dot_product_attention seen in a step")
    shapes = _shapes(list(calls))
    if "flash" not in plan.sdpa:
        return Check("attention", "ok", f"{' or '.join(plan.sdpa)}, {plan.reasons['attention']}: {shapes}")
    if device.kind != "cuda" or not torch.cuda.is_available():
        return Check("attention", "ok", shapes)
    refused = [call for call in calls if not takes_flash(call)]
    if refused:
        other = " or ".join(kernel for kernel in plan.sdpa if kernel != "flash")
        remedy = "ask PyTorch why: torch.backends.cuda.can_use_flash_attention(..., debug=True)"
        return Check("attention", "warn", f"no flash kernel, so {other} for {_shapes(refused)}", remedy)
    return Check("attention", "ok", f"the GPU's flash kernel: {shapes}")


def _shapes(calls: Sequence[Attention]) -> str:
    kinds = sorted({str(call) for call in calls})
    return "; ".join(kinds[:3]) + (f"; and {len(kinds) - 3} more" if len(kinds) > 3 else "")


def takes_flash(call: Attention) -> bool:
    """Whether PyTorch's flash kernel supports this call and its backward pass on the current CUDA device."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(call.precision, torch.float32)

    def build(length: int, width: int) -> Tensor:
        shape = (1, call.num_heads, length, width)[-call.num_dims :]
        return torch.empty(shape, device="cuda", dtype=dtype, requires_grad=True)

    query, key = build(call.query_length, call.head_dim), build(call.key_length, call.head_dim)
    value, enable_gqa = build(call.key_length, call.value_dim), False
    mask = torch.empty(call.query_length, call.key_length, device="cuda", dtype=dtype) if call.mask else None
    params = torch.backends.cuda.SDPAParams(query, key, value, mask, call.dropout, call.causal, enable_gqa)
    return torch.backends.cuda.can_use_flash_attention(params)
