"""The length of a full run, and of the decay of its learning rate at its end."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import UserError
from trainer.checkpoint import BEST, STABLE, find_state
from trainer.state import follows_schedule, read_config
from trainer.state_form import read_state
from tuner.spec.setups import Setup, full_setup
from tuner.spec.study_toml import StudySpec
from tuner.study.record import FullRunRecord

log = logging.getLogger(__name__)

FINISH_SHARE = 0.2
"""`--finish` decays over this share of the steps so far."""


@dataclass(frozen=True)
class LengthRequest:
    """The options of `tuner promote` about the length."""

    steps: int | None = None
    finish: bool = False
    """Start the decay now; that of a declining run from its best state."""
    decay_steps: int | None = None
    """Of `finish`. Default: `FINISH_SHARE` of the steps so far."""
    has_diverged: bool = False
    """Of `finish`: go back from the decay too, where going on would only diverge again."""


NO_REQUEST, FINISH = LengthRequest(), LengthRequest(finish=True)


@dataclass(frozen=True)
class Length:
    """The configuration of a full run at the length that is asked for."""

    setup: Setup
    restart: int | None = None
    """The run goes on from an earlier state, of this step: from `stable.pth`, since it is in its decay or ended."""
    from_best: bool = False
    """It goes back to `best.pth` instead, since it declines."""


def decide_length(
    spec: StudySpec,
    params: Mapping[str, Any],
    request: LengthRequest,
    *,
    last: FullRunRecord | None,
    origin: int,
    run_dir: Path,
) -> Length:
    """The length asked for now, else that of the run so far, else that of `[full]`.

    Args:
        last: The run so far, if it was started.
        origin: Step of the checkpoint that a run without one of its own continues from.

    Raises:
        UserError: The run can't have this length.
    """
    current = _current(spec, params, last)
    # A whole checkpoint is read: only where its step counts.
    state = None
    if request != NO_REQUEST:
        state = find_state(run_dir, lambda state: follows_schedule(state, current.config))
    reached = state[1]["step"] if state else origin
    start = current.config.decay_start
    if state is None and request.steps is None and start is not None and origin > start:
        raise UserError(
            f"its checkpoint is of step {origin:,}, and the full run of {current.config.num_steps:,} steps decays from "
            f"step {start:,}: use a longer [full], or --steps {math.ceil(origin / (1 - spec.full.decay_fraction))}."
        )
    if request.finish:
        # A decline in the decay does not end it. Where the decay began at the best state, going back would repeat it.
        goes_on = start is not None and reached > start and not request.has_diverged
        best = _best_step(run_dir) if last is not None and last.is_declining and not goes_on else None
        if best is not None and (start is None or best + 1 < start):
            return Length(_finish(spec, params, request, current, best), restart=best, from_best=True)
        return Length(_finish(spec, params, request, current, reached))
    if request.steps is None or request.steps == current.config.num_steps:
        return Length(current)
    return _change_steps(spec, params, request.steps, current, reached, run_dir, is_begun=state is not None)


def _current(spec: StudySpec, params: Mapping[str, Any], last: FullRunRecord | None) -> Setup:
    # A cosine has one length: that of its trials.
    if last is None or last.steps is None or spec.full.schedule == "cosine":
        return full_setup(spec, params)
    decay_steps = last.decay_steps
    if decay_steps is None:
        state = find_state(last.run_dir)
        config = read_config(state[1]) if state else None
        decay_steps = config.decay_steps if config and config.schedule == "wsd" else 0
    return _with_length(spec, params, last.steps, decay_steps)


def _with_length(spec: StudySpec, params: Mapping[str, Any], steps: int, decay_steps: int) -> Setup:
    decay: dict[str, Any] = {"schedule": "none"}
    if decay_steps:
        decay = {"schedule": "wsd", "decay_fraction": decay_steps / steps}
    return full_setup(spec, params, steps=steps, samples=None, **decay)


def _finish(spec: StudySpec, params: Mapping[str, Any], request: LengthRequest, current: Setup, reached: int) -> Setup:
    config, decay_steps = current.config, request.decay_steps
    if config.schedule == "cosine":
        raise UserError("--finish: the rate of this run falls from its start (full.schedule cosine); leave it out.")
    if config.decay_start is not None and reached >= config.decay_start:
        if decay_steps not in (None, config.decay_steps):
            raise UserError(
                f"--decay-steps {decay_steps}: the run decays since step {config.decay_start:,}, over "
                f"{config.decay_steps:,} steps; leave it out."
            )
        return current
    decay_steps = decay_steps or max(1, round(FINISH_SHARE * reached))
    return _with_length(spec, params, reached + decay_steps, decay_steps)


def _change_steps(
    spec: StudySpec,
    params: Mapping[str, Any],
    steps: int,
    current: Setup,
    reached: int,
    run_dir: Path,
    *,
    is_begun: bool,
) -> Length:
    """The run with more steps, or with fewer than it was to have."""
    config = current.config
    if config.schedule == "cosine":
        raise UserError(
            f"--steps {steps}: the trials followed a cosine over {config.num_steps} steps, and the full run continues "
            "it; leave --steps out, or tune with another [full] length."
        )
    if config.decay_start is None:
        if steps < reached:
            raise UserError(f"--steps {steps}: the full run is at step {reached}; leave --steps out, or give more.")
        return Length(_with_length(spec, params, steps, 0))
    share = spec.full.decay_fraction if spec.full.schedule == "wsd" else config.decay_fraction
    setup = _with_length(spec, params, steps, max(1, round(share * steps)))
    restart = config.decay_start if is_begun and reached > config.decay_start else None
    start, end = restart or reached, setup.config.decay_start
    if end is not None and end < start:
        ended = ", or --finish to end it now" if is_begun and restart is None else ""
        raise UserError(
            f"--steps {steps}: the learning rate would fall from step {end:,} on, and the full run had a constant one "
            f"until step {start:,}; give at least {math.ceil(start / (1 - share))}{ended}."
        )
    if restart is not None:
        _check_stable(steps, run_dir, restart)
    return Length(setup, restart)


def _best_step(run_dir: Path) -> int | None:
    """Step of `best.pth`; None if it is missing or damaged, and then the log gives the reason."""
    try:
        step: int = read_state(run_dir / BEST)["step"]
    except UserError as error:
        log.warning("the run can't go back to its best state, and finishes from its last one: %s", error)
        return None
    return step


def _check_stable(steps: int, run_dir: Path, step: int) -> None:
    stable = run_dir / STABLE
    try:
        problem = None if read_state(stable)["step"] == step else f"it is not of step {step:,}"
    except UserError as error:
        problem = str(error).rstrip(".")
    if problem:
        raise UserError(
            f"--steps {steps}: the full run has decayed and can't continue from {stable} ({problem}); leave --steps "
            "out, or put it back."
        )
