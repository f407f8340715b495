"""The loss of a batch as one compiled function, its code kept on disk for the next run.

`Workload.loss_sums` is compiled: forward and loss as one graph with symbolic lengths, shared by batches of all lengths.
Validation stays eager: it is short, and would need a graph of its own.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.config import identity_fields
from trainer.errors import UserError
from trainer.ranks import ALONE, Ranks, ReducedLoss
from trainer.workload import Workload

log = logging.getLogger(__name__)


class TrainingLoss:
    """`workload.loss_sums` of one model, compiled at the first call if `compile`.

    Args:
        required: Raise if the model can't be compiled as one graph; otherwise log a warning and run eagerly.
            Compilation fails before anything is computed, so the numbers are those of an eager run.
        expected_seconds: Rough compilation time, logged beforehand.
        ranks: The gradients become the mean over them.
    """

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        *,
        compile: bool,
        required: bool = False,
        expected_seconds: float = 0.0,
        ranks: Ranks = ALONE,
    ) -> None:
        self._workload, self._model, self._required = workload, model, required
        self._expected_seconds = expected_seconds
        self._waiting = compile
        self._compiled: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
        self._ones: set[tuple[str, int]] = set()
        """The axes of length 1 of the compiled graph. torch compiles these as constants, never as symbols."""
        if compile:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder()))
            # All models of a process share one limit on graphs. Those of earlier trials are no longer needed.
            torch._dynamo.reset()
            # By default the backward pass is compiled when it first runs, and would fail in the middle of a step.
            torch._functorch.config.force_non_lazy_backward_lowering = True
            # Two lengths that are equal in the first batch by chance must still be two symbols.
            torch.fx.experimental._config.use_duck_shape = False
            self._compiled = torch.compile(self._eager, fullgraph=True, dynamic=True)
        # Its hooks are outside of the compiled graph.
        self._reduced = ReducedLoss(model, self._compute) if ranks.count > 1 else None

    def _eager(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._workload.loss_sums(self._model, inputs)

    def __call__(self, inputs: Mapping[str, Tensor], *, is_last: bool = True) -> dict[str, Tensor]:
        """The sums of `Workload.loss_sums`; zeros without inputs.

        Args:
            is_last: Of the micro-batches of a step; gradients are reduced over the ranks with that one.

        Raises:
            UserError: A graph is required and compilation fails.
        """
        return self._compute(inputs) if self._reduced is None else self._reduced(inputs, is_last=is_last)

    def _compute(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not inputs:
            # All samples of this rank are damaged. The other ranks wait for a gradient of each parameter.
            zeros = [p.sum() * 0 for p in self._model.parameters() if p.requires_grad]
            return dict.fromkeys(self._workload.loss_weights, torch.stack(zeros).sum())
        ones = {(name, axis) for name, tensor in inputs.items() for axis, size in enumerate(tensor.shape) if size == 1}
        # A last micro-batch of one sample, or all but one of a batch damaged: not worth a graph of its own. If the
        # first batch was such a one, the next one is compiled instead, or all others would run eagerly.
        if self._compiled is None or not (self._waiting or ones <= self._ones):
            return self._eager(inputs)
        started = time.perf_counter()
        if self._waiting:
            log.warning("compiling forward and loss: about %.0f s of silence", self._expected_seconds)
        try:
            sums = self._compiled(inputs)
        except _compilation_errors() as error:
            reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])
            if self._required:
                raise UserError(
                    f'train.compile "on": loss_sums can\'t be compiled as one graph ({reason}): use "auto" or "off".'
                ) from error
            log.warning("compile: off: loss_sums can't be compiled as one graph (%s)", reason)
            self._compiled = None
            return self._eager(inputs)
        self._ones = ones
        if self._waiting:
            self._waiting = False
            log.info("compiled in %.1f s", time.perf_counter() - started)
            mark = _mark(self._workload, self._model)
            with suppress(OSError):  # an unwritable folder: the next run compiles again
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()
        return sums


def _compilation_errors() -> tuple[type[Exception], ...]:
    """Torch's errors for code that can't be compiled, or would be recompiled without end. Imported only after an
    error: the import takes a second."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, FailOnRecompileLimitHit, InductorError


def cache_folder() -> Path:
    """The folder of compiled code: $TORCHINDUCTOR_CACHE_DIR, else one that survives a reboot."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(home) / "prodigy-tuner" / "inductor")


def was_compiled(workload: Workload, model: nn.Module) -> bool:
    """Whether this version of PyTorch has compiled such a model on such a device."""
    return _mark(workload, model).exists()


def _mark(workload: Workload, model: nn.Module) -> Path:
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    options = workload.model_dump_json(include=set(identity_fields(type(workload))))
    shapes = [(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]
    key = repr((torch.__version__, name, type(workload).__qualname__, options, shapes)).encode()
    return cache_folder() / f"compiled-{hashlib.sha256(key).hexdigest()[:16]}"
