"""A mistake in a spec as one line: the key, the value, the remedy."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

DIMENSION_KEYS = ("choices", "low", "high", "log", "step")
LONGEST_VALUE = 80
# Where several types are allowed, pydantic adds the tried type to the location of the error.
TRIED_TYPE = re.compile(r"(Choices|Range|int|float|bool|str|(function|constrained)-.*|(literal|list|tuple|dict)\[.*)")


def describe_unknown_key(key: str, known: Iterable[str], section: str = "") -> str:
    """The message for an unknown key. It names the nearest known key, or all known keys."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    where = f"{section}." if section else ""
    remedy = f"did you mean {where}{near[0]}?" if near else f"known are {', '.join(known)}."
    return f"unknown key {where}{key}; {remedy}"


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """The first error as one line. A misspelt key comes before the key that is missing because of it."""
    errors = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    where = _place(first["loc"])
    if first["type"] == "extra_forbidden":
        return _explain_unknown_key(where, "Choices" in first["loc"], model, prefix)
    name = ".".join([prefix, *where]).strip(".")
    if first["type"] == "missing":
        return f"{name} is missing; add it."
    # One error for each allowed type, some with equal messages.
    messages = dict.fromkeys(_message(e["msg"]) for e in errors if _place(e["loc"]) == where)
    given = "" if isinstance(first["input"], dict) else f" {_format_value(first['input'])}"
    return f"{name or 'spec'}{given}: {', or '.join(messages)}."


def _explain_unknown_key(where: Sequence[str], has_choices: bool, model: type[BaseModel], prefix: str) -> str:
    key = where[-1]
    for part in where[:-1]:
        nested = model.model_fields[part].annotation if part in model.model_fields else None
        for each in (nested, *get_args(nested)):
            if isinstance(each, type) and issubclass(each, BaseModel):
                model = each
    section = ".".join([prefix, *where[:-1]]).strip(".")
    if where[0] != "search" or len(where) < 3:
        return describe_unknown_key(key, model.model_fields, section)
    if has_choices and key in DIMENSION_KEYS:
        return f"{section}.{key}: choices can't be combined with low, high, log and step; remove it or the choices."
    return describe_unknown_key(key, DIMENSION_KEYS, section)


def _place(loc: Sequence[int | str]) -> list[str]:
    return [str(part) for part in loc if not TRIED_TYPE.fullmatch(str(part))]


def _message(text: str) -> str:
    text = text.removeprefix("Value error, ")
    return f"{text[0].lower()}{text[1:].rstrip('.')}"


def _format_value(value: Any) -> str:
    """A value as in TOML, shortened to one line."""
    # JSON writes inf and nan differently from TOML.
    text = str(value) if isinstance(value, float) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
