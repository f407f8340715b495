"""Prodigy at memory speed: prodigyopt's optimizer with the same numbers and the same state dict.

prodigyopt waits for two `.item()` per parameter and passes over its memory some twenty times. Here one
kernel a step reads and writes every number once, and every scalar (d, its numerator, the step counters)
stays on the device. On CPU the kernel is C, compiled by the system's compiler in half a second and called
through ctypes; on CUDA it is Triton; without a compiler, and for anything that is not contiguous float32,
it is PyTorch's own operations: the same numbers, as slow as prodigyopt.

    optimizer = Prodigy(model.parameters(), weight_decay=0.01)
    norm = optimizer.grad_norm()                                # one pass, on the device
    optimizer.found_inf = (~norm.isfinite()).float()            # skip this update when 1
    optimizer.grad_scale = (norm / max_norm).clamp(min=1.0)     # clip without another pass
    optimizer.step()

The bytes: 36 a parameter for the moments and the sums that d comes from, 16 for the update. But an update
uses the d from before the step, and the new one only in `d * eps`. So once d has come to rest, which is most of
a training run, the first kernel updates the parameters too (40 bytes in all), and the second does nothing,
unless d has risen after all: then it corrects them.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import io
import logging
import math
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prodigyopt
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Elements a kernel works on at a time. Its sums are float32 within a chunk and float64 across chunks, so they
# depend on neither the number of threads nor the order in which they run.
_CHUNK = 8192

# The coefficients a kernel reads, decided on the device. The mode of the first pass: 0 nothing, 1 moments,
# 2 moments and update; of the second: 0 nothing, 1 update, 2 correct an update made with the old d.
_MODE, _SCALE, _RATE1, _RATE2, _RATE3, _DLR, _SHRINK, _OLD_EPS, _NEW_EPS, _DLR_D = range(10)

# What prodigyopt keeps in every parameter group and changes in step().
_SCALARS = ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k")

_C_SOURCE = """
#include <math.h>
#include <stdint.h>

enum { GRAD, PARAM, P0, EXP_AVG, EXP_AVG_SQ, S, SIZE, FIRST_CHUNK, COLUMNS };
enum { MODE, SCALE, RATE1, RATE2, RATE3, DLR, SHRINK, OLD_EPS, NEW_EPS };
#define INLINE static inline __attribute__((always_inline))
#define FOR_EACH_CHUNK _Pragma("omp parallel for num_threads(chunks < 16 ? 1 : threads) schedule(static)") \\
  for (int64_t k = 0; k < chunks; k++)
#define LOCATE const int64_t *row = table + COLUMNS * owner[k], lo = (k - row[FIRST_CHUNK]) * CHUNK; \\
  const int64_t n = row[SIZE] - lo < CHUNK ? row[SIZE] - lo : CHUNK
#define AT(column) ((float *)(intptr_t)row[column] + lo)

static const float zeros[CHUNK];

/* Products and sums are fused where PyTorch's operations fuse them, and only there: early on, d is smaller
   than a rounding error of a parameter near 1, and another rounding would give another d. */

/* The sums that d comes from, over every step-th element. */
INLINE void sums(int64_t n, int64_t step, const float *restrict grad, const float *restrict param,
                 const float *restrict p0, float *restrict s, const float *c, float beta3, float l2,
                 double *out) {
  float numerator = 0, denominator = 0, scale = c[SCALE], rate3 = c[RATE3];
#pragma omp simd reduction(+ : numerator, denominator)
  for (int64_t j = 0; j < n; j++) {
    float x = param[j * step], g = fmaf(x, l2, grad[j * step] / scale), t = fmaf(g, rate3, beta3 * s[j]);
    numerator += g * (p0[j] - x);
    denominator += fabsf(t);
    s[j] = t;
  }
  out[0] = numerator;
  out[1] = denominator;
}

