"""Sizes as a person reads them, and the first line of an error."""

from __future__ import annotations

import pytest

from trainer.errors import first_line
from trainer.units import format_bytes


@pytest.mark.parametrize(
    ("number", "text"),
    [(24e9, "24.0 GB"), (1e9, "1.0 GB"), (123_456_789, "123.5 MB"), (400_000, "400 kB"), (0, "0 kB")],
)
def test_bytes_have_a_fitting_unit(number: float, text: str) -> None:
    assert format_bytes(number) == text


@pytest.mark.parametrize(
    ("error", "line"), [(ValueError("\none\ntwo"), "one"), (MemoryError(), "MemoryError"), (OSError("  "), "OSError")]
)
def test_error_is_quoted_by_its_first_line_or_its_type(error: Exception, line: str) -> None:
    assert first_line(error) == line
