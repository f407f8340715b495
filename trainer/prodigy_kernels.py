"""The kernels of `trainer.prodigy`: one step's work on many tensors in two passes over memory.

On CPU they are C, compiled by the system's compiler in half a second and called through ctypes, with PyTorch's own
OpenMP threads; on CUDA they are Triton. Both read a table of addresses, so no tensor has to move.
"""

import ctypes
import functools
import importlib
import importlib.util
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Elements a kernel works on at a time. Its sums are float32 within a chunk and float64 across chunks, so they
# depend on neither the number of threads nor the order in which they run.
CHUNK_SIZE = 8192

# The coefficients a kernel reads, decided on the device. The mode of the first pass: 0 nothing, 1 moments,
# 2 moments and update; of the second: 0 nothing, 1 update, 2 correct an update made with the old d.
MODE, SCALE, RATE1, RATE2, RATE3, DLR, SHRINK, OLD_EPS, NEW_EPS, DLR_D = range(10)


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
def c_kernels() -> ctypes.CDLL | None:
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
            f"-DCHUNK={CHUNK_SIZE}",
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
def triton_kernels() -> tuple[Any, Any] | None:
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
    counts = torch.tensor([-(-size // CHUNK_SIZE) for size in sizes])
    owner = torch.repeat_interleave(torch.arange(len(sizes)), counts).int()
    return _upload(owner, device), (counts.cumsum(0) - counts).tolist()


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it; a pageable copy would wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass(frozen=True)
class Constants:
    """A group's numbers that the host knows."""

    beta1: float
    beta2: float
    beta3: float
    l2: float  # coupled weight decay, added to the gradient
    decay: float  # decoupled weight decay
    slice_p: int
    learns: bool  # lr > 0


class Kernel:
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
        kernels = triton_kernels()
        assert kernels is not None
        if len(self.owner):
            with torch.cuda.device(self.device):
                launch = kernels[which][(len(self.owner),)]
                constants.update(CHUNK=CHUNK_SIZE, BLOCK=1024, enable_fp_fusion=True)
                launch(self.table, self.owner, *arguments, **constants)


def _c_library() -> ctypes.CDLL:
    library = c_kernels()
    assert library is not None
    return library


def is_plain(tensor: Tensor) -> bool:
    """Whether a kernel can read it. A subclass (FakeTensor, DTensor) has no memory of that size at its address."""
    plain_type = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain_type and tensor.dtype == torch.float32 and tensor.is_contiguous()


def has_kernels(device: torch.device) -> bool:
    if device.type == "cuda":
        return triton_kernels() is not None
    return device.type == "cpu" and c_kernels() is not None


def check_fit(row: tuple[Tensor, ...], slice_p: int) -> None:
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
