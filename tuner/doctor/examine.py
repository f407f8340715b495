"""All checks, in the order in which they are to be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from trainer.acceleration import AccelerationPlan, RunSize, plan
from trainer.errors import UserError
from trainer.memory import MemoryEstimate, NoEstimate, Probe
from trainer.workload import Workload
from tuner.doctor.attention import check_attention, recorded
from tuner.doctor.check import Check, has_failed
from tuner.doctor.data import check_data, check_loader, check_packing, check_paths
from tuner.doctor.device import Machine, check_device, cuda_machine, this_machine
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
from tuner.doctor.memory import check_memory, check_snapshot
from tuner.doctor.storage import check_interrupted, check_storage, open_trials
from tuner.spec.setups import Setup, full_setup, largest_step
from tuner.spec.study_toml import StudySpec
from tuner.spec.workloads import described
from tuner.study.launch import KEEP_TRIALS


def examine(
    spec: Path | None = None,
    *,
    run_root: Path = Path("runs"),
    gpu_memory: float | None = None,
    storage: str | None = None,
) -> list[Check]:
    """Look at everything; nothing is changed.

    Args:
        spec: A study.toml; without it only the installation, the machine and the storage are looked at.
        run_root: Folder of the run directories.
        gpu_memory: Bytes. Judge for a CUDA device with so many and bf16, in place of this machine's.
        storage: Database URL, as `open_storage` takes it.
    """
    machine = this_machine() if gpu_memory is None else cuda_machine(gpu_memory)
    # What is installed is this machine's, whatever the card that is judged.
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    checks = [check_own(), check_trainer(), check_python(), *check_packages(), check_compiler(), check_compile(kind)]
    checks += [check_device(machine), *check_gpus(), check_clock(run_root), check_storage(storage)]
    checks += check_interrupted(open_trials(storage), run_root)
    return checks + (list(examine_spec(spec, machine, run_root)) if spec else [check_free(run_root)])


def examine_spec(path: Path, machine: Machine, run_root: Path) -> Iterator[Check]:
    """The checks that need a study.toml; each is the ground of the next. Where one can't be made, the disk's is the
    last."""
    study = None
    try:
        spec = StudySpec.load(path)
        setup = full_setup(spec, {})
        yield Check("spec", "ok", f"{path}: study {spec.study.name}, {spec.trial.num_trials} trials")
        study = spec.study.name
        yield from _examine_workload(spec, setup, machine, run_root)
        return
    except UserError as error:
        name, what = ("spec", "the spec") if study is None else ("workload", "[workload] or what it names")
        yield Check(name, "fail", str(error), f"correct {what}, then run this again")
    except NoEstimate as error:
        yield Check("memory", "warn", f"no estimate: {error}", "watch the first steps of a run with the largest batch")
    except Exception as error:
        # The workload is somebody else's code, and what it raises is a finding as any other: those before it and after
        # it are to be read too. Tensors without contents may be all that it stumbled over.
        remedy = "correct it there; if tuner train gets on with it, only the memory of a run stays unknown"
        yield Check("workload", "fail", described(error), remedy)
    yield check_free(run_root, study)


def _examine_workload(spec: StudySpec, setup: Setup, machine: Machine, run_root: Path) -> Iterator[Check]:
    """What needs the data and the model. Raises what they raise."""
    if setup.config.device == "cuda" and machine.capabilities.kind == "cpu":
        yield Check("device", "fail", 'train.device "cuda", and there is no CUDA device', 'use train.device = "auto"')
    if setup.config.device == "cpu":
        machine = this_machine("cpu")
    # Looking at the data must not begin with copying it.
    workload, setup = setup.workload, replace(setup, workload=setup.workload.unpacked())
    missing = list(check_paths(workload))
    yield from missing
    data = [] if has_failed(missing) else [check_data(setup)]
    yield from data
    if has_failed([*missing, *data]):
        yield check_free(run_root, spec.study.name)
        return
    yield from _examine_run(spec, setup, machine, run_root, workload)


def _examine_run(
    spec: StudySpec, setup: Setup, machine: Machine, run_root: Path, workload: Workload
) -> Iterator[Check]:
    """What needs the model. Raises NoEstimate where it can't run without contents, and UserError.

    Args:
        setup: With data that is not packed.
        workload: As the spec has it.
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
    yield check_snapshot(estimate.checkpoint, estimate.total if machine.capabilities.kind == "cpu" else 0)
    yield _disk(spec, setup, estimate, run_root)


def _plan(setup: Setup, probe: Probe, machine: Machine, mapped: bool) -> AccelerationPlan:
    """How the full run would be carried out. Raises UserError where [train] asks for what can't be."""
    config, data = setup.config, setup.workload.train_data()
    size = RunSize.of(probe.model, data, samples_per_step=config.effective_batch_size, remaining_steps=config.num_steps)
    return plan(machine.capabilities, config, replace(size, mapped_data=mapped or size.mapped_data))


def _attention(setup: Setup, probe: Probe, chosen: AccelerationPlan, machine: Machine) -> Check:
    # The CPU's operations: those of CUDA would stand in for attention before it is seen.
    one = setup.config.model_copy(update={"batch_size": 1, "micro_batch_size": None, "grad_accumulation": 1})
    with recorded(probe.precision) as calls:
        Probe(setup.workload, one, device="cpu", precision=probe.precision).estimate()
    return check_attention(calls, chosen, machine.capabilities)


def _disk(spec: StudySpec, setup: Setup, estimate: MemoryEstimate, run_root: Path) -> Check:
    return check_checkpoints(
        run_root,
        spec.study.name,
        checkpoint=estimate.checkpoint,
        best=len(set(setup.workload.best_checkpoints().values())) * estimate.parameters,
        # Those that are kept, the baseline, and the one that runs; latest.pth is another name for the newest.
        num_trials=min(KEEP_TRIALS + 2, spec.trial.num_trials),
        num_full=setup.config.keep_checkpoints,
    )
