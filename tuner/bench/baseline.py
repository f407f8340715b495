"""The baseline training loop of `tuner bench`, and its optimizations, one by one.

The loop trains any workload in the common way: plain attention, float32, torch's default AdamW, random batches, files
read between the steps, and a wait for the device at every number that it reads. It is for measurements only.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import prodigyopt
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer import TrainConfig, Workload, cross_entropy
from trainer.acceleration import Capabilities, detect
from trainer.config import ADAMW_LR
from trainer.data.batching import BatchOrder
from trainer.data.loader import BatchReader, train_batches
from trainer.evaluation import autocast
from trainer.metrics import LossMeter
from trainer.optimizers import build_optimizer, update
from trainer.workload import Batch

REQUESTED = {
    "prodigy": "prodigyopt's Prodigy in place of AdamW",
    "compile": "torch.compile of forward and loss, shapes as they come",
    "sdpa": "every attention kernel allowed, not the plain one alone",
    "bf16": "bf16 autocast, float32 weights",
    "cudnn": "cuDNN autotune",
    "tf32": "TF32 matrix products where they are float32",
    "loader": "DataLoader with workers, prefetch and pinned memory",
}
"""The usual optimizations, in the order of the table."""
ADDED = {
    "buckets": "batches of like length",
    "no waiting": "norm, clip, finite check and metrics on the device; AdamW fused",
    "our prodigy": "trainer.prodigy in place of prodigyopt",
    "packed data": "samples from one file, not one file a field",
}
"""The optimizations that this project adds."""


def find_obstacle(name: str, capabilities: Capabilities, workload: Workload) -> str:
    """Why this optimization can't be measured here; empty if it can."""
    cuda = capabilities.kind == "cuda"
    if name in ("cudnn", "tf32") and not cuda:
        return "no effect on a CPU"
    if name == "tf32" and capabilities.compute_capability < (8, 0):
        return "the device has no TF32"
    if name == "bf16" and not capabilities.bf16:
        return "the device has no fast bf16"
    if name == "packed data" and workload.unpacked() is workload:
        return "the workload packs no data"
    return ""


