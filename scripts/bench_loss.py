"""The loss over 8,194 codes: all logits at once, torch's chunked form, and ours, forward and backward.

    python scripts/bench_loss.py [--rounds 5] [--json scripts/records/loss_cpu.json]

Each form runs in fresh processes, by turns. Memory is what the process takes at its peak beyond the inputs, the weight
and their gradients.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.bench_optimizer import describe, memory, summary
from trainer.cross_entropy import cross_entropy_sum

CODES = 8194
SIZES = {"1,200 targets, width 256": (1200, 256), "2,400 targets, width 1,280": (2400, 1280)}
FORMS = ("all logits at once", "F.linear_cross_entropy", "chunked, ours")
STEPS = 6


def loss_of(form: str, x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    if form == "chunked, ours":
        return cross_entropy_sum(x, head, targets)
    if form == "F.linear_cross_entropy":
        # It is not on autocast's list, so the casts are made here.
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
        x, weight, bias = x.to(dtype), head.weight.to(dtype), head.bias.to(dtype)
        options = nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(x, weight, targets, linear_bias=bias, reduction="sum", options=options).float()
    return F.cross_entropy(head(x).float(), targets, reduction="sum")


def fresh(form: str, size: str, precision: str) -> dict[str, float]:
    """In this process: seconds of the quickest step, MB at the peak, and the loss."""
    num_targets, width = SIZES[size]
    torch.manual_seed(0)
    x, head = torch.randn(num_targets, width, requires_grad=True), nn.Linear(width, CODES)
    targets = torch.randint(0, CODES, (num_targets,))
    for leaf in (x, head.weight, head.bias):
        leaf.grad = torch.zeros_like(leaf)
    torch.randn(512, 512) @ torch.randn(512, 512)
    before, seconds = memory("cpu"), []
    for _ in range(STEPS):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(form, x, head, targets)
        torch.autograd.backward(loss)
        seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds), "memory_mb": memory("cpu") - before, "loss": loss.item()}


def in_child(*case: str) -> dict[str, float]:
    child = subprocess.run([sys.executable, __file__, "--fresh", *case], check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return measured


def measure(rounds: int) -> dict[str, Any]:
    cases = [(size, precision) for size in SIZES for precision in ("fp32", "bf16")]
    runs = [{case: {form: in_child(form, *case) for form in FORMS} for case in cases} for _ in range(rounds)]
    return {
        "command": " ".join(["python", *sys.argv]),
        "versions": {"torch": version("torch"), "python": platform.python_version()},
        "device": describe("cpu"),
        "load_average": os.getloadavg(),
        "codes": CODES,
        "cases": {
            f"{size}, {precision}": {
                form: {
                    key: summary([run[size, precision][form][key] for run in runs])
                    for key in ("seconds", "memory_mb", "loss")
                }
                for form in FORMS
            }
            for size, precision in cases
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--fresh", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fresh:
        print(json.dumps(fresh(*arguments.fresh)))
        return
    record = measure(arguments.rounds)
    for case, forms in record["cases"].items():
        print(case)
        for form, row in forms.items():
            values = {key: row[key]["median"] for key in row}
            print(
                f"  {form:24}{values['seconds'] * 1e3:8.0f} ms{values['memory_mb']:8.0f} MB   loss {values['loss']:.3f}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
