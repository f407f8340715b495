"""`tuner doctor`: what a run needs, looked at before time is spent. Each check is a function that returns a `Check`."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from trainer.acceleration import Capabilities, choose_precision, detect
from trainer.errors import DamagedSample, UserError
from trainer.memory import MemoryEstimate, NoEstimate, Probe, available_memory
from tuner.launcher import KEEP_TRIALS
from tuner.search_space import Setup, full_setup
from tuner.spec import StudySpec

TORCH = "2.13"
PRODIGYOPT = "1.1"
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Check:
    """What was looked at, how it is, and what to do about it."""

    name: str
    state: Literal["ok", "warn", "fail"]
    """A run can't do with a "fail"; a "warn" costs time, or concerns some of a study's trials."""
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class Machine:
    """The device that runs are judged for. It need not be this machine's."""

    capabilities: Capabilities
    memory: int
    """Bytes that a run may take."""


def examine(spec: Path | None = None, *, run_root: Path = Path("runs"), gpu_memory: float | None = None) -> list[Check]:
    """All checks, in the order in which they are to be read.

    Args:
        spec: A study.toml; without it only the installation is looked at.
        run_root: Folder of the run directories.
        gpu_memory: Bytes. Judge for a CUDA device with so many and bf16, in place of this machine's.
    """
    checks = [check_python(), check_torch(), check_prodigyopt(), check_compiler()]
    machine = this_machine() if gpu_memory is None else cuda_machine(gpu_memory)
    checks.append(check_device(machine))
    return checks + (list(examine_spec(spec, machine, run_root)) if spec else [])


def examine_spec(path: Path, machine: Machine, run_root: Path) -> Iterator[Check]:
    """The checks that need a study.toml; each is the ground of the next."""
    try:
        spec = StudySpec.load(path)
        # Looking at the data must not begin with copying it.
        unpacked = {"workload.pack": False} if "pack" in spec.workload_class.model_fields else {}
        setup = full_setup(spec, unpacked)
    except UserError as error:
        yield Check("spec", "fail", str(error), "correct the spec, then run this again")
        return
    yield Check("spec", "ok", f"{path}: study {spec.study.name}, {spec.trial.num_trials} trials")
    if setup.config.device == "cuda" and machine.capabilities.kind == "cpu":
        yield Check("device", "fail", 'train.device "cuda", and there is no CUDA device', 'use train.device = "auto"')
    if setup.config.device == "cpu":
        machine = this_machine("cpu")
    try:
        yield check_data(setup)
        probe = Probe(
            setup.workload,
            setup.config,
            device=machine.capabilities.kind,
            precision="fp32",
        )
        probe.precision, _ = choose_precision(machine.capabilities, setup.config, probe.num_trained)
        estimate = probe.estimate()
    except UserError as error:
        yield Check("workload", "fail", str(error), "correct [workload] or what it names, then run this again")
        return
    except NoEstimate as error:
        yield Check("memory", "warn", f"no estimate: {error}", "watch the first steps of a run with the largest batch")
        return
    yield from check_memory(spec, probe, estimate, machine)
    yield check_snapshot(estimate, machine)
    yield check_disk(spec, setup, estimate, run_root)


def check_python() -> Check:
    found = platform.python_version()
    if sys.version_info[:2] in ((3, 11), (3, 12)):
        return Check("python", "ok", found)
    return Check("python", "fail", f"{found}: Aim has no package for it", "use Python 3.11 or 3.12")


def check_torch() -> Check:
    return _check_version("torch", TORCH)


def check_prodigyopt() -> Check:
    return _check_version("prodigyopt", PRODIGYOPT)


def _check_version(name: str, wanted: str) -> Check:
    try:
        found = version(name)
    except PackageNotFoundError:
        found = "not installed"
    if found.startswith(f"{wanted}."):
        return Check(name, "ok", found)
    return Check(name, "fail", f"{found}; made for {wanted}", f"pip install '{name}~={wanted}.0'")


