"""One row of `tuner bench` in one round, in its own process: only the compile cache is shared.

python -m tuner.bench.measurement < request.json       # one JSON object on stdout
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer import TrainConfig, UserError, Workload, train
from trainer.acceleration import detect
from trainer.errors import first_line
from tuner.bench.baseline import BaselineLoop, apply_switches
from tuner.spec.setups import full_setup
from tuner.spec.study_toml import StudySpec
from tuner.study.objective import is_out_of_memory
from tuner.study.peak_memory import peak_memory

WARMUP = 5
# Compilation ends after QUIET_STEPS shapes without a new graph, at the latest after these steps or seconds.
QUIET_STEPS, MAX_COMPILE_STEPS, MAX_COMPILE_SECONDS = 5, 40, 300.0
MAX_INTERVALS = 4


@dataclass(frozen=True)
class Measurement:
    """One row in one round."""

    steps: int
    seconds: float
    """Of the timed steps."""
    tokens: float
    """Real tokens of the timed steps."""
    real_token_share: float
    loss: float
    """Mean over the first `steps` steps from step 0, to compare the rows."""
    peak_memory_bytes: int
    note: str = ""
    losses: tuple[float, ...] = ()
    """Of each step from step 0 on; empty for the trainer, which reads none."""


def measure(
    workload: Workload, config: TrainConfig, on: frozenset[str], *, steps: int, warmup: int = WARMUP
) -> Measurement:
    """Time `steps` steps of the baseline with some optimizations, after a warm-up."""
    loop = BaselineLoop(workload, config, on)
    note, num_graphs = "", 0
    with apply_switches(on):
        if "compile" in on:
            started = time.perf_counter()
            _compile(loop)
            num_graphs = count_graphs()
            note = f"{num_graphs} graphs compiled in {time.perf_counter() - started:.0f} s before the warm-up"
        for _ in range(warmup):
            loop.step()
        loop.synchronize()
        loop.tokens = loop.slots = 0
        started = time.perf_counter()
        for _ in range(steps):
            loop.step()
        loop.meter.read()
        loop.synchronize()
        seconds = time.perf_counter() - started
    losses = tuple(float(loss) for loss in loop.losses)
    return Measurement(
        steps=steps,
        seconds=seconds,
        tokens=loop.tokens,
        real_token_share=loop.tokens / max(1, loop.slots),
        loss=sum(losses[:steps]) / max(1, len(losses[:steps])),
        peak_memory_bytes=peak_memory(loop.device.type) or 0,
        note=note + _describe_late_graphs(count_graphs() - num_graphs),
        losses=losses,
    )


def _compile(loop: BaselineLoop) -> None:
    """Run backward passes until torch.compile makes no more graphs: one for the first shape, a general one for the
    second, and more for other branches. Without updates and on batches of another epoch, so the steps after it are
    those of the other rows."""
    quiet, started = 0, time.perf_counter()
    batches = loop.batches_from(epoch=1)
    for _ in range(MAX_COMPILE_STEPS):
        if quiet >= QUIET_STEPS or time.perf_counter() - started > MAX_COMPILE_SECONDS:
            break
        before = count_graphs()
        loop.backward([next(batches)])
        quiet = quiet + 1 if count_graphs() == before else 0
    loop.reset()


class _Finished(Exception):
    """Enough was measured. Ends the trainer without a checkpoint."""


class _Intervals:
    """A tracker that stores the figures of each log interval."""

    def __init__(self) -> None:
        self.values: list[Mapping[str, float]] = []
        self.graphs: list[int] = [0]

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        if "train/tokens_per_second" in values:
            self.values.append(dict(values))
            self.graphs.append(count_graphs())

    def close(self) -> None:
        """Nothing to close."""

    def stop(self) -> bool:
        """Ends after an interval without compilation; the interval before it was the warm-up."""
        settled = len(self.values) >= 2 and self.graphs[-1] == self.graphs[-2]
        if settled or len(self.values) >= MAX_INTERVALS:
            raise _Finished
        return False


def measure_trainer(workload: Workload, config: TrainConfig, *, steps: int) -> Measurement:
    """Time `steps` steps of `train()` with this configuration, after a warm-up of equal length.

    The run keeps its length, which decides its acceleration, and is ended when enough was measured.
    """
    changes: dict[str, Any] = {"log_every": steps, "eval_every": None, "save_every": None}
    if (config.num_steps or 0) <= MAX_INTERVALS * steps:
        changes |= {"steps": MAX_INTERVALS * steps + 1, "samples": None, "seconds": None}
        changes |= {"schedule_steps": config.horizon}
    intervals, reasons = _Intervals(), _Reasons()
    logger = logging.getLogger("trainer.acceleration")
    logger.addHandler(reasons)
    logger.setLevel(logging.INFO)
    try:
        with tempfile.TemporaryDirectory(prefix="tuner-bench-") as folder, contextlib.suppress(_Finished):
            train(
                workload,
                config.model_copy(update=changes),
                run_dir=Path(folder) / "run",
                tracker=intervals,
                stop=intervals.stop,
            )
    finally:
        logger.removeHandler(reasons)
    values = intervals.values[-1]
    seconds = steps * config.effective_batch_size / values["train/samples_per_second"]
    if intervals.graphs[-1]:
        late = intervals.graphs[-1] - intervals.graphs[-2]
        reasons.lines.append(f"{intervals.graphs[-2]} graphs compiled{_describe_late_graphs(late)}")
    return Measurement(
        steps=steps,
        seconds=seconds,
        tokens=values["train/tokens_per_second"] * seconds,
        real_token_share=values["train/real_token_share"],
        loss=intervals.values[0]["train/loss"],
        peak_memory_bytes=peak_memory(detect(config.device).kind) or 0,
        note="; ".join(reasons.lines),
    )


class _Reasons(logging.Handler):
    """Stores the trainer's log lines about acceleration, without the device, which is in the title."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "topic", "") != "device":
            self.lines.append(record.getMessage())


def count_graphs() -> int:
    """Number of graphs that torch.compile has made in this process. Imports nothing."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0


def _describe_late_graphs(num_graphs: int) -> str:
    return f", {num_graphs} more in the timed steps" if num_graphs else ""


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Answer a request of `tuner bench`: a Measurement as plain values, or the reason why there is none.

    Args:
        request: `spec` (from `StudySpec.to_dict`), `optimizations` (names; None for the trainer), `steps`, and `round`,
            which is added to the training seed: each round has other batches.
    """
    values = request["spec"]
    try:
        spec = StudySpec.build(values, base_dir=Path(values["base_dir"]))
        setup = full_setup(spec, {})
        config = setup.config.model_copy(update={"seed": setup.config.seed + request["round"]})
        if request["optimizations"] is None:
            measurement = measure_trainer(setup.workload, config, steps=request["steps"])
        else:
            on = frozenset(request["optimizations"])
            # The trainer is timed in its second interval; a warm-up of equal length gives the others the same steps.
            workload = setup.workload if "packed data" in on else setup.workload.unpacked()
            measurement = measure(workload, config, on, steps=request["steps"], warmup=request["steps"])
    except UserError as error:
        return {"user_error": str(error)}
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise
        return {"out_of_memory": first_line(error)}
    return {"measurement": {**asdict(measurement), "losses": None}}


def main() -> None:
    request = json.load(sys.stdin)
    # prodigyopt and some workloads print; stdout carries only the answer.
    with contextlib.redirect_stdout(sys.stderr):
        result = answer(request)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