class BaselineLoop:
    """A model, its optimizer and its batches, with a set of optimizations."""

    def __init__(self, workload: Workload, config: TrainConfig, on: frozenset[str]) -> None:
        self.workload, self.config, self.on = workload, config, on
        self.capabilities = detect(config.device)
        self.device = torch.device(self.capabilities.kind)
        torch.manual_seed(config.seed)
        model = self.model = workload.build_model().to(self.device).train()
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = self._build_optimizer()
        self.batches = self.batches_from(epoch=0)

        def loss_sums(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return workload.loss_sums(model, inputs)

        # Forward and loss as one function: a loss that calls submodules or methods of a compiled model is not compiled.
        self.loss_sums: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = loss_sums
        if "compile" in on:
            self.loss_sums = torch.compile(loss_sums)
        self.meter = LossMeter(workload.loss_weights)
        self.losses: list[float | Tensor] = []
        """Of each step."""
        self.reset()

    def _build_optimizer(self) -> Any:
        config = self.config
        if "our prodigy" in self.on:
            return build_optimizer(self.model, config.model_copy(update={"optimizer": "prodigy", "lr": None}))
        betas, decay = (config.beta1, config.beta2), config.weight_decay
        if "prodigy" in self.on:
            return prodigyopt.Prodigy(
                self.params,
                betas=betas,
                weight_decay=decay,
                use_bias_correction=config.use_bias_correction,
                safeguard_warmup=config.safeguard_warmup,
                d0=config.d0,
                d_coef=config.d_coef,
                slice_p=config.slice_p,
            )
        lr = config.base_lr if config.optimizer == "adamw" else ADAMW_LR
        # Clipping and the finite check without a wait need the fused form; else torch's default.
        fused = True if "no waiting" in self.on else None
        return torch.optim.AdamW(self.params, lr, betas=betas, weight_decay=decay, fused=fused)

    def batches_from(self, epoch: int) -> Iterator[Batch]:
        """An endless iterator of batches."""
        config, data = self.config, self.workload.train_data()
        pool = config.bucket_samples if "buckets" in self.on else 1
        order = BatchOrder(
            data.lengths,
            config.batch_size,
            group=config.grad_accumulation,
            bucket_samples=pool,
            seed=config.seed,
            draw=self.workload.draw_epoch,
        )
        if "loader" in self.on:
            workers = config.num_workers or max(1, min(8, self.capabilities.cores - 1))
            return train_batches(
                self.workload,
                data,
                order,
                start=(epoch, 0),
                num_workers=workers,
                device=self.device,
                pin_memory=self.device.type == "cuda",
            )
        reader = BatchReader(self.workload, data)
        return (reader[indices].to(self.device) for indices in order.from_position(epoch, 0))

    def step(self) -> None:
        """One update over `grad_accumulation` batches, at a constant learning rate."""
        group = [next(self.batches) for _ in range(self.config.grad_accumulation)]
        self.losses.append(self.backward(group))
        if "no waiting" in self.on:
            self._update()
        else:
            self._update_and_wait()
        self.optimizer.zero_grad()

    def backward(self, group: Sequence[Batch]) -> float | Tensor:
        """Compute the gradients of the mean loss over the batches; returns that loss."""
        group = [batch for batch in group if batch.num_samples]
        weights = self.workload.loss_weights
        totals = {name: sum(batch.counts[name] for batch in group) for name in weights}
        total: float | Tensor = 0.0
        for batch in group:
            with autocast(self.device, "bf16" if "bf16" in self.on else "fp32"):
                sums = self.loss_sums(batch.inputs)
            terms = [weight * sums[name] / totals[name] for name, weight in weights.items() if totals[name]]
            loss = torch.stack(terms).sum()
            torch.autograd.backward(loss)
            self.tokens += batch.num_tokens
            self.slots += batch.num_slots
            if "no waiting" in self.on:
                self.meter.add(sums, batch.counts)
                total = total + loss.detach()
            else:
                # Each number is a wait for the device.
                total += loss.item()
                _ = {name: value.item() / max(1, batch.counts[name]) for name, value in sums.items()}
        return total

    def reset(self) -> None:
        """Clear gradients and counters, and seed the random numbers again."""
        self.optimizer.zero_grad()
        self.meter.reset()
        self.tokens = self.slots = 0
        torch.manual_seed(self.config.seed)

    def _update_and_wait(self) -> None:
        """The common way: `.item()` for each parameter's norm, decisions on the host."""
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = math.sqrt(sum(grad.norm().item() ** 2 for grad in grads))
        limit = self.config.max_grad_norm
        if limit is not None and norm > limit:
            for grad in grads:
                grad.mul_(limit / norm)
        if math.isfinite(norm):
            self.optimizer.step()

    def _update(self) -> None:
        """Norm, clip and finite check on the device."""
        limit = self.config.max_grad_norm
        if "prodigy" in self.on and "our prodigy" not in self.on:
            # prodigyopt supports no found_inf, and waits twice per parameter in any case.
            norm = nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
            if limit is not None:
                nn.utils.clip_grads_with_norm_(self.params, limit, norm)
            self.optimizer.step()
        else:
            update(self.optimizer, lr=self.optimizer.param_groups[0]["lr"], max_grad_norm=limit)

    def synchronize(self) -> None:
        """Wait until the device has finished all work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@contextlib.contextmanager
def apply_switches(on: frozenset[str]) -> Iterator[None]:
    """torch's switches, and all logits at once: chunks are an optimization of the trainer."""
    torch.backends.cudnn.benchmark = "cudnn" in on
    # As the trainer sets it: after the newer `fp32_precision`, reading this one is an error, and torch.compile may.
    torch.set_float32_matmul_precision("high" if "tf32" in on else "highest")
    chunk, cross_entropy.CHUNK_LOGITS = cross_entropy.CHUNK_LOGITS, sys.maxsize
    try:
        with contextlib.nullcontext() if "sdpa" in on else sdpa_kernel([SDPBackend.MATH]):
            yield
    finally:
        cross_entropy.CHUNK_LOGITS = chunk