def check_compiler(environment: dict[str, str] | None = None) -> Check:
    """Whether there is a C compiler, found as the Prodigy kernels find theirs."""
    environment = dict(os.environ) if environment is None else environment
    path = environment.get("PATH", "")
    chosen = shlex.split(environment.get("CC", ""))[:1]
    for name in chosen or ["cc", "gcc", "clang"]:
        if found := shutil.which(name, path=path):
            return Check("compiler", "ok", found)
    what = f"$CC names {chosen[0]}, which is not there" if chosen else "no C compiler (cc, gcc or clang)"
    return Check(
        "compiler",
        "warn",
        f"{what}: no torch.compile, and Prodigy's step takes several times as long",
        "correct $CC" if chosen else "install gcc",
    )


def this_machine(device: str = "auto") -> Machine:
    capabilities = detect(device)
    return Machine(capabilities, available_memory(capabilities.kind))


def cuda_machine(memory: float) -> Machine:
    """A card that is not here, of a generation that has bf16."""
    name = "a CUDA device that is not here"
    cores = len(os.sched_getaffinity(0))
    return Machine(Capabilities("cuda", name, cores, int(memory), compute_capability=(8, 0)), int(memory))


def check_device(machine: Machine) -> Check:
    device = machine.capabilities
    bf16 = "bf16" if device.bf16 else "no fast bf16"
    message = f"{device.name}, {size(machine.memory)} to be had, {bf16}"
    if device.kind == "cpu":
        remedy = "for more than a demo use a machine with a CUDA device and torch's CUDA build"
        return Check("device", "warn", f"no CUDA device, so {message}", remedy)
    if not device.bf16:
        return Check("device", "warn", message, "runs take float32, at half the speed and twice the memory")
    return Check("device", "ok", message)


def check_data(setup: Setup) -> Check:
    """Whether the data can be opened, and its first samples be read. Raises UserError where it can't be opened."""
    train, val = setup.workload.train_data(), setup.workload.val_data()
    message = f"{len(train):,} samples to train on, {len(val):,} to validate"
    for data in (train, val):
        try:
            data[0]
        except DamagedSample as error:
            return Check("data", "warn", f"{message}; {error}", "more than 1% of such samples stop a run: repair them")
        except IndexError:
            return Check("data", "fail", f"{message}: a split is empty", "name data for it in [workload]")
    return Check("data", "ok", f"{message}, at most {int(max(train.lengths)):,} tokens each")


def check_memory(spec: StudySpec, probe: Probe, baseline: MemoryEstimate, machine: Machine) -> Iterator[Check]:
    """[train]'s own batch size, then the others of the search space."""
    fits = baseline.fits(machine.memory)
    largest = None if fits else probe.largest_batch_size(machine.memory)
    yield _memory_check(probe, baseline, machine, "fail", "" if largest is None else _remedy(probe, largest))
    for batch_size in _searched_batch_sizes(spec):
        if batch_size != baseline.batch_size:
            try:
                estimate = probe.estimate(batch_size)
            except UserError as error:
                yield Check(f"memory, batch {batch_size}", "fail", str(error), "search smaller ones")
                continue
            if largest is None and not estimate.fits(machine.memory):
                largest = probe.largest_batch_size(machine.memory)
            remedy = f"its trials would end as infeasible: leave it out of [search]; the largest that fits is {largest}"
            yield _memory_check(probe, estimate, machine, "warn", remedy)


def _memory_check(
    probe: Probe, estimate: MemoryEstimate, machine: Machine, unfit: Literal["warn", "fail"], remedy: str
) -> Check:
    parts = {
        "parameters": estimate.parameters,
        "gradients": estimate.gradients,
        "optimizer": estimate.optimizer_state,
        "activations": estimate.activations,
    }
    shown = ", ".join(f"{name} {size(value)}" for name, value in parts.items())
    peaks = {
        "training": estimate.training_peak,
        "the optimizer's step": estimate.step_peak,
        "validation": estimate.evaluation_peak,
    }
    message = (
        f"{size(estimate.total)} of {size(machine.memory)} in {probe.precision} on the longest samples "
        f"({shown}; the peak is in {max(peaks, key=lambda name: peaks[name])})"
    )
    fits = estimate.fits(machine.memory)
    name = f"memory, batch {estimate.batch_size}"
    return Check(name, "ok" if fits else unfit, message, "" if fits else remedy)


