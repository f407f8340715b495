"""Prodigy's kernels against PyTorch's operations, and the time of an optimizer's step."""

from __future__ import annotations

import contextlib
import io
import itertools
from typing import Any

import prodigyopt
import torch

from scripts.bench.roofline import NORM, PRODIGY_RESTS, PRODIGY_RISES
from scripts.gpu_check.timing import DEVICE, measure_ms
from scripts.gpu_check.workload import build_workload
from trainer.optimizers import update
from trainer.prodigy import Prodigy

SHAPES = ((1280, 3840), (8194,), (1,), (5,), (8192, 3), (12001, 16))
STEPS, NAN_STEP = 40, 5


def kernels(tiny: bool) -> dict[str, Any]:
    """Parameters and d after steps with a NaN among them, while d rises and while it rests."""
    return {"slices": {f"slice_p {slice_p}": compare(slice_p, tiny) for slice_p in (1, 11)}}


def compare(slice_p: int, tiny: bool) -> dict[str, Any]:
    (ours, our_d), (theirs, their_d) = (replay(use_kernels, slice_p, tiny) for use_kernels in (True, False))
    after_nan = [d[NAN_STEP] == d[NAN_STEP - 1] for d in (our_d, their_d)]
    return {
        "parameters_differ_by": max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)),
        "d_differs_by": max(abs(a - b) / b for a, b in zip(our_d, their_d, strict=True)),
        "nan_skipped": all(after_nan) and all(bool(p.isfinite().all()) for p in ours),
        "d": our_d[-1],
        "steps_at_rest": sum(a == b for a, b in itertools.pairwise(our_d)),
    }


def replay(use_kernels: bool, slice_p: int, tiny: bool) -> tuple[list[torch.Tensor], list[float]]:
    """The parameters at the end, and d after each step."""
    random = torch.Generator(device=DEVICE).manual_seed(1)
    shapes = SHAPES[1:-1] if tiny else SHAPES
    params = [torch.nn.Parameter(0.02 * torch.randn(shape, generator=random, device=DEVICE)) for shape in shapes]
    optimizer, history = Prodigy(params, weight_decay=0.01, slice_p=slice_p), []
    optimizer.use_kernels = use_kernels
    for step in range(STEPS):
        for p in params:
            # A pull towards zero: d rises, then rests.
            p.grad = 1e-3 * torch.randn(p.shape, generator=random, device=DEVICE) + 0.1 * p.detach()
            if step == NAN_STEP:
                p.grad.view(-1)[0] = float("nan")
        update(optimizer, lr=1.0, max_grad_norm=1.0)
        history.append(optimizer.d_on_device())
    return [p.detach() for p in params], torch.stack(history).tolist()


def optimizer(tiny: bool) -> dict[str, Any]:
    """Milliseconds of a whole update, with the gradient norm, and their least by bytes."""
    params = list(build_workload(tiny).build_model().to(DEVICE).parameters())
    for p in params:
        p.grad = torch.randn_like(p) * 1e-5
    number = sum(p.numel() for p in params)
    record: dict[str, Any] = {"parameters": number, "tensors": len(params)}
    record["bytes"] = {"rests": (PRODIGY_RESTS + NORM) * number, "rises": (PRODIGY_RISES + NORM) * number}
    for slice_p in (1, 11):
        times = time_prodigy(params, slice_p)
        record |= {f"{name}, slice_p {slice_p}": ms for name, ms in times.items()}
    record["adamw_ms"] = time_update(torch.optim.AdamW(params, 1e-4, fused=True), lr=1e-4)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = prodigyopt.Prodigy(params)
    record["prodigyopt_ms"] = measure_ms(theirs.step, runs=3, warm_up=1)
    return record


def time_update(optimizer: Any, lr: float = 1.0) -> float:
    return measure_ms(lambda: update(optimizer, lr=lr, max_grad_norm=1.0))


def time_prodigy(params: list[torch.nn.Parameter], slice_p: int) -> dict[str, float]:
    """Milliseconds of the norm, and of an update while d rises and while it rests."""
    optimizer = Prodigy(params, weight_decay=0.01, slice_p=slice_p)
    grads = [p.grad for p in params if p.grad is not None]
    times = {"norm_ms": measure_ms(optimizer.grad_norm), "rises_ms": time_update(optimizer)}
    for group in optimizer.param_groups:
        group.update(d=1e-3, d_max=1e-3, d_hat=0.0)

    def rest() -> None:
        torch._foreach_neg_(grads)  # with gradients of one sign d would rise
        update(optimizer, lr=1.0, max_grad_norm=1.0)

    sign = measure_ms(lambda: torch._foreach_neg_(grads))
    return times | {"rests_ms": measure_ms(rest) - sign}
