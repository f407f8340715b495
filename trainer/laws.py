"""Checks a workload against the three laws.

from trainer.laws import check_workload
check_workload(MyWorkload(...))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from trainer.data.batching import BatchOrder, validation_batches
from trainer.data.loader import fixed_batches, train_batches
from trainer.evaluation import evaluate
from trainer.workload import Batch, Dataset, Workload


def check_workload(workload: Workload, *, num_samples: int = 8, tolerance: float = 1e-4) -> None:
    """Check a workload against the three laws, on the CPU in float32 with dropout off.

    Args:
        num_samples: Number of samples from each split.
        tolerance: Relative difference allowed for rounding.

    Raises:
        AssertionError: A law does not hold; the message names the law, the place and the difference.
    """
    check_lengths(workload, num_samples=num_samples)
    check_neighbours(workload, num_samples=num_samples, tolerance=tolerance)
    check_validation(workload, num_samples=num_samples, tolerance=tolerance)
    check_batch_order(workload)


def check_lengths(workload: Workload, *, num_samples: int) -> None:
    """Before the laws: there are samples, each has its length, and a longer one takes no fewer slots."""
    for split, data in {"train_data()": workload.train_data(), "val_data()": workload.val_data()}.items():
        assert len(data), f"{split} has no samples"
        lengths = type(data.lengths).__name__
        assert isinstance(data.lengths, np.ndarray), f"{split} has lengths that are a {lengths}: give a numpy array"
        assert len(data.lengths) == len(data), (
            f"{split} has {len(data)} samples, and its lengths are {len(data.lengths)}"
        )
        short, long = _extremes(data, num_samples)
        slots = {index: workload.collate([data[index]]).num_slots for index in {*short, *long}}
        # The short sample with the most slots, and the long one with the fewest.
        one, other = max(short, key=lambda index: slots[index]), min(long, key=lambda index: slots[index])
        assert data.lengths[one] == data.lengths[other] or slots[one] <= slots[other], (
            f"{split}: by its lengths sample {one} has {data.lengths[one]} tokens and sample {other} has "
            f"{data.lengths[other]}, and collated alone they take {slots[one]} and {slots[other]} slots"
        )


def check_neighbours(workload: Workload, *, num_samples: int, tolerance: float) -> None:
    """Law 1: the sums of a batch are the sums of its samples, each computed alone; padding changes nothing."""
    assert workload.loss_weights, "loss_weights is empty: nothing would be minimized"
    data = workload.train_data()
    # Shortest and longest together: maximal padding.
    short, long = _extremes(data, num_samples)
    samples = [data[index] for index in sorted({*short, *long})]
    model = _model(workload)
    alone = _total(_sums(workload, model, workload.collate([sample])) for sample in samples)
    for pad_multiple in (1, 32):
        batch = workload.collate(samples, pad_multiple)
        assert batch.num_samples == len(samples), (
            f"law 1: {len(samples)} samples make a batch whose num_samples is {batch.num_samples}"
        )
        together = _sums(workload, model, batch)
        for name, value in alone.items():
            assert _close(together[name], value, tolerance), (
                f"law 1: {name} of {len(samples)} samples is {together[name]} in one batch "
                f"(pad_multiple {pad_multiple}) and {value} in batches of one: return sums, not means, and let no "
                "sample see another one or its padding"
            )


def check_validation(workload: Workload, *, num_samples: int, tolerance: float) -> None:
    """Law 2: the validation set is fixed, and its loss does not depend on the batch size."""
    data = workload.val_data()
    indices = validation_batches(data.lengths, num_samples, seed=0)
    batches = fixed_batches(workload, data, indices)
    for how, other in _reopen(workload):
        again = other.val_data()
        same = np.array_equal(data.lengths, again.lengths) and _alike(batches, fixed_batches(workload, again, indices))
        assert same, f"law 2: val_data() has other samples {how}: draw them by a fixed seed"
    model, device = _model(workload), torch.device("cpu")
    results = []
    for batch_size in (1, 3, num_samples):
        indices = validation_batches(
            data.lengths, num_samples, seed=0, batch_size=batch_size, part_of=workload.val_part
        )
        batches = fixed_batches(workload, data, indices)
        results.append(evaluate(workload, model, batches, device=device, precision="fp32"))
    for name, value in results[0].items():
        others = [result[name] for result in results[1:]]
        assert all(_close(other, value, tolerance) for other in others), (
            f"law 2: {name} is {value} in batches of 1 and {others} in batches of 3 and {num_samples}"
        )


def check_batch_order(workload: Workload, *, num_batches: int = 4) -> None:
    """Law 3: the same seed gives the same batches, with and without loader workers, whenever the data is opened."""
    data = workload.train_data()

    def first_batches(data: Dataset, num_workers: int = 0, *, opened: Workload = workload) -> list[Batch]:
        order, cpu = BatchOrder(data.lengths, min(4, len(data)), seed=1, draw=opened.draw_epoch), torch.device("cpu")
        batches = train_batches(workload, data, order, start=(0, 0), num_workers=num_workers, device=cpu)
        return list(islice(batches, num_batches))

    batches = first_batches(data)
    for number, (one, two) in enumerate(zip(batches, first_batches(data, num_workers=2), strict=True)):
        assert _alike([one], [two]), f"law 3: batch {number} differs between 0 and 2 loader workers"
    for how, other in _reopen(workload):
        again = other.train_data()
        same = np.array_equal(data.lengths, again.lengths) and _alike(batches, first_batches(again, opened=other))
        assert same, f"law 3: train_data() has other samples {how}: draw them by a fixed seed"


def _reopen(workload: Workload) -> Iterator[tuple[str, Workload]]:
    """The same workload, then a new instance: a continued run is another process, which keeps nothing."""
    yield "when it is called again", workload
    yield "in a workload built anew", type(workload).model_validate(workload.model_dump(by_alias=True))


def _extremes(data: Dataset, num_samples: int) -> tuple[list[int], list[int]]:
    """The shortest samples and the longest, half of `num_samples` each; half of the data if that is less."""
    order = np.argsort(data.lengths, kind="stable").tolist()
    half = max(1, min(num_samples, len(order)) // 2)
    return order[:half], order[-half:]


def _alike(some: list[Batch], others: list[Batch]) -> bool:
    """Whether the batches are equal."""
    return len(some) == len(others) and all(
        one.counts == other.counts
        and one.inputs.keys() == other.inputs.keys()
        and all(torch.equal(one.inputs[name], other.inputs[name]) for name in one.inputs)
        for one, other in zip(some, others, strict=True)
    )


def _model(workload: Workload) -> torch.nn.Module:
    torch.manual_seed(0)
    return workload.build_model().eval()


def _sums(workload: Workload, model: torch.nn.Module, batch: Batch) -> dict[str, float]:
    with torch.no_grad():
        sums: Mapping[str, Tensor] = workload.loss_sums(model, batch.inputs)
    missing = sums.keys() ^ batch.counts.keys()
    assert not missing, f"loss_sums and Batch.counts name different losses: {sorted(missing)}"
    unknown = workload.loss_weights.keys() - sums.keys()
    assert not unknown, f"loss_weights names {sorted(unknown)}, and loss_sums returns {sorted(sums)}"
    return {name: float(value) for name, value in sums.items()}


def _total(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _close(one: float, other: float, tolerance: float) -> bool:
    return abs(one - other) <= tolerance * max(1.0, abs(one), abs(other))
