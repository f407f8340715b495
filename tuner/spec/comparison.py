"""Compares two specs: whether their trials are comparable."""

from __future__ import annotations

from typing import Any

from trainer.config import Role, differences, role_of
from tuner.spec.study_toml import StudySpec

ENDINGS = ("num_trials", "patience", "min_delta")
"""Keys of [trial] that end the study. They change no trial."""


def compare_specs(spec: StudySpec, stored: StudySpec) -> list[str]:
    """The settings of `spec` that make its trials incomparable with those of `stored`; the data is not compared."""
    new, old = _list_comparable(spec), _list_comparable(stored)
    return [phrase for part in new for phrase in differences(part, old[part], new[part])]


def _list_comparable(spec: StudySpec) -> dict[str, dict[str, Any]]:
    values = spec.to_dict()
    # A trial has the first part of its full run's cosine. Any other schedule is constant over it.
    cosine = {**spec.full.length, "schedule": "cosine"} if spec.full.schedule == "cosine" else {}
    options = spec.build_workload().model_dump(mode="json")
    return {
        "study": {key: values["study"][key] for key in ("workload", "metric", "direction")},
        "train": spec.baseline.identity(),
        "full": cosine,
        "workload": {
            key: value for key, value in options.items() if role_of(spec.workload_class, key) is not Role.FREE
        },
        "search": values["search"],
        "trial": {key: value for key, value in values["trial"].items() if key not in ENDINGS},
    }
