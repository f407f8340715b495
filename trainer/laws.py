"""The three laws of a workload, as a check that any workload can be put through.

from trainer.laws import check_workload
check_workload(MyWorkload(...))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from trainer.batching import BatchOrder, validation_batches
from trainer.evaluation import evaluate
from trainer.loader import fixed_batches, train_batches
from trainer.workload import Batch, Workload


def check_workload(workload: Workload, *, num_samples: int = 8, tolerance: float = 1e-4) -> None:
    """Put a workload through the three laws, on the CPU in float32 with dropout off.

    Args:
        num_samples: How many samples of each split take part.
        tolerance: Relative difference that rounding may make.

    Raises:
        AssertionError: A law does not hold; the message says which, where and by how much.
    """
    check_neighbours(workload, num_samples=num_samples, tolerance=tolerance)
    check_validation(workload, num_samples=num_samples, tolerance=tolerance)
    check_batch_order(workload)


def check_neighbours(workload: Workload, *, num_samples: int, tolerance: float) -> None:
    """Law 1: the sums of a batch are the sums of its samples, each computed alone; padding changes nothing."""
    data = workload.train_data()
    # Shortest and longest together: the most padding there can be.
    order = np.argsort(data.lengths, kind="stable")
    picked = np.unique(np.concatenate([order[: num_samples // 2], order[-(num_samples // 2) :]]))
    samples = [data[int(index)] for index in picked]
    model = _model(workload)
    alone = _total(_sums(workload, model, workload.collate([sample])) for sample in samples)
    for pad_multiple in (1, 32):
        together = _sums(workload, model, workload.collate(samples, pad_multiple))
        for name, value in alone.items():
            assert _close(together[name], value, tolerance), (
                f"law 1: {name} of {len(samples)} samples is {together[name]} in one batch "
                f"(pad_multiple {pad_multiple}) and {value} in batches of one"
            )


def check_validation(workload: Workload, *, num_samples: int, tolerance: float) -> None:
    """Law 2: the validation loss is the same, however the validation set is cut into batches."""
    data = workload.val_data()
    model, device = _model(workload), torch.device("cpu")
    results = []
    for batch_size in (1, 3, num_samples):
        indices = validation_batches(data.lengths, num_samples, seed=0, batch_size=batch_size)
        batches = fixed_batches(workload, data, indices)
        results.append(evaluate(workload, model, batches, device=device, precision="fp32"))
    for name, value in results[0].items():
        others = [result[name] for result in results[1:]]
        assert all(_close(other, value, tolerance) for other in others), (
            f"law 2: {name} is {value} in batches of 1 and {others} in batches of 3 and {num_samples}"
        )


def check_batch_order(workload: Workload, *, num_batches: int = 4) -> None:
    """Law 3: the same seed gives the same batches, with and without loader workers."""
    data = workload.train_data()
    order = BatchOrder(data.lengths, min(4, len(data.lengths)), seed=1)
    first, second = (
        list(
            islice(
                train_batches(workload, data, order, start=(0, 0), num_workers=workers, device=torch.device("cpu")),
                num_batches,
            )
        )
        for workers in (0, 2)
    )
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        same = one.inputs.keys() == other.inputs.keys() and all(
            torch.equal(one.inputs[name], other.inputs[name]) for name in one.inputs
        )
        assert same, f"law 3: batch {number} differs between 0 and 2 loader workers"


def _model(workload: Workload) -> torch.nn.Module:
    torch.manual_seed(0)
    return workload.build_model().eval()


def _sums(workload: Workload, model: torch.nn.Module, batch: Batch) -> dict[str, float]:
    with torch.no_grad():
        sums: Mapping[str, Tensor] = workload.loss_sums(model, batch.inputs)
    missing = sums.keys() ^ batch.counts.keys()
    assert not missing, f"loss_sums and Batch.counts name different losses: {sorted(missing)}"
    return {name: float(value) for name, value in sums.items()}


def _total(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _close(one: float, other: float, tolerance: float) -> bool:
    return abs(one - other) <= tolerance * max(1.0, abs(one), abs(other))
