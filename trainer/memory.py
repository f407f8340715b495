"""Estimates a run's peak memory beforehand, by running one step under torch's FakeTensorMode.

    probe = Probe(workload, config, device="cuda", precision="bf16")
    print(probe.estimate().total, probe.largest_batch_size(24e9))

FakeTensorMode knows shapes and computes nothing. Model, loss, backward pass, optimizer step and validation run in it,
and the live bytes are counted operation by operation. 500 M parameters take some seconds and hardly any memory, on any
machine: CUDA's attention and dropout replace the CPU's, so the estimate for a GPU needs no GPU. The batch holds the
longest samples, because the peak has to fit.

Not counted: buffers inside one operation, and on CUDA the context, the libraries' workspaces and the rounding of the
caching allocator, which `allowance` covers. CUDA's autocast is assumed to choose the same precisions as the CPU's. A
compiled model is estimated as if it were eager.
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
"""Buffers of cuBLAS, of cuDNN, and of the flash kernel's backward pass."""
CUDA_PAD_MULTIPLE = 8
"""As in an acceleration plan."""
CUDA_ROUNDING = 0.05
"""Share of the tensors' bytes that the caching allocator loses to rounding and fragmentation."""


class NoEstimate(Exception):
    """The model can't run under FakeTensorMode; the message gives the reason."""


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory that a run needs, in bytes of device memory unless noted."""

    batch_size: int
    num_slots: int
    """Tokens that go through the model at once, with padding: the batch, or a micro-batch, of the longest samples."""
    parameters: int
    """Buffers included."""
    weights: int
    """In a checkpoint: the model's state dict."""
    gradients: int
    optimizer_state: int
    activations: int
    """The batch, tensors saved for the backward pass, and temporary buffers, at their peak; without gradients."""
    training_peak: int
    """At the peak of forward and backward. Below the sum of the four above if that peak comes before the gradients
    exist."""
    step_peak: int
    """At the peak of the optimizer step."""
    evaluation_peak: int
    """At the peak of a validation."""
    allowance: int
    """For memory that can't be counted beforehand; 0 on a CPU."""

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
        """Bytes of a checkpoint on disk, and of its snapshot in host memory. If less than twice as much is free,
        there is no snapshot, and training waits for the write."""
        return self.weights + self.optimizer_state

    def fits(self, available: float) -> bool:
        """Whether a device with `available` free bytes can train it."""
        return self.total <= available


def estimate(workload: Workload, config: TrainConfig, *, device: str, precision: str) -> MemoryEstimate:
    """Estimate the memory of a run under `config`.

    Args:
        device: "cuda" or "cpu": the device whose operations are assumed. This machine need not have it.
        precision: "bf16" or "fp32", as in an acceleration plan.

    Raises:
        NoEstimate: The model or the loss needs the values of its tensors.
        UserError: The data can't be read.
    """
    return Probe(workload, config, device=device, precision=precision).estimate()


def available_memory(device: str) -> int:
    """Bytes that a new run may take: the free memory of the current CUDA device; on a CPU that of the machine, or of
    the control group (a container's limit) if that is less."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        # The caching allocator keeps memory that an earlier run of this process released, and will reuse it.
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        # The query has created a context, which the estimate counts, too.
        return min(total, free + CUDA_CONTEXT)
    free_here, left = psutil.virtual_memory().available, memory_left()
    return free_here if left is None else min(free_here, left)


class Probe:
    """Builds a model under FakeTensorMode once, then estimates batch sizes. An estimate takes about a second.

    Args:
        contents: Use real tensors and compute: the reference in tests of the estimates.
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
            self.weights = storage_bytes(self.model.state_dict().values())
        self._resident = [*self.model.parameters(), *self.model.buffers()]
        self.parameters = storage_bytes(self._resident)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.num_trained = sum(parameter.numel() for parameter in trained)
        self.gradients = storage_bytes(trained)

    @classmethod
    def on_device(cls, workload: Workload, config: TrainConfig, capabilities: Capabilities) -> Probe:
        """A probe for a device, in the precision that an acceleration plan would choose for the model."""
        probe = cls(workload, config, device=capabilities.kind, precision="fp32")
        probe.precision, _ = choose_precision(capabilities, config, probe.num_trained)
        return probe

    def estimate(self, batch_size: int | None = None, *, micro_batch_size: int | None = None) -> MemoryEstimate:
        """Estimate the run with this batch size and micro-batch size, or the configuration's.

        "auto" counts as the batch size; `trainer.micro_batches` decides it.

        Raises:
            NoEstimate, UserError: As in `estimate` of this module.
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
            weights=self.weights,
            gradients=self.gradients,
            optimizer_state=state,
            activations=activations,
            training_peak=training_peak,
            step_peak=step_peak,
            evaluation_peak=evaluation_peak,
            allowance=allowance(peak) if self.device == "cuda" else 0,
        )

    def largest_batch_size(self, available: float) -> int:
        """The largest batch size that fits into `available` bytes; 0 if none does. Takes about four estimates.

        Memory grows by the same amount with each sample: a line through two estimates predicts the size, and two more
        estimates confirm it.
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
        """Count under FakeTensorMode, with the device's operations. The process's random state does not change."""
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
        """A step of the training loop without its update, over `number` such batches or micro-batches.

        Only two are run: the second starts with the gradients of the first, as all later ones do.
        """
        group = [self._inputs(batch, live) for _ in range(min(number, 2))]
        waiting = torch.empty(max(0, number - 2) * storage_bytes(group[0].values()), dtype=torch.uint8)
        weights = self.workload.loss_weights
        for inputs in group:
            with autocast(torch.device("cpu"), self.precision):
                sums = self.workload.loss_sums(self.model, inputs)
            terms = [weight * sums[name] / batch.counts[name] for name, weight in weights.items() if batch.counts[name]]
            loss = torch.stack(terms).sum()
            # As torch.autograd.backward, which would disable our function mode: recomputed activations (gradient
            # checkpointing) would then use the CPU's operations.
            _engine_run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
        del waiting

    @cached_property
    def _step(self) -> tuple[int, int]:
        """(bytes of the optimizer's state, bytes at the peak of a step), the same for every batch size."""
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
            # The kernels work in place. Fake tensors took PyTorch's operations, whose temporary buffers do not count.
            peak = self.parameters + self.gradients + state
        return state, peak

    def _has_kernels(self) -> bool:
        if self.device == "cuda" and not torch.cuda.is_available():
            return True
        return has_kernels(torch.device(self.device))

    @cached_property
    def _evaluation_peak(self) -> int:
        """At the peak of a validation, without the optimizer's state."""
        data, config = self.workload.val_data(), self.config
        part_of = self.workload.val_part
        batches = validation_batches(data.lengths, config.val_samples, seed=config.val_seed, part_of=part_of)
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
    """Bytes that a CUDA device needs besides those of the tensors: a cautious rule of thumb."""
    return CUDA_CONTEXT + CUDA_WORKSPACES + int(CUDA_ROUNDING * peak)


def read_samples(data: Dataset, indices: Sequence[int] | np.ndarray, number: int) -> tuple[list[Any], str]:
    """Returns the first `number` readable samples, and the error of the last damaged one.

    They are fewer if the indices end, or after 100 damaged samples in a row.
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
