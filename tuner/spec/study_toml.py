"""StudySpec: reads and checks a study.toml.

A mistake is one line: the key, the value, the remedy. For an unknown key it names the nearest known one.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trainer.config import (
    IsNumber,
    NonNegativeFloat,
    NonNegativeInt,
    OnDecline,
    PositiveFloat,
    PositiveInt,
    Role,
    Schedule,
    TrainConfig,
    Unit,
    role_of,
)
from trainer.errors import UserError
from trainer.trackers import TrackerName
from trainer.workload import Workload
from tuner.spec.beside import HooksSection, NotifySection
from tuner.spec.mistakes import describe_unknown_key, explain
from tuner.spec.overrides import apply_override
from tuner.spec.search import Dimension, Range, Section, find_unevenness, flatten, is_whole, split_key
from tuner.spec.workloads import load_workload_class


class StudySection(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Names folders and files too."""
    workload: str = Field(pattern=r"^[\w.]+:\w+$")
    """"module:Class"; the module may be in the folder of the study.toml."""
    metric: str = Field("val/loss", pattern=r"^val/\w+$")
    direction: Literal["minimize", "maximize"] = "minimize"
    seed: NonNegativeInt = 0
    """The sampler's seed; `train.seed` is that of training."""

    @field_validator("name")
    @classmethod
    def _check(cls, name: str) -> str:
        if name.endswith(".full"):
            raise ValueError("this ending is reserved for the full runs of a study; choose another")
        return name


class TrialSection(Section):
    """The short run. Its budget is one of samples, steps and seconds."""

    samples: PositiveInt | None = None
    steps: PositiveInt | None = None
    seconds: PositiveFloat | None = None
    evaluations: PositiveInt = 8
    num_trials: PositiveInt = 20
    """Of the study, over all launches."""
    patience: NonNegativeInt = 0
    """The study ends after this number of trials without an improvement; 0: never."""
    min_delta: NonNegativeFloat = 0.0
    """The least improvement that counts."""

    @model_validator(mode="after")
    def _check(self) -> TrialSection:
        if sum(value is not None for value in (self.samples, self.steps, self.seconds)) != 1:
            raise ValueError("give exactly one of samples, steps and seconds")
        if self.budget < self.evaluations:
            raise ValueError(f"{self.evaluations} evaluations in {self.budget:g} {self.unit}: use fewer")
        if self.min_delta and not self.patience:
            raise ValueError(f"min_delta {self.min_delta:g} does nothing without patience: set patience too")
        return self

    @property
    def unit(self) -> Unit:
        return "samples" if self.samples else "steps" if self.steps else "seconds"

    @property
    def budget(self) -> float:
        return self.samples or self.steps or self.seconds or 0

    @property
    def first_point(self) -> int:
        """The first point of the evaluation grid, as it is reported."""
        return max(1, round(self.budget / self.evaluations))


