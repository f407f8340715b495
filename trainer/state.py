"""A run's whole state: the content of a checkpoint, and how a run starts, continues, or is refused."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from torch import Tensor, nn

from trainer.acceleration import RunSize
from trainer.checkpoint import Checkpoints, snapshot
from trainer.checkpoint_file import UnreadableFile
from trainer.config import Role, TrainConfig, differences, fields_of_role, identity_fields
from trainer.errors import UserError, first_line
from trainer.guard import Guard
from trainer.optimizers import build_optimizer, has_same_rates
from trainer.ranks import ALONE, Ranks
from trainer.state_form import describe, find_odd_optimizer, load_model, read_state
from trainer.workload import Workload

log = logging.getLogger(__name__)

FIRST_LOG_STEPS = 53
"""An early log line, after the warm-up and 50 more steps, for the user who starts a run of days."""
WARM_UP_STEPS = 3
"""The first steps after a start or a continuation. In the first one code is compiled and caches are cold; in the next
ones kernels are chosen for a length, or compiled on first use. Their time is left out of `Progress.seconds`, so that a
budget in seconds trains equally long with and without compilation."""


@dataclass
class Progress:
    """Progress of a run, in plain values, stored in checkpoints as it is."""

    step: int = 0
    seconds: float = 0.0
    """Seconds of training, over `timed_steps`; warm-up, validation and checkpoints are not counted."""
    timed_steps: int = 0
    evaluated: float = 0.0
    """The last point of the evaluation grid that was evaluated."""
    evaluated_step: int = -1
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last validation."""
    best: dict[str, float] = field(default_factory=dict)
    """The best value so far of each metric with a best checkpoint."""
    guard: Guard = field(default_factory=Guard)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], **defaults: Any) -> Progress:
        """The progress in a checkpoint; `defaults` are for what an older one lacks."""
        return TypeAdapter(cls).validate_python({**defaults, **state})


