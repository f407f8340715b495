"""Prodigy's kernels for CUDA, in Triton."""

import functools
import importlib
import importlib.util
import logging
from typing import Any

logger = logging.getLogger(__name__)


@functools.cache
def load_triton_kernels() -> tuple[Any, Any] | None:
    """(first pass, second pass), which compute the same as those in C; None if Triton is not installed."""
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
