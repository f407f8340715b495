"""The loss of a batch as one compiled function, its code kept on disk for the next run.

What is compiled is `Workload.loss_sums`: forward and loss together, as one graph whose lengths are symbols, so that
batches of all lengths share it. Validation stays eager: it is short, and its graph would be another one.
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
from trainer.workload import Workload

log = logging.getLogger(__name__)


class TrainingLoss:
    """`workload.loss_sums` of one model, compiled at the first call if `compile`.

    Args:
        required: A model that can't be compiled as one graph is an error; else that is said, and the run is eager.
            By then nothing has been computed, so the numbers are those of an eager run.
        expected_seconds: How long compilation will take, roughly; said beforehand.
    """

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        *,
        compile: bool,
        required: bool = False,
        expected_seconds: float = 0.0,
    ) -> None:
        self._workload, self._model, self._required = workload, model, required
        self._expected_seconds = expected_seconds
        self._waiting = compile
        self._compiled: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
        if compile:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder()))
            # All models of a process share one limit of graphs; those of earlier trials are of no use, and on disk.
            torch._dynamo.reset()
            # Else the backward pass is compiled when it first runs, and fails there, in the middle of a step.
            torch._functorch.config.force_non_lazy_backward_lowering = True
            # Two lengths that happen to agree in the first batch shall be two symbols all the same.
            torch.fx.experimental._config.use_duck_shape = False
            self._compiled = torch.compile(self._eager, fullgraph=True, dynamic=True)

    def _eager(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._workload.loss_sums(self._model, inputs)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of `Workload.loss_sums`. Raises UserError where a graph is required and there can't be one."""
        if self._compiled is None:
            return self._eager(inputs)
        started = time.perf_counter()
        if self._waiting:
            log.warning("compiling forward and loss: about %.0f s of silence", self._expected_seconds)
        try:
            sums = self._compiled(inputs)
        except _failures() as error:
            reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])
            if self._required:
                raise UserError(
                    f'train.compile "on": loss_sums can\'t be compiled as one graph ({reason}): use "auto" or "off".'
                ) from error
            log.warning("compile: off: loss_sums can't be compiled as one graph (%s)", reason)
            self._compiled = None
            return self._eager(inputs)
        if self._waiting:
            self._waiting = False
            log.info("compiled in %.1f s", time.perf_counter() - started)
            mark = _mark(self._workload, self._model)
            with suppress(OSError):  # a closed folder: the next run compiles again
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()
        return sums


def _failures() -> tuple[type[Exception], ...]:
    """What torch raises where code can't be compiled, or would have to be compiled without end. Asked for only then:
    importing it takes a second."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, FailOnRecompileLimitHit, InductorError


def cache_folder() -> Path:
    """Where compiled code lies: $TORCHINDUCTOR_CACHE_DIR, else a folder that outlives a restart of the machine."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(home) / "prodigy-tuner" / "inductor")


def compiled_before(workload: Workload, model: nn.Module) -> bool:
    """Whether such a model was compiled on such a device by this version of PyTorch."""
    return _mark(workload, model).exists()


def _mark(workload: Workload, model: nn.Module) -> Path:
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    options = workload.model_dump_json(include=set(identity_fields(type(workload))))
    shapes = [(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]
    key = repr((torch.__version__, name, type(workload).__qualname__, options, shapes)).encode()
    return cache_folder() / f"compiled-{hashlib.sha256(key).hexdigest()[:16]}"
