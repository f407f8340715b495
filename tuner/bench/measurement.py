"""One row of `tuner bench` in one round, in a process of its own, so that nothing is shared but the compile cache.

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
# torch.compile has seen enough shapes when so many in a row made no graph, and anyway after so many steps or seconds.
QUIET_STEPS, MAX_COMPILE_STEPS, MAX_COMPILE_SECONDS = 5, 40, 300.0
MAX_INTERVALS = 4


@dataclass(frozen=True)
class Measurement:
    """One row in one round."""

    steps: int
    seconds: float
    """Of the timed steps."""
    tokens: float
    """Real ones, in the timed steps."""
    real_token_share: float
    loss: float
    """Mean over the first `steps` steps, counted from step 0: does every row train the same thing?"""
    peak_memory_bytes: int
    note: str = ""
    losses: tuple[float, ...] = ()
    """Each step's, from step 0 on; empty for the trainer, which reads none."""


def measure(
    workload: Workload, config: TrainConfig, on: frozenset[str], *, steps: int, warmup: int = WARMUP
) -> Measurement:
    """Time `steps` steps of the baseline under some optimizations, after a warm-up."""
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
    """Let torch.compile see shapes until it makes no more graphs: one for the first shape, a general one for the
    second, and more where the code takes another way. No update, and batches of another epoch: the steps that
    follow are those of every other row."""
    quiet, started = 0, time.perf_counter()
    batches = loop.batches_from(epoch=1)
    for _ in range(MAX_COMPILE_STEPS):
        if quiet >= QUIET_STEPS or time.perf_counter() - started > MAX_COMPILE_SECONDS:
            break
        before = count_graphs()
        loop.backward([next(batches)])
        quiet = quiet + 1 if count_graphs() == before else 0
    loop.reset()


class _Measured(Exception):
    """The trainer has run long enough; raised so that it ends without writing a checkpoint."""


class _Intervals:
    """A tracker that keeps the figures of each log interval."""

    def __init__(self) -> None:
        self.values: list[Mapping[str, float]] = []
        self.graphs: list[int] = [0]

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        if "train/tokens_per_second" in values:
            self.values.append(dict(values))
            self.graphs.append(count_graphs())

    def close(self) -> None:
        """Nothing to write at the end."""

    def stop(self) -> bool:
        """The interval before was the warm-up, unless code was still compiled in this one."""
        settled = len(self.values) >= 2 and self.graphs[-1] == self.graphs[-2]
        if settled or len(self.values) >= MAX_INTERVALS:
            raise _Measured
        return False


def measure_trainer(workload: Workload, config: TrainConfig, *, steps: int) -> Measurement:
    """Time `steps` steps of `train()` with this configuration, after as many for its warm-up.

    The run keeps its own length, by which it decides what pays; it is left when enough was measured.
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
        with tempfile.TemporaryDirectory(prefix="tuner-bench-") as folder, contextlib.suppress(_Measured):
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
    """Keeps what the trainer logs of its acceleration, but the device: the table names it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "topic", "") != "device":
            self.lines.append(record.getMessage())


def count_graphs() -> int:
    """How many graphs torch.compile has made in this process. Asking imports nothing."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0


def _describe_late_graphs(num_graphs: int) -> str:
    return f", {num_graphs} more in the timed steps" if num_graphs else ""


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Measure what `tuner bench` asks for: a Measurement as plain values, or what stands in its way.

    Args:
        request: `spec` (as `StudySpec.to_dict` gives it), `optimizations` (names; None for the trainer), `steps`,
            and `round`, which moves the training seed: each round has batches of its own.
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
            # The trainer is timed in its second interval: so are the others, on the same steps.
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
    # prodigyopt and some workloads print; stdout is for the answer alone.
    with contextlib.redirect_stdout(sys.stderr):
        found = answer(request)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
