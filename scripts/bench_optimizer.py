"""Prodigy against prodigyopt, fused AdamW and the memory's bandwidth, interleaved in one run.

    python scripts/bench_optimizer.py [--device cpu] [--rounds 12] [--json scripts/records/optimizer_cpu.json]

The parameters are those of a GPT of 6 layers and width 462: 74 tensors, 16.8 M numbers. The bound is the time
in which 52 bytes a parameter move at the bandwidth of a copy of 1.2 GB (read and written bytes counted). d
"rests" with gradients of alternating sign and "rises" at every step with constant ones; a run begins with the
second and spends most of its steps in the first. Speed-ups are medians over rounds, each step the best of three in
its round, so that a busy machine slows both sides. First step, 100 steps and peak memory are taken in fresh
processes with an empty compilation cache.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import prodigyopt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.prodigy import Prodigy

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "prodigyopt": prodigyopt.Prodigy,
    "ours, d rests": Prodigy,
    "ours, d rises": lambda params: Prodigy(params, growth_rate=1.001),
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
}
BYTES_A_PARAMETER = 52
COPIED = 150_000_000  # float32: 0.6 GB read, 0.6 GB written


def shapes(width: int = 462, layers: int = 6, tokens: int = 2560, places: int = 512) -> list[tuple[int, ...]]:
    """The tensors of a GPT with tied embeddings, as nn.Linear and nn.LayerNorm hold them."""
    norm = [(width,), (width,)]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(tokens, width), (places, width)] + layers * (norm + attention + norm + mlp)


def parameters(device: str) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes()]
    for p in params:
        p.grad = torch.randn_like(p) * 0.01
    return params


def timed(action: Callable[[], object], device: str) -> float:
    """Seconds, with the device's work done."""
    started = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def steady(device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds a step of each optimizer, and of the copy, by turns: the best of three in every round."""
    optimizers = {name: build(parameters(device)) for name, build in OPTIMIZERS.items()}
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
                took.append(timed(optimizer.step, device))
            seconds[name].append(min(took[1:]))  # the first finds the others' data in the cache
        norm = optimizers["ours, d rests"].grad_norm
        seconds["copy"].append(min(timed(lambda: target.copy_(source), device) for _ in range(3)))
        seconds["grad_norm"].append(min(timed(norm, device) for _ in range(3)))
    rests, rises = (float(optimizers[f"ours, d {word}"].param_groups[0]["d"]) for word in ("rests", "rises"))
    assert rests == 1e-3 and rises > 1e-6, f"d rests at {rests}, rises to {rises}: the names would be wrong"
    return seconds


def fresh(name: str, device: str) -> dict[str, float]:
    """In this process: the first step (with building the optimizer), 100 steps, and memory at its peak."""
    params = parameters(device)
    there = [p.grad for p in params]
    back = [-gradient for gradient in there]

    def step() -> None:
        """With gradients of alternating sign, for with constant ones d would grow beyond any number."""
        for p, gradient in zip(params, back if params[0].grad is there[0] else there, strict=True):
            p.grad = gradient
        optimizer.step()

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = memory(device)
    started = time.perf_counter()
    optimizer = OPTIMIZERS[name](params)
    timed(step, device)
    first = time.perf_counter() - started
    timed(lambda: [step() for _ in range(99)], device)
    total = time.perf_counter() - started
    return {"first_step_s": first, "100_steps_s": total, "memory_added_mb": memory(device) - before}


def memory(device: str) -> float:
    """MB at the peak so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    # Not getrusage: its peak begins with that of the process which started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / 1e6


def in_child(name: str, device: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, __file__, "--device", device, "--fresh", name]
        child = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    measured: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return measured


def summary(values: list[float]) -> dict[str, float]:
    low, high = statistics.quantiles(values, n=4)[::2] if len(values) > 1 else values * 2
    return {"median": statistics.median(values), "min": min(values), "q1": low, "q3": high, "runs": len(values)}


def ratio(above: list[float], below: list[float], factor: float = 1.0) -> dict[str, float]:
    """Of what was measured in the same round, so that a busy machine slows both."""
    return summary([factor * a / b for a, b in zip(above, below, strict=True)])


def measure(device: str, rounds: int, children: int) -> dict[str, object]:
    seconds = steady(device, rounds)
    count = sum(math.prod(shape) for shape in shapes())
    bytes_moved = BYTES_A_PARAMETER * count
    bound = [bytes_moved * took / (8 * COPIED) for took in seconds["copy"]]
    runs = [{name: in_child(name, device) for name in OPTIMIZERS} for _ in range(children)]
    rows = {
        name: {
            "step_s": summary(seconds[name]),
            "speedup_over_prodigyopt": ratio(seconds["prodigyopt"], seconds[name]),
            "over_bound": ratio(seconds[name], bound),
            **{key: summary([run[name][key] for run in runs]) for key in runs[0][name]},
        }
        for name in OPTIMIZERS
    }
    return {
        "command": " ".join(["python", *sys.argv]),
        "versions": {name: version(name) for name in ("torch", "prodigyopt")} | {"python": platform.python_version()},
        "device": describe(device),
        "load_average": os.getloadavg(),
        "parameters": count,
        "tensors": len(shapes()),
        "copy_bytes_a_second": summary([8 * COPIED / took for took in seconds["copy"]]),
        "bound_s": summary(bound),
        "grad_norm_s": summary(seconds["grad_norm"]),
        "optimizers": rows,
    }


def describe(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{model[0] if model else platform.processor()}, {torch.get_num_threads()} threads"


def table(record: dict) -> str:
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--children", type=int, default=3, help="fresh processes for each optimizer")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--fresh", choices=list(OPTIMIZERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fresh:
        print(json.dumps(fresh(arguments.fresh, arguments.device)))
        return
    record = measure(arguments.device, arguments.rounds, arguments.children)
    print(table(record))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