@dataclass
class Run:
    """Model, optimizer and progress of one training run."""

    workload: Workload
    config: TrainConfig
    device: torch.device
    model: nn.Module
    optimizer: torch.optim.Optimizer
    data_digest: str
    lineage: Mapping[str, Any]
    progress: Progress = field(default_factory=Progress)
    ranks: Ranks = ALONE
    checkpoint: Path | None = None
    """The one that it continues from."""

    @classmethod
    def build(
        cls,
        workload: Workload,
        config: TrainConfig,
        device: str,
        *,
        init: Path | None = None,
        data_digest: str,
        ranks: Ranks = ALONE,
    ) -> Run:
        """A run at step 0. `init`: take the weights of this checkpoint."""
        torch.manual_seed(config.seed)
        model = workload.build_model()
        if not isinstance(model, nn.Module):
            raise UserError(
                f"{type(workload).__name__}.build_model returns a {type(model).__name__}: return the model."
            )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError(f"{type(model).__name__} has no parameter to train: set requires_grad of some.")
        if init is not None:
            workload.load_weights(model, init)
            log.info("weights from %s, new %s optimizer, step 0", init, config.optimizer)
        if device != "cpu":
            model.to(device)
        optimizer = build_optimizer(model, config)
        # Building the model draws as many numbers as it has weights; dropout starts from the seed again.
        torch.manual_seed(config.seed)
        return cls(workload, config, torch.device(device), model, optimizer, data_digest, {}, ranks=ranks)

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches in a rank's part of a batch."""
        return self.config.count_micro_batches(math.ceil(self.config.batch_size / self.ranks.count))

    @property
    def samples(self) -> int:
        """Samples seen, damaged ones included."""
        return self.progress.step * self.config.effective_batch_size

    @property
    def finished(self) -> bool:
        if self.config.num_steps is not None:
            return self.progress.step >= self.config.num_steps
        assert self.config.seconds is not None
        return self.progress.seconds >= self.config.seconds

    def warms_up(self, steps_here: int) -> bool:
        """Whether the next step belongs to the warm-up, after `steps_here` steps since the start or continuation.

        A run that is stopped within its warm-up again and again would never use up its seconds: from the second
        start on, at most as many steps are left out as were timed.
        """
        left_out, timed = self.progress.step - self.progress.timed_steps, self.progress.timed_steps
        return steps_here < WARM_UP_STEPS and left_out < max(WARM_UP_STEPS, timed)

    def is_first_log(self, steps_here: int) -> bool:
        """Whether a log line is due besides those of `log_every`, after `steps_here` steps since the start.

        It shows the first figures, and the speed under this run's own plan, early.
        """
        return steps_here == FIRST_LOG_STEPS < self.config.log_every

    def size(self, *, compiled_before: bool = False) -> RunSize:
        """The remaining run, as input of `acceleration.plan`."""
        config, steps, seconds = self.config, self.config.num_steps, self.config.seconds
        return RunSize.of(
            self.model,
            self.workload.train_data(),
            samples_per_step=config.effective_batch_size,
            remaining_steps=None if steps is None else max(0, steps - self.progress.step),
            remaining_seconds=None if seconds is None else max(0.0, seconds - self.progress.seconds),
            compiled_before=compiled_before,
        )

    def measure_progress(self) -> float:
        """Progress in the unit of the evaluation grid."""
        amounts = {"samples": self.samples, "steps": self.progress.step, "seconds": self.progress.seconds}
        return float(amounts[self.config.eval_unit])

    def due_evaluation(self) -> float | None:
        """The latest point of the grid that is reached and not yet evaluated, or None. The end is a point too."""
        if self.progress.evaluated_step == self.progress.step:
            return None
        amount = self.measure_progress()
        if every := self.config.eval_every:
            # The tolerance keeps a grid of fractions (16000 / 7 samples) from missing its own last point.
            point = (amount + 1e-6) // every * every
            if point > self.progress.evaluated + 1e-3 * every:
                return point
        return amount if self.finished else None

    def identity(self) -> dict[str, Any]:
        """The values that must be equal in a continued run."""
        options = self.workload.model_dump(mode="json", include=set(identity_fields(type(self.workload))))
        return {
            "train": self.config.identity(),
            "workload": options,
            "data": {"contents": self.data_digest},
        }

    def weights(self) -> dict[str, Any]:
        """The content of `best_*.pth` and `milestone_*.pth`."""
        return {
            "model": self.model.state_dict(),
            "step": self.progress.step,
            "samples": self.samples,
            "metrics": dict(self.progress.metrics),
            "identity": self.identity(),
            "lineage": dict(self.lineage),
        }

    def state(self) -> dict[str, Any]:
        """Everything that a continuation needs to be equal bit for bit (on CPU, in float32)."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state()
        return {
            **self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_type": self.config.optimizer,
            "progress": asdict(self.progress),
            "random": random,
            "config": self.config.model_dump(mode="json"),
        }

    def load(self, state: Mapping[str, Any], source: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: The checkpoint is of another run; the message names what differs.
        """
        optimizer_type = state.get("optimizer_type", "adamw")
        remedy = (
            f"or take its weights with a new optimizer from step 0 into a new folder: --init {source} --run-dir NEW"
        )
        if "optimizer" not in state:
            raise UserError(f"{source} holds weights and no training state: take them with --init {source}.")
        if optimizer_type != self.config.optimizer:
            raise UserError(
                f"{source} is a checkpoint of {optimizer_type} and this run uses {self.config.optimizer}: "
                f"continue with --set train.optimizer={optimizer_type}, {remedy}."
            )
        if not state.keys() >= {"progress", "identity", "random", "config", "lineage"}:
            raise UserError(
                f"{source} is of another trainer and can't be continued: take its weights, --init {source}."
            )
        mine, its = self.identity(), state["identity"]
        # Older checkpoints have the schedule in their identity.
        schedule = set(fields_of_role(TrainConfig, Role.SCHEDULE))
        its = {**its, "train": {key: value for key, value in its["train"].items() if key not in schedule}}
        # They also lack newer fields, whose defaults change nothing.
        its["train"] = _defaults(TrainConfig) | its["train"]
        its["workload"] = _defaults(type(self.workload)) | its["workload"]
        changed = [phrase for part in mine for phrase in differences(part, its[part], mine[part])]
        if not follows_schedule(state, self.config):
            its_config = read_config(state)
            before = its_config.describe_schedule() if its_config else "of another trainer"
            changed.append(
                f"the learning rate of its {state['step']:,} steps was {before}, and is now "
                f"{self.config.describe_schedule()}: keep that schedule, or train for longer"
            )
        if changed:
            raise UserError(f"{source} is of another run ({'; '.join(changed)}): rename that folder, {remedy}.")
        if odd := find_odd_optimizer(state["optimizer"], self.optimizer):
            raise UserError(f"{source} has another optimizer's state ({odd}): use another run directory, {remedy}.")
        load_model(self.model, state, source, ": use another run directory.")
        # A second copy of the whole state may not fit into memory: it is mapped, and copied tensor by tensor.
        on_cpu = self.device.type == "cpu"
        self.optimizer.load_state_dict(snapshot(state["optimizer"]) if on_cpu else state["optimizer"])
        try:
            # Older checkpoints have no warm-up: all their steps were timed.
            self.progress = Progress.from_state(state["progress"], timed_steps=state["step"])
            self._set_random(state["random"])
        except (ValidationError, RuntimeError, TypeError, KeyError) as error:
            reason = describe(error) if isinstance(error, ValidationError) else first_line(error)
            raise UserError(f"{source} can't be continued ({reason}): use another run directory, {remedy}.") from error
        if state["config"]["eval_unit"] != self.config.eval_unit:
            # A trial on a grid of seconds continues as a full run on a grid of samples.
            self.progress.evaluated = self.measure_progress()

    def _set_random(self, states: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])


