"""Decides how a run is executed, from the device and the size of the run. Each choice is logged with its reason."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import nn

from trainer.config import TrainConfig
from trainer.errors import UserError
from trainer.ranks import num_local_ranks, take_gpu
from trainer.workload import Dataset

log = logging.getLogger(__name__)

# Rough, cautious figures, used only to decide whether the remaining steps repay the compilation.
BF16_RATES = {(8, 0): 2048, (8, 6): 512, (8, 9): 512, (9, 0): 4096, (10, 0): 8192, (12, 0): 512}
"""Operations a cycle of a multiprocessor in bf16 products with float32 sums, from this compute capability on."""
FP32_RATE = 128
"""The same in float32 without TF32, which takes half the rate of bf16."""
CLOCK = 1.8e9
SUSTAINED_SHARE = 0.4
"""The share of the peak that a transformer's training step sustains."""
FLOPS_PER_PARAMETER = 6
"""For each token, forward and backward."""
COMPILE_GAIN = 0.07
"""The share of a GPU's step that compiled code saves, by fusing the operations between the matrix products: from the
bytes that it does not move (docs/gpu.md)."""
COMPILE_SECONDS, COMPILE_SECONDS_PER_TENSOR = 10.0, 0.7
WARM_SHARE = 0.25
"""Share of the compilation time that is needed if the code is cached on disk."""
# With AVX-512, bf16 products repay their conversions in wide models only; smaller ones are faster in float32.
BF16_PARAMETERS = 5_000_000

Kernel = Literal["flash", "efficient", "math"]


@dataclass(frozen=True)
class Capabilities:
    """Description of a device. `plan` reads nothing else of it, so it can be tested without the device."""

    kind: Literal["cuda", "cpu"]
    name: str
    cores: int
    memory: int
    """Bytes: the GPU's own, or the machine's."""
    compute_capability: tuple[int, int] = (0, 0)
    multiprocessors: int = 80
    """Of a GPU."""
    amx_bf16: bool = False
    avx512_bf16: bool = False
    compiler: bool = True
    """Whether torch.compile has its compiler: Triton for a GPU, a C++ compiler for a CPU."""

    @property
    def bf16(self) -> bool:
        """Whether the device multiplies bf16 itself; otherwise PyTorch emulates it, slower than float32."""
        return self.compute_capability >= (8, 0) or self.amx_bf16 or self.avx512_bf16


@dataclass(frozen=True)
class RunSize:
    """Description of a run, the other input of `plan`."""

    num_parameters: int
    num_tensors: int
    tokens_per_step: float
    """Real tokens, on average."""
    remaining_steps: int | None
    """None if the budget is in seconds."""
    remaining_seconds: float | None = None
    mapped_data: bool = False
    """Samples come from a memory-mapped store, so loader workers would not help."""
    compiled_before: bool = False
    """Compiled code of this model is cached on disk."""

    @classmethod
    def of(cls, model: nn.Module, data: Dataset, *, samples_per_step: int, **rest: Any) -> RunSize:
        """Describe the training of a model on data; `rest` are the fields from `remaining_steps` on."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return cls(
            num_parameters=sum(parameter.numel() for parameter in trained),
            num_tensors=len(trained),
            tokens_per_step=float(data.lengths.mean()) * samples_per_step,
            mapped_data=getattr(data, "mapped", False),
            **rest,
        )


@dataclass(frozen=True)
class AccelerationPlan:
    device: str
    precision: str
    """"bf16": autocast with float32 weights. "fp32": no autocast."""
    tf32: bool
    cudnn_benchmark: bool
    sdpa: tuple[Kernel, ...]
    """Attention kernels that PyTorch may choose from."""
    compile: bool
    compile_seconds: float
    """Rough time of the compilation, or of loading its code from disk."""
    pad_multiple: int
    """Lengths are padded to multiples of it."""
    num_workers: int
    pin_memory: bool
    fused_optimizer: bool
    reasons: Mapping[str, str]
    """Why each choice was made, by its topic in the log; that of "device" describes the device."""

    def log_lines(self) -> dict[str, str]:
        """One line for each topic: the choice and its reason."""
        choices = {
            "precision": self.precision,
            "tf32": _on(self.tf32),
            "cudnn autotune": _on(self.cudnn_benchmark),
            "attention": " or ".join(self.sdpa),
            "compile": _on(self.compile),
            "loader workers": str(self.num_workers),
            "pinned memory": _on(self.pin_memory),
            "fused optimizer": _on(self.fused_optimizer),
        }
        parts = {topic: (topic, choices.get(topic), reason) for topic, reason in self.reasons.items()}
        return {topic: ": ".join(filter(None, part)) for topic, part in parts.items()}


def detect(device: str = "auto") -> Capabilities:
    """Describe the device that `train.device` names.

    Raises:
        UserError: `device` is "cuda", and there is none, or not one for each process of the run.
    """
    cores = max(1, len(os.sched_getaffinity(0)) // num_local_ranks())
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError('train.device "cuda": this machine shows no CUDA device; use "auto" or repair the driver.')
    if device == "cpu" or not torch.cuda.is_available():
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        return Capabilities(
            "cpu",
            "CPU",
            cores=cores,
            memory=psutil.virtual_memory().total,
            amx_bf16="amx_bf16" in flags,
            avx512_bf16="avx512_bf16" in flags,
            compiler=any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))),
        )
    # Before the first tensor on the device: the allocator reads it once.
    os.environ.update(allocator_settings(os.environ))
    take_gpu()
    properties = torch.cuda.get_device_properties()
    return Capabilities(
        "cuda",
        properties.name,
        cores=cores,
        memory=properties.total_memory,
        compute_capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        compiler=importlib.util.find_spec("triton") is not None and properties.major >= 7,
    )


def allocator_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for CUDA's caching allocator: segments that grow, because the lengths of batches vary, and fixed ones
    would be lost to fragmentation. Nothing if the user has set any."""
    if environment.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        return {}
    return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def sustained_flops(capabilities: Capabilities, *, bf16: bool, tf32: bool) -> float:
    """Operations a second that a transformer's training step sustains on a GPU. Rough."""
    known = [rate for capability, rate in BF16_RATES.items() if capability <= capabilities.compute_capability]
    rate = known[-1] if known and bf16 else known[-1] // 2 if known and tf32 else FP32_RATE
    return SUSTAINED_SHARE * CLOCK * capabilities.multiprocessors * rate


