"""Whether a budget in samples is the same for every batch size: a run ends, and is validated, between two steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

MAX_EXCESS = 0.02
"""By so much of the budget a trial may go beyond it, or large batches would win by what they see more."""
MAX_DELAY = 0.25
"""By so much of the way to the next one a trial may miss a point of the grid, where it is held against others."""


def unevenness(samples: int, evaluations: int, batch_sizes: Sequence[int], accumulations: Sequence[int]) -> str | None:
    """What is uneven about a budget in samples, and one that is even; None where it is even enough.

    Args:
        batch_sizes: All that a trial may have, rising.
        accumulations: Of how many batches a step may be, rising.
    """
    interval = samples / evaluations
    largest = batch_sizes[-1] * accumulations[-1]
    if largest <= min(MAX_EXCESS * samples, MAX_DELAY * interval):
        return None
    for size in _step_sizes(batch_sizes, accumulations):
        seen = math.ceil(samples / size) * size
        remedy = f"use samples = {_even(samples, evaluations, batch_sizes, accumulations):_}"
        batch = f"a batch of {size}" + (" (batch_size x grad_accumulation)" if accumulations[-1] > 1 else "")
        if seen - samples > MAX_EXCESS * samples:
            excess = (seen - samples) / samples
            return f"samples {samples:_}: with {batch} a trial sees {seen:_}, {excess:.1%} more; {remedy}"
        for number in range(1, evaluations):
            point = number * samples / evaluations
            passed = math.ceil(point / size) * size
            if passed - point > MAX_DELAY * interval:
                return (
                    f"evaluations {evaluations}: with {batch} the point of {point:g} samples is validated at {passed}, "
                    f"and others near it; {remedy}, or fewer evaluations"
                )
    return None


def _step_sizes(batch_sizes: Sequence[int], accumulations: Sequence[int]) -> Iterator[int]:
    """The larger ones first: where a range can't pass, one of them is found out at once."""
    for accumulation in reversed(accumulations):
        for batch_size in reversed(batch_sizes):
            yield batch_size * accumulation


def _even(samples: int, evaluations: int, batch_sizes: Sequence[int], accumulations: Sequence[int]) -> int:
    """The next budget that all batches divide, or else one that is long beside each of them."""
    largest = batch_sizes[-1] * accumulations[-1]
    long = math.ceil(max(1 / MAX_EXCESS, evaluations / MAX_DELAY) * largest)
    common = evaluations
    for size in _step_sizes(batch_sizes, accumulations):
        common = math.lcm(common, evaluations * size)
        if common > long:
            return long
    return min(math.ceil(samples / common) * common, long)
