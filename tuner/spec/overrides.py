"""`--set section.key=value`: parsed, and put into the values of a study.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

from trainer.errors import UserError
from tuner.spec.search import split_key

SECTIONS = ("train", "workload", "full", "trial", "study", "track", "notify", "hooks")
LENGTHS = ("steps", "samples", "seconds")


def parse_override(text: str) -> tuple[str, Any]:
    """`train.batch_size=8` as ("train.batch_size", 8). The value is TOML; a bare word is a string."""
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        raise UserError(f"--set {text}: write it as section.key=value, such as train.batch_size=8.")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()
    except (ValueError, RecursionError):
        raise UserError(f"--set {key}: the value has too many digits or brackets: give a shorter one.") from None


def parse_overrides(texts: Sequence[str] | None) -> dict[str, Any]:
    """The values of all `--set`, by key."""
    return dict(map(parse_override, texts or []))


def apply_override(values: dict[str, Any], key: str, value: Any) -> None:
    """Set one key. A length replaces the section's other lengths: only one of them may be set."""
    section, name = split_key(key)
    if section not in SECTIONS:
        raise UserError(f"--set {key}: the sections are {', '.join(SECTIONS)}.")
    if section in ("full", "trial") and name in LENGTHS:
        for other in LENGTHS:
            values.get(section, {}).pop(other, None)
    if not isinstance(values.setdefault(section, {}), dict):
        raise UserError(f"--set {key}: {section} is not a table in the spec.")
    values[section][name] = value
