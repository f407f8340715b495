"""Whether the model's attention may go through the flash kernel: a pure function over shapes and devices."""

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

LARGEST_HEAD = 256
SM8X_TRAINED_HEADS = range(193, 225)
"""Head dimensions whose backward pass the flash kernel lacks on compute capability 8.6 to 8.9 and 12.x."""


@dataclass(frozen=True)
class Attention:
    """A call of `scaled_dot_product_attention`, described."""

    num_heads: int
    head_dim: int
    value_dim: int
    query_length: int
    key_length: int
    precision: str
    """"bf16", "fp16" or "fp32": what it computes in, under the run's autocast."""
    num_dims: int = 4
    mask: bool = False
    dropout: float = 0.0
    causal: bool = False

    def __str__(self) -> str:
        parts = [f"{self.num_heads} heads of {self.head_dim}", self.precision]
        parts += ["causal"] if self.causal else []
        parts += ["with a mask" if self.mask else "no mask"]
        return ", ".join(parts + ([f"dropout {self.dropout:g}"] if self.dropout else []))


def flash_obstacle(attention: Attention, device: Capabilities) -> tuple[str, str] | None:
    """Why PyTorch's flash kernel can't take this call when it is trained, and the remedy; None where it can.

    The conditions are those of PyTorch 2.13 (`aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`, and
    `sdp_utils_cpp.cpp` for CPUs).
    """
    if attention.num_dims != 4:
        return f"its tensors have {attention.num_dims} dimensions", "give it [batch, heads, length, head dimension]"
    if attention.head_dim != attention.value_dim:
        return f"keys of {attention.head_dim} and values of {attention.value_dim}", "give both the same head dimension"
    if device.kind == "cpu":
        no_dropout = "set the attention's dropout to 0 in [workload], where that is wanted"
        return ("the CPU's has no dropout", no_dropout) if attention.dropout else None
    if device.compute_capability < (8, 0):
        return "it needs compute capability 8.0", "none on this card: the efficient kernel is used"
    if attention.precision == "fp32":
        return "it computes in bf16 only", 'use train.precision = "auto" or "bf16"'
    if attention.mask:
        return "a mask is given", "leave the mask out: is_causal = True, and padding at the end that the loss ignores"
    if attention.head_dim > LARGEST_HEAD:
        return f"heads of {attention.head_dim}, above {LARGEST_HEAD}", "use more heads of a smaller dimension"
    if attention.causal and attention.query_length != attention.key_length:
        return "causal with another number of queries than of keys", "give both the same length"
    small = (8, 6) <= device.compute_capability <= (8, 9) or device.compute_capability[0] == 12
    if small and (attention.head_dim in SM8X_TRAINED_HEADS or (attention.head_dim > 224 and attention.dropout)):
        return f"this card has no backward pass for heads of {attention.head_dim}", "use heads of at most 192"
    return None


class Recorder(TorchFunctionMode):
    """Takes note of each call of `scaled_dot_product_attention` while it is active.

    Attention within functions that are handled as one, as that of `nn.MultiheadAttention`, is not seen.
    """

    def __init__(self, precision: str) -> None:
        super().__init__()
        self.calls: Counter[Attention] = Counter()
        self._precision = precision

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self._note(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _note(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **_: Any,
    ) -> None:
        # A validation has its own calls; what counts is the step.
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
                # Attention is among what autocast takes to its precision.
                precision="bf16" if self._precision == "bf16" and own == "fp32" else own,
                num_dims=query.dim(),
                mask=attn_mask is not None,
                dropout=dropout_p,
                causal=is_causal,
            )
        ] += 1


@contextmanager
def recorded(precision: str) -> Iterator[Counter[Attention]]:
    """The attention calls made inside, and how often each was."""
    with Recorder(precision) as recorder:
        yield recorder.calls


def check_attention(calls: Mapping[Attention, int], plan: AccelerationPlan, device: Capabilities) -> Check:
    """Which kernel a step's attention goes through."""
    if not calls:
        return Check("attention", "ok", "a step makes no call of scaled_dot_product_attention that could be seen")
    shapes = _shapes(list(calls))
    if "flash" not in plan.sdpa and any(flash_obstacle(call, device) is None for call in calls):
        return Check("attention", "ok", f"{' or '.join(plan.sdpa)}, as train.sdpa says: {shapes}")
    for call in calls:
        if (found := flash_obstacle(call, device)) or (found := torch_obstacle(call, device)):
            obstacle, remedy = found
            other = [kernel for kernel in plan.sdpa if kernel != "flash"]
            if device.kind == "cpu":
                other = ["math"]
            return Check("attention", "warn", f"no flash kernel: {obstacle}; {' or '.join(other)} ({call})", remedy)
    return Check("attention", "ok", f"the {'CPU' if device.kind == 'cpu' else 'GPU'}'s flash kernel: {shapes}")


def _shapes(calls: Sequence[Attention]) -> str:
    kinds = sorted({str(call) for call in calls})
    return "; ".join(kinds[:3]) + (f"; and {len(kinds) - 3} more" if len(kinds) > 3 else "")


def torch_obstacle(call: Attention, device: Capabilities) -> tuple[str, str] | None:
    """PyTorch's own word, where the device is here. It knows what it was built with."""
    if device.kind != "cuda" or not torch.cuda.is_available():
        return None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(call.precision, torch.float32)

    def made(length: int, width: int) -> Tensor:
        return torch.empty(1, call.num_heads, length, width, device="cuda", dtype=dtype, requires_grad=True)

    query, key = made(call.query_length, call.head_dim), made(call.key_length, call.head_dim)
    value, enable_gqa = made(call.key_length, call.value_dim), False
    params = torch.backends.cuda.SDPAParams(query, key, value, None, call.dropout, call.causal, enable_gqa)
    if torch.backends.cuda.can_use_flash_attention(params):
        return None
    return "this PyTorch refuses it here", "ask it why: torch.backends.cuda.can_use_flash_attention(..., debug=True)"
