"""The [search] section: its dimensions, which fields can take them, and budgets that all batch sizes divide."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Discriminator, Tag, field_validator, model_validator

from trainer.config import IsNumber

ON_THE_GRID = 1e-6
"""So far from a step, in steps, rounding puts a value: 0.1 + 2 x 0.1 is not 0.3."""


class Section(BaseModel):
    """A table of the study.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Choices(Section):
    choices: tuple[int | float | str | bool, ...]

    @field_validator("choices", mode="before")
    @classmethod
    def _check(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError("give a list of values")
        for at, choice in enumerate(value):
            if not isinstance(choice, int | float | str | bool):
                raise ValueError(f"{choice!r} is no number, text, true or false")
            if isinstance(choice, float) and not math.isfinite(choice):
                raise ValueError(f"{choice!r} is not finite")
            if choice in value[:at]:
                raise ValueError(f"{choice!r} is there twice; remove one")
        if len(value) < 2:
            raise ValueError("there is nothing to choose: give several, or set the value outside [search]")
        return value

    def __contains__(self, value: object) -> bool:
        return value in self.choices

    @property
    def corners(self) -> tuple[Any, ...]:
        """Values that stand for all: what holds for them holds for the others."""
        return self.choices

    def misfit(self, annotation: Any) -> str | None:
        """Why a field of this type can't be searched so; None where it can, as far as the type says."""
        return None

    def whole_numbers(self) -> list[int]:
        """All values of a field that takes whole numbers only, rising."""
        return sorted(map(int, self.choices))


class Range(Section):
    low: Annotated[int | float, IsNumber]
    high: Annotated[int | float, IsNumber]
    log: bool = False
    step: Annotated[int | float, IsNumber] | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_table(cls, value: Any) -> Any:
        if not isinstance(value, Mapping | Range):
            raise ValueError("write it as { choices = [...] } or { low = ..., high = ... }")
        return value

    @model_validator(mode="after")
    def _check(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}; exchange them")
        if self.low == self.high:
            raise ValueError(f"low and high are both {self.low}: give a range, or set the value outside [search]")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log = true needs low above 0 and no step")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step {self.step} must be above 0")
        if self.step is not None and not self._is_step(self.high):
            below = self.low + math.floor((self.high - self.low) / self.step) * self.step
            near = [f"{value:.12g}" for value in (below, below + self.step) if value > self.low]
            raise ValueError(f"steps of {self.step} from {self.low} miss high {self.high}; use {' or '.join(near)}")
        return self

    def _is_step(self, value: float) -> bool:
        step = self.step
        return step is None or abs(math.remainder(value - self.low, step)) <= ON_THE_GRID * step

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return self.low <= value <= self.high and self._is_step(value)

    @property
    def corners(self) -> tuple[Any, ...]:
        """Values that stand for all: what holds for them holds for the others."""
        return (self.low, self.high)

    def misfit(self, annotation: Any) -> str | None:
        """Why a field of this type can't be searched so; None where it can, as far as the type says."""
        types = plain_types(annotation)
        if types <= {bool, NoneType}:
            return "it is true or false, which no range is: use choices = [true, false]"
        if types <= {bool, str, Literal, NoneType}:
            return "it is not a number, so it has no range: use choices = [...]"
        if is_whole(annotation):
            for name, value in (("low", self.low), ("high", self.high), ("step", self.step)):
                if value is not None and value != int(value):
                    return f"it takes whole numbers, not {name} {value}"
        return None

    def whole_numbers(self) -> range:
        """All values of a field that takes whole numbers only, rising."""
        return range(int(self.low), int(self.high) + 1, int(self.step or 1))


def _kind_of_dimension(value: Any) -> str:
    named = "choices" in value if isinstance(value, Mapping) else isinstance(value, Choices)
    return "Choices" if named else "Range"


Dimension = Annotated[
    Annotated[Choices, Tag("Choices")] | Annotated[Range, Tag("Range")], Discriminator(_kind_of_dimension)
]


def plain_types(annotation: Any) -> set[Any]:
    """What a field's annotation allows: {int, NoneType} of `PositiveInt | None`; {Literal} of given values."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return plain_types(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return set().union(*map(plain_types, get_args(annotation)))
    return {origin or annotation}


def is_whole(annotation: Any) -> bool:
    """Whether a field of this type takes whole numbers only."""
    types = plain_types(annotation)
    return int in types and float not in types


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """[search] by dotted keys. TOML nests an unquoted `train.d_coef`; both spellings mean the same."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        # The values of a dimension are no tables.
        if isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def split_key(key: str) -> tuple[str, str]:
    """A searched field's section and name: ("train", "d_coef") of "train.d_coef"."""
    section, _, name = key.partition(".")
    return section, name


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
