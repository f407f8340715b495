"""Runs of `train()` with their figures: speed, memory, graphs, waits for the device, and where the time goes."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch._dynamo.utils import counters

from scripts.bench.roofline import find_gpu
from scripts.gpu_check.timing import DEVICE, synchronize
from scripts.gpu_check.workload import build_workload
from trainer import TrainConfig, train

INTERVALS = {"warm-up": 0, "timed": 1, "watched": 2, "profiled": 3, "timed again": 4}
"""What each log interval of a measured run is for."""
PROFILED_STEPS = 3
KINDS = {
    "optimizer": r"first_pass|second_pass|multi_tensor|norm.*foreach|lpnorm",
    "attention": r"flash|fmha|attention|sdpa|SoftmaxForward",
    "products": r"gemm|cutlass|cublas|nvjet|xmma|sgemm|_mm_",
    "copies": r"[Mm]emcpy|[Mm]emset",
    "compiled code": r"^triton_",
}


class Finished(Exception):
    """Enough was measured. Ends the trainer without its last checkpoint."""


class Watch:
    """Follows a run, as its tracker and as its `stop`: times, waits, and a profile."""

    def __init__(self, log_every: int, last_step: int) -> None:
        self.log_every, self.last_step = log_every, last_step
        self.values: list[Mapping[str, float]] = []
        self.starts: list[float] = []
        """When each step began."""
        self.waits: dict[str, int] = {}
        """Place in the code -> waits for the device."""
        self.profile: dict[str, Any] = {}
        self._profiler: Any = None

    def track(self, values: Mapping[str, float], *, step: int, samples: int) -> None:
        if "train/samples_per_second" in values:
            self.values.append(dict(values))

    def close(self) -> None:
        """Nothing to close."""

    def stop(self) -> bool:
        """Called before each step."""
        self.starts.append(time.perf_counter())
        number = len(self.starts)
        if number > self.last_step:
            raise Finished
        if DEVICE == "cuda":
            first = 1 + self.log_every * INTERVALS["watched"]
            # The first step of an interval follows the log line's own reading.
            torch.cuda.set_sync_debug_mode("warn" if first < number < first + self.log_every - 1 else "default")
        start = 2 + self.log_every * INTERVALS["profiled"]
        if number == start:
            synchronize()
            activity = torch.profiler.ProfilerActivity
            self._profiler = torch.profiler.profile(activities=[activity.CUDA if DEVICE == "cuda" else activity.CPU])
            self._profiler.__enter__()
            self._profile_start = time.perf_counter()
        elif number == start + PROFILED_STEPS:
            synchronize()
            seconds = time.perf_counter() - self._profile_start
            self._profiler.__exit__(None, None, None)
            self.profile = summarize_profile(self._profiler.key_averages(), seconds)
        return False

    def count_wait(self, message: Warning | str, *_: Any, **__: Any) -> None:
        """In place of `warnings.showwarning`."""
        if "synchroniz" in str(message):
            frames = [
                frame
                for frame in traceback.extract_stack()
                if not frame.filename.endswith(("training.py", "warnings.py"))
            ]
            place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown"
            self.waits[place] = self.waits.get(place, 0) + 1


def classify(kernel: str) -> str:
    """The kind of a kernel by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), "other operations")


def summarize_profile(rows: Any, seconds: float) -> dict[str, Any]:
    """Milliseconds a step by kind of kernel, and the longest kernels."""
    cuda = DEVICE == "cuda"
    took = {row.key: 1e-3 * (row.self_device_time_total if cuda else row.self_cpu_time_total) for row in rows}
    counts = {row.key: row.count for row in rows}
    kinds: dict[str, float] = {}
    for name, ms in took.items():
        kinds[classify(name)] = kinds.get(classify(name), 0.0) + ms / PROFILED_STEPS
    longest = sorted(took, key=lambda name: -took[name])[:25]
    return {
        "ms_by_kind": {kind: round(ms, 3) for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])},
        "busy_share": round(sum(took.values()) / (1e3 * seconds), 3),
        "kernels_a_step": sum(counts.values()) // PROFILED_STEPS,
        "longest": [
            [name[:100], counts[name] // PROFILED_STEPS, round(took[name] / PROFILED_STEPS, 3)] for name in longest
        ],
    }


@contextlib.contextmanager
def logged_lines() -> Iterator[list[str]]:
    """The trainer's log lines inside, with seconds."""
    lines: list[str] = []
    handler, started, logger = logging.Handler(), time.perf_counter(), logging.getLogger("trainer")
    handler.emit = lambda record: lines.append(f"{time.perf_counter() - started:.1f} {record.getMessage()}")  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def measure_run(
    tiny: bool,
    *,
    intervals: int = len(INTERVALS),
    log_every: int = 20,
    batch_size: int = 8,
    compile: str = "off",
    **options: Any,
) -> dict[str, Any]:
    """Train for some log intervals; returns the figures. `options` are the workload's."""
    log_every = 6 if tiny else log_every
    if tiny and compile == "on":
        # The graph alone: code for a CPU takes a minute.
        torch.compile = functools.partial(torch.compile, backend="eager")
    workload = build_workload(tiny, **options)
    watch = Watch(log_every, intervals * log_every)
    config = TrainConfig(
        steps=10**6, batch_size=batch_size, compile=compile, log_every=log_every, save_every=None, device=DEVICE
    )
    counters.clear()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with logged_lines() as lines, tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = watch.count_wait
        started = time.perf_counter()
        with contextlib.suppress(Finished):
            train(workload, config, run_dir=folder, tracker=watch, stop=watch.stop)
    return figures(watch, workload.flops_per_sample(), batch_size, lines) | {
        "start_s": round(watch.starts[0] - started, 2),
        "first_step_s": round(watch.starts[1] - watch.starts[0], 2),
    }


def figures(watch: Watch, flops_per_sample: float, batch_size: int, lines: list[str]) -> dict[str, Any]:
    """What a measured run shows."""
    timed = [watch.values[INTERVALS[name]] for name in ("timed", "timed again") if INTERVALS[name] < len(watch.values)]
    record: dict[str, Any] = {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "waits": watch.waits,
        "log": lines[-40:],
    }
    for name in ("loss", "grad_norm", "d", "data_wait", "real_token_share", "samples_per_second"):
        record[name] = [round(values[f"train/{name}"], 9) for values in watch.values]
    if timed:
        rate = statistics.median(values["train/samples_per_second"] for values in timed)
        record["ms_a_step"] = round(1e3 * batch_size / rate, 3)
        record["flops_a_second"] = flops_per_sample * rate
    if watch.profile:
        record["profile"] = watch.profile
    if DEVICE == "cuda":
        gpu, memory = find_gpu(torch.cuda.get_device_name()), torch.cuda.memory_stats()
        if gpu and timed:
            record["mfu"] = record["flops_a_second"] / gpu.flops
        record["peak_bytes"] = {kind: memory[f"{kind}_bytes.all.peak"] for kind in ("allocated", "reserved")} | {
            "retries": memory["num_alloc_retries"]
        }
    return record


Stage = Callable[[bool], dict[str, Any]]
eager: Stage = measure_run
compiled: Stage = functools.partial(measure_run, compile="on")
warm: Stage = functools.partial(measure_run, compile="on", intervals=1)
no_dropout: Stage = functools.partial(measure_run, compile="on", dropout=0.0)
batch32: Stage = functools.partial(measure_run, compile="on", batch_size=32)
