"""The same training by several frameworks. Each contender trains until its `Turn` raises `Finished`.

All of them use the workload's model, data and collate, Prodigy with the same hyperparameters, gradients clipped
at 1.0, the precision that `trainer.acceleration` selects for the device, and no loader workers, logging, validation
or checkpoints. The frameworks are configured for speed, as an experienced user would:

- batches of similar length by transformers' own LengthGroupedSampler, for Lightning too, which has none; the lengths
  are passed to it: from this dataset it would have to read every sample
- Lightning without logger, progress bar, summary and checkpoints; transformers without its check of the loss for
  NaN, which waits for the device at every step
- prodigyopt's Prodigy, as their users have
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from studies.indextts2 import IndexTTS2
from trainer.acceleration import AccelerationPlan, apply
from trainer.config import TrainConfig
from trainer.data.batching import BatchOrder
from trainer.data.loader import train_batches
from trainer.evaluation import autocast
from trainer.loop import train
from trainer.prodigy import Prodigy


class Finished(Exception):
    """The benchmark is over; raised out of a contender's training."""


@dataclass(frozen=True)
class Report:
    """A contender's work in one turn."""

    seconds: float
    steps: int
    tokens: int
    """Real tokens."""
    slots: int
    """Tokens with padding."""
    loss: float
    """Mean over the turn's steps."""


class Turn:
    """A contender's clock: after `steps` steps it reports, and waits for the contender's next turn.

    The reports go to the other end of `connection`, which sends True for one more turn and False for the end.
    """

    def __init__(self, connection: Connection, steps: int) -> None:
        self.connection, self.steps = connection, steps
        self.loss: Tensor | float = 0.0
        self._wait()

    def add(self, tokens: int, slots: int, loss: Tensor | float) -> None:
        """Count a batch, or several with the sum of their losses. Does not wait for the device."""
        self.tokens += tokens
        self.slots += slots
        self.loss = self.loss + loss

    def step(self, steps: int = 1) -> None:
        """Count optimizer steps; at the turn's end, report and wait. Raises Finished after the last turn."""
        self.count += steps
        if self.count < self.steps:
            return
        loss = float(self.loss) / self.count  # waits for the device
        seconds = time.perf_counter() - self.started
        self.connection.send(Report(seconds, self.count, self.tokens, self.slots, loss))
        self._wait()

    def _wait(self) -> None:
        if not self.connection.recv():
            raise Finished
        self.count = self.tokens = self.slots = 0
        self.loss = 0.0
        self.started = time.perf_counter()


@dataclass(frozen=True)
class Task:
    """A training: the workload, its configuration and the acceleration plan."""

    workload: IndexTTS2
    config: TrainConfig
    plan: AccelerationPlan
    """As trainer.acceleration makes it without compilation; `train()` makes its own."""

    @property
    def bf16(self) -> bool:
        return self.plan.precision == "bf16"

    def optimizer(self, build: Callable[..., torch.optim.Optimizer], model: nn.Module) -> torch.optim.Optimizer:
        c = self.config
        assert c.optimizer == "prodigy" and c.schedule == "none" and not c.warmup_steps and c.grad_accumulation == 1
        names = ("weight_decay", "use_bias_correction", "safeguard_warmup", "d0", "d_coef", "slice_p")
        options = {name: getattr(c, name) for name in names}
        return build(model.parameters(), lr=c.base_lr, betas=(c.beta1, c.beta2), **options)

    def collate(self, samples: Sequence[Any]) -> dict[str, Any]:
        """The workload's batch in the frameworks' form. The counts are tensors: torch.compile would compile numbers
        in as constants."""
        batch = self.workload.collate(samples)
        counts = {name: torch.tensor(count) for name, count in batch.counts.items()}
        return {"inputs": batch.inputs, "counts": counts, "tokens": batch.num_tokens, "slots": batch.num_slots}

    def sampler(self) -> torch.utils.data.Sampler[int]:
        from transformers.trainer_pt_utils import LengthGroupedSampler

        lengths = self.workload.train_data().lengths.tolist()
        sampler: torch.utils.data.Sampler[int] = LengthGroupedSampler(self.config.batch_size, lengths=lengths)
        return sampler


