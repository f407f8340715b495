"""Evaluate a checkpoint, of a run or a published one, on the validation data."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from trainer.acceleration import RunSize, apply, detect, plan
from trainer.checkpoint import read_checkpoint
from trainer.config import TrainConfig, differences
from trainer.data.batching import validation_batches
from trainer.data.loader import BatchReader, DamageCount
from trainer.errors import UserError
from trainer.evaluation import evaluate
from trainer.workload import Batch, Dataset, Workload
from tuner.promotion.export import build_workload, find_checkpoint, read_run
from tuner.spec.mistakes import explain
from tuner.spec.setups import Setup, full_setup
from tuner.spec.study_toml import StudySpec
from tuner.study.samples import read_samples, samples_dir

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointMetrics:
    """The metrics of a checkpoint on a validation set."""

    checkpoint: Path
    samples: int
    """Number of samples measured, without damaged ones."""
    metrics: dict[str, float]
    step: int | None
    """None for weights of another program."""
    names: tuple[str, ...] = ()
    """All names of the file in its run directory."""

    def to_dict(self) -> dict[str, Any]:
        values = {"checkpoint": str(self.checkpoint), "samples": self.samples, "metrics": self.metrics}
        return {**values, "step": self.step, "names": list(self.names)} if self.names else values


def evaluate_checkpoint(spec: StudySpec, checkpoint: Path, *, samples: int | None = None) -> CheckpointMetrics:
    """Measure a checkpoint as a run would: same loss, same precision, dropout off.

    Args:
        checkpoint: Any that the workload can read; of a run directory, the one that `tuner export` takes.
        samples: How many of the validation samples. Default: `train.val_samples` where the spec sets it, else all.

    Raises:
        UserError: The checkpoint or the data can't be read, or they don't fit the spec.
    """
    num_samples = samples or spec.train.get("val_samples")
    setup = full_setup(spec, {}, val_samples=num_samples)
    path = find_checkpoint(checkpoint, workload=setup.workload) if checkpoint.is_dir() else checkpoint
    _warn_of_differences(path, setup.workload, setup.config)
    return _measure(setup, path)


def evaluate_all(run_dir: Path, *, samples: int | None = None, by: str = "val/loss") -> list[CheckpointMetrics]:
    """Measure every checkpoint of a run on its validation set; damaged ones are left out.

    Each has also the metrics that a hook left for its step, as "hook/NAME". The checkpoints name their workload, which
    is imported: evaluate runs that you trust.

    Args:
        samples: How many of the validation samples, in place of the run's number.
        by: The metric to sort by, the lowest first; with "-" before it the highest first. Checkpoints without it last.

    Raises:
        UserError: There is no checkpoint of a run, the data can't be read, or no checkpoint has the metric `by`.
    """
    source = find_checkpoint(run_dir)
    state = read_run(source)
    train = {**state.get("identity", {"train": {}})["train"], "steps": 1}
    try:
        config = TrainConfig.model_validate({key: train[key] for key in train if key in TrainConfig.model_fields})
    except ValidationError as error:
        raise UserError(
            f"{source}: {explain(error, TrainConfig, prefix='train').rstrip('.')}: name another run."
        ) from None
    if samples is not None:
        config = config.model_copy(update={"val_samples": samples})
    setup = Setup(build_workload(state["lineage"], source), config)
    files: dict[tuple[int, int], list[Path]] = {}
    for path in sorted(run_dir.glob("*.pth")):
        files.setdefault((path.stat().st_dev, path.stat().st_ino), []).append(path)
    found = []
    for names in files.values():
        try:
            one = _measure(setup, names[0])
        except UserError as error:
            log.warning("%s", error)
            continue
        metrics = {**one.metrics, **_hook_metrics(run_dir, one.step)}
        found.append(replace(one, metrics=metrics, names=tuple(path.stem for path in names)))
    name, sign = by.removeprefix("-"), -1 if by.startswith("-") else 1
    if found and not any(name in one.metrics for one in found):
        known = ", ".join(dict.fromkeys(metric for one in found for metric in one.metrics))
        raise UserError(f"--by {by}: no checkpoint has this metric; there are {known}.")
    return sorted(found, key=lambda one: sign * one.metrics.get(name, sign * math.inf))


def _hook_metrics(run_dir: Path, step: int | None) -> dict[str, float]:
    """What a hook measured on the checkpoint of a step."""
    folder = None if step is None else samples_dir(run_dir, step)
    if folder is None or not folder.is_dir():
        return {}
    return {f"hook/{name}": value for name, value in read_samples(folder).metrics.items()}


def _measure(setup: Setup, path: Path) -> CheckpointMetrics:
    config, workload = setup.config, setup.workload
    capabilities = detect(config.device)
    # New rows of the vocabulary are initialised as in the run.
    torch.manual_seed(config.seed)
    model = _load_model(workload, path)
    data = workload.val_data()
    indices = validation_batches(data.lengths, config.val_samples, seed=config.val_seed, part_of=workload.val_part)
    acceleration = plan(capabilities, config, RunSize.of(model, data, samples_per_step=1, remaining_steps=0))
    apply(acceleration)
    device = torch.device(acceleration.device)
    model.to(device)
    counts: list[int] = []
    # One by one: a list would hold a whole validation set in memory, some 170 kB an utterance.
    batches = _read(workload, data, indices, counts)
    metrics = evaluate(workload, model, batches, device=device, precision=acceleration.precision)
    step = read_checkpoint(path, mmap=True).get("step")
    return CheckpointMetrics(path, sum(counts), metrics, step if isinstance(step, int) else None)


def _load_model(workload: Workload, path: Path) -> nn.Module:
    model = workload.without_initial_weights().build_model()
    workload.load_weights(model, path)
    return model


def _read(workload: Workload, data: Dataset, indices: Sequence[np.ndarray], counts: list[int]) -> Iterator[Batch]:
    """Yield the batches one by one, as `fixed_batches` makes them; `counts` receives their numbers of samples."""
    reader = BatchReader(workload, data)
    damage = DamageCount(sum(map(len, indices)))
    for chosen in indices:
        batch = reader[chosen]
        damage.add(len(chosen), batch.damaged)
        counts.append(batch.num_samples)
        if batch.num_samples:
            yield replace(batch, part=workload.val_part(int(chosen[0])))


def _warn_of_differences(path: Path, workload: Workload, config: TrainConfig) -> None:
    """Warn if an option, a loss weight or the validation set is not the run's: the metrics would not compare."""
    identity = read_checkpoint(path, mmap=True).get("identity")
    if not isinstance(identity, dict):
        return
    recorded = identity["workload"]
    present = workload.model_dump(mode="json", include=set(recorded))
    if changed := differences("workload", recorded, present):
        log.warning("%s is of a run with other options: %s", path, "; ".join(changed))
    measured = {name: identity["train"][name] for name in ("val_samples", "val_seed")}
    if any(getattr(config, name) != value for name, value in measured.items()):
        log.warning(
            "the run itself was measured on %s validation samples (seed %s): --samples %s gives its figures",
            *(measured["val_samples"] or "all", measured["val_seed"], measured["val_samples"] or ""),
        )
