"""Records learning curves of full runs that see no sample twice, and what each ends at when its rate decays.

    python -m scripts.bench.search.record text|speech [--hours H] [--seeds 3]

One curve after the other, on one thread: seed 0 of the whole grid of batch size x d_coef, coarse to fine, then the
further seeds of the dozen with the lowest annealed loss. Each finished curve is written at once to
scripts/records/curves_TASK.json. The same command continues it, with a wider grid too. Run one process a task.

A curve is one run at a constant rate. It has, at each of `points` (samples):

- loss: the validation loss on one fixed set of samples
- average: that of the power average of the weights (`PowerAverage`)
- d: Prodigy's step size estimate

and `annealed`, by length in samples: the loss of the run of that length, its rate falling linearly to zero over the
last fifth (schedule "wsd"). Up to the decay it is the curve's own run, so it is continued from there. The value at the
full length is the one that a search is judged by. `seconds` depends on other load; the losses do not.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from scripts.bench.common import Record, build_parser, describe_command, write_record
from scripts.bench.search.curves import find_curves
from scripts.bench.search.tasks import NextToken
from trainer import Diverged, Evaluation, TrainConfig, UserError, Workload, train
from trainer.checkpoint import step_file
from trainer.data.batching import validation_batches
from trainer.data.loader import fixed_batches
from trainer.evaluation import evaluate

Configuration = tuple[int, float, int]
"""Batch size, d_coef and seed."""

VAL_SAMPLES, EXPONENT = 1024, 16
BETA2 = 0.95
"""The small GPT's loss is lower with it than with 0.999, at every batch size; and batches of 2 are then too small."""


@dataclass(frozen=True)
class Plan:
    """The grid and the lengths, in samples. Each batch size divides a 480th of the length."""

    length: int = 245_760
    batch_sizes: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    d_coefs: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    num_best: int = 12
    """Configurations that are recorded under further seeds."""

    @property
    def unit(self) -> int:
        return self.length // 480

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths with an annealed loss."""
        return self.length // 60, self.length // 20, self.length // 5, self.length

    @cached_property
    def points(self) -> list[int]:
        """Where the curve is recorded: dense at first, and always at 1/480, 1/240, 1/120, 1/60, 1/20 and 1/5."""
        ends = [length * 4 // 5 for length in self.lengths] + [self.length]
        spans = zip([0, *ends], ends, self.spacings, strict=False)
        return [point for start, end, every in spans for point in range(every, end + 1, every) if point > start]

    @property
    def spacings(self) -> tuple[int, ...]:
        """Between the points before each of the decays, and after the last one's start."""
        return self.unit, self.unit, 8 * self.unit, 16 * self.unit, 16 * self.unit


PLANS = {"text": Plan(batch_sizes=(4, 8, 16, 32, 64, 128, 256)), "speech": Plan()}
"""Each with its optimum two grid steps from every edge."""


class PowerAverage:
    """The mean of the weights after every `every`-th update, those of update k weighted by about k ** EXPONENT.

    Its horizon is about an eighteenth of the run so far. A hook for after `optimizer.step()`.
    """

    def __init__(self, workload: Workload, every: int) -> None:
        self.workload, self.every, self.num_updates = workload, every, 0
        self.model = workload.build_model()
        self.weights = [parameter.detach() for parameter in self.model.parameters()]
        data = workload.val_data()
        self.batches = fixed_batches(workload, data, validation_batches(data.lengths, VAL_SAMPLES, seed=0))

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        self.num_updates += 1
        if self.num_updates % self.every == 0:
            current = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            share = 1 - (1 - self.every / self.num_updates) ** (EXPONENT + 1)
            torch._foreach_lerp_(self.weights, current, share)

    def loss(self) -> float:
        metrics = evaluate(self.workload, self.model, self.batches, device=torch.device("cpu"), precision="fp32")
        return metrics["val/loss"]


def build_config(configuration: Configuration, samples: int, **others: Any) -> TrainConfig:
    batch_size, d_coef, seed = configuration
    return TrainConfig(
        samples=samples,
        batch_size=batch_size,
        d_coef=d_coef,
        beta2=BETA2,
        seed=seed,
        val_samples=VAL_SAMPLES,
        device="cpu",
        precision="fp32",
        compile="off",
        num_workers=0,
        log_every=1000,
        save_every=None,
        keep_checkpoints=100,
        **others,
    )


def anneal(workload: Workload, config: TrainConfig, run_dir: Path, folder: Path) -> float | None:
    """The loss of the run of `config`, which decays, continued from a run at a constant rate; None if it diverged."""
    checkpoint = run_dir / step_file(config.decay_start or 0)
    if not checkpoint.exists():
        return None
    try:
        result = train(workload, config, run_dir=folder / f"{config.samples}", resume=checkpoint)
    except Diverged:
        return None
    return round(result.metrics["val/loss"], 5)


