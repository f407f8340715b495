"""The loss over 8,194 codes: all logits at once, torch's chunked form, and ours, forward and backward.

    python -m scripts.bench.loss [--rounds 5] [--json scripts/records/loss_cpu.json]

Each form runs in new processes, interleaved. Memory is the process's peak beyond the inputs, the weight and their
gradients.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.bench.common import Record, build_parser, read_memory, run_benchmark, run_child, summarize
from trainer.cross_entropy import cross_entropy_sum

CODES = 8194
SIZES = {"1,200 targets, width 256": (1200, 256), "2,400 targets, width 1,280": (2400, 1280)}
FORMS = ("all logits at once", "F.linear_cross_entropy", "chunked, ours")
STEPS = 6


def compute_loss(form: str, x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    if form == "chunked, ours":
        return cross_entropy_sum(x, head, targets)
    if form == "F.linear_cross_entropy":
        # Autocast does not cover this function.
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
        x, weight, bias = x.to(dtype), head.weight.to(dtype), head.bias.to(dtype)
        options = nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(x, weight, targets, linear_bias=bias, reduction="sum", options=options).float()
    return F.cross_entropy(head(x).float(), targets, reduction="sum")


def measure_form(form: str, size: str, precision: str) -> dict[str, float]:
    """In this process: seconds of the fastest step, peak MB, and the loss."""
    num_targets, width = SIZES[size]
    torch.manual_seed(0)
    x, head = torch.randn(num_targets, width, requires_grad=True), nn.Linear(width, CODES)
    targets = torch.randint(0, CODES, (num_targets,))
    for leaf in (x, head.weight, head.bias):
        leaf.grad = torch.zeros_like(leaf)
    torch.randn(512, 512) @ torch.randn(512, 512)
    before, seconds = read_memory("VmHWM"), []
    for _ in range(STEPS):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = compute_loss(form, x, head, targets)
        torch.autograd.backward(loss)
        seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds), "memory_mb": (read_memory("VmHWM") - before) / 1e6, "loss": loss.item()}


def measure(arguments: argparse.Namespace) -> Record:
    cases = [(size, precision) for size in SIZES for precision in ("fp32", "bf16")]
    runs = [
        {case: {form: run_child(measure_form, form, *case) for form in FORMS} for case in cases}
        for _ in range(arguments.rounds)
    ]
    return {
        "codes": CODES,
        "cases": {
            f"{size}, {precision}": {
                form: {
                    key: summarize([run[size, precision][form][key] for run in runs])
                    for key in ("seconds", "memory_mb", "loss")
                }
                for form in FORMS
            }
            for size, precision in cases
        },
    }


def format_table(record: Record) -> str:
    lines = []
    for case, forms in record["cases"].items():
        lines.append(case)
        for form, row in forms.items():
            seconds, memory, loss = (row[key]["median"] for key in ("seconds", "memory_mb", "loss"))
            lines.append(f"  {form:24}{seconds * 1e3:8.0f} ms{memory:8.0f} MB   loss {loss:.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    run_benchmark(parser, measure, packages=("torch",), format_table=format_table)


if __name__ == "__main__":
    main()
