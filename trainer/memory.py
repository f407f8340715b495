"""How much memory a run will need, said beforehand: the model's own code runs on tensors without contents.

    probe = Probe(workload, config, device="cuda", precision="bf16")
    print(probe.estimate().total, probe.largest_batch_size(24e9))

Model, loss, backward pass, optimizer step and validation run under torch's FakeTensorMode, which knows shapes and
computes nothing, and the bytes that live are counted operation by operation. 500 M parameters take some seconds and
no memory worth speaking of, on any machine: CUDA's attention and dropout are put in place of the CPU's, so a card can
be judged where there is none. The batch is of the longest samples, for the peak is what has to fit.

What is not seen: buffers inside one operation, and on CUDA the context, the libraries' workspaces and what the caching
allocator loses by rounding, for which `allowance` stands. CUDA's autocast is taken to choose the precisions that the
CPU's does. A compiled model is judged as if it were not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.autograd.graph import _engine_run_backward

from trainer.acceleration import Capabilities, choose_precision
from trainer.cgroup import memory_left
from trainer.checkpoint import tensors_in
from trainer.config import TrainConfig
from trainer.data.batching import validation_batches
from trainer.errors import DamagedSample, UserError, first_line
from trainer.evaluation import autocast
from trainer.live_bytes import CudaOperations, LiveBytes, storage_bytes
from trainer.optimizers import build_optimizer, update
from trainer.prodigy import Prodigy
from trainer.prodigy.kernels import has_kernels
from trainer.workload import Batch, Dataset, Workload

CUDA_CONTEXT = 500_000_000
"""Bytes that a process takes on a CUDA device before it holds a tensor; 0.3 to 0.6 GB by driver and device."""
CUDA_WORKSPACES = 100_000_000
"""cuBLAS's and cuDNN's own buffers, and those of the flash kernel's backward pass."""
CUDA_PAD_MULTIPLE = 8
"""As an acceleration plan has it."""
CUDA_ROUNDING = 0.05
"""Share of the tensors' bytes that the caching allocator loses to rounding and fragmentation."""