def plan(capabilities: Capabilities, config: TrainConfig, size: RunSize) -> AccelerationPlan:
    """Decide how a run is executed on a device. A pure function; values set in `[train]` are kept.

    Raises:
        UserError: A value in `[train]` is not possible on the device.
    """
    cuda = capabilities.kind == "cuda"
    ampere = cuda and capabilities.compute_capability >= (8, 0)
    precision, precision_why = choose_precision(capabilities, config, size.num_parameters)
    bf16 = precision == "bf16"
    sdpa, sdpa_why = _attention(capabilities, config, bf16)
    tf32 = cuda and (ampere if config.tf32 is None else config.tf32)
    compiled, compile_why = _compile(capabilities, config, size, sustained_flops(capabilities, bf16=bf16, tf32=tf32))
    num_workers, workers_why = _workers(capabilities, config, size)
    benchmark = cuda and config.cudnn_benchmark is not False
    pin_memory = cuda and config.pin_memory is not False
    # Tensor cores need multiples of 8. Compiled code then sees few shapes, too.
    pad_multiple = 8 if cuda or compiled else 1
    reasons = {"device": f"{capabilities.name}, {capabilities.cores} cores, {capabilities.memory / 1e9:.0f} GB"}
    reasons["precision"] = precision_why
    if cuda:
        reasons["tf32"] = _why(config.tf32, "compute capability 8.0 and above supports it")
        reasons["cudnn autotune"] = _why(config.cudnn_benchmark, "few shapes, many steps")
    reasons |= {"attention": sdpa_why, "compile": compile_why, "loader workers": workers_why}
    if cuda:
        reasons["pinned memory"] = _why(config.pin_memory, "copies do not block")
    if not config.fused_optimizer:
        reasons["fused optimizer"] = "as set"
    return AccelerationPlan(
        device=capabilities.kind,
        precision=precision,
        tf32=tf32,
        cudnn_benchmark=benchmark,
        sdpa=sdpa,
        compile=compiled,
        compile_seconds=compile_seconds(size),
        pad_multiple=pad_multiple,
        num_workers=num_workers,
        pin_memory=pin_memory,
        fused_optimizer=config.fused_optimizer,
        reasons=reasons,
    )


def choose_precision(capabilities: Capabilities, config: TrainConfig, num_parameters: int) -> tuple[str, str]:
    """ "bf16" or "fp32", and why."""
    if config.precision != "auto":
        return config.precision, "as set"
    if not capabilities.bf16:
        return "fp32", "bf16 needs compute capability 8.0" if capabilities.kind == "cuda" else "the CPU has no bf16"
    if capabilities.kind == "cuda" or capabilities.amx_bf16:
        return "bf16", "autocast, float32 weights: the device multiplies bf16 at full speed"
    if num_parameters < BF16_PARAMETERS:
        return "fp32", f"{num_parameters:,} parameters are too few for AVX-512's bf16 to pay"
    return "bf16", "autocast, float32 weights: the CPU's AVX-512 multiplies bf16"


