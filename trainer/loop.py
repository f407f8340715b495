"""train(): evaluate -> save -> stop? -> step -> log. Between two log lines the device is never waited for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.acceleration import AccelerationPlan, apply, detect, plan
from trainer.batching import BatchOrder, validation_batches
from trainer.checkpoint import Checkpoints, locked
from trainer.compilation import TrainingLoss, compiled_before
from trainer.config import TrainConfig
from trainer.evaluation import Evaluation, autocast, evaluate
from trainer.loader import fixed_batches, train_batches
from trainer.metrics import IntervalMeter, log_line
from trainer.micro_batches import split
from trainer.optimizers import schedule_factor, step_size, update
from trainer.state import Run, prepare
from trainer.tracking import Tracker, Trackers
from trainer.workload import Batch, Workload

log = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """No update was possible over a whole log interval: every gradient was infinite or not a number."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    finished: bool
    """False where it was stopped; the same call continues it."""
    step: int
    samples: int
    seconds: float
    """Seconds of training, over all continuations; validation and checkpoints are not counted."""
    metrics: dict[str, float]
    """The last validation's."""
    best: dict[str, float]
    run_dir: Path


def train(
    workload: Workload,
    config: TrainConfig,
    *,
    run_dir: Path | str,
    tracker: Tracker | None = None,
    on_eval: Callable[[Evaluation], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    resume: str | Path = "auto",
    init: Path | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train, or continue where `run_dir` holds a checkpoint of the same run.

    Args:
        tracker: Receives the figures of each log interval and validation; it is closed at the end.
        on_eval: Called after each validation; what it raises ends the run, everything is closed, and goes on.
        stop: Asked at every step boundary; True ends the run there with a checkpoint.
        resume: "auto", "never" (refuse a directory that holds a run), or a checkpoint's path.
        init: Weights for step 0, from any checkpoint that the workload can read.
        lineage: Where the configuration comes from; kept in every checkpoint.

    Raises:
        UserError: The data, the device or what is in `run_dir` does not fit; nothing is lost. With
            `micro_batch_size` "auto" also: the device can't hold one sample at a time.
        Diverged: No gradient of a whole log interval was finite.
    """
    run_dir = Path(run_dir)
    tracker = tracker or Trackers([])
    with (
        closing(tracker),
        locked(run_dir),
        Checkpoints(run_dir, keep=config.keep_checkpoints) as checkpoints,
    ):
        capabilities = detect(config.device)
        config = split(workload, config, capabilities)
        run = prepare(workload, config, capabilities.kind, checkpoints, resume=resume, init=init, lineage=lineage)
        acceleration = plan(capabilities, config, run.size(compiled_before=compiled_before(workload, run.model)))
        apply(acceleration)
        _loop(run, acceleration, checkpoints, tracker, on_eval, stop)
    progress = run.progress
    return TrainResult(
        finished=run.finished,
        step=progress.step,
        samples=run.samples,
        seconds=progress.seconds,
        metrics=progress.metrics,
        best=progress.best,
        run_dir=run_dir,
    )


def _loop(
    run: Run,
    acceleration: AccelerationPlan,
    checkpoints: Checkpoints,
    tracker: Tracker,
    on_eval: Callable[[Evaluation], None] | None,
    stop: Callable[[], bool],
) -> None:
    config, progress = run.config, run.progress
    batches = _train_batches(run, acceleration)
    compile, required = acceleration.compile, config.compile == "on"
    loss_sums = TrainingLoss(run.workload, run.model, compile=compile, required=required)
    val_data = run.workload.val_data()
    val_indices = validation_batches(val_data.lengths, config.val_samples, seed=config.val_seed)
    val_batches = fixed_batches(run.workload, val_data, val_indices)
    meter = IntervalMeter(run.workload.loss_weights)
    meter.start(progress.step, progress.seconds)
    saved_step = progress.step
    run.model.train()
    while True:
        if (point := run.due_evaluation()) is not None:
            evaluation, improved = _evaluate(run, acceleration.precision, val_batches, point)
            tracker.track(evaluation.metrics, step=progress.step, samples=run.samples)
            if improved:
                checkpoints.save_best(run.weights(), improved)
            if on_eval is not None:
                on_eval(evaluation)

        ends = run.finished or stop()
        due = config.save_every is not None and progress.step % config.save_every == 0
        if progress.step != saved_step and (ends or due):
            checkpoints.save(run.state())
            saved_step = progress.step
        if ends:
            break

        started = time.perf_counter()
        step(run, loss_sums, acceleration.precision, batches, meter)
        progress.step += 1
        values = None
        if progress.step % config.log_every == 0 or run.finished:
            values = meter.read()
        progress.seconds += time.perf_counter() - started
        if values is not None:
            _log(run, meter, values, tracker)


def _train_batches(run: Run, acceleration: AccelerationPlan) -> Iterator[Batch]:
    config, data = run.config, run.workload.train_data()
    order = BatchOrder(
        data.lengths,
        config.batch_size,
        group=config.grad_accumulation,
        bucket_samples=config.bucket_samples,
        seed=config.seed,
    )
    start = divmod(run.progress.step * config.grad_accumulation, order.batches_per_epoch)
    return train_batches(
        run.workload,
        data,
        order,
        start=start,
        num_workers=acceleration.num_workers,
        device=run.device,
        pin_memory=acceleration.pin_memory,
        pad_multiple=acceleration.pad_multiple,
        num_micro_batches=config.num_micro_batches,
    )


def step(run: Run, loss_sums: TrainingLoss, precision: str, batches: Iterator[Batch], meter: IntervalMeter) -> None:
    """One optimizer update over `grad_accumulation` batches, in their micro-batches, as exact as one.

    Reads no value on the host.
    """
    config = run.config
    group = [next(batches) for _ in range(config.grad_accumulation * config.num_micro_batches)]
    group = [batch for batch in group if batch.num_samples]
    weights = run.workload.loss_weights
    totals = {name: sum(batch.counts[name] for batch in group) for name in weights}
    for batch in group:
        with autocast(run.device, precision):
            sums = loss_sums(batch.inputs)
        terms = [weight * sums[name] / totals[name] for name, weight in weights.items() if totals[name]]
        torch.autograd.backward(torch.stack(terms).sum())
        meter.add_batch(sums, batch)
    lr = config.base_lr * schedule_factor(config, run.progress.step)
    if group:
        norm, skipped = update(run.optimizer, lr=lr, max_grad_norm=config.max_grad_norm)
        meter.add_update(norm, skipped, lr=lr, d=step_size(run.optimizer))
    run.optimizer.zero_grad()


def _evaluate(run: Run, precision: str, batches: list[Batch], point: float) -> tuple[Evaluation, list[str]]:
    """Validate; also the names of the best checkpoints that are to be written."""
    progress = run.progress
    metrics = evaluate(run.workload, run.model, batches, device=run.device, precision=precision)
    progress.metrics, progress.evaluated, progress.evaluated_step = metrics, point, progress.step
    improved = []
    for metric, name in run.workload.best_checkpoints().items():
        if metrics[metric] < progress.best.get(metric, float("inf")):
            progress.best[metric] = metrics[metric]
            improved.append(name)
    shown = ", ".join(f"{name}: {value:.4f}" for name, value in metrics.items())
    log.info("[Step %d] validation after %d samples: %s", progress.step, run.samples, shown)
    evaluation = Evaluation(
        point=point,
        step=progress.step,
        samples=run.samples,
        seconds=progress.seconds,
        metrics=metrics,
        d=float(step_size(run.optimizer)),
    )
    return evaluation, improved


def _log(run: Run, meter: IntervalMeter, values: dict[str, float], tracker: Tracker) -> None:
    progress, config = run.progress, run.config
    steps, seconds = progress.step - meter.first_step, progress.seconds - meter.first_second
    if values["train/skipped_updates"] == steps and steps > 1:
        raise Diverged(f"none of the last {steps} gradients was finite, at step {progress.step}")
    values["train/samples_per_second"] = steps * config.effective_batch_size / seconds
    values["train/tokens_per_second"] = meter.tokens / seconds
    remaining = None if config.num_steps is None else (config.num_steps - progress.step) * seconds / steps
    log.info(log_line(progress.step, values, time=seconds, remaining=remaining))
    tracker.track(values, step=progress.step, samples=run.samples)
    meter.start(progress.step, progress.seconds)
