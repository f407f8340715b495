"""Prodigy's Triton kernels in Triton's interpreter, on a CPU. Run as a process, with TRITON_INTERPRET=1 set before
Triton is imported; prints how far parameters and d are from those of PyTorch's operations."""

from __future__ import annotations

import contextlib
import itertools
import sys

import torch
from torch import nn

from trainer.optimizers import update
from trainer.prodigy import Prodigy, kernels, optimizer

STEPS, NAN_STEP = 18, 5
SHAPES = ((9000,), (5,), (1,), (37, 3))
"""The first spans two chunks."""


class Interpreted(kernels.Kernel):
    """Launches the kernels for CUDA on tensors of the CPU."""

    launches = 0

    def __init__(self, rows: list[tuple[torch.Tensor, ...]]) -> None:
        super().__init__(rows)
        self.cuda = True

    def _launch(self, *arguments: object, **constants: int) -> None:
        Interpreted.launches += 1
        super()._launch(*arguments, **constants)  # type: ignore[arg-type]


def replay(use_kernels: bool, slice_p: int) -> tuple[list[nn.Parameter], list[float]]:
    random = torch.Generator().manual_seed(1)
    params = [nn.Parameter(0.02 * torch.randn(shape, generator=random)) for shape in SHAPES]
    prodigy, history = Prodigy(params, weight_decay=0.01, slice_p=slice_p), []
    prodigy.use_kernels = use_kernels
    for step in range(STEPS):
        for p in params:
            p.grad = 1e-3 * torch.randn(p.shape, generator=random) + 0.1 * p.detach()
        if step == NAN_STEP:
            params[0].grad[0] = float("nan")
        update(prodigy, lr=1.0, max_grad_norm=0.5)
        history.append(float(prodigy.d_on_device()))
    return params, history


def main(slice_p: int) -> None:
    optimizer.Kernel = Interpreted
    torch.cuda.device = lambda _: contextlib.nullcontext()  # type: ignore[assignment, misc]
    (ours, our_d), (theirs, their_d) = (replay(use_kernels, slice_p) for use_kernels in (True, False))
    parameters = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))
    d = max(abs(a - b) / b for a, b in zip(our_d, their_d, strict=True))
    rests = sum(a == b for a, b in itertools.pairwise(our_d))
    print(Interpreted.launches, parameters, d, rests, our_d[NAN_STEP] == our_d[NAN_STEP - 1])


if __name__ == "__main__":
    main(int(sys.argv[1]))