/* One pass over a chunk. with_sums and update are constants where this is inlined. */
INLINE void pass(int with_sums, int update, int64_t n, const float *restrict grad, float *restrict param,
                 const float *restrict p0, float *restrict exp_avg, float *restrict exp_avg_sq,
                 float *restrict s, const float *c, float beta1, float beta2, float beta3, float l2,
                 double *out) {
  float numerator = 0, denominator = 0, dlr = c[DLR], shrink = c[SHRINK], eps = c[OLD_EPS];
  float scale = c[SCALE], rate1 = c[RATE1], rate2 = c[RATE2], rate3 = c[RATE3];
#pragma omp simd reduction(+ : numerator, denominator)
  for (int64_t i = 0; i < n; i++) {
    float x = param[i], g = fmaf(x, l2, grad[i] / scale);
    float m = fmaf(g, rate1, beta1 * exp_avg[i]), v = fmaf(rate2 * g, g, beta2 * exp_avg_sq[i]);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if (with_sums) {
      float t = fmaf(g, rate3, beta3 * s[i]);
      numerator += g * (p0[i] - x);
      denominator += fabsf(t);
      s[i] = t;
    }
    if (update) param[i] = fmaf(x, -shrink, x) - dlr * m / (sqrtf(v) + eps);
  }
  if (with_sums) {
    out[0] = numerator;
    out[1] = denominator;
  }
}

void first_pass(const int64_t *table, const int32_t *owner, int64_t chunks, int64_t step, const float *c,
                float beta1, float beta2, float beta3, float l2, int threads, double *out) {
  if (c[MODE] == 0) return;
  int update = c[MODE] == 2;
  FOR_EACH_CHUNK {
    LOCATE;
    const int64_t j = (lo + step - 1) / step, skip = j * step - lo;
    const float *p0 = row[P0] ? (const float *)(intptr_t)row[P0] + j : zeros;
    float *s = (float *)(intptr_t)row[S] + j;
#define PASS(with_sums, update) pass(with_sums, update, n, AT(GRAD), AT(PARAM), p0, AT(EXP_AVG), \\
    AT(EXP_AVG_SQ), s, c, beta1, beta2, beta3, l2, out + 2 * k)
    if (step != 1)
      sums((lo + n + step - 1) / step - j, step, AT(GRAD) + skip, AT(PARAM) + skip, p0, s, c, beta3, l2,
           out + 2 * k);
    if (step == 1 && update) PASS(1, 1);
    else if (step == 1) PASS(1, 0);
    else if (update) PASS(0, 1);
    else PASS(0, 0);
  }
}

void second_pass(const int64_t *table, const int32_t *owner, int64_t chunks, const float *c, int threads) {
  if (c[MODE] == 0) return;
  const float dlr = c[DLR], old = c[OLD_EPS], new = c[NEW_EPS], shrink = c[SHRINK];
  /* 1 / (root + old) - 1 / (root + new) with one division; in units of new, so that no product underflows. */
  const float inverse = 1 / new, ratio = old * inverse, rest = dlr * inverse * (1 - ratio);
  FOR_EACH_CHUNK {
    LOCATE;
    float *restrict param = AT(PARAM);
    const float *restrict exp_avg = AT(EXP_AVG), *restrict exp_avg_sq = AT(EXP_AVG_SQ);
    if (c[MODE] == 1) {
#pragma omp simd
      for (int64_t i = 0; i < n; i++)
        param[i] = fmaf(param[i], -shrink, param[i]) - dlr * exp_avg[i] / (sqrtf(exp_avg_sq[i]) + new);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) {
        float root = sqrtf(exp_avg_sq[i]) * inverse;
        param[i] += rest * exp_avg[i] / ((root + ratio) * (root + 1));
      }
    }
  }
}

