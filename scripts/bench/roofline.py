"""The least time of a training step on a GPU, by arithmetic: operations over the peak, bytes over the bandwidth.

    python -m scripts.bench.roofline     # the tables of docs/gpu.md

Imports no torch and measures nothing. `scripts.gpu_check` compares its measurements with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Figures of the data sheet, without sparsity."""

    name: str
    flops: float
    """bf16 products with float32 sums, a second."""
    bandwidth: float
    """Bytes a second."""


RTX_4090, H100 = Gpu("RTX 4090", 165.2e12, 1.008e12), Gpu("H100", 989e12, 3.35e12)
GPUS = (
    RTX_4090,
    H100,
    Gpu("H200", 989e12, 4.8e12),
    Gpu("A100", 312e12, 2.04e12),
    Gpu("RTX 5090", 209.5e12, 1.79e12),
    Gpu("RTX 3090", 71e12, 0.936e12),
)
PRODIGY_RISES, PRODIGY_RESTS = 52, 40
"""Bytes a parameter that a step of `trainer.prodigy` moves."""
NORM = 4
"""Bytes a parameter of the gradient norm."""
CASTS = 14
"""Bytes a weight of a product: float32 to bf16 (4 + 2); its gradient in bf16, then in float32 (2 + 2 + 4)."""
PRODIGYOPT = 130
"""The same of prodigyopt: some twenty passes, counted in its source."""
PAGEABLE, PAGE_LOCKED = 4e9, 25e9
"""Bytes a second from the GPU into host memory."""
SAVE_EVERY = 1000
STATE = 24
"""Bytes a parameter: weight, gradient, and Prodigy's four states."""

# Bytes a position, layer and unit of width of the forward pass, beside the products' own kernels: float32 is 4, bf16 2.
EAGER_FORWARD = {
    "two norms: read, write": 16,
    "their outputs to bf16": 12,
    "inputs and outputs of four products": 2 * (1 + 3 + 1 + 1 + 1 + 4 + 4 + 1),
    "attention, and its output made contiguous": 8 + 4,
    "GELU": 16,
    "two dropouts with their masks": 10,
    "two residual sums": 20,
}
COMPILED_FORWARD = {
    "sum, norm and cast as one kernel, twice": 2 * (4 + 2 + 4 + 2),
    "inputs and outputs of four products": EAGER_FORWARD["inputs and outputs of four products"],
    "attention, and its output made contiguous": 8 + 4,
    "GELU": 16,
}


@dataclass(frozen=True)
class Model:
    """A GPT with a text and a code head, each with a table of the same size; the default is IndexTTS-2's."""

    width: int = 1280
    layers: int = 24
    text_tokens: int = 12_001
    codes: int = 8194
    positions: int = 1818 + 602

    @property
    def blocks(self) -> int:
        """Weights of the products in the blocks."""
        return 12 * self.layers * self.width**2

    @property
    def parameters(self) -> int:
        norms_and_biases = 13 * self.layers * self.width + 4 * self.width + self.text_tokens + self.codes
        tables = self.width * (2 * (self.text_tokens + self.codes) + self.positions + 2)
        return self.blocks + norms_and_biases + tables


@dataclass(frozen=True)
class Batch:
    """A batch of equally long utterances."""

    size: int = 8
    text: int = 58
    codes: int = 299

    @property
    def length(self) -> int:
        """Positions of an utterance: prefix, text with start and stop, start and codes."""
        return 34 + self.text + 2 + self.codes + 1

    @property
    def positions(self) -> int:
        return self.size * self.length


def count_flops(
    model: Model, *, positions: float, squares: float, text_targets: float, code_targets: float
) -> dict[str, float]:
    """Operations of forward and backward by part: two for a product and its sum, three products a weight.

    Args:
        squares: Sum of the squared lengths; a causal model needs half of each attention matrix.
    """
    outputs = text_targets * model.text_tokens + code_targets * model.codes
    return {
        "blocks": 6.0 * model.blocks * positions,
        "attention": 6.0 * model.layers * model.width * squares,
        "heads": 6.0 * model.width * outputs,
    }


def batch_flops(model: Model, batch: Batch) -> dict[str, float]:
    """`count_flops` of a batch."""
    return count_flops(
        model,
        positions=batch.positions,
        squares=batch.size * batch.length**2,
        text_targets=batch.size * (batch.text + 1),
        code_targets=batch.size * (batch.codes + 1),
    )


def activation_bytes(model: Model, batch: Batch, *, compiled: bool) -> float:
    """Bytes that forward and backward move for activations; a backward pass moves about twice those of its forward."""
    forward = sum((COMPILED_FORWARD if compiled else EAGER_FORWARD).values())
    return 3.0 * forward * model.width * model.layers * batch.positions


