"""The environment, what the device can do at most, and two questions about shapes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from scripts.gpu_check.timing import DEVICE, measure_ms, synchronize
from trainer.acceleration import RunSize, apply, detect, plan
from trainer.config import TrainConfig
from trainer.memory import available_memory

PACKAGES = ("triton", "prodigyopt", "pydantic", "optuna", "numpy", "psutil")


def ceilings(tiny: bool) -> dict[str, Any]:
    """Versions and device; bandwidth of a copy, operations a second of a bf16 product; widths of heads; attention."""
    record = describe_environment()
    record["copy_bytes_a_second"], record["bf16_flops"] = time_copy(tiny), time_product(tiny)
    record["head_ms"] = {str(columns): time_head(columns, tiny) for columns in (8194, 8256, 12001, 12032)}
    apply(plan(detect(), TrainConfig(steps=1), RunSize(1, 1, 1.0, 1)))
    record["attention_ms"] = {str(dropout): time_lengths(dropout, tiny) for dropout in (0.0, 0.1)}
    return record


def time_copy(tiny: bool) -> float:
    """Bytes a second, read and written."""
    source = torch.ones(1 << (16 if tiny else 28), device=DEVICE)
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / measure_ms(lambda: target.copy_(source))


def time_product(tiny: bool) -> float:
    """Operations a second of a square bf16 product."""
    width = 256 if tiny else 8192
    a = torch.randn(width, width, device=DEVICE, dtype=torch.bfloat16)
    return 2e3 * width**3 / measure_ms(lambda: a @ a)


def describe_environment() -> dict[str, Any]:
    """What a reader of the record needs to know of the machine."""
    record: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "compiler": shutil.which("cc") or shutil.which("gcc"),
        "headers": Path(sysconfig.get_path("include"), "Python.h").is_file(),
        "device": vars(detect()),
        "available_memory": available_memory(DEVICE),
        "packages": {},
    }
    for name in PACKAGES:
        try:
            record["packages"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            record["packages"][name] = None
    if DEVICE == "cuda":
        record |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
        record["uuid"] = str(torch.cuda.get_device_properties().uuid)
        record["allocator"] = torch.cuda.memory._snapshot().get("allocator_settings")
    return record


def time_head(columns: int, tiny: bool) -> list[float]:
    """Milliseconds of a head's three products: forward, gradient of its input, gradient of its weight."""
    rows, width, columns = (64, 32, columns // 64) if tiny else (2432, 1280, columns)
    x, weight, gradient = (
        torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
        for shape in ((rows, width), (columns, width), (rows, columns))
    )
    return [
        measure_ms(product) for product in (lambda: x @ weight.t(), lambda: gradient @ weight, lambda: gradient.t() @ x)
    ]


def time_lengths(dropout: float, tiny: bool) -> dict[str, Any]:
    """Attention's kernel, and the milliseconds of its first call at each length, forward and backward."""
    times, kernel = [], ""
    for length in (400, 408, 416, 424, 400, 408):
        shape = (1, length // 10, 3, 2, 16) if tiny else (8, length, 3, 20, 64)
        qkv = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        synchronize()
        started = time.perf_counter()
        output = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        torch.autograd.backward(output.sum())
        synchronize()
        times.append(round(1e3 * (time.perf_counter() - started), 3))
        kernel = type(output.grad_fn).__name__
    return {"kernel": kernel, "ms": times}