class NoEstimate(Exception):
    """The model can't run without contents; the message says why."""


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run needs, in bytes of device memory where nothing else is said."""

    batch_size: int
    num_slots: int
    """Tokens that go through the model at once, with padding: the batch, or a micro-batch, of the longest samples."""
    parameters: int
    """Buffers included."""
    gradients: int
    optimizer_state: int
    activations: int
    """The batch, what the backward pass needs, and temporary buffers, at their peak; gradients aside."""
    training_peak: int
    """At the peak of forward and backward. Below the sum of the four above where that peak falls before the gradients
    are there."""
    step_peak: int
    """At the peak of the optimizer step."""
    evaluation_peak: int
    """At the peak of a validation."""
    allowance: int
    """For what can't be counted beforehand; 0 on a CPU."""

    @property
    def peak(self) -> int:
        """Bytes of tensors at the run's peak."""
        return max(self.training_peak, self.step_peak, self.evaluation_peak)

    @property
    def total(self) -> int:
        """Bytes that the device must have."""
        return self.peak + self.allowance

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint on disk, and of its snapshot in host memory, where that has twice as much free;
        training waits while it is written where it has not."""
        return self.parameters + self.optimizer_state

    def fits(self, available: float) -> bool:
        """Whether a device with so many bytes free can train it."""
        return self.total <= available


def estimate(workload: Workload, config: TrainConfig, *, device: str, precision: str) -> MemoryEstimate:
    """What a run under `config` needs.

    Args:
        device: "cuda" or "cpu": whose operations are assumed. It need not be there.
        precision: "bf16" or "fp32", as an acceleration plan says it.

    Raises:
        NoEstimate: The model or the loss needs the values of its tensors.
        UserError: The data can't be read.
    """
    return Probe(workload, config, device=device, precision=precision).estimate()


def available_memory(device: str) -> int:
    """Bytes that a new run may take: free on the current CUDA device, or of the machine's memory and of what its
    control group (a container's limit) leaves."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        # What an earlier run of this process gave back, the caching allocator keeps; it will be used again.
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        # Asking has cost a context, which the estimate counts too.
        return min(total, free + CUDA_CONTEXT)
    free_here, left = psutil.virtual_memory().available, memory_left()
    return free_here if left is None else min(free_here, left)


class Probe:
    """A run without contents: built once, then asked about batch sizes. An estimate takes about a second.

    Args:
        contents: Use real tensors after all, and compute. The reference that the estimates are tested against.
    """

    def __init__(
        self, workload: Workload, config: TrainConfig, *, device: str, precision: str, contents: bool = False
    ) -> None:
        self.workload, self.config, self.device = workload, config, device
        self.precision = precision
        self._fake = None if contents else FakeTensorMode()
        self._data = workload.train_data()
        with self._counting():
            self.model = workload.build_model().train()
        self._resident = [*self.model.parameters(), *self.model.buffers()]
        self.parameters = storage_bytes(self._resident)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.num_trained = sum(parameter.numel() for parameter in trained)
        self.gradients = storage_bytes(trained)

    @classmethod
    def on_device(cls, workload: Workload, config: TrainConfig, capabilities: Capabilities) -> Probe:
        """A probe of a run on a device, in the precision that an acceleration plan would choose for the model."""
        probe = cls(workload, config, device=capabilities.kind, precision="fp32")
        probe.precision, _ = choose_precision(capabilities, config, probe.num_trained)
        return probe

    def estimate(self, batch_size: int | None = None, *, micro_batch_size: int | None = None) -> MemoryEstimate:
        """What the run needs, with this batch size and micro-batch size or the configuration's.

        "auto" is taken for the batch size; `trainer.micro_batches` decides it.

        Raises:
            NoEstimate, UserError: As `estimate` of this module.
        """
        batch_size = batch_size or self.config.batch_size
        sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size or self.config.micro_batch_size}
        num_micro_batches = self.config.model_copy(update=sizes).num_micro_batches
        batch = self._longest(math.ceil(batch_size / num_micro_batches))
        with self._counting() as live:
            live.add(self._resident)
            self._forward_backward(batch, live, self.config.grad_accumulation * num_micro_batches)
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            activations = live.peak_without(gradients) - self.parameters
            training_peak = live.peak
            del gradients
            self.model.zero_grad()
        state, step_peak = self._step
        training_peak += state
        evaluation_peak = self._evaluation_peak + state
        peak = max(training_peak, step_peak, evaluation_peak)
        return MemoryEstimate(
            batch_size=batch_size,
            num_slots=batch.num_slots,
            parameters=self.parameters,
            gradients=self.gradients,
            optimizer_state=state,
            activations=activations,
            training_peak=training_peak,
            step_peak=step_peak,
            evaluation_peak=evaluation_peak,
            allowance=allowance(peak) if self.device == "cuda" else 0,
        )

    def largest_batch_size(self, available: float) -> int:
        """The largest batch size that fits into so many bytes; 0 where none does. Some four estimates.

        Memory grows by the same amount with each sample, so a straight line through two estimates finds the place,
        and two more prove it.
        """
        first = last = self.estimate(1)
        if not first.fits(available):
            return 0
        low, high = 1, len(self._data) + 1
        guess = max(2, self.config.batch_size)
        while high - low > 1:
            last, before = self.estimate(min(max(guess, low + 1), high - 1)), last
            low, high = (last.batch_size, high) if last.fits(available) else (low, last.batch_size)
            slope = (last.total - before.total) / (last.batch_size - before.batch_size)
            guess = last.batch_size + int((available - last.total) // slope) if slope > 0 else 2 * last.batch_size
        return low

    @contextmanager
    def _counting(self) -> Iterator[LiveBytes]:
        """Run without contents, as on the device, and count; the process' random state stays as it was."""
        live = LiveBytes()
        with torch.random.fork_rng(devices=[]):
            try:
                if self._fake is None:
                    with live:
                        yield live
                elif self.device == "cuda":
                    with self._fake, live, CudaOperations(attention=self.config.sdpa != "math"):
                        yield live
                else:
                    with self._fake, live:
                        yield live
            except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
                raise NoEstimate(f"the model reads the values of its tensors ({first_line(error)})") from error
            except RuntimeError as error:
                if "not supported for tensor subclasses" not in str(error):
                    raise
                raise NoEstimate(f"the model reads the values of its tensors ({first_line(error)})") from error

    def _inputs(self, batch: Batch, live: LiveBytes) -> dict[str, Tensor]:
        inputs = batch.inputs
        if self._fake is not None:
            inputs = {name: self._fake.from_tensor(tensor) for name, tensor in inputs.items()}
        live.add(inputs.values())
        return inputs

    def _forward_backward(self, batch: Batch, live: LiveBytes, number: int) -> None:
        """One step of the training loop but its update, over so many such batches or micro-batches.

        A second one finds the gradients of the first, and a third finds what the second did.
        """
        group = [self._inputs(batch, live) for _ in range(min(number, 2))]
        waiting = torch.empty(max(0, number - 2) * storage_bytes(group[0].values()), dtype=torch.uint8)
        weights = self.workload.loss_weights
        for inputs in group:
            with autocast(torch.device("cpu"), self.precision):
                sums = self.workload.loss_sums(self.model, inputs)
            terms = [weight * sums[name] / batch.counts[name] for name, weight in weights.items() if batch.counts[name]]
            loss = torch.stack(terms).sum()
            # What torch.autograd.backward does, but that switches our function mode off, and recomputed activations
            # (gradient checkpointing) would then be the CPU's.
            _engine_run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
        del waiting

    @cached_property
    def _step(self) -> tuple[int, int]:
        """Bytes of the optimizer's state, and at the peak of a step. Both are the same for every batch size."""
        with self._counting() as live:
            live.add(self._resident)
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer = build_optimizer(self.model, self.config)
            update(optimizer, lr=self.config.base_lr, max_grad_norm=self.config.max_grad_norm)
            peak = live.peak
            state = storage_bytes(tensors_in([*optimizer.state.values()]))
            self.model.zero_grad()
        if isinstance(optimizer, Prodigy) and optimizer.use_kernels and self._has_kernels():
            # They read and write in place; tensors without contents take the operations that stand in for them.
            peak = self.parameters + self.gradients + state
        return state, peak

    def _has_kernels(self) -> bool:
        if self.device == "cuda" and not torch.cuda.is_available():
            return True
        return has_kernels(torch.device(self.device))

    @cached_property
    def _evaluation_peak(self) -> int:
        """At the peak of a validation, the optimizer's state aside."""
        data, config = self.workload.val_data(), self.config
        batches = validation_batches(data.lengths, config.val_samples, seed=config.val_seed)
        largest = max(batches, key=lambda indices: len(indices) * int(data.lengths[indices].max()))
        samples, _ = read_samples(data, largest, len(largest))
        if not samples:
            return 0
        batch = self.workload.collate(samples)
        with self._counting() as live:
            live.add(self._resident)
            inputs = self._inputs(batch, live)
            self.model.eval()
            with torch.no_grad(), autocast(torch.device("cpu"), self.precision):
                self.workload.loss_sums(self.model, inputs)
            self.model.train()
            return live.peak

    @cached_property
    def _by_length(self) -> np.ndarray:
        """All samples, the longest first."""
        return np.argsort(self._data.lengths)[::-1]

    def _longest(self, batch_size: int) -> Batch:
        """A batch of the longest samples that can be read, collated as the loader does."""
        samples, damage = read_samples(self._data, self._by_length, batch_size)
        if len(samples) < batch_size:
            raise UserError(
                f"of {len(self._data)} training samples {len(samples)} could be read, too few for a batch of "
                f"{batch_size}: use a smaller train.batch_size or more data." + (f" {damage}" if damage else "")
            )
        return self.workload.collate(samples, CUDA_PAD_MULTIPLE if self.device == "cuda" else 1)


def allowance(peak: int) -> int:
    """Bytes that a CUDA device must have beyond those of the tensors: a rule of thumb, to be on the safe side."""
    return CUDA_CONTEXT + CUDA_WORKSPACES + int(CUDA_ROUNDING * peak)


def read_samples(data: Dataset, indices: Sequence[int] | np.ndarray, number: int) -> tuple[list[Any], str]:
    """The first `number` of these samples that can be read, and what is wrong with the last one that can't.

    They are fewer where the indices end, or where 100 damaged ones came in a row.
    """
    samples: list[Any] = []
    damage, num_damaged = "", 0
    for index in indices:
        if len(samples) == number or num_damaged == 100:
            break
        try:
            samples.append(data[int(index)])
            num_damaged = 0
        except DamagedSample as error:
            damage, num_damaged = str(error), num_damaged + 1
    return samples, damage