class WithLoss(nn.Module):
    """The workload's model and its loss in one forward: the frameworks call, and can compile, it as a whole."""

    def __init__(self, workload: IndexTTS2) -> None:
        super().__init__()
        self.model = workload.build_model()
        self.weights = dict(workload.loss_weights)

    def forward(self, inputs: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sums = self.model(inputs)
        terms = [weight * sums[name] / counts[name] for name, weight in self.weights.items()]
        return {"loss": torch.stack(terms).sum()}


def transformers(task: Task, turn: Turn, *, compiled: bool = False) -> None:
    import prodigyopt
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class EndOfStep(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn.step()

    class Grouped(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
            # As train_sampling_strategy="group_by_length" does, with the known lengths.
            return task.sampler()

        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            tokens, slots = inputs.pop("tokens"), inputs.pop("slots")
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            turn.add(tokens, slots, loss.detach())
            return loss

    model, config = WithLoss(task.workload), task.config
    optimizer = task.optimizer(prodigyopt.Prodigy, model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=config.num_steps,
            per_device_train_batch_size=config.batch_size,
            max_grad_norm=config.max_grad_norm,
            bf16=task.bf16,
            tf32=task.plan.tf32 or None,
            use_cpu=task.plan.device == "cpu",
            torch_compile=compiled,
            dataloader_drop_last=True,
            dataloader_pin_memory=task.plan.device == "cuda",
            remove_unused_columns=False,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Grouped(
            model,
            arguments,
            train_dataset=task.workload.train_data(),
            data_collator=task.collate,
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
            callbacks=[EndOfStep()],
        ).train()


def lightning(task: Task, turn: Turn, *, compiled: bool = False) -> None:
    import lightning as L
    import prodigyopt

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = WithLoss(task.workload)
            if compiled:
                self.model.compile()

        def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
            loss: Tensor = self.model(batch["inputs"], batch["counts"])["loss"]
            turn.add(batch["tokens"], batch["slots"], loss.detach())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return task.optimizer(prodigyopt.Prodigy, self.model)

    class EndOfStep(L.Callback):
        def on_train_batch_end(self, *_: Any, **__: Any) -> None:
            turn.step()

    data: Any = task.workload.train_data()
    loader = torch.utils.data.DataLoader[Any](
        data,
        batch_size=task.config.batch_size,
        sampler=task.sampler(),
        collate_fn=task.collate,
        drop_last=True,
        pin_memory=task.plan.device == "cuda",
    )
    L.Trainer(
        accelerator=task.plan.device,
        devices=1,
        precision="bf16-mixed" if task.bf16 else "32-true",
        max_steps=task.config.num_steps or -1,
        gradient_clip_val=task.config.max_grad_norm,
        benchmark=task.plan.cudnn_benchmark,
        callbacks=[EndOfStep()],
        barebones=True,
    ).fit(Module(), loader)


def bare_loop(task: Task, turn: Turn) -> None:
    """The least code that trains on our batches with our optimizer, which clips within its step."""
    workload, config, device = task.workload, task.config, torch.device(task.plan.device)
    model = workload.build_model().to(device)
    optimizer: Any = task.optimizer(Prodigy, model)
    data = workload.train_data()
    order = BatchOrder(data.lengths, config.batch_size, bucket_samples=config.bucket_samples, seed=config.seed)
    weights, max_grad_norm = workload.loss_weights, config.max_grad_norm
    for batch in train_batches(
        workload,
        data,
        order,
        start=(0, 0),
        num_workers=task.plan.num_workers,
        device=device,
        pin_memory=task.plan.pin_memory,
        pad_multiple=task.plan.pad_multiple,
    ):
        with autocast(device, task.plan.precision):
            sums = model(batch.inputs)
        loss = sum(weight * sums[name] / batch.counts[name] for name, weight in weights.items())
        loss.backward()
        optimizer.grad_scale = (optimizer.grad_norm() / max_grad_norm).clamp(min=1.0)
        optimizer.step()
        optimizer.zero_grad()
        turn.add(batch.num_tokens, batch.num_slots, loss.detach())
        turn.step()


class _TurnTracker:
    """A tracker that passes the metrics of each log interval to the turn."""

    def __init__(self, turn: Turn, batch_size: int) -> None:
        self.turn, self.batch_size, self.last_step = turn, batch_size, 0

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        steps, self.last_step = step - self.last_step, step
        tokens = steps * self.batch_size * values["train/tokens_per_second"] / values["train/samples_per_second"]
        self.turn.add(round(tokens), round(tokens / values["train/real_token_share"]), values["train/loss"] * steps)
        self.turn.step(steps)

    def close(self) -> None:
        pass


def ours(task: Task, turn: Turn) -> None:
    with tempfile.TemporaryDirectory() as folder:
        train(task.workload, task.config, run_dir=folder, tracker=_TurnTracker(turn, task.config.batch_size))


CONTENDERS: dict[str, Callable[[Task, Turn], None]] = {
    "transformers": transformers,
    "transformers, compiled": lambda task, turn: transformers(task, turn, compiled=True),
    "lightning": lightning,
    "lightning, compiled": lambda task, turn: lightning(task, turn, compiled=True),
    "bare loop": bare_loop,
    "ours": ours,
}


def contend(name: str, task: Task, connection: Connection, steps: int, output: Path) -> None:
    """A contender's process, from start to exit; its stdout and stderr go to `output`."""
    with open(output, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    apply(task.plan)
    torch.manual_seed(task.config.seed)
    with suppress(Finished):
        CONTENDERS[name](task, Turn(connection, steps))
