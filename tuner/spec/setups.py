"""Builds workload and configuration of a trial or a full run, from a spec and parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna import Trial
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from trainer.config import TrainConfig
from trainer.trackers import TrackerName
from trainer.workload import Workload
from tuner.spec.search import Choices, list_types, split_key
from tuner.spec.study_toml import StudySpec

VALIDATION_SHARE = 0.1
# A forward pass without gradients costs about a third of a training step.
FORWARD_SHARE = 1 / 3
# For a budget in seconds: its number of samples is unknown beforehand.
DEFAULT_VAL_SAMPLES = 100
# In trial lengths. Below it the trials' own order is as good, on the recorded curves and on the Korean demo.
MIN_HORIZON = 5


@dataclass(frozen=True)
class Setup:
    """The arguments of `train()`: the workload with its options, and the configuration; and the trackers."""

    workload: Workload
    config: TrainConfig
    trackers: Sequence[TrackerName] = ()


def search_space(spec: StudySpec) -> dict[str, BaseDistribution]:
    """What the sampler chooses from, by searched field."""
    space: dict[str, BaseDistribution] = {}
    for name, each in spec.search.items():
        if isinstance(each, Choices):
            space[name] = CategoricalDistribution(each.choices)
        elif spec.is_integer(name):
            space[name] = IntDistribution(int(each.low), int(each.high), each.log, int(each.step or 1))
        else:
            space[name] = FloatDistribution(each.low, each.high, each.log, each.step)
    return space


def stored_space(spec: StudySpec, trials: Iterable[FrozenTrial]) -> dict[str, BaseDistribution]:
    """The distributions that Optuna stores with a trial, by searched field.

    Choices that are numbers are stored as the range that they span: within a study, Optuna lets a range grow, but no
    list of choices. Early versions stored lists, and their studies keep them.

    Args:
        trials: Of the study.
    """
    lists = {name for t in trials for name, d in t.distributions.items() if isinstance(d, CategoricalDistribution)}
    space = search_space(spec)
    for name, each in spec.search.items():
        if isinstance(each, Choices) and each.is_numeric and name not in lists:
            low, high = min(each.choices), max(each.choices)
            if float in list_types(spec.annotation(name)):
                space[name] = FloatDistribution(float(low), float(high))
            elif all(isinstance(choice, int) for choice in each.choices):
                space[name] = IntDistribution(int(low), int(high))
    return space


class OutsideSearch(Exception):
    """A parameter's value is not in its search space."""


def check_enqueued(params: Mapping[str, Any], spec: StudySpec) -> None:
    """Check the parameters of a trial that a person enqueued.

    Raises:
        OutsideSearch: One of them is not in its search space.
    """
    for name, value in params.items():
        if name in spec.search and value not in spec.search[name]:
            raise OutsideSearch(f"{name} = {value!r} is not in its search space ({spec.search[name]})")


def suggest(trial: Trial, spec: StudySpec) -> dict[str, Any]:
    """Asks the sampler for a value of each searched field, by dotted name."""
    params: dict[str, Any] = {}
    for name, d in stored_space(spec, trial.study.get_trials(deepcopy=False)).items():
        if isinstance(d, CategoricalDistribution):
            params[name] = trial.suggest_categorical(name, d.choices)
        elif isinstance(d, IntDistribution):
            params[name] = trial.suggest_int(name, d.low, d.high, step=d.step, log=d.log)
        elif isinstance(d, FloatDistribution):
            params[name] = trial.suggest_float(name, d.low, d.high, step=d.step, log=d.log)
    return params


def count_settings(spec: StudySpec) -> float:
    """Number of settings in the search space; infinite if one parameter takes fractions."""
    sizes = []
    for distribution in search_space(spec).values():
        if isinstance(distribution, CategoricalDistribution):
            sizes.append(len(distribution.choices))
        elif isinstance(distribution, IntDistribution | FloatDistribution) and distribution.step:
            sizes.append(round((distribution.high - distribution.low) / distribution.step) + 1)
        else:
            return math.inf
    return math.prod(sizes)


def baseline_params(spec: StudySpec) -> dict[str, Any]:
    """The searched fields' values in the spec: the parameters of trial 0."""
    owners = {"train": spec.baseline, "workload": spec.build_workload()}
    fields = {key: split_key(key) for key in spec.search}
    return {key: getattr(owners[section], name) for key, (section, name) in fields.items()}


