"""train(): evaluate -> save -> stop? -> step -> log. Between two log lines it never waits for the device."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.acceleration import AccelerationPlan, apply, detect, plan
from trainer.checkpoint import BEST, LATEST, STABLE, Checkpoints, lock_folder, milestone_file
from trainer.compilation import TrainingLoss, was_compiled
from trainer.config import TrainConfig
from trainer.data.batching import BatchOrder, validation_batches
from trainer.data.loader import fixed_batches, train_batches
from trainer.device_monitor import DeviceMonitor
from trainer.errors import UserError
from trainer.evaluation import Evaluation, autocast, evaluate
from trainer.follower import ImportPath, NoCheckpoints, Start
from trainer.metrics import IntervalMeter
from trainer.micro_batches import decide_micro_batch_size
from trainer.optimizers import is_finite, schedule_factor, step_size, update
from trainer.ranks import ALONE, Ranks
from trainer.reporting import Diverged as Diverged
from trainer.reporting import Reporter
from trainer.run_folder import open_run_folder
from trainer.state import Run, prepare
from trainer.tracking import Tracker, Trackers
from trainer.workload import Batch, Workload


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    finished: bool
    """False if it was stopped; the same call continues it."""
    step: int
    samples: int
    seconds: float
    """Seconds of training, over all continuations; warm-up, validation and checkpoints are not counted."""
    timed_steps: int
    """Steps that `seconds` counts."""
    metrics: dict[str, float]
    """Of the last validation."""
    best: dict[str, float]
    run_dir: Path
    stopped_by_guard: str = ""
    """Why the guard ended it (`on_decline` "stop" or "finish"); the same call continues it all the same."""

    @property
    def samples_per_second(self) -> float | None:
        """None if all steps belong to the warm-up."""
        return self.samples / self.step * self.timed_steps / self.seconds if self.timed_steps else None


def train(
    workload: Workload,
    config: TrainConfig,
    *,
    run_dir: Path | str,
    tracker: Tracker | None = None,
    on_eval: Callable[[Evaluation], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    alive: Callable[[], object] = lambda: None,
    resume: str | Path = "auto",
    init: Path | None = None,
    lineage: Mapping[str, Any] | None = None,
    ranks: Ranks = ALONE,
) -> TrainResult:
    """Train, or continue if `run_dir` holds a checkpoint of the same run.

    Args:
        tracker: Receives the figures of each log interval and validation; it is closed at the end.
        on_eval: Called after each validation. Its exception ends the run, closes everything, and reaches the caller.
        stop: Called at every step boundary; True ends the run there with a checkpoint.
        alive: Called at every batch of a validation, for those who wait for a sign of life.
        resume: "auto", "never" (refuse a directory that holds a run), or a checkpoint's path.
        init: Weights for step 0, from any checkpoint that the workload can read.
        lineage: Where the configuration comes from; stored in every checkpoint.
        ranks: Share each batch with these processes. This is the first of them, and the others `follow` it.

    Raises:
        UserError: The data, the device or the content of `run_dir` does not fit; nothing is lost. With
            `micro_batch_size` "auto" also: the device can't hold one sample at a time.
        Diverged: No gradient was finite any more, or the validation loss or a weight was not. The newest checkpoint
            from before is kept, and the same call continues from there.
    """
    run_dir = Path(run_dir)
    if ranks.count > config.batch_size:
        raise UserError(
            f"train.batch_size {config.batch_size} has no sample for each of the {ranks.count} processes: use at most "
            f"--nproc-per-node {config.batch_size}."
        )
    open_run_folder(run_dir)
    trackers = Trackers([] if tracker is None else [tracker])
    with (
        closing(trackers),
        lock_folder(run_dir),
        Checkpoints(run_dir, keep=config.keep_checkpoints, on_written=trackers.written, stop=stop) as checkpoints,
    ):
        capabilities = detect(config.device)
        config = decide_micro_batch_size(workload, config, capabilities, ranks)
        run = prepare(
            workload, config, capabilities.kind, checkpoints, resume=resume, init=init, lineage=lineage, ranks=ranks
        )
        acceleration = plan(capabilities, config, run.size(compiled_before=was_compiled(workload, run.model)))
        apply(acceleration)
        ranks.gather(ImportPath.own())
        ranks.gather(Start.of(run, acceleration))
        ranks.gather(None)  # all have built it; NCCL waits for ten minutes only, and its errors have no line
        with DeviceMonitor(capabilities.kind) as monitor:
            reporter = Reporter(run, trackers, monitor)
            try:
                _loop(run, acceleration, checkpoints, reporter, on_eval, stop, alive)
            except Diverged:
                checkpoints.return_to_good()
                raise
    progress = run.progress
    return TrainResult(
        finished=run.finished,
        step=progress.step,
        samples=run.samples,
        seconds=progress.seconds,
        timed_steps=progress.timed_steps,
        metrics=progress.metrics,
        best=progress.best,
        run_dir=run_dir,
        stopped_by_guard=reporter.stopped_by_guard,
    )


def follow(ranks: Ranks, stop: Callable[[], bool] = lambda: False) -> None:
    """Take part in every `train` of the first rank. Writes and reports nothing.

    Args:
        stop: Called at every step boundary; True ends the run there on all ranks, with a checkpoint.

    Raises:
        RankLost: The first rank has ended, or another one.
    """
    while True:
        # Two messages: the second one can be read only where its classes can be imported.
        paths: list[Any] = ranks.gather(None)
        paths[0].adopt()
        starts: list[Any] = ranks.gather(None)
        _take_part(starts[0], ranks, stop)
        gc.collect()  # its model is in cycles, and the next run needs the memory


def _take_part(start: Start, ranks: Ranks, stop: Callable[[], bool]) -> None:
    detect(start.config.device)
    apply(start.acceleration)
    run = start.build(ranks)
    ranks.gather(None)
    with DeviceMonitor(start.acceleration.device) as monitor, suppress(Diverged):
        reporter = Reporter(run, Trackers([]), monitor)
        _loop(run, start.acceleration, NoCheckpoints(), reporter, None, stop, lambda: None)


def _loop(
    run: Run,
    acceleration: AccelerationPlan,
    checkpoints: Checkpoints | NoCheckpoints,
    reporter: Reporter,
    on_eval: Callable[[Evaluation], None] | None,
    stop: Callable[[], bool],
    alive: Callable[[], object],
) -> None:
    config, progress, ranks = run.config, run.progress, run.ranks
    batches = _train_batches(run, acceleration)
    loss_sums = TrainingLoss(
        run.workload,
        run.model,
        compile=acceleration.compile,
        required=config.compile == "on",
        expected_seconds=acceleration.compile_seconds,
        ranks=ranks,
    )
    val_data = run.workload.val_data()
    val_indices = validation_batches(
        val_data.lengths, config.val_samples, seed=config.val_seed, part_of=run.workload.val_part
    )
    val_batches = fixed_batches(run.workload, val_data, val_indices, ranks=ranks)
    meter = IntervalMeter(run.workload.loss_weights)
    meter.start(progress.step)
    first_step = progress.step
    # The state before the decay is written again: its process may have been killed before stable.pth was linked.
    saved_step = -1 if first_step == config.decay_start else first_step
    run.model.train()
    while True:
        also = [STABLE] if progress.step == config.decay_start else []
        if (point := run.due_evaluation()) is not None:
            evaluation, improved = _evaluate(run, acceleration.precision, _signalling(val_batches, alive), point)
            reporter.report_evaluation(evaluation)
            if improved:
                checkpoints.save_weights(run.weights(), improved)
                reporter.report_checkpoints(improved)
            if config.on_decline is not None and progress.guard.since_best == 0:
                also.append(BEST)
            if on_eval is not None:
                on_eval(evaluation)

        ends = run.finished or any(ranks.gather(stop())) or bool(reporter.stopped_by_guard)
        due = config.save_every is not None and progress.step % config.save_every == 0
        if BEST in also or (progress.step != saved_step and (ends or due or also)):
            # The snapshot waits for the device in any case.
            if not is_finite(run.optimizer):
                raise Diverged(f"the weights or the optimizer's state are not finite at step {progress.step}")
            checkpoints.save(run.state(), also=also, is_last=run.finished)
            reporter.report_checkpoints([LATEST])
            saved_step = progress.step
        if config.keep_every is not None and progress.step and progress.step % config.keep_every == 0:
            checkpoints.save_weights(run.weights(), [milestone_file(progress.step)])
            reporter.report_checkpoints([milestone_file(progress.step)])
        if ends:
            break

        checkpoints.check()
        warm_up = run.warms_up(progress.step - first_step)
        started = time.perf_counter()
        step(run, loss_sums, acceleration.precision, batches, meter)
        progress.step += 1
        values = None
        if progress.step % config.log_every == 0 or run.finished or run.is_first_log(progress.step - first_step):
            values = meter.read(ranks)
        seconds = ranks.gather(time.perf_counter() - started)[0]
        meter.add_step(seconds, warm_up=warm_up)
        if not warm_up:
            progress.seconds += seconds
            progress.timed_steps += 1
        if values is not None:
            if math.isfinite(values["train/grad_norm"]):
                checkpoints.confirm(progress.step)
            reporter.report_interval(meter, values)
            meter.start(progress.step)


def _train_batches(run: Run, acceleration: AccelerationPlan) -> Iterator[Batch]:
    config, data = run.config, run.workload.train_data()
    order = BatchOrder(
        data.lengths,
        config.batch_size,
        group=config.grad_accumulation,
        bucket_samples=config.bucket_samples,
        seed=config.seed,
        draw=run.workload.draw_epoch,
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
        num_micro_batches=run.num_micro_batches,
        ranks=run.ranks,
    )


def step(run: Run, loss_sums: TrainingLoss, precision: str, batches: Iterator[Batch], meter: IntervalMeter) -> None:
    """One optimizer update over `grad_accumulation` batches and their micro-batches: the update of one large batch.

    Reads no value on the host.
    """
    config, ranks = run.config, run.ranks
    started = time.perf_counter()
    group = [next(batches) for _ in range(config.grad_accumulation * run.num_micro_batches)]
    meter.data_wait += time.perf_counter() - started
    group = [batch for batch in group if batch.num_samples]
    weights = run.workload.loss_weights
    totals = ranks.sum({name: sum(batch.counts[name] for batch in group) for name in weights})
    some = any(totals.values())
    if some and not group:
        group = [Batch({}, dict.fromkeys(weights, 0), num_samples=0, num_tokens=0, num_slots=0)]
    for batch in group:
        with autocast(run.device, precision):
            sums = loss_sums(batch.inputs, is_last=batch is group[-1])
        # The gradient is the mean over ranks, and their sum is wanted.
        terms = [weight * ranks.count * sums[name] / totals[name] for name, weight in weights.items() if totals[name]]
        torch.autograd.backward(torch.stack(terms).sum())
        meter.add_batch(sums, batch)
    lr = config.base_lr * schedule_factor(config, run.progress.step)
    if some:
        norm, skipped = update(run.optimizer, lr=lr, max_grad_norm=config.max_grad_norm)
        meter.add_update(norm, skipped, lr=lr, d=step_size(run.optimizer))
    # Reduced gradients are views of the buckets that they are sent in.
    run.optimizer.zero_grad(set_to_none=ranks.count == 1)


def _signalling(batches: Iterable[Batch], alive: Callable[[], object]) -> Iterator[Batch]:
    for batch in batches:
        alive()
        yield batch


def _evaluate(run: Run, precision: str, batches: Iterable[Batch], point: float) -> tuple[Evaluation, list[str]]:
    """Validate; also returns the names of the best checkpoints to write."""
    progress = run.progress
    metrics = evaluate(run.workload, run.model, batches, device=run.device, precision=precision, ranks=run.ranks)
    progress.metrics, progress.evaluated, progress.evaluated_step = metrics, point, progress.step
    improved = []
    for metric, name in run.workload.best_checkpoints().items():
        if metrics[metric] < progress.best.get(metric, float("inf")):
            progress.best[metric] = metrics[metric]
            improved.append(name)
    evaluation = Evaluation(
        point=point,
        step=progress.step,
        samples=run.samples,
        seconds=progress.seconds,
        timed_steps=progress.timed_steps,
        metrics=metrics,
        d=float(step_size(run.optimizer)),
    )
    return evaluation, improved
