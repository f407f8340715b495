"""Compares two specs: whether their trials are comparable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.config import Role, differences, role_of
from tuner.spec.search import Dimension
from tuner.spec.setups import count_val_samples
from tuner.spec.study_toml import StudySpec

ENDINGS = ("num_trials", "patience", "min_delta")
"""Keys of [trial] that end the study. They change no trial."""


def compare_specs(spec: StudySpec, stored: StudySpec) -> list[str]:
    """The settings of `spec` that make its trials incomparable with those of `stored`; the data is not compared."""
    new, old = _list_comparable(spec), _list_comparable(stored)
    changed = [phrase for part in new for phrase in differences(part, old[part], new[part])]
    return changed + _compare_search(spec.search, stored.search)


def _compare_search(new: Mapping[str, Dimension], old: Mapping[str, Dimension]) -> list[str]:
    """A search space may become wider: its trials stay comparable."""
    changed = [f"search.{name} was added" for name in new.keys() - old.keys()]
    changed += [f"search.{name} was removed" for name in old.keys() - new.keys()]
    for name in old.keys() & new.keys():
        if (reason := old[name].describe_narrowing(new[name])) is not None:
            changed.append(f"search.{name} was {old[name]} and is now {new[name]}: {reason}")
    return sorted(changed)


def _list_comparable(spec: StudySpec) -> dict[str, dict[str, Any]]:
    values = spec.to_dict()
    # A trial has the first part of its full run's cosine. Any other schedule is constant over it.
    cosine = {**spec.full.length, "schedule": "cosine"} if spec.full.schedule == "cosine" else {}
    options = spec.build_workload().model_dump(mode="json")
    return {
        "study": {key: values["study"][key] for key in ("workload", "metric", "direction")},
        # Without a value, the search space decides how many.
        "train": {**spec.baseline.identity(), "val_samples": count_val_samples(spec)},
        "full": cosine,
        "workload": {
            key: value for key, value in options.items() if role_of(spec.workload_class, key) is not Role.FREE
        },
        "trial": {key: value for key, value in values["trial"].items() if key not in ENDINGS},
    }
