"""The [search] section: its dimensions, then its keys, then budgets that are fair to all batch sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Discriminator, Tag, field_validator, model_validator

from trainer.config import IsNumber

ON_THE_GRID = 1e-6
"""Tolerance of a value on a grid of steps, in steps: in floating point 0.1 + 2 x 0.1 is not 0.3."""
MAX_EXCESS = 0.02
"""Share of the budget by which a trial may exceed it: beyond that, large batches win because they see more samples."""
MAX_DELAY = 0.25
"""Share of an interval by which a trial may pass a point of the grid before it is validated there."""


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
        # In Python True is 1.
        return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in self.choices)

    def __str__(self) -> str:
        return ", ".join(map(str, self.choices))

    @property
    def is_numeric(self) -> bool:
        """Whether all are numbers that a database, which stores a parameter as a float, holds exactly."""
        return all(not isinstance(c, bool | str) and abs(c) <= 2**53 for c in self.choices)

    def describe_narrowing(self, new: Dimension) -> str | None:
        """Why a study can't continue with another dimension; None where that one has all values of this one."""
        if not isinstance(new, Choices):
            return "choices can't become a range"
        missing = [choice for choice in self.choices if choice not in new]
        return f"{', '.join(map(str, missing))} is missing" if missing else None

    @property
    def corners(self) -> tuple[Any, ...]:
        """Values that represent all: a check of these is a check of every value."""
        return self.choices

    def find_misfit(self, annotation: Any) -> str | None:
        """Why a field of this type can't be searched this way; None where its type allows it."""
        return None

    def list_whole_numbers(self) -> list[int]:
        """All values, rising, for a field that takes whole numbers only."""
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

    def __str__(self) -> str:
        kind = ", log" if self.log else "" if self.step is None else f", step {self.step:g}"
        return f"{self.low:g} to {self.high:g}{kind}"

    def _is_step(self, value: float) -> bool:
        step = self.step
        return step is None or abs(math.remainder(value - self.low, step)) <= ON_THE_GRID * step

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return self.low <= value <= self.high and self._is_step(value)

    def describe_narrowing(self, new: Dimension) -> str | None:
        """As of `Choices`."""
        if not isinstance(new, Range):
            return "a range can't become choices"
        if (self.log, self.step) != (new.log, new.step):
            return "log and step can't change"
        if new.low > self.low or new.high < self.high:
            return "it is narrower"
        return None if new._is_step(self.low) else f"its steps miss {self.low}"

    @property
    def corners(self) -> tuple[Any, ...]:
        return (self.low, self.high)

    def find_misfit(self, annotation: Any) -> str | None:
        types = list_types(annotation)
        if types <= {bool, NoneType}:
            return "it is true or false, which no range is: use choices = [true, false]"
        if types <= {bool, str, Literal, NoneType}:
            return "it is not a number, so it has no range: use choices = [...]"
        if is_whole(annotation):
            for name, value in (("low", self.low), ("high", self.high), ("step", self.step)):
                if value is not None and value != int(value):
                    return f"it takes whole numbers, not {name} {value}"
        return None

    def list_whole_numbers(self) -> range:
        return range(int(self.low), int(self.high) + 1, int(self.step or 1))


def _find_kind(value: Any) -> str:
    has_choices = "choices" in value if isinstance(value, Mapping) else isinstance(value, Choices)
    return "Choices" if has_choices else "Range"


Dimension = Annotated[Annotated[Choices, Tag("Choices")] | Annotated[Range, Tag("Range")], Discriminator(_find_kind)]


def list_types(annotation: Any) -> set[Any]:
    """The types that a field allows: {int, NoneType} of `PositiveInt | None`; {Literal} of given values."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return list_types(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return set().union(*map(list_types, get_args(annotation)))
    return {origin or annotation}


def is_whole(annotation: Any) -> bool:
    """Whether a field of this type takes whole numbers only."""
    types = list_types(annotation)
    return int in types and float not in types


def flatten(tree: Mapping[str, Any], prefix: str = "", *, of_dimensions: bool = True) -> dict[str, Any]:
    """[search], or an entry of [[search.try]], by dotted keys.

    TOML nests an unquoted `train.d_coef`; both spellings mean the same.

    Args:
        of_dimensions: The values are dimensions, which are tables without tables; else they are no tables.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and (
            not of_dimensions or any(isinstance(inner, dict) for inner in value.values())
        )
        if nested:
            flat |= flatten(value, f"{prefix}{key}.", of_dimensions=of_dimensions)
        else:
            flat[prefix + key] = value
    return flat


def split_key(key: str) -> tuple[str, str]:
    """A searched field's section and name: ("train", "d_coef") of "train.d_coef"."""
    section, _, name = key.partition(".")
    return section, name


def find_unevenness(
    samples: int, evaluations: int, batch_sizes: Sequence[int], accumulations: Sequence[int]
) -> str | None:
    """Why a budget in samples is unfair to some batch sizes, and a fair one; None where it is fair.

    Args:
        batch_sizes: All of the search space, rising.
        accumulations: All numbers of batches in a step, rising.
    """
    interval = samples / evaluations
    largest = batch_sizes[-1] * accumulations[-1]
    if largest <= min(MAX_EXCESS * samples, MAX_DELAY * interval):
        return None
    for size in _iterate_step_sizes(batch_sizes, accumulations):
        seen = math.ceil(samples / size) * size
        remedy = f"use samples = {_find_even_budget(samples, evaluations, batch_sizes, accumulations):_}"
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


def _iterate_step_sizes(batch_sizes: Sequence[int], accumulations: Sequence[int]) -> Iterator[int]:
    """The largest first: in a long range one of them is uneven, and the search ends early."""
    for accumulation in reversed(accumulations):
        for batch_size in reversed(batch_sizes):
            yield batch_size * accumulation


def _find_even_budget(samples: int, evaluations: int, batch_sizes: Sequence[int], accumulations: Sequence[int]) -> int:
    """The next budget that all batches divide, or else one that is long compared with each of them."""
    largest = batch_sizes[-1] * accumulations[-1]
    long = math.ceil(max(1 / MAX_EXCESS, evaluations / MAX_DELAY) * largest)
    common = evaluations
    for size in _iterate_step_sizes(batch_sizes, accumulations):
        common = math.lcm(common, evaluations * size)
        if common > long:
            return long
    return min(math.ceil(samples / common) * common, long)