def _attention(capabilities: Capabilities, config: TrainConfig, bf16: bool) -> tuple[tuple[Kernel, ...], str]:
    ampere = capabilities.compute_capability >= (8, 0)
    reason = "flash needs bf16" if ampere else "flash needs compute capability 8.0"
    if capabilities.kind == "cpu":
        if config.sdpa == "efficient":
            raise UserError('train.sdpa "efficient" is a kernel for CUDA: use "auto", "flash" or "math".')
        if config.sdpa == "math":
            return ("math",), "as set"
        return ("flash", "math"), "the CPU's flash kernel if there is no dropout"
    if config.sdpa == "flash" and not (ampere and bf16):
        raise UserError(f'train.sdpa "flash" is not available here ({reason}): use "auto".')
    if config.sdpa != "auto":
        return (config.sdpa,), "as set"
    if ampere and bf16:
        return ("flash", "efficient", "math"), "no mask, bf16 and compute capability 8.0: flash is eligible"
    return ("efficient", "math"), reason


def _compile(capabilities: Capabilities, config: TrainConfig, size: RunSize, flops_a_second: float) -> tuple[bool, str]:
    missing = "Triton" if capabilities.kind == "cuda" else "a C++ compiler"
    if config.compile == "on" and not capabilities.compiler:
        raise UserError(f'train.compile "on" needs {missing}, which is not installed: install it or use "auto".')
    if config.compile != "auto":
        return config.compile == "on", "as set"
    if capabilities.kind == "cpu":
        # Measured with 1 M to 10 M parameters: 5% faster to 16% slower, for a minute of compilation.
        return False, "a CPU spends its time in matrix products, which compilation does not change"
    if not capabilities.compiler:
        return False, f"{missing} is not installed"
    if size.remaining_steps is None:
        left, run = size.remaining_seconds or 0.0, f"{size.remaining_seconds or 0:.0f} s"
    else:
        flops = FLOPS_PER_PARAMETER * size.num_parameters * size.tokens_per_step
        left = size.remaining_steps * flops / flops_a_second
        run = f"{size.remaining_steps:,} steps"
    cost = compile_seconds(size)
    what = f"about {cost:.0f} s of {'loading compiled code' if size.compiled_before else 'compilation'}"
    if left * COMPILE_GAIN > cost:
        return True, f"{run} repay {what}; forward and loss as one graph with symbolic lengths"
    return False, f"{run} would not repay {what}"


def compile_seconds(size: RunSize) -> float:
    """Rough time of the compilation, or of loading its code if it is cached on disk."""
    cost = COMPILE_SECONDS + COMPILE_SECONDS_PER_TENSOR * size.num_tensors
    return cost * (WARM_SHARE if size.compiled_before else 1)


def _workers(capabilities: Capabilities, config: TrainConfig, size: RunSize) -> tuple[int, str]:
    if config.num_workers is not None:
        workers = min(config.num_workers, capabilities.cores)
        return workers, "as set" if workers == config.num_workers else f"{config.num_workers} set, limited by the cores"
    if size.mapped_data:
        return 0, "the data is memory-mapped"
    if capabilities.kind == "cpu":
        return 0, "the cores are busy computing"
    return min(8, capabilities.cores - 1), "the device computes while they read"


def _on(value: bool) -> str:
    return "on" if value else "off"


def _why(setting: bool | None, reason: str) -> str:
    return reason if setting is None else "as set"


def apply(plan: AccelerationPlan) -> None:
    """Set torch's switches for this process, and log each choice with its reason."""
    if plan.device == "cuda":
        torch.set_float32_matmul_precision("high" if plan.tf32 else "highest")
        torch.backends.cudnn.benchmark = plan.cudnn_benchmark
    # These switches apply to the CPU's attention, too.
    torch.backends.cuda.enable_flash_sdp("flash" in plan.sdpa)
    torch.backends.cuda.enable_mem_efficient_sdp("efficient" in plan.sdpa)
    torch.backends.cuda.enable_math_sdp("math" in plan.sdpa)
    # cuDNN builds a plan for each new length, and lengths change at every step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    for topic, line in plan.log_lines().items():
        log.info("%s", line, extra={"topic": topic})
