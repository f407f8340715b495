"""TrainConfig: all settings of `train()`. Frozen; an unknown key is an error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

ADAMW_LR = 1e-4


def _check_is_number(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise ValueError("a number is needed" + (", without quotes" if isinstance(value, str) else ""))
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("numbers end at 2**63")
    return value


IsNumber = BeforeValidator(_check_is_number)
"""Pydantic would accept true as 1 and "16" as 16. Integers of more than 64 bits fit no tensor and no database."""
PositiveInt = Annotated[int, Field(gt=0), IsNumber]
NonNegativeInt = Annotated[int, Field(ge=0), IsNumber]
PositiveFloat = Annotated[float, Field(gt=0), IsNumber]
NonNegativeFloat = Annotated[float, Field(ge=0), IsNumber]


class Role(Enum):
    """The role of a field. A field without a role is identity: it changes what is computed, so a run can't be
    continued with another value, and a study may search it."""

    FREE = "how the run is carried out: may change between a run and its continuation"
    BUDGET = "how long the run is: may change, and can't be searched"
    SCHEDULE = "the rate over the run: may change for the steps to come, and can't be searched"
    MEASURE = "what is measured: identity, and can't be searched, or trials would not be comparable"


Unit = Literal["samples", "steps", "seconds"]
Schedule = Literal["none", "cosine", "wsd"]
OnDecline = Literal["warn", "stop", "finish"]


class TrainConfig(BaseModel):
    """One training run. Its length is exactly one of `steps`, `samples` and `seconds`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Length. A step is one optimizer update; a sample is one utterance; seconds count training alone.
    steps: Annotated[PositiveInt | None, Role.BUDGET] = None
    samples: Annotated[PositiveInt | None, Role.BUDGET] = None
    seconds: Annotated[PositiveFloat | None, Role.BUDGET] = None

    # Computation.
    seed: Annotated[NonNegativeInt, Role.MEASURE] = 0
    batch_size: PositiveInt = 8
    grad_accumulation: PositiveInt = 1
    optimizer: Literal["prodigy", "adamw"] = "prodigy"
    lr: PositiveFloat | None = None
    """Default: 1 for Prodigy, which should not be changed; 1e-4 for AdamW."""
    d_coef: PositiveFloat = 1.0
    """Prodigy's factor on its own step size; the one setting of Prodigy to tune."""
    d0: PositiveFloat = 1e-6
    weight_decay: NonNegativeFloat = 0.01
    beta1: NonNegativeFloat = 0.9
    beta2: NonNegativeFloat = 0.999
    use_bias_correction: bool = False
    safeguard_warmup: bool = False
    slice_p: Annotated[PositiveInt, Field(le=2**20)] = 1
    """Prodigy keeps its statistics on every slice_p-th entry: 11 saves 7 bytes a parameter."""
    lr_factors: dict[str, PositiveFloat] = {}
    """Prefix of parameters' names -> factor on their learning rate, and so on their weight decay; of several prefixes
    the longest counts."""
    max_grad_norm: PositiveFloat | None = 1.0
    warmup_steps: NonNegativeInt = 0
    schedule: Annotated[Schedule, Role.SCHEDULE] = "none"
    schedule_steps: Annotated[PositiveInt | None, Role.SCHEDULE] = None
    """The schedule's horizon. Default: the run's own steps; a trial takes its full run's."""
    decay_fraction: Annotated[NonNegativeFloat, Role.SCHEDULE] = 0.2
    """wsd: the share of the horizon, at its end, in which the learning rate falls to zero."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    bucket_samples: PositiveInt = 2048
    """Size of the random pools in which batches of similar length are formed; 1: no length buckets."""

    # Measurement.
    val_samples: Annotated[PositiveInt | None, Role.MEASURE] = None
    """Number of validation samples, drawn once with `val_seed`. Default: all."""
    val_seed: Annotated[NonNegativeInt, Role.MEASURE] = 0

    # Execution.
    eval_every: Annotated[PositiveFloat | None, Role.BUDGET] = None
    """Distance between the points of the evaluation grid, in `eval_unit`. Default: at the end only."""
    eval_unit: Annotated[Unit, Role.BUDGET] = "samples"
    on_decline: Annotated[OnDecline | None, Role.BUDGET] = None
    """The guard of a full run: "warn" reports a decline; "stop" and "finish" also end the run there, with a checkpoint.
    A guarded run keeps the state of its best validation as `best.pth`. None: no guard."""
    patience: Annotated[PositiveInt | None, Role.BUDGET] = None
    """Validations without a new best val/loss that count as a decline. Default: any number is none."""
    log_every: Annotated[PositiveInt, Role.FREE] = 100
    """Steps between log lines. The loop waits for the device only at these."""
    save_every: Annotated[PositiveInt | None, Role.FREE] = 1000
    """Steps between checkpoints. A run that ends or is stopped always saves one."""
    keep_checkpoints: Annotated[PositiveInt, Role.FREE] = 2
    keep_every: Annotated[PositiveInt | None, Role.FREE] = None
    """Steps between milestones: weights that are never deleted. Default: none."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Role.FREE] = "auto"
    micro_batch_size: Annotated[PositiveInt | Literal["auto"] | None, Role.FREE] = None
    """Limit on the samples of a batch that go through the model at once; the update is that of the whole batch. "auto":
    the largest that fits by the memory estimate. Default: the batch size."""

    # `trainer.acceleration` decides these from device and run, unless they are set.
    compile: Annotated[Literal["auto", "on", "off"], Role.FREE] = "auto"
    sdpa: Annotated[Literal["auto", "flash", "efficient", "math"], Role.FREE] = "auto"
    """The kernel of scaled dot-product attention."""
    tf32: Annotated[bool | None, Role.FREE] = None
    cudnn_benchmark: Annotated[bool | None, Role.FREE] = None
    num_workers: Annotated[NonNegativeInt | None, Role.FREE] = None
    pin_memory: Annotated[bool | None, Role.FREE] = None
    fused_optimizer: Annotated[bool, Role.FREE] = True
    """False: PyTorch's own operations instead of fused kernels."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        lengths = [n for n in ("steps", "samples", "seconds") if getattr(self, n) is not None]
        if len(lengths) != 1:
            given = " and ".join(lengths) or "none of them"
            raise ValueError(f"give exactly one of steps, samples and seconds, not {given}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 0 and below 1")
        if self.optimizer == "adamw" and not self.fused_optimizer:
            raise ValueError("fused_optimizer false is for prodigy: only AdamW's fused form can skip an update")
        if self.decay_fraction > 1:
            raise ValueError(f"decay_fraction {self.decay_fraction} is a share; use at most 1")
        if self.schedule != "none" and self.horizon is None:
            raise ValueError(
                f"schedule {self.schedule} needs a horizon when the length is in seconds: set schedule_steps"
            )
        return self

    @property
    def effective_batch_size(self) -> int:
        """Samples per optimizer update."""
        return self.batch_size * self.grad_accumulation

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches in a batch; 1 while it is undecided."""
        return self.count_micro_batches(self.batch_size)

    def count_micro_batches(self, num_samples: int) -> int:
        """Number of micro-batches in a part of a batch."""
        return math.ceil(num_samples / self.micro_batch_size) if isinstance(self.micro_batch_size, int) else 1

    @property
    def num_steps(self) -> int | None:
        """The run's length in optimizer updates; None if it is given in seconds."""
        if self.samples is not None:
            return math.ceil(self.samples / self.effective_batch_size)
        return self.steps

    @property
    def horizon(self) -> int | None:
        """Steps over which the schedule runs."""
        return self.schedule_steps or self.num_steps

    @property
    def decay_start(self) -> int | None:
        """wsd: the number of the first update at a lowered rate."""
        if self.schedule != "wsd" or self.horizon is None:
            return None
        return self.horizon - self.decay_steps + 1

    @property
    def decay_steps(self) -> int:
        """wsd: over how many updates the rate falls to zero."""
        return max(1, round(self.decay_fraction * (self.horizon or 0)))

    @property
    def base_lr(self) -> float:
        return self.lr or (1.0 if self.optimizer == "prodigy" else ADAMW_LR)

    def describe_schedule(self) -> str:
        """The schedule in words: "constant until step 8,001, then falling to zero at 10,000"."""
        if self.schedule == "cosine":
            return f"a cosine over {self.horizon:,} steps"
        if self.decay_start is None:
            return "constant"
        return f"constant until step {self.decay_start:,}, then falling to zero at {self.horizon:,}"

    def identity(self) -> dict[str, Any]:
        """The fields that must be equal in a continued run, as plain values."""
        values = self.model_dump(mode="json", include=set(identity_fields(type(self))))
        values["lr"] = self.base_lr
        return values


def role_of(model: type[BaseModel], name: str) -> Role | None:
    """The role of a field of `TrainConfig` or of a workload."""
    return next((m for m in model.model_fields[name].metadata if isinstance(m, Role)), None)


def fields_of_role(model: type[BaseModel], *roles: Role | None) -> Iterator[str]:
    """Names of the fields with one of these roles; None is that of identity."""
    return (name for name in model.model_fields if role_of(model, name) in roles)


def identity_fields(model: type[BaseModel]) -> Iterator[str]:
    """Names of the fields that change what is computed or measured."""
    return fields_of_role(model, None, Role.MEASURE)


def differences(prefix: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One phrase for each key that differs: "train.batch_size was 8 and is now 16"."""
    return [
        f"{prefix}.{key} was {old.get(key)!r} and is now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
