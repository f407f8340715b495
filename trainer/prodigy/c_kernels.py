"""Prodigy's kernels for the CPU, in C.

The system's compiler builds them in half a second, and ctypes calls them. They run on PyTorch's own OpenMP threads.
"""

import ctypes
import functools
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# Elements in a chunk, the unit of work of a thread. Sums are float32 within a chunk and float64 across chunks, so they
# depend on neither the number of threads nor the order in which they run.
CHUNK_SIZE = 8192

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
def load_c_kernels() -> ctypes.CDLL | None:
    """Compile the C kernels for this machine (about 0.5 s, once per process); None without a compiler."""
    command = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if command is None:
        logger.warning("prodigy: no C compiler (cc, gcc or clang); the optimizer runs as slowly as prodigyopt")
        return None
    compiler = shlex.split(command)
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
            return _set_signatures(ctypes.CDLL(library))
        except subprocess.CalledProcessError as error:
            reason = error.stderr.decode(errors="replace").strip()[-500:]
        except OSError as error:
            reason = str(error)
    logger.warning("prodigy: %s compiled no kernels; the optimizer runs as slowly as prodigyopt: %s", command, reason)
    return None


def _set_signatures(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size, real, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    chunks: list[Any] = [pointer, pointer, size]
    library.first_pass.argtypes = [*chunks, size, pointer, *[real] * 4, threads, pointer]
    library.second_pass.argtypes = [*chunks, pointer, threads]
    library.squares.argtypes = [*chunks, threads, pointer]
    for function in (library.first_pass, library.second_pass, library.squares):
        function.restype = None
    return library