def step_ms(model: Model, batch: Batch, gpu: Gpu, *, compiled: bool = True, share: float = 1.0) -> dict[str, float]:
    """Milliseconds of each part of a step while d rests.

    Args:
        share: The share of the products' peak that is reached.
    """
    heads = model.width * (model.text_tokens + model.codes)
    products = {name: flops / gpu.flops / share for name, flops in batch_flops(model, batch).items()}
    moved = {
        "optimizer": PRODIGY_RESTS * model.parameters,
        "gradient norm": NORM * model.parameters,
        "casts": CASTS * (model.blocks + heads),
        "activations": activation_bytes(model, batch, compiled=compiled),
    }
    seconds = products | {name: amount / gpu.bandwidth for name, amount in moved.items()}
    return {name: 1e3 * value for name, value in seconds.items()}


def savings_ms(model: Model, batch: Batch, gpu: Gpu) -> dict[str, float]:
    """Milliseconds a step that each measure is expected to save, most on a 4090 first."""
    weights, moved = model.blocks + model.width * (model.text_tokens + model.codes), model.parameters / gpu.bandwidth
    eager, compiled = (activation_bytes(model, batch, compiled=each) for each in (False, True))
    snapshot = (STATE - 4) * model.parameters * (1 / PAGEABLE - 1 / PAGE_LOCKED) / SAVE_EVERY
    seconds = {
        "our Prodigy in place of prodigyopt": (PRODIGYOPT - PRODIGY_RESTS) * moved,
        "compilation: bytes of activations": (eager - compiled) / gpu.bandwidth,
        "casting weights once a step, for each further micro-batch": 6 * weights / gpu.bandwidth,
        "heads padded to multiples of 64, if they ran at a third": 2 * batch_flops(model, batch)["heads"] / gpu.flops,
        "page-locked snapshots, every 1,000 steps": snapshot,
    }
    return {name: 1e3 * value for name, value in seconds.items()}


def validation_seconds(model: Model, gpu: Gpu, *, samples: int, share: float = 0.4) -> float:
    """Seconds of a validation in eager mode: forward only, a third of a step's operations."""
    return sum(batch_flops(model, Batch(samples)).values()) / 3 / gpu.flops / share


def utilization(model: Model, batch: Batch, gpu: Gpu, seconds: float) -> float:
    """Model FLOPs utilization of a step of that length: needed operations over the peak's."""
    return sum(batch_flops(model, batch).values()) / gpu.flops / seconds


def find_gpu(name: str) -> Gpu | None:
    """The GPU of a device's name, such as "NVIDIA GeForce RTX 4090"; None if its data sheet is not in the table."""
    # A laptop's chip of the same name is a smaller one.
    return None if "Laptop" in name else next((gpu for gpu in GPUS if gpu.name in name), None)


def format_parts(gpus: tuple[Gpu, ...] = (RTX_4090, H100)) -> Iterator[str]:
    """The parts of a step at batch size 8."""
    model, batch = Model(), Batch()
    parts = [step_ms(model, batch, gpu) for gpu in gpus]
    yield "| batch 8, compiled, d rests; ms at the peak | " + " | ".join(gpu.name for gpu in gpus) + " |"
    yield "|---|" + "---:|" * len(gpus)
    for name in parts[0]:
        yield f"| {name} | " + " | ".join(f"{part[name]:.1f}" for part in parts) + " |"
    yield "| sum | " + " | ".join(f"{sum(part.values()):.1f}" for part in parts) + " |"


def format_sizes(gpus: tuple[Gpu, ...] = (RTX_4090, H100)) -> Iterator[str]:
    """Sums of a step by batch size, and what share of the peak's operations they are."""
    model = Model()
    yield (
        "| batch | positions | TFLOP | "
        + " | ".join(f"{gpu.name}: ms at the peak | at 70% of it | MFU | optimizer" for gpu in gpus)
        + " |"
    )
    yield "|---:|---:|---:|" + "---:|" * 4 * len(gpus)
    for size in (4, 8, 16, 32):
        batch = Batch(size)
        cells = []
        for gpu in gpus:
            peak, real = (step_ms(model, batch, gpu, share=share) for share in (1.0, 0.7))
            ms = sum(real.values())
            cells.append(
                f"{sum(peak.values()):.0f} | {ms:.0f} | {utilization(model, batch, gpu, ms / 1e3):.0%} "
                f"| {real['optimizer'] / ms:.0%}"
            )
        flops = sum(batch_flops(model, batch).values())
        yield f"| {size} | {batch.positions:,} | {flops / 1e12:.1f} | " + " | ".join(cells) + " |"


def format_savings(gpus: tuple[Gpu, ...] = (RTX_4090, H100)) -> Iterator[str]:
    """What each measure saves at batch size 8."""
    savings = [savings_ms(Model(), Batch(), gpu) for gpu in gpus]
    yield "| expected to save, ms a step | " + " | ".join(gpu.name for gpu in gpus) + " |"
    yield "|---|" + "---:|" * len(gpus)
    for name in savings[0]:
        yield f"| {name} | " + " | ".join(f"{each[name]:.1f}" for each in savings) + " |"


if __name__ == "__main__":
    print("\n".join([*format_parts(), "", *format_sizes(), "", *format_savings()]))