class Choice(BaseModel):
    """A sampler or a pruner: its name, and arguments of Optuna's class."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str

    @model_validator(mode="after")
    def _check(self) -> Choice:
        for key, value in self.arguments.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key} {value}: input should be a finite number")
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class FullSection(Section):
    """The full run. Its length is one of steps and samples."""

    steps: PositiveInt | None = None
    samples: PositiveInt | None = None
    eval_every: PositiveInt | None = None
    """Samples between validations. Default: a trial's length, so the first is at the trial's last point."""
    schedule: Schedule = "wsd"
    """wsd: the learning rate is constant and falls linearly to zero over the last `decay_fraction` of the run; a trial
    ends before that. cosine: to zero over the whole run, and a trial has the first part of it. none: constant."""
    decay_fraction: Annotated[float, Field(gt=0, lt=1), IsNumber] = 0.2
    on_decline: OnDecline = "warn"
    """When the guard finds that the run declines. warn: report it; stop: end it with a checkpoint; finish: go back to
    `best.pth` and let the rate fall to zero from there."""
    patience: PositiveInt | None = None
    """Validations without a new best val/loss that count as a decline. Default: any number is none."""

    @model_validator(mode="after")
    def _check(self) -> FullSection:
        if (self.steps is None) == (self.samples is None):
            raise ValueError("give exactly one of steps and samples")
        if self.on_decline == "finish" and self.schedule == "cosine":
            raise ValueError('on_decline "finish" needs a rate that is still constant, and a cosine falls: use "stop"')
        return self

    @property
    def length(self) -> dict[str, int]:
        """Its samples or its steps, by that name."""
        return {"samples": self.samples} if self.samples is not None else {"steps": self.steps or 0}


class TrackSection(Section):
    """Where the figures of all runs are written."""

    to: list[TrackerName] = Field(default=["aim"])


class StudySpec(Section):
    """A whole study.toml."""

    study: StudySection
    workload: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    search: dict[str, Dimension]
    tries: tuple[dict[str, Any], ...] = ()
    """`[[search.try]]`: parameters that the user wants tried after the baseline; a missing key has its value."""
    trial: TrialSection
    sampler: Choice = Choice(name="gp")
    pruner: Choice = Choice(name="median")
    full: FullSection
    track: TrackSection = TrackSection()
    notify: NotifySection = NotifySection()
    hooks: HooksSection | None = None
    base_dir: Path = Path()
    """Folder of the study.toml: relative paths start here, and the workload's module may be here."""

    @classmethod
    def load(cls, path: Path | str, overrides: Mapping[str, Any] | None = None, *, search: bool = True) -> StudySpec:
        """Read and check a study.toml.

        Args:
            overrides: Values by dotted key that replace the file's: {"train.batch_size": 16}.
            search: False ignores [search], for a run without a study.

        Raises:
            UserError: The file is missing, is no TOML, or has a value that is not allowed.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise UserError(f"{path}: no such study spec; give the path of a study.toml.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: can't be read as UTF-8 text ({error}).") from None
        try:
            values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise UserError(f"{path}: not valid TOML: {error}.") from error
        if "tries" in values:
            raise UserError(f"{path}: unknown key tries; write its entries as [[search.try]].")
        for key, value in (overrides or {}).items():
            apply_override(values, key, value)
        if not search:
            values["search"] = {}
        elif isinstance(values.get("search"), dict) and not values["search"].keys() - {"try"}:
            raise UserError(f"{path}: [search] is empty; name a field to search, such as train.batch_size.")
        return cls.build(values, base_dir=path.resolve().parent, source=str(path))

    @classmethod
    def build(
        cls, values: Mapping[str, Any], *, base_dir: Path, source: str = "spec", stored: bool = False
    ) -> StudySpec:
        """Check the values of a study.toml.

        Args:
            stored: They come from an existing study: [search] and the budget are not checked again.

        Raises:
            UserError: A value is not allowed; the message starts with `source`.
        """
        values = {**(_with_schedule(values) if stored else values), "base_dir": base_dir}
        if isinstance(values.get("search"), dict):
            search = dict(values["search"])
            if "try" in search:
                values["tries"] = _read_tries(search.pop("try"), source)
            values["search"] = flatten(search)
        try:
            spec = cls.model_validate(values)
        except ValidationError as error:
            raise UserError(f"{source}: {explain(error, cls)}") from None
        spec._check(source, stored)
        return spec

    def to_dict(self) -> dict[str, Any]:
        """Plain values with absolute paths, as stored with the study. `build` reads them."""
        values = self.model_dump(mode="json", exclude_none=True)
        if "notify" not in self.model_fields_set:
            del values["notify"]
        # Validation makes paths absolute. Options that the user left out stay out and follow the defaults.
        resolved = self.build_workload().model_dump(mode="json")
        values["workload"] = {key: resolved[key] for key in self.workload}
        return values

    @cached_property
    def workload_class(self) -> type[Workload]:
        """Imports the class that `study.workload` names.

        Raises:
            UserError: The module or the class does not exist, or it is no Workload.
        """
        return load_workload_class(self.study.workload, self.base_dir)

    def build_workload(self, options: Mapping[str, Any] | None = None) -> Workload:
        """The workload with the options of `[workload]`, or with others.

        Raises:
            UserError: An option is unknown or out of range.
        """
        options = dict(self.workload if options is None else options)
        try:
            return self.workload_class.model_validate(options, context={"base_dir": self.base_dir})
        except ValidationError as error:
            raise UserError(explain(error, self.workload_class, prefix="workload")) from None

    @property
    def baseline(self) -> TrainConfig:
        """`[train]` as a configuration of one step: its settings without a length."""
        return self.build_config({**self.train, "steps": 1})

    def build_config(self, values: Mapping[str, Any]) -> TrainConfig:
        """A TrainConfig from `values`.

        Raises:
            UserError: A key is unknown or out of range.
        """
        try:
            return TrainConfig.model_validate(dict(values))
        except ValidationError as error:
            raise UserError(explain(error, TrainConfig, prefix="train")) from None

    def _check(self, source: str, stored: bool) -> None:
        """Check the keys of [train] and [workload], and [search] against them."""
        try:
            for key in self.train:
                role = role_of(TrainConfig, key) if key in TrainConfig.model_fields else None
                if role is Role.BUDGET:
                    raise UserError(
                        f"train.{key}: the length, the evaluation grid and the guard are set in [trial] and [full]; "
                        "remove it from [train]."
                    )
                if role is Role.SCHEDULE:
                    raise UserError(
                        f"train.{key}: the schedule is set in [full] (schedule, decay_fraction), over the full run's "
                        "length; remove it from [train]."
                    )
            owners = {"train": self.baseline, "workload": self.build_workload()}
            for key, dimension in () if stored else self.search.items():
                self._check_dimension(key, dimension, owners)
            if not stored:
                self._check_budget()
                self._check_tries(owners)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    def _check_dimension(self, key: str, dimension: Dimension, owners: Mapping[str, BaseModel]) -> None:
        section, name = split_key(key)
        if section not in owners or not name:
            raise UserError(f'search."{key}": only train.* and workload.* fields can be searched.')
        owner = owners[section]
        if name not in type(owner).model_fields:
            raise UserError(f'search."{key}": {describe_unknown_key(name, type(owner).model_fields, section)}')
        role = role_of(type(owner), name)
        if role is Role.FREE:
            raise UserError(f'search."{key}": it changes no result; set it in [{section}].')
        if role is Role.SCHEDULE:
            raise UserError(f'search."{key}": a trial ends before the rate falls; set the schedule in [full].')
        if role in (Role.BUDGET, Role.MEASURE):
            raise UserError(
                f'search."{key}": it decides {"the budget" if role is Role.BUDGET else "what is measured"}, '
                "so trials would not be comparable; remove it from [search]."
            )
        if (misfit := dimension.find_misfit(type(owner).model_fields[name].annotation)) is not None:
            raise UserError(f'search."{key}": {misfit}.')
        for corner in dimension.corners:
            if isinstance(dimension, Range) and self.is_integer(key):
                corner = int(corner)
            if section == "train":
                self.build_config({**self.train, "steps": 1, name: corner})
            else:
                self.build_workload({**self.workload, name: corner})
        value = getattr(owner, name)
        if value is None:
            raise UserError(f"{key} is not set: the baseline needs a value of its search space ({dimension}).")
        if value not in dimension:
            raise UserError(
                f"{key} = {value!r} is outside its search space ({dimension}): it is the baseline, so widen the space "
                "or change it."
            )

    def _check_tries(self, owners: Mapping[str, BaseModel]) -> None:
        """Check that each entry of [[search.try]] is in the search space, and that no two trials would be the same."""
        baseline = {key: getattr(owners[split_key(key)[0]], split_key(key)[1]) for key in self.search}
        names: dict[str, dict[str, Any]] = {"the baseline": baseline}
        for number, entry in enumerate(self.tries, 1):
            where = f"search.try {number}"
            for key, value in entry.items():
                if key not in self.search:
                    raise UserError(f"{where}: {describe_unknown_key(key, self.search)}")
                dimension = self.search[key]
                fits = value in dimension
                if fits and isinstance(dimension, Range) and self.is_integer(key):
                    fits = value == int(value)
                if not fits:
                    raise UserError(
                        f"{where}: {key} = {value!r} is outside its search space ({dimension}): change it, or widen "
                        "the space."
                    )
            params = {**baseline, **entry}
            same = next((name for name, other in names.items() if other == params), None)
            if same is not None:
                raise UserError(f"{where}: it is the same as {same}; remove it, or change a value.")
            names[where] = params

    def _check_budget(self) -> None:
        """Check that all batch sizes see equally many samples, and that the pruner's first rung is within a trial."""
        steps = [
            dimension.list_whole_numbers()
            if (dimension := self.search.get(f"train.{name}"))
            else [getattr(self.baseline, name)]
            for name in ("batch_size", "grad_accumulation")
        ]
        every, largest = self.full.eval_every, steps[0][-1] * steps[1][-1]
        if every is not None and every < largest:
            raise UserError(f"full.eval_every {every}: a step may take {largest} samples; use at least {largest}.")
        samples, is_searched = self.trial.samples, max(map(len, steps)) > 1
        if samples and is_searched and (reason := find_unevenness(samples, self.trial.evaluations, *steps)) is not None:
            raise UserError(f"trial.{reason}.")
        for size in sorted({batch_size * accumulation for batch_size in steps[0] for accumulation in steps[1]}):
            self._check_decay(size)
        rung = self.pruner.arguments.get("min_resource")
        if isinstance(rung, int) and rung > self.trial.budget:
            raise UserError(
                f"pruner.min_resource {rung} is beyond a trial's {self.trial.budget:g} {self.trial.unit}: "
                "nothing would be pruned; use less."
            )

    def _check_decay(self, batch_size: int) -> None:
        """Check that a trial with this effective batch size ends before its full run's rate falls."""
        trial, full = self.trial, self.full
        if not self.search or full.schedule != "wsd" or trial.unit == "seconds":
            return
        num_steps, trial_steps = (each.steps or math.ceil((each.samples or 0) / batch_size) for each in (full, trial))
        config = TrainConfig(steps=num_steps, schedule="wsd", decay_fraction=full.decay_fraction)
        assert config.decay_start is not None
        if trial_steps > config.decay_start:
            most = config.decay_start * (batch_size if trial.samples else 1)
            raise UserError(
                f"trial.{trial.unit} {trial.budget:_}: with a batch of {batch_size} a trial has {trial_steps:,} steps, "
                f"and its full run decays from step {config.decay_start:,} of {num_steps:,}: use at most {most:_} "
                f'{trial.unit}, a longer [full], or full.schedule = "none".'
            )

    def annotation(self, key: str) -> Any:
        """The type of a searched field."""
        section, name = split_key(key)
        fields = (TrainConfig if section == "train" else self.workload_class).model_fields
        return fields[name].annotation

    def is_integer(self, key: str) -> bool:
        """Whether a searched field takes whole numbers only."""
        return is_whole(self.annotation(key))


def _read_tries(value: Any, source: str) -> tuple[dict[str, Any], ...]:
    """The entries of [[search.try]] by dotted keys."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise UserError(f"{source}: search.try: write each entry under a heading [[search.try]], with double brackets.")
    return tuple(flatten(entry, of_dimensions=False) for entry in value)


def _with_schedule(values: Mapping[str, Any]) -> dict[str, Any]:
    """A stored spec; an older one has its schedule in [train], and without one its full runs are constant."""
    train = dict(values.get("train", {}))
    train.pop("schedule_steps", None)
    older = {"schedule": train.pop("schedule", "none"), "decay_fraction": train.pop("decay_fraction", 0.2)}
    return {**values, "train": train, "full": {**older, **values["full"]}}