void squares(const int64_t *table, const int32_t *owner, int64_t chunks, int threads, double *out) {
  FOR_EACH_CHUNK {
    LOCATE;
    const float *grad = AT(GRAD);
    double sums[32] = {0}, sum = 0; /* enough of them to hide the latency of an addition */
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
      for (int j = 0; j < 32; j++) sums[j] += (double)grad[i + j] * grad[i + j];
    for (; i < n; i++) sum += (double)grad[i] * grad[i];
    for (int j = 0; j < 32; j++) sum += sums[j];
    out[k] = sum;
  }
}
"""


@functools.cache
def _c_kernels() -> ctypes.CDLL | None:
    """The C kernels, compiled for this machine (about 0.5 s, once a process); None without a compiler."""
    found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        logger.warning("prodigy: no C compiler (cc, gcc or clang); the optimizer runs as slowly as prodigyopt")
        return None
    compiler = shlex.split(found)
    with tempfile.TemporaryDirectory() as folder:
        source, objects, library = (str(Path(folder, f"prodigy.{end}")) for end in ("c", "o", "so"))
        Path(source).write_text(_C_SOURCE)
        flags = [
            "-O3",
            "-march=native",
            "-fno-math-errno",
            "-ffp-contract=off",
            "-fopenmp",
            "-fPIC",
            f"-DCHUNK={_CHUNK}",
        ]
        try:
            subprocess.run([*compiler, *flags, "-c", source, "-o", objects], check=True, capture_output=True)
            # Linked without an OpenMP library: the symbols are PyTorch's own, so there is one thread pool.
            subprocess.run([*compiler, "-shared", objects, "-o", library], check=True, capture_output=True)
            return _with_signatures(ctypes.CDLL(library))
        except subprocess.CalledProcessError as error:
            reason = error.stderr.decode(errors="replace").strip()[-500:]
        except OSError as error:
            reason = str(error)
    logger.warning("prodigy: %s made no kernel; the optimizer runs as slowly as prodigyopt: %s", found, reason)
    return None


def _with_signatures(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size, real, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    chunks: list[Any] = [pointer, pointer, size]
    library.first_pass.argtypes = [*chunks, size, pointer, *[real] * 4, threads, pointer]
    library.second_pass.argtypes = [*chunks, pointer, threads]
    library.squares.argtypes = [*chunks, threads, pointer]
    for function in (library.first_pass, library.second_pass, library.squares):
        function.restype = None
    return library


@functools.cache
def _triton_kernels() -> tuple[Any, Any] | None:
    """The same first and second pass in Triton; None where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        logger.warning("prodigy: Triton is not installed; the optimizer runs as slowly as prodigyopt")
        return None
    triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")

    @triton.jit  # type: ignore[untyped-decorator]
    def first_pass(  # type: ignore[no-untyped-def]
        table, owner, c, out, beta1, beta2, beta3, l2,
        STEP: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,  # type: ignore[name-defined]
    ):  # fmt: skip
        k = tl.program_id(0)
        mode = tl.load(c)
        if mode != 0:
            scale, rate1, rate2 = tl.load(c + 1), tl.load(c + 2), tl.load(c + 3)
            rate3, dlr, shrink, eps = tl.load(c + 4), tl.load(c + 5), tl.load(c + 6), tl.load(c + 7)
            row = table + 8 * tl.load(owner + k)
            real = tl.pointer_type(tl.float32)
            grad, param, p0 = tl.load(row).to(real), tl.load(row + 1).to(real), tl.load(row + 2).to(real)
            exp_avg, exp_avg_sq = tl.load(row + 3).to(real), tl.load(row + 4).to(real)
            s, size, first = tl.load(row + 5).to(real), tl.load(row + 6), tl.load(row + 7)
            p0_size = tl.where(tl.load(row + 2) == 0, 0, size)
            numerator = tl.zeros((BLOCK,), tl.float32)
            denominator = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, CHUNK, BLOCK):
                i = (k - first) * CHUNK + start + tl.arange(0, BLOCK)
                here = i < size
                x = tl.load(param + i, here, 0.0)
                g = tl.load(grad + i, here, 0.0) / scale + l2 * x
                m = beta1 * tl.load(exp_avg + i, here, 0.0) + rate1 * g
                v = beta2 * tl.load(exp_avg_sq + i, here, 0.0) + rate2 * g * g
                tl.store(exp_avg + i, m, here)
                tl.store(exp_avg_sq + i, v, here)
                counted = here & (i % STEP == 0)
                t = beta3 * tl.load(s + i // STEP, counted, 0.0) + rate3 * g
                tl.store(s + i // STEP, t, counted)
                away = tl.load(p0 + i // STEP, counted & (i < p0_size), 0.0) - x
                numerator += tl.where(counted, g * away, 0.0)
                denominator += tl.where(counted, tl.abs(t), 0.0)
                if mode == 2:
                    tl.store(param + i, x - shrink * x - dlr * m / (tl.sqrt(v) + eps), here)
            tl.store(out + 2 * k, tl.sum(numerator.to(tl.float64)))
            tl.store(out + 2 * k + 1, tl.sum(denominator.to(tl.float64)))

    @triton.jit  # type: ignore[untyped-decorator]
    def second_pass(  # type: ignore[no-untyped-def]
        table, owner, c, CHUNK: tl.constexpr, BLOCK: tl.constexpr,  # type: ignore[name-defined]
    ):  # fmt: skip
        k = tl.program_id(0)
        mode = tl.load(c)
        if mode != 0:
            dlr, shrink, old, new = tl.load(c + 5), tl.load(c + 6), tl.load(c + 7), tl.load(c + 8)
            ratio = old / new
            rest = dlr / new * (1 - ratio)
            row = table + 8 * tl.load(owner + k)
            real = tl.pointer_type(tl.float32)
            param, exp_avg = tl.load(row + 1).to(real), tl.load(row + 3).to(real)
            exp_avg_sq = tl.load(row + 4).to(real)
            size, first = tl.load(row + 6), tl.load(row + 7)
            for start in range(0, CHUNK, BLOCK):
                i = (k - first) * CHUNK + start + tl.arange(0, BLOCK)
                here = i < size
                x, m = tl.load(param + i, here, 0.0), tl.load(exp_avg + i, here, 0.0)
                root = tl.sqrt(tl.load(exp_avg_sq + i, here, 0.0))
                updated = x - shrink * x - dlr * m / (root + new)
                corrected = x + rest * m / ((root / new + ratio) * (root / new + 1))
                tl.store(param + i, tl.where(mode == 1, updated, corrected), here)

    return first_pass, second_pass


@functools.lru_cache(maxsize=16)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, list[int]]:
    """Which tensor each chunk belongs to (int32, on the device), and each tensor's first chunk."""
    counts = torch.tensor([-(-size // _CHUNK) for size in sizes])
    owner = torch.repeat_interleave(torch.arange(len(sizes)), counts).int()
    return _upload(owner, device), (counts.cumsum(0) - counts).tolist()


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it; a pageable copy would wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass(frozen=True)
class _Constants:
    """A group's numbers that the host knows."""

    beta1: float
    beta2: float
    beta3: float
    l2: float  # coupled weight decay, added to the gradient
    decay: float  # decoupled weight decay
    slice_p: int
    learns: bool  # lr > 0


class _Kernel:
    """Tensors as a table of addresses, made anew each step: gradients stay where autograd puts them, and a
    parameter or its state may be replaced at any time.

    Each row is (gradient, parameter, p0, exp_avg, exp_avg_sq, s).
    """

    def __init__(self, rows: list[tuple[Tensor, ...]]) -> None:
        self.device = rows[0][0].device
        self.cuda = self.device.type == "cuda"
        sizes = tuple(row[0].numel() for row in rows)
        self.owner, first = _chunks(sizes, self.device)
        table = [
            # A 0-dimensional p0 stands for zeros, which a kernel knows as the address 0.
            [g.data_ptr(), p.data_ptr(), p0.data_ptr() if p0.dim() else 0, *(t.data_ptr() for t in state), n, k]
            for (g, p, p0, *state), n, k in zip(rows, sizes, first, strict=True)
        ]
        self.table = _upload(torch.tensor(table, dtype=torch.int64), self.device)
        self.chunks = (self.table.data_ptr(), self.owner.data_ptr(), len(self.owner))

    def first_pass(self, c: Tensor, const: _Constants) -> Tensor:
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
        kernels = _triton_kernels()
        assert kernels is not None
        if len(self.owner):
            with torch.cuda.device(self.device):
                launch = kernels[which][(len(self.owner),)]
                constants.update(CHUNK=_CHUNK, BLOCK=1024, enable_fp_fusion=True)
                launch(self.table, self.owner, *arguments, **constants)


def _c_library() -> ctypes.CDLL:
    library = _c_kernels()
    assert library is not None
    return library


class _Operations:
    """One parameter by PyTorch's own operations: any layout, any float type, any device.

    A skipped update multiplies by one and adds zeros that were selected (NaN x 0 would be NaN).
    """

    def __init__(self, row: tuple[Tensor, ...]) -> None:
        self.grad, self.param, self.p0, self.exp_avg, self.exp_avg_sq, self.s = row

    def _gradient(self, c: Tensor, const: _Constants) -> Tensor:
        gradient = self.grad / c[_SCALE]
        if const.l2:
            gradient.add_(self.param, alpha=const.l2)
        return torch.where(c[_MODE] != 0, gradient, 0.0)

    def first_pass(self, c: Tensor, const: _Constants) -> Tensor:
        """Moments and s; returns (numerator, denominator) as float64."""
        c = c.to(self.param.dtype)
        run, rates = c[_MODE] != 0, torch.where(c[_MODE] != 0, c, 0.0)
        beta1, beta2, beta3 = (c.new_full((), b).where(run, 1.0) for b in (const.beta1, const.beta2, const.beta3))
        gradient = self._gradient(c, const)
        sliced = gradient.flatten()[:: const.slice_p]
        away = self.p0 - self.param.flatten()[:: const.slice_p]
        if const.beta1 > 0:
            self.exp_avg.mul_(beta1).addcmul_(gradient, rates[_RATE1])
        self.exp_avg_sq.mul_(beta2).addcmul_(gradient * rates[_RATE2], gradient)
        self.s.mul_(beta3).addcmul_(sliced, rates[_RATE3])
        return torch.stack((torch.dot(sliced, away), self.s.abs().sum())).double()

    def second_pass(self, c: Tensor, const: _Constants) -> None:
        """Update the parameter with the new d."""
        c = c.to(self.param.dtype)
        rates = torch.where(c[_MODE] != 0, -c, 0.0)
        if const.decay:
            self.param.addcmul_(self.param, rates[_SHRINK])
        momentum = const.beta1 > 0
        change = self.exp_avg * rates[_DLR] if momentum else self._gradient(c, const) * rates[_DLR_D]
        self.param.add_(change.div_(self.exp_avg_sq.sqrt().add_(c[_NEW_EPS])))


class _Part:
    """One group's share of a step: its parameters that have a gradient, by kernel where possible."""

    def __init__(
        self, group: dict[str, Any], const: _Constants, rows: Sequence[tuple[Tensor, ...]], use_kernels: bool
    ) -> None:
        self.group, self.const, self.rows = group, const, rows
        # The kernels know no beta1 of 0, for which there is no exp_avg. State has its parameter's layout.
        use_kernels = use_kernels and const.beta1 > 0 and bool(rows)
        plain = [use_kernels and _is_plain(row[1]) and _is_plain(row[0]) for row in rows]
        if any(plain) and not _has_kernels(rows[0][1].device):
            plain = [False] * len(rows)
        by_kernel = [row for row, yes in zip(rows, plain, strict=True) if yes]
        for row in by_kernel:
            _check_fit(row, const.slice_p)
        self.kernel = _Kernel(by_kernel) if by_kernel else None
        self.operations = [_Operations(row) for row, yes in zip(rows, plain, strict=True) if not yes]

    def coefficients(self, mode: Tensor, scale: Tensor, d: Tensor, dlr: Tensor, new_d: Tensor) -> Tensor:
        """What the passes read, in the order of _MODE to _DLR_D; float64."""
        group, const = self.group, self.const
        rate3 = d / group["d0"] * (d if group["safeguard_warmup"] else dlr)
        rates = (d * (1 - const.beta1), d * d * (1 - const.beta2), rate3, dlr, const.decay * dlr)
        return torch.stack((mode, scale, *rates, d * group["eps"], new_d * group["eps"], dlr * new_d))

    def first_pass(self, c: Tensor) -> Tensor:
        """Returns (numerator, denominator) of d, summed over the group."""
        sums = [operations.first_pass(c, self.const) for operations in self.operations]
        if self.kernel is not None:
            sums.append(self.kernel.first_pass(c, self.const))
        return torch.stack(sums).sum(0)

    def second_pass(self, c: Tensor, go: Tensor, kernel_mode: Tensor) -> None:
        """Update the parameters where go is 1; kernel_mode is the kernel's mode there."""
        for operations in self.operations:
            operations.second_pass(torch.cat((go.reshape(1), c[1:])), self.const)
        if self.kernel is not None:
            self.kernel.second_pass(torch.cat(((go * kernel_mode).reshape(1), c[1:])))


class Prodigy(prodigyopt.Prodigy):  # type: ignore[misc]
    """Prodigy (Mishchenko and Defazio 2023, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner").

    Arguments, numbers and state dict are those of `prodigyopt.Prodigy` 1.1.2, which documents them; a
    checkpoint of either continues with the other. What differs:

    - Nothing in `step()` waits for the device. After the first step `param_groups[i]["d"]` (and d_max,
      d_numerator, d_denom, d_hat, k) hold 0-dimensional float64 tensors on the device, new ones each step, so
      that one that was kept doesn't change. `d_on_device()` returns d. Only `state_dict()` reads them on the
      host, all at once, and gives floats and ints. Setting one to a float works.
    - `found_inf` (float tensor; None or unset: 0): 1 skips the update: parameters, state and d stay as they
      are, whatever the gradients hold. `grad_scale` (tensor; None or unset: 1): gradients are divided by it. As
      with PyTorch's fused optimizers they hold until changed, and `torch.amp.GradScaler` sets them.
    - Gradients are never written to. (prodigyopt adds coupled weight decay to `p.grad`.)
    - `p0` is kept whole until the first `state_dict()`, which replaces it by a 0-dimensional zero for parameters
      that began as zeros; prodigyopt does so at once, and waits for the device.

    Raises ValueError for `fsdp_in_use` and for parameters on several devices; RuntimeError for learning rates
    that differ and are not 0.
    """

    _step_supports_amp_scaling = True
    # Set or not, as in PyTorch's fused optimizers: GradScaler multiplies what it finds and deletes it afterwards.
    found_inf: Tensor | None
    grad_scale: Tensor | None
    # False: PyTorch's own operations only, as a reference for the kernels and a way around them.
    use_kernels = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # prodigyopt prints
            super().__init__(*args, **kwargs)
        if any(group["fsdp_in_use"] for group in self.param_groups):
            raise ValueError("fsdp_in_use=True: sharded parameters are not supported; use prodigyopt.Prodigy")
        # Whether a parameter began as something else than zeros: asked on the device, read by state_dict().
        self._began_nonzero: dict[Tensor, Tensor] = {}
        self._last_learning: list[int] | None = None

    def d_on_device(self) -> Tensor:
        """The step size estimate d (0-dimensional, float64), without waiting for the device."""
        head = self.param_groups[0]
        return _on_device(head["d"], head["params"][0].device)

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The 2-norm of all gradients (0-dimensional, on the device), in one pass and without waiting."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        on_cpu = self.use_kernels and all(g.device.type == "cpu" and _is_plain(g) for g in grads)
        if grads and on_cpu and _c_kernels() is not None:
            return _Kernel([(g,) * 6 for g in grads]).norm()
        return torch.nn.utils.get_total_norm(grads)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update; returns the closure's loss, or None without a closure."""
        loss = None if closure is None else closure()
        lr = max(group["lr"] for group in self.param_groups)
        if any(group["lr"] not in (lr, 0.0) for group in self.param_groups):
            rates = [group["lr"] for group in self.param_groups]
            raise RuntimeError(f"lr {rates}: Prodigy needs one lr for all groups, or 0 to freeze one")
        with torch.no_grad():
            parts = [self._part(group) for group in self.param_groups]
            # Without a gradient to learn from, prodigyopt leaves everything as it is.
            if any(part.const.learns and part.rows for part in parts):
                self._update(lr, [part for part in parts if part.rows])
        return loss

    def _update(self, lr: float, parts: list[_Part]) -> None:
        head, const = self.param_groups[0], parts[0].const
        old = {key: _on_device(head.get(key, 0.0), parts[0].rows[0][1].device) for key in _SCALARS}
        d, one = old["d"], torch.ones_like(old["d"])
        dlr = d * lr
        if head["use_bias_correction"]:
            count = old["k"] + 1
            dlr = dlr * ((1 - const.beta2**count) ** 0.5 / (1 - const.beta1**count))
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        run = one if found_inf is None else (found_inf.reshape(()) == 0).double()
        scale = one if grad_scale is None else grad_scale.reshape(()).double()
        at_once = self._may_update_at_once(parts, old)

        numerator, denominator = old["d_numerator"] * const.beta3, torch.zeros_like(d)
        for part in parts:
            if part.const.learns:
                sums = part.first_pass(part.coefficients(run * (1 + at_once), scale, d, dlr, d))
                numerator = numerator + d / part.group["d0"] * dlr * sums[0]
                denominator = denominator + sums[1]
        go = run * (denominator != 0)
        new = self._next_scalars(old, numerator, denominator)
        correct = 2 * (new["d"] != d)
        for part in parts:
            mode = torch.where(at_once == 1, correct, 1) if part.const.learns else one
            part.second_pass(part.coefficients(one, scale, d, dlr, new["d"]), go, mode)
            # A list, because with one tensor for all PyTorch reads it on the host.
            torch._foreach_add_([self.state[row[1]]["step"] for row in part.rows], [go] * len(part.rows))
        scalars = {key: torch.where(go == 1, value, old[key]) for key, value in new.items()}
        for group in self.param_groups:
            group.update(scalars, k=_on_device(group["k"], d.device) + go)

    def _may_update_at_once(self, parts: list[_Part], old: dict[str, Tensor]) -> Tensor:
        """1 where the first pass should update the parameters, else 0: where d has risen, and then come to rest.

        A correction costs more than it saves while d rises at every step. It also rounds once more, which early
        on, when d is below a rounding error of the parameters, would be felt in d.
        With a d_denom of 0 prodigyopt leaves the parameters alone; d_denom can't become 0 where it was not and
        the same parameters learn, for s only decays.
        """
        learning = [id(row[1]) for part in parts if part.const.learns for row in part.rows]
        same = self._last_learning in (None, learning)
        self._last_learning = learning
        if not same:
            return torch.zeros_like(old["d"])
        d0: float = self.param_groups[-1]["d0"]
        at_rest = (old["d"] == old["d_max"]) & (old["d_hat"] < old["d"]) & (old["d"] > d0)
        return torch.logical_and(at_rest, old["d_denom"] != 0).double()

    def _next_scalars(self, old: dict[str, Tensor], numerator: Tensor, denominator: Tensor) -> dict[str, Tensor]:
        """d and its kin after the step; comparisons as Python's max and min make them, where NaN loses."""
        head, d = self.param_groups[0], old["d"]
        d_hat = head["d_coef"] * numerator / denominator
        started = torch.where((d == self.param_groups[-1]["d0"]) & (d_hat > d), d_hat, d)
        d_max = torch.where(d_hat > old["d_max"], d_hat, old["d_max"])
        grown = started * head["growth_rate"]
        new_d = torch.where(grown < d_max, grown, d_max)
        return {"d": new_d, "d_max": d_max, "d_numerator": numerator, "d_denom": denominator, "d_hat": d_hat}

    def _part(self, group: dict[str, Any]) -> _Part:
        head = self.param_groups[0]
        beta1, beta2 = head["betas"]
        beta3 = math.sqrt(beta2) if head["beta3"] is None else head["beta3"]
        decay, decouple = group["weight_decay"], head["decouple"]
        l2, decay = (0.0, decay) if decouple else (decay, 0.0)
        const = _Constants(beta1, beta2, beta3, l2, decay, group["slice_p"], group["lr"] > 0)
        rows: list[tuple[Tensor, ...]] = []
        for p in group["params"]:
            if p.grad is not None:
                state = self.state[p] or self._start(p, beta1, const.slice_p)
                exp_avg_sq = state["exp_avg_sq"]
                rows.append((p.grad, p, state["p0"], state.get("exp_avg", exp_avg_sq), exp_avg_sq, state["s"]))
        return _Part(group, const, rows, self.use_kernels)

    def _start(self, p: Tensor, beta1: float, slice_p: int) -> dict[str, Any]:
        first = next(p for group in self.param_groups for p in group["params"])
        if p.device != first.device:
            raise ValueError(f"parameters on {first.device} and {p.device}: Prodigy needs them on one device")
        p0 = p.detach().flatten()[::slice_p].clone()
        state: dict[str, Any] = self.state[p]
        state.update(step=_on_device(0, p.device), s=torch.zeros_like(p0), p0=p0)
        if beta1 > 0:
            state["exp_avg"] = torch.zeros_like(p)
        state["exp_avg_sq"] = torch.zeros_like(p)
        self._began_nonzero[p] = p.any()
        return state

    def state_dict(self) -> dict[str, Any]:
        """As prodigyopt's: d and its kin are floats, step and k ints. The only place that waits for the device."""
        asked = list(self._began_nonzero.items())
        for (p, _), nonzero in zip(asked, _read([flag for _, flag in asked]), strict=True):
            if not nonzero:
                self.state[p]["p0"] = torch.zeros((), dtype=p.dtype, device=p.device)
        self._began_nonzero.clear()

        packed = super().state_dict()
        groups = [dict(group) for group in packed["param_groups"]]
        states = {key: dict(state) for key, state in packed["state"].items()}
        live = [(place, key) for place in groups for key in _SCALARS if isinstance(place.get(key), Tensor)]
        live += [(state, "step") for state in states.values()]
        for (place, key), value in zip(live, _read([place[key] for place, key in live]), strict=True):
            place[key] = int(value) if key in ("k", "step") else value
        return {**packed, "param_groups": groups, "state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from prodigyopt's state dict or this class's own."""
        super().load_state_dict(state_dict)
        self._began_nonzero.clear()
        self._last_learning = None
        for p, state in self.state.items():
            state["step"] = _on_device(state["step"], p.device)
            if p.is_contiguous():  # so must its state be, for the kernels
                state.update({key: t.contiguous() for key, t in state.items() if isinstance(t, Tensor)})


def _is_plain(tensor: Tensor) -> bool:
    """Whether a kernel can read it. A subclass (FakeTensor, DTensor) has no memory of that size at its address."""
    plain_type = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain_type and tensor.dtype == torch.float32 and tensor.is_contiguous()


def _check_fit(row: tuple[Tensor, ...], slice_p: int) -> None:
    """A kernel goes by addresses: with state of another size, type or device it would write elsewhere."""
    grad, param, p0, exp_avg, exp_avg_sq, s = row
    whole, sliced = param.nbytes, 4 * -(-param.numel() // slice_p)
    fits = grad.nbytes == exp_avg.nbytes == exp_avg_sq.nbytes == whole and s.nbytes == sliced
    if not (fits and p0.nbytes in (4, sliced) and exp_avg_sq.device == param.device):
        shape, device = tuple(param.shape), param.device
        raise ValueError(
            f"the optimizer's state doesn't fit a parameter of shape {shape} on {device} with slice_p {slice_p}; "
            "load a checkpoint of this model and slice_p, and move the model before its first step"
        )


def _has_kernels(device: torch.device) -> bool:
    if device.type == "cuda":
        return _triton_kernels() is not None
    return device.type == "cpu" and _c_kernels() is not None


def _on_device(value: Tensor | float, device: torch.device) -> Tensor:
    """A 0-dimensional float64 tensor; torch.full, because copying a number from the host would wait."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


def _read(scalars: list[Tensor]) -> list[float]:
    """The values of 0-dimensional tensors, in one copy."""
    return torch.stack([scalar.double() for scalar in scalars]).tolist() if scalars else []
