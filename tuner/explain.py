"""A pydantic ValidationError as one line: the key, the value, the remedy."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable

from pydantic import BaseModel, ValidationError


def unknown_key(key: str, known: Iterable[str], section: str = "") -> str:
    """What to say of a key that is not among the known: the nearest of them, or all."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    where = f"{section}." if section else ""
    remedy = f"did you mean {where}{near[0]}?" if near else f"known are {', '.join(known)}."
    return f"unknown key {where}{key}; {remedy}"


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One mistake of a ValidationError as one line: a misspelt key rather than the one that it leaves missing."""
    errors = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    where = [part for part in map(str, first["loc"]) if part not in ("Choices", "Range")]
    if first["type"] == "extra_forbidden":
        for part in where[:-1]:
            nested = model.model_fields[part].annotation if part in model.model_fields else None
            if isinstance(nested, type) and issubclass(nested, BaseModel):
                model = nested
        if where[0] == "search":
            return unknown_key(
                where[-1], {"choices": 0, "low": 0, "high": 0, "log": 0, "step": 0}, "search." + where[1]
            )
        return unknown_key(where[-1], model.model_fields, ".".join([prefix, *where[:-1]]).strip("."))
    name = ".".join([prefix, *where]).strip(".")
    if first["type"] == "missing":
        return f"{name} is missing; add it."
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict) else f" {json.dumps(first['input'], default=str)}"
    return f"{name or 'spec'}{given}: {message[0].lower()}{message[1:].rstrip('.')}."