def record_curve(workload: Workload, plan: Plan, configuration: Configuration) -> dict[str, Any]:
    """Train one configuration; a run that diverges has a shorter curve, and `diverged` is the reason."""
    started = time.monotonic()
    values: dict[str, list[float]] = {"loss": [], "average": [], "d": []}
    average = PowerAverage(workload, max(1, plan.unit // 8 // configuration[0]))
    curve: dict[str, Any] = dict(zip(("batch_size", "d_coef", "seed"), configuration, strict=True))

    def on_eval(evaluation: Evaluation) -> None:
        if evaluation.samples in plan.points:
            values["loss"].append(round(evaluation.metrics["val/loss"], 5))
            values["average"].append(round(average.loss(), 5))
            values["d"].append(float(f"{evaluation.d:.4g}"))

    decaying = [build_config(configuration, length, schedule="wsd") for length in plan.lengths]
    # The constant run is trained up to each decay's start in turn, where it leaves a checkpoint.
    ends = [(config.decay_start or 0) * configuration[0] for config in decaying] + [plan.length]
    with tempfile.TemporaryDirectory() as name:
        folder, constant = Path(name), Path(name, "constant")
        hook = register_optimizer_step_post_hook(average)
        try:
            for end, every in zip(ends, plan.spacings, strict=True):
                train(workload, build_config(configuration, end, eval_every=every), run_dir=constant, on_eval=on_eval)
        except Diverged as error:
            curve["diverged"] = str(error)
        finally:
            hook.remove()
        annealed = {f"{config.samples}": anneal(workload, config, constant, folder) for config in decaying}
    return curve | {"annealed": annealed, **values, "seconds": round(time.monotonic() - started, 1)}


def list_configurations(plan: Plan, curves: list[dict[str, Any]], num_seeds: int) -> Iterator[Configuration]:
    """All configurations in their order, d_coefs near 0.3 first; those of further seeds once the grid is recorded."""
    places = itertools.product(enumerate(plan.batch_sizes), enumerate(plan.d_coefs))
    grid = sorted((i % 2 + j % 2, abs(math.log(d_coef / 0.3)), size, d_coef) for (i, size), (j, d_coef) in places)
    yield from ((size, d_coef, 0) for _, _, size, d_coef in grid)
    first = [curve for curve in curves if curve["seed"] == 0]
    if len(first) >= len(grid):
        final = str(plan.length)
        best = sorted(first, key=lambda curve: curve["annealed"][final] or float("inf"))[: plan.num_best]
        yield from ((curve["batch_size"], curve["d_coef"], seed) for seed in range(1, num_seeds) for curve in best)


def read_curves(path: Path, head: Record) -> list[dict[str, Any]]:
    """The curves recorded so far. Exits where they are of other data or lengths; the grid may have been narrower."""
    if not path.exists():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    if changed := [key for key in head if key not in ("command", "grid") and record.get(key) != head[key]]:
        sys.exit(f"{path} was recorded with another {', '.join(changed)}: move it away to record it again.")
    curves: list[dict[str, Any]] = record["curves"]
    return curves


def record_curves(
    path: Path, workload: Workload, plan: Plan, *, num_seeds: int, is_over: Callable[[], bool] = lambda: False
) -> None:
    """Record what `path` lacks, one curve after the other, until `is_over`."""
    head = {
        "command": describe_command(),
        "torch": version("torch"),
        "workload": workload.model_dump(mode="json"),
        "data": workload.data_digest(),
        "val_samples": VAL_SAMPLES,
        "beta2": BETA2,
        "average_exponent": EXPONENT,
        "length": plan.length,
        "points": plan.points,
        "grid": {"batch_sizes": plan.batch_sizes, "d_coefs": plan.d_coefs, "num_best": plan.num_best},
    }
    curves = read_curves(path, head)
    while not is_over():
        done = {(curve["batch_size"], curve["d_coef"], curve["seed"]) for curve in curves}
        missing = [each for each in list_configurations(plan, curves, num_seeds) if each not in done]
        if not missing:
            print(f"{path}: all {len(done)} curves are recorded")
            return
        curves.append(curve := record_curve(workload, plan, missing[0]))
        write_record(path, head | {"curves": curves}, rows="curves")
        shown = ("batch_size", "d_coef", "seed", "annealed", "seconds")
        print(f"{len(curves)} curves:", ", ".join(f"{key} {curve[key]}" for key in shown), flush=True)


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("task", choices=sorted(PLANS))
    parser.add_argument("--hours", type=float, default=float("inf"), help="start no curve after so many hours")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the best dozen configurations")
    arguments = parser.parse_args()
    plan = PLANS[arguments.task]
    torch.set_num_threads(1)
    path, workload = find_curves(arguments.task), NextToken(task=arguments.task, min_samples=plan.length)
    deadline = time.monotonic() + 3600 * arguments.hours
    try:
        record_curves(path, workload, plan, num_seeds=arguments.seeds, is_over=lambda: time.monotonic() > deadline)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
