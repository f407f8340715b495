"""The manifests' shares of the samples that are drawn: against forgetting the languages of the base model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def check_shares(shares: Sequence[float | None]) -> None:
    """Raises ValueError where shares (None: none given) leave nothing for the other manifests, or not all is shared."""
    total = sum(share or 0.0 for share in shares)
    if None in shares and total >= 1:
        raise ValueError(f"the shares sum to {total:g}, which leaves nothing for the manifests without one")
    if None not in shares and abs(total - 1) > 1e-6:
        raise ValueError(f"every manifest has a share, and they sum to {total:g}: they must sum to 1, or omit one")


def divide(sizes: Sequence[int], shares: Sequence[float | None]) -> list[float]:
    """Each manifest's part of the samples that are drawn, in sum 1."""
    rest = 1 - sum(share or 0.0 for share in shares)
    num_rest = sum(size for size, share in zip(sizes, shares, strict=True) if share is None)
    return [
        rest * size / max(1, num_rest) if share is None else share for size, share in zip(sizes, shares, strict=True)
    ]


def draw_shares(sizes: Sequence[int], shares: Sequence[float | None], epoch: int, seed: int) -> np.ndarray:
    """The samples of an epoch: as many as all manifests have, from each its share.

    A manifest is used up before one of its samples comes again: the epochs take one after the other from an endless
    row of its permutations.

    Args:
        sizes: Each manifest's number of samples; those of one manifest follow those of the one before.
        shares: None: a part of the rest, by size.

    Returns:
        [sum(sizes)] int64 indices, manifest by manifest.
    """
    parts = divide(sizes, shares)
    # Rounded at the ends, so that the numbers add up.
    ends = np.rint(np.cumsum([0.0, *parts]) / sum(parts) * sum(sizes)).astype(np.int64)
    drawn, first = [np.empty(0, np.int64)], 0
    for which, (size, number) in enumerate(zip(sizes, np.diff(ends).tolist(), strict=True)):
        position, end = epoch * number, (epoch + 1) * number
        while position < end:
            turn, start = divmod(position, size)
            taken = np.random.default_rng((seed, which, turn)).permutation(size)[start : start + end - position]
            drawn.append(first + taken)
            position += len(taken)
        first += size
    return np.concatenate(drawn)