def try_params(spec: StudySpec) -> list[dict[str, Any]]:
    """The parameters of each entry of [[search.try]]; a key that is left out has the baseline's value."""
    entries = [
        {key: int(value) if spec.is_integer(key) else value for key, value in entry.items()} for entry in spec.tries
    ]
    return [{**baseline_params(spec), **entry} for entry in entries]


def largest_step(spec: StudySpec) -> int:
    """The largest effective batch size of the search space."""
    largest = 1
    for name in ("batch_size", "grad_accumulation"):
        space = spec.search.get(f"train.{name}")
        largest *= int(max(space.corners)) if space else getattr(spec.baseline, name)
    return largest


def horizon(spec: StudySpec) -> float | None:
    """Length of a run at a constant learning rate that ranks settings as the baseline's full run does, in the unit of
    the trials; None if those are in seconds, or if it is shorter than `MIN_HORIZON` trials.

    A run whose rate decays ranks them as a constant one of half its length: over the curves in scripts/records, the
    rank correlation with its end is 0.97 and 0.96 there, against 0.92 and 0.88 at its own length. A decay removes
    noise, as larger batches do.
    """
    if spec.trial.unit == "seconds":
        return None
    config = full_setup(spec, {}).config
    length: float = (config.num_steps or 0) * (config.effective_batch_size if spec.trial.unit == "samples" else 1)
    length = length if spec.full.schedule == "none" else length / 2
    return length if length >= MIN_HORIZON * spec.trial.budget else None


def full_setup(spec: StudySpec, params: Mapping[str, Any], **changes: Any) -> Setup:
    """The full run with these parameters; `changes` replace fields of the configuration."""
    train, options = _overlay(spec, params)
    values = {
        **train,
        "steps": spec.full.steps,
        "samples": spec.full.samples,
        "val_samples": count_val_samples(spec),
        "eval_every": spec.full.eval_every or spec.trial.samples,
        "eval_unit": "samples",
        "schedule": spec.full.schedule,
        "decay_fraction": spec.full.decay_fraction,
        "on_decline": spec.full.on_decline,
        "patience": spec.full.patience,
    }
    if values["eval_every"] is None:
        # A trial in steps or seconds has no length in samples: about a hundred validations.
        probe = spec.build_config({**train, "steps": 1})
        samples = spec.full.samples or (spec.full.steps or 0) * probe.effective_batch_size
        values["eval_every"] = max(1, samples // 100)
    return Setup(spec.build_workload(options), spec.build_config({**values, **changes}), spec.track.to)


def trial_setup(spec: StudySpec, params: Mapping[str, Any], **changes: Any) -> Setup:
    """The short run: a prefix of the full run (same seed, batches and schedule), on the evaluation grid."""
    full = full_setup(spec, params)
    values = {
        **full.config.model_dump(exclude_unset=True),
        "schedule_steps": full.config.horizon,
        "steps": spec.trial.steps,
        "samples": spec.trial.samples,
        "seconds": spec.trial.seconds,
        "eval_every": spec.trial.budget / spec.trial.evaluations,
        "eval_unit": spec.trial.unit,
        "keep_checkpoints": 1,
        "keep_every": None,
        "on_decline": None,
        "patience": None,
    }
    return Setup(full.workload, spec.build_config({**values, **changes}), spec.track.to)


def _overlay(spec: StudySpec, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """[train] and [workload], updated with a trial's parameters."""
    sections = {"train": dict(spec.train), "workload": dict(spec.workload)}
    for key, value in params.items():
        section, name = split_key(key)
        sections[section][name] = value
    return sections["train"], sections["workload"]


def count_val_samples(spec: StudySpec) -> int:
    """Size of the validation set: as set, else so that validation takes at most a tenth of a trial."""
    if "val_samples" in spec.train:
        return int(spec.train["val_samples"])
    if spec.trial.seconds is not None:
        return DEFAULT_VAL_SAMPLES
    # A budget in steps: the smallest batch size decides, because all trials share the set.
    smallest = min(spec.search["train.batch_size"].corners) if "train.batch_size" in spec.search else None
    batch_size = smallest or spec.baseline.batch_size
    samples = spec.trial.samples or (spec.trial.steps or 0) * int(batch_size)
    affordable = VALIDATION_SHARE / FORWARD_SHARE * samples / spec.trial.evaluations
    return max(1, math.floor(affordable))
