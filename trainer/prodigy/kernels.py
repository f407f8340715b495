"""Prodigy's kernels: one step on many tensors in two passes over memory.

On CPU they are in C (`c_kernels.py`), on CUDA in Triton (`triton_kernels.py`). Both read a table of addresses, so no
tensor has to move.
"""

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.prodigy.c_kernels import CHUNK_SIZE, load_c_kernels
from trainer.prodigy.triton_kernels import load_triton_kernels

# The order of the coefficients that a kernel reads, in C and Triton too. They are computed on the device. Mode of the
# first pass: 0 nothing, 1 moments, 2 moments and update. Of the second: 0 nothing, 1 update, 2 correct an update made
# with the old d.
MODE, SCALE, RATE1, RATE2, RATE3, DLR, SHRINK, OLD_EPS, NEW_EPS, DLR_D = range(10)


@functools.lru_cache(maxsize=16)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, list[int]]:
    """The tensor of each chunk (int32, on the device), and the first chunk of each tensor."""
    counts = torch.tensor([-(-size // CHUNK_SIZE) for size in sizes])
    owner = torch.repeat_interleave(torch.arange(len(sizes)), counts).int()
    return _upload(owner, device), (counts.cumsum(0) - counts).tolist()


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it; a pageable copy would wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass(frozen=True)
class Constants:
    """A parameter group's values that are known on the host."""

    beta1: float
    beta2: float
    beta3: float
    l2: float  # coupled weight decay, added to the gradient
    decay: float  # decoupled weight decay
    slice_p: int
    learns: bool  # lr > 0


class Kernel:
    """Tensors as a table of addresses, built for each step: gradients stay where autograd puts them, and a
    parameter or its state may be replaced between steps.

    Each row is (gradient, parameter, p0, exp_avg, exp_avg_sq, s).
    """

    def __init__(self, rows: list[tuple[Tensor, ...]]) -> None:
        self.device = rows[0][0].device
        self.cuda = self.device.type == "cuda"
        sizes = tuple(row[0].numel() for row in rows)
        self.owner, first = _chunks(sizes, self.device)
        table = [
            # A 0-dimensional p0 means zeros; for the kernels that is the address 0.
            [g.data_ptr(), p.data_ptr(), p0.data_ptr() if p0.dim() else 0, *(t.data_ptr() for t in state), n, k]
            for (g, p, p0, *state), n, k in zip(rows, sizes, first, strict=True)
        ]
        self.table = _upload(torch.tensor(table, dtype=torch.int64), self.device)
        self.chunks = (self.table.data_ptr(), self.owner.data_ptr(), len(self.owner))

    def first_pass(self, c: Tensor, const: Constants) -> Tensor:
        """Moments, s and, in mode 2, the parameters; returns (numerator, denominator) as float64."""
        out = torch.zeros(len(self.owner), 2, dtype=torch.float64, device=self.device)
        c = c.float()
        numbers = (const.beta1, const.beta2, const.beta3, const.l2)
        if self.cuda:
            self._launch(0, c, out, *numbers, STEP=const.slice_p)
        else:
            step, threads = const.slice_p, torch.get_num_threads()
            _c_library().first_pass(*self.chunks, step, c.data_ptr(), *numbers, threads, out.data_ptr())
        return out.sum(0)

    def second_pass(self, c: Tensor) -> None:
        """Update the parameters with the new d, or correct an update made with the old one."""
        c = c.float()
        if self.cuda:
            self._launch(1, c)
        else:
            _c_library().second_pass(*self.chunks, c.data_ptr(), torch.get_num_threads())

    def norm(self) -> Tensor:
        """The 2-norm of the first column (CPU only)."""
        out = torch.zeros(len(self.owner), dtype=torch.float64)
        _c_library().squares(*self.chunks, torch.get_num_threads(), out.data_ptr())
        return out.sum().sqrt().float()

    def _launch(self, which: int, *arguments: Any, **constants: int) -> None:
        kernels = load_triton_kernels()
        assert kernels is not None
        if len(self.owner):
            with torch.cuda.device(self.device):
                launch = kernels[which][(len(self.owner),)]
                constants.update(CHUNK=CHUNK_SIZE, BLOCK=1024, enable_fp_fusion=True)
                launch(self.table, self.owner, *arguments, **constants)


def _c_library() -> ctypes.CDLL:
    library = load_c_kernels()
    assert library is not None
    return library


def is_plain(tensor: Tensor) -> bool:
    """Whether a kernel can read it. A subclass (FakeTensor, DTensor) has no memory of that size at its address."""
    plain_type = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain_type and tensor.dtype == torch.float32 and tensor.is_contiguous()


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels for this kind of device can be loaded."""
    if device.type == "cuda":
        return load_triton_kernels() is not None
    return device.type == "cpu" and load_c_kernels() is not None


def check_state(row: tuple[Tensor, ...], slice_p: int) -> None:
    """Refuse state of another size, type or device: a kernel uses addresses only, and would write elsewhere."""
    grad, param, p0, exp_avg, exp_avg_sq, s = row
    whole, sliced = param.nbytes, 4 * -(-param.numel() // slice_p)
    fits = grad.nbytes == exp_avg.nbytes == exp_avg_sq.nbytes == whole and s.nbytes == sliced
    if not (fits and p0.nbytes in (4, sliced) and exp_avg_sq.device == param.device):
        shape, device = tuple(param.shape), param.device
        raise ValueError(
            f"the optimizer's state doesn't fit a parameter of shape {shape} on {device} with slice_p {slice_p}; "
            "load a checkpoint of this model and slice_p, and move the model before its first step"
        )
