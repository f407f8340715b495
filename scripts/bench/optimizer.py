"""Prodigy against prodigyopt, fused AdamW and the memory's bandwidth, interleaved in one run.

    python -m scripts.bench.optimizer [--device cpu] [--rounds 12] [--json scripts/records/optimizer_cpu.json]

The parameters are those of a GPT of 6 layers and width 462: 74 tensors, 16.8 M numbers. The bound is the time
in which 52 bytes a parameter move at the bandwidth of a copy of 1.2 GB (read and written bytes counted). d
"rests" with gradients of alternating sign and "rises" at every step with constant ones; a run starts with the
second and spends most of its steps in the first. Speed-ups are medians over rounds, each step the best of three in
its round, so that other load slows both sides. First step, 100 steps and peak memory are measured in new
processes with an empty compilation cache.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable

import prodigyopt
import torch

from scripts.bench.common import (
    Record,
    build_parser,
    read_memory,
    run_benchmark,
    run_child,
    summarize,
    summarize_ratio,
)
from trainer.prodigy import Prodigy

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "prodigyopt": prodigyopt.Prodigy,
    "ours, d rests": Prodigy,
    "ours, d rises": lambda params: Prodigy(params, growth_rate=1.001),
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
}
BYTES_A_PARAMETER = 52
COPIED = 150_000_000  # float32: 0.6 GB read, 0.6 GB written


def list_shapes(width: int = 462, layers: int = 6, tokens: int = 2560, places: int = 512) -> list[tuple[int, ...]]:
    """The tensors of a GPT with tied embeddings, as nn.Linear and nn.LayerNorm hold them."""
    norm = [(width,), (width,)]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(tokens, width), (places, width)] + layers * (norm + attention + norm + mlp)


def build_parameters(device: str) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in list_shapes()]
    for p in params:
        p.grad = torch.randn_like(p) * 0.01
    return params


def measure_seconds(action: Callable[[], object], device: str) -> float:
    """Seconds until the device has finished the work."""
    started = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure_steps(device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds a step of each optimizer and of the copy, interleaved: the best of three in every round."""
    optimizers = {name: build(build_parameters(device)) for name, build in OPTIMIZERS.items()}
    prodigy = optimizers["ours, d rests"]
    assert isinstance(prodigy, Prodigy)
    source = torch.ones(COPIED, device=device)
    target = torch.zeros_like(source)
    seconds: dict[str, list[float]] = {name: [] for name in [*optimizers, "copy", "grad_norm"]}
    for name, optimizer in optimizers.items():
        optimizer.step()
        for group in optimizer.param_groups:
            if "d" in group:
                group["d"] = group["d_max"] = 1e-3 if name != "ours, d rises" else group["d"]
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            took = []
            for _ in range(4):
                if name != "ours, d rises":
                    for group in optimizer.param_groups:
                        torch._foreach_neg_([p.grad for p in group["params"]])
                took.append(measure_seconds(optimizer.step, device))
            seconds[name].append(min(took[1:]))  # the first reads a cache full of other data
        norm = prodigy.grad_norm
        seconds["copy"].append(min(measure_seconds(lambda: target.copy_(source), device) for _ in range(3)))
        seconds["grad_norm"].append(min(measure_seconds(norm, device) for _ in range(3)))
    rests, rises = (float(optimizers[f"ours, d {word}"].param_groups[0]["d"]) for word in ("rests", "rises"))
    assert rests == 1e-3 and rises > 1e-6, f"d rests at {rests}, rises to {rises}: the names would be wrong"
    return seconds


def measure_start(name: str, device: str) -> dict[str, float]:
    """In this process: the first step (with building the optimizer), 100 steps, and peak memory."""
    params = build_parameters(device)
    there = [gradient for p in params if (gradient := p.grad) is not None]
    back = [-gradient for gradient in there]

    def step() -> None:
        """With gradients of alternating sign: with constant ones d would grow without bound."""
        for p, gradient in zip(params, back if params[0].grad is there[0] else there, strict=True):
            p.grad = gradient
        optimizer.step()

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = read_peak_mb(device)
    started = time.perf_counter()
    optimizer = OPTIMIZERS[name](params)
    measure_seconds(step, device)
    first = time.perf_counter() - started
    for _ in range(98):
        step()
    measure_seconds(step, device)
    total = time.perf_counter() - started
    return {"first_step_s": first, "100_steps_s": total, "memory_added_mb": read_peak_mb(device) - before}


def read_peak_mb(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else read_memory("VmHWM") / 1e6


def measure_start_in_child(name: str, device: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        environment = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
        return run_child(measure_start, name, device, environment=environment)


def measure(arguments: argparse.Namespace) -> Record:
    device = arguments.device
    seconds = measure_steps(device, arguments.rounds)
    count = sum(math.prod(shape) for shape in list_shapes())
    bytes_moved = BYTES_A_PARAMETER * count
    bound = [bytes_moved * took / (8 * COPIED) for took in seconds["copy"]]
    runs = [{name: measure_start_in_child(name, device) for name in OPTIMIZERS} for _ in range(arguments.children)]
    rows = {
        name: {
            "step_s": summarize(seconds[name]),
            "speedup_over_prodigyopt": summarize_ratio(seconds["prodigyopt"], seconds[name]),
            "over_bound": summarize_ratio(seconds[name], bound),
            **{key: summarize([run[name][key] for run in runs]) for key in runs[0][name]},
        }
        for name in OPTIMIZERS
    }
    return {
        "parameters": count,
        "tensors": len(list_shapes()),
        "copy_bytes_a_second": summarize([8 * COPIED / took for took in seconds["copy"]]),
        "bound_s": summarize(bound),
        "grad_norm_s": summarize(seconds["grad_norm"]),
        "optimizers": rows,
    }


def format_table(record: Record) -> str:
    lines = [
        f"{record['tensors']} tensors, {record['parameters']:,} parameters, {record['device']}",
        f"copy {record['copy_bytes_a_second']['median'] / 1e9:.1f} GB/s, bound"
        f" {record['bound_s']['median'] * 1e3:.1f} ms, grad_norm {record['grad_norm_s']['median'] * 1e3:.1f} ms",
        f"{'':15}{'ms a step':>10}{'quartiles':>14}{'speed-up':>10}{'/ bound':>9}{'first s':>9}"
        f"{'100 steps s':>13}{'memory MB':>11}",
    ]
    for name, row in record["optimizers"].items():
        step = row["step_s"]
        spread = f"{step['q1'] * 1e3:.1f}-{step['q3'] * 1e3:.1f}"
        lines.append(
            f"{name:15}{step['median'] * 1e3:10.1f}{spread:>14}{row['speedup_over_prodigyopt']['median']:10.2f}"
            f"{row['over_bound']['median']:9.2f}{row['first_step_s']['median']:9.2f}{row['100_steps_s']['median']:13.2f}"
            f"{row['memory_added_mb']['median']:11.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--children", type=int, default=3, help="new processes for each optimizer")
    run_benchmark(parser, measure, packages=("torch", "prodigyopt"), format_table=format_table)


if __name__ == "__main__":
    main()