def _remedy(probe: Probe, largest: int) -> str:
    """What to do where [train] as it is does not fit."""
    checkpointing = getattr(probe.workload, "gradient_checkpointing", None) is False
    other = "workload.gradient_checkpointing = true" if checkpointing else ""
    slices = probe.config.optimizer == "prodigy" and probe.config.slice_p == 1
    other = other or ("train.slice_p = 11" if slices else "")
    if largest == 0:
        return f"no batch size fits: use {other or 'a smaller model'}" + (" or a smaller model" if other else "")
    kept = f"train.batch_size = {largest} is the largest that fits, with train.grad_accumulation for the same step"
    return f"{kept}; or {other}" if other else kept


def _searched_batch_sizes(spec: StudySpec) -> list[int]:
    space = spec.search.get("train.batch_size")
    return sorted({int(corner) for corner in space.corners}) if space else []


def check_snapshot(estimate: MemoryEstimate, machine: Machine) -> Check:
    """Whether checkpoints are written while training goes on."""
    host = available_memory("cpu") - (estimate.total if machine.capabilities.kind == "cpu" else 0)
    message = f"a checkpoint's snapshot takes {size(estimate.checkpoint)} of host memory, {size(host)} free"
    if estimate.checkpoint > host / 2:
        return Check(
            "snapshot",
            "warn",
            f"{message}: less than twice as much, so training waits while checkpoints are written",
            "free host memory, or raise train.save_every",
        )
    return Check("snapshot", "ok", message)


def check_disk(spec: StudySpec, setup: Setup, estimate: MemoryEstimate, run_root: Path) -> Check:
    """Whether the study's checkpoints and the full run's fit beside what is there."""
    best = len(set(setup.workload.best_checkpoints().values())) * estimate.parameters
    # Those that are kept, the baseline, and the one that runs; latest.pth is another name for the newest.
    num_trials = min(KEEP_TRIALS + 2, spec.trial.num_trials)
    trials = num_trials * (estimate.checkpoint + best)
    full = setup.config.keep_checkpoints * estimate.checkpoint + best
    needed = trials + full + estimate.checkpoint  # one more while it is written
    folder = run_root.resolve()
    there = _checkpoint_bytes(folder / spec.study.name)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    message = (
        f"checkpoints of {size(estimate.checkpoint)}: {size(needed)} for {num_trials} trials and the full "
        f"run, {size(free)} free in {folder}" + (f" beside {size(there)} of them" if there else "")
    )
    if not os.access(folder, os.W_OK):
        return Check("disk", "fail", f"{folder} can't be written to", "choose another --run-root")
    if free + there < needed:
        return Check("disk", "fail", message, "free some space, or choose another --run-root")
    return Check("disk", "ok", message)


def _checkpoint_bytes(folder: Path) -> int:
    """Of all checkpoints under `folder`, each file counted once however many names it has."""
    stats = [path.stat() for path in folder.rglob("*.pth")]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())


def size(count: float) -> str:
    """Bytes for a person: 12.34 GB, or 56 MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def show(checks: Sequence[Check], console: Console) -> None:
    """A line for each check, its remedy below it."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        line = Text(f"{check.state:5}", STYLES[check.state]) + Text(f"{check.name:{width}}  {check.message}")
        console.print(line, soft_wrap=True)
        if check.remedy:
            console.print(Text(f"{'':5}{'':{width}}  -> {check.remedy}"), soft_wrap=True)


def as_json(checks: Iterable[Check]) -> list[dict[str, Any]]:
    return [asdict(check) for check in checks]


def has_failed(checks: Iterable[Check]) -> bool:
    return any(check.state == "fail" for check in checks)
