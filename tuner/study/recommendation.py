"""The trial to promote, in words. Imports no torch."""

from __future__ import annotations

from tuner.study.record import StudyRecord


def describe_recommendation(record: StudyRecord) -> str | None:
    """The trial to promote and what a longer run is expected to change, in a sentence; None if the study has no
    recommendation."""
    found = record.recommendation
    if found is None:
        return None
    growth = f"the optimal batch size is expected to grow by a factor of {found['growth']:.2g} until its end"
    if found["trial"] == found["best"]:
        return f"trial {found['trial']} is recommended for the full run, too: {growth}"
    return (
        f"trial {found['trial']} is recommended for the full run: there it is better than trial {found['best']} with "
        f"probability {found['probability']:.2f}; {growth}"
    )
