"""All checks, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from trainer.acceleration import AccelerationPlan, RunSize, plan
from trainer.errors import UserError
from trainer.memory import MemoryEstimate, NoEstimate, Probe
from trainer.workload import Workload
from tuner.doctor.attention import check_attention, record_attention
from tuner.doctor.check import Check, has_failed
from tuner.doctor.data import check_data, check_loader, check_packing, check_paths
from tuner.doctor.device import Machine, build_cuda_machine, check_device, detect_machine
from tuner.doctor.disk import check_checkpoints, check_free
from tuner.doctor.gpus import check_gpus
from tuner.doctor.installation import (
    check_clock,
    check_compile,
    check_compiler,
    check_own,
    check_packages,
    check_python,
    check_trainer,
)
from tuner.doctor.laws import check_laws
from tuner.doctor.memory import check_memory, check_snapshot
from tuner.doctor.storage import check_interrupted, check_storage, read_open_trials
from tuner.spec.setups import Setup, full_setup, largest_step
from tuner.spec.study_toml import StudySpec
from tuner.spec.workloads import describe_error
from tuner.study.launch import KEEP_TRIALS


def examine(
    spec: Path | None = None,
    *,
    run_root: Path = Path("runs"),
    gpu_memory: float | None = None,
    storage: str | None = None,
    whole_data: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Check]:
    """Run all checks, without changing anything.

    Args:
        spec: A study.toml. Without it only the installation, the machine and the storage are checked.
        run_root: Folder of the run directories.
        gpu_memory: Bytes. Assume a CUDA device with this memory and bf16, not this machine's.
        storage: Database URL, as `open_storage` takes it.
        whole_data: Judge the content of all data, not of a sample; see `Workload.check_data`.
        progress: See there.
    """
    judge = partial(_judge_data, whole=whole_data, progress=progress)
    machine = detect_machine() if gpu_memory is None else build_cuda_machine(gpu_memory)
    # The compiler of this machine, also for an assumed card.
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    checks = [check_own(), check_trainer(), check_python(), *check_packages(), check_compiler(), check_compile(kind)]
    checks += [check_device(machine), *check_gpus(), check_clock(run_root), check_storage(storage)]
    checks += check_interrupted(read_open_trials(storage), run_root)
    return checks + (list(examine_spec(spec, machine, run_root, judge)) if spec else [check_free(run_root)])


def _judge_data(
    workload: Workload, whole: bool = False, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Check]:
    return workload.check_data(whole=whole, progress=progress)


def examine_spec(
    path: Path, machine: Machine, run_root: Path, judge: Callable[[Workload], Iterator[Check]] = _judge_data
) -> Iterator[Check]:
    """The checks that need a study.toml. If one of them is impossible, only that of the disk follows."""
    study = None
    try:
        spec = StudySpec.load(path)
        setup = full_setup(spec, {})
        yield Check("spec", "ok", f"{path}: study {spec.study.name}, {spec.trial.num_trials} trials")
        study = spec.study.name
        yield from _examine_workload(spec, setup, machine, run_root, judge)
        return
    except UserError as error:
        name, place = ("spec", "the spec") if study is None else ("workload", "[workload] or its files")
        yield Check(name, "fail", str(error), f"correct {place}, then run this again")
    except NoEstimate as error:
        yield Check("memory", "warn", f"no estimate: {error}", "watch the first steps of a run with the largest batch")
    except Exception as error:
        # The workload is the user's code: its error is the result of a check. It may fail under FakeTensorMode only.
        remedy = "correct it there; if tuner train works, only the memory estimate is missing"
        yield Check("workload", "fail", describe_error(error), remedy)
    yield check_free(run_root, study)


def _examine_workload(
    spec: StudySpec, setup: Setup, machine: Machine, run_root: Path, judge: Callable[[Workload], Iterator[Check]]
) -> Iterator[Check]:
    """The checks that need the data and the model. Raises their exceptions."""
    if setup.config.device == "cuda" and machine.capabilities.kind == "cpu":
        yield Check(
            "device", "fail", 'train.device is "cuda", but there is no CUDA device', 'use train.device = "auto"'
        )
    if setup.config.device == "cpu":
        machine = detect_machine("cpu")
    # Checking the data must not pack it.
    workload, setup = setup.workload, replace(setup, workload=setup.workload.unpacked())
    missing = list(check_paths(workload))
    yield from missing
    data = [] if has_failed(missing) else [check_data(setup)]
    yield from data
    if has_failed([*missing, *data]):
        yield check_free(run_root, spec.study.name)
        return
    yield from judge(setup.workload)
    yield from _examine_run(spec, setup, machine, run_root, workload)


def _examine_run(
    spec: StudySpec, setup: Setup, machine: Machine, run_root: Path, workload: Workload
) -> Iterator[Check]:
    """The checks that need the model. Raises NoEstimate where it can't run under FakeTensorMode, and UserError.

    Args:
        setup: With unpacked data.
        workload: That of the spec.
    """
    probe = Probe.on_device(setup.workload, setup.config, machine.capabilities)
    estimate = probe.estimate()
    yield from check_memory(spec, probe, estimate, machine)
    mapped = False
    if workload is not setup.workload:
        packing, mapped = check_packing(workload, setup.workload)
        yield packing
    chosen = _plan(setup, probe, machine, mapped)
    yield _attention(setup, probe, chosen, machine)
    yield check_loader(setup, chosen, machine.capabilities, largest_step(spec))
    yield check_laws(setup.workload, estimate.weights)
    yield check_snapshot(estimate.checkpoint, estimate.total if machine.capabilities.kind == "cpu" else 0)
    yield _disk(spec, setup, estimate, run_root)


def _plan(setup: Setup, probe: Probe, machine: Machine, mapped: bool) -> AccelerationPlan:
    """The acceleration of the full run. Raises UserError where [train] requires an impossible one."""
    config, data = setup.config, setup.workload.train_data()
    size = RunSize.of(probe.model, data, samples_per_step=config.effective_batch_size, remaining_steps=config.num_steps)
    return plan(machine.capabilities, config, replace(size, mapped_data=mapped or size.mapped_data))


def _attention(setup: Setup, probe: Probe, chosen: AccelerationPlan, machine: Machine) -> Check:
    # On the CPU: CUDA's kernels replace the attention call before it can be recorded.
    one = setup.config.model_copy(update={"batch_size": 1, "micro_batch_size": None, "grad_accumulation": 1})
    with record_attention(probe.precision) as calls:
        Probe(setup.workload, one, device="cpu", precision=probe.precision).estimate()
    return check_attention(calls, chosen, machine.capabilities)


def _disk(spec: StudySpec, setup: Setup, estimate: MemoryEstimate, run_root: Path) -> Check:
    config = setup.config
    num_milestones = (config.num_steps or 0) // config.keep_every if config.keep_every else 0
    return check_checkpoints(
        run_root,
        spec.study.name,
        checkpoint=estimate.checkpoint,
        best=len(set(setup.workload.best_checkpoints().values())) * estimate.weights,
        milestones=num_milestones * estimate.weights,
        # The kept trials, the baseline and the running one; latest.pth is a link to the newest.
        num_trials=min(KEEP_TRIALS + 3, spec.trial.num_trials),
        # Three more: best.pth, stable.pth and the newest good state.
        num_full=config.keep_checkpoints + 2 + (config.decay_start is not None),
    )