def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    """The defaults of a model's identity fields, as plain values."""
    return model.model_construct().model_dump(mode="json", include=set(identity_fields(model)))


def read_config(state: Mapping[str, Any]) -> TrainConfig | None:
    """The configuration in a checkpoint; None if it has none of this trainer."""
    try:
        return TrainConfig.model_validate(state["config"])
    except (KeyError, ValidationError):
        return None


def follows_schedule(state: Mapping[str, Any], config: TrainConfig) -> bool:
    """Whether the updates so far of a checkpoint had the rates of a schedule, which may differ later on."""
    before = read_config(state)
    return before is not None and has_same_rates(before, config, state["step"])


def _best_on_disk(run_dir: Path, workload: Workload, best: Mapping[str, float]) -> dict[str, float]:
    """The best values so far that have their weights in a run directory.

    In a new run directory there are none: the next validation writes them again. They are better than in the state
    where it continues from before a decay.
    """
    kept = {}
    for metric, name in workload.best_checkpoints().items():
        if metric in best and (run_dir / name).is_file():
            try:
                on_disk = read_state(run_dir / name).get("metrics", {})
                kept[metric] = min(best[metric], on_disk.get(metric, math.inf))
            except UnreadableFile as error:
                log.warning("%s It is kept until a validation is better.", error)
                kept[metric] = best[metric]
            except UserError as error:
                log.warning("%s", error)
    return kept


def _warn_of_batch_norm(run: Run) -> None:
    if run.num_micro_batches == 1 and run.ranks.count == 1:
        return
    for name, module in run.model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            log.warning(
                "%s is a %s: it takes the statistics of each part of a batch, so the update is not that of the whole "
                "batch; GroupNorm and LayerNorm have no statistics of a batch",
                name,
                type(module).__name__,
            )
            return


def prepare(
    workload: Workload,
    config: TrainConfig,
    device: str,
    checkpoints: Checkpoints,
    *,
    resume: str | Path = "auto",
    init: Path | None = None,
    lineage: Mapping[str, Any] | None = None,
    ranks: Ranks = ALONE,
) -> Run:
    """Build a run, and continue it if there is a checkpoint.

    Args:
        resume: "auto" continues the run in the directory; "never" refuses a directory that holds a run; a path
            continues from that checkpoint.
        init: Load the weights of this checkpoint for step 0.
    """
    checkpoint = checkpoints.find(lambda state: follows_schedule(state, config))
    if checkpoint and resume == "never":
        raise UserError(
            f"{checkpoints.run_dir} holds a run at step {checkpoint[1].get('step')}, and --resume never is set: "
            "choose another run directory, or continue with --resume auto."
        )
    if resume not in ("auto", "never"):
        if checkpoint and checkpoint[1].get("lineage", {}).get("resumed_from") == str(resume):
            resume = "auto"
        elif checkpoint:
            raise UserError(f"{checkpoints.run_dir} holds a run of its own: choose another run directory for {resume}.")
        else:
            checkpoint = Path(resume), read_state(Path(resume))
            lineage = {**(lineage or {}), "resumed_from": str(resume)}

    start = None if checkpoint else init
    run = Run.build(workload, config, device, init=start, data_digest=workload.data_digest(), ranks=ranks)
    run.lineage = {**(lineage or {}), **({"init": str(init)} if init else {})}
    if checkpoint:
        path, state = checkpoint
        run.load(state, path)
        run.checkpoint = path
        run.lineage = {**state["lineage"], **run.lineage}
        if init is not None and state["lineage"].get("init") != str(init):
            raise UserError(f"{checkpoints.run_dir} holds a run that did not start from {init}: choose another folder.")
        run.progress.best = _best_on_disk(checkpoints.run_dir, workload, run.progress.best)
        log.info("continuing from %s at step %d", path, run.progress.step)
    _warn_of_batch_norm(run)
    if config.schedule != "none":
        log.info("learning rate: %s", config.describe_schedule())
    return run
