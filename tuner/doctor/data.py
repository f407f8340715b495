"""A spec's data: whether it exists, can be read and packed, and how it is loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import psutil

from trainer.acceleration import AccelerationPlan, Capabilities
from trainer.data.loader import check_lengths, check_losses
from trainer.data.packed import AUTO_BYTES, AUTO_SHARE
from trainer.data.packed_store import HEADER, CannotPack
from trainer.data.packing import Estimate, duration, estimate
from trainer.errors import DamagedSample
from trainer.live_bytes import storage_bytes
from trainer.memory import read_samples
from trainer.units import format_bytes
from trainer.workload import Workload
from tuner.doctor.check import Check, State
from tuner.doctor.disk import find_nearest_folder
from tuner.spec.setups import Setup

INDEX, OTHER_INDEX = ".tuner-index", Path("data/index")
"""Folders of packed stores: the first beside an input file, else the second."""
SHM = Path("/dev/shm")
PREFETCHED = 4
"""Batches that each loader worker prefetches."""


def check_paths(workload: Workload) -> Iterator[Check]:
    """One check for each missing or unreadable file that an option names. Opens no file.

    A missing file that is no input file is a warning: the workload may create it.
    """
    inputs = set(workload.input_files())
    for option, path in list_paths(workload):
        is_input = (option, path) in inputs
        remedy = f"correct workload.{option}" + (", or make the data" if is_input else "")
        if not path.exists():
            missing: State = "fail" if is_input else "warn"
            yield Check("data", missing, f"{path}, which workload.{option} names, does not exist", remedy)
        elif not os.access(path, os.R_OK):
            yield Check(
                "data", "fail", f"{path}, which workload.{option} names, can't be read", "correct its permissions"
            )
        elif is_input and path.is_file() and not path.stat().st_size:
            yield Check("data", "fail", f"{path}, which workload.{option} names, is empty", remedy)


def list_paths(workload: Workload) -> Iterator[tuple[str, Path]]:
    """(option, path) of each input file, then of every other path among the options."""
    inputs = list(workload.input_files())
    yield from inputs
    for option, value in workload.model_dump().items():
        for entry in value if isinstance(value, list | tuple) else [value]:
            if isinstance(entry, Path) and (option, entry) not in inputs:
                yield option, entry


def check_data(setup: Setup) -> Check:
    """Whether the data can be opened, and its first samples can be read and collated.

    Raises:
        UserError: It can't be opened, or does not match its lengths or the workload's losses.
    """
    train, val = setup.workload.train_data(), setup.workload.val_data()
    message = f"{len(train):,} samples to train on, {len(val):,} to validate"
    if not (len(train) and len(val)):
        return Check("data", "fail", f"{message}: a split is empty", "name its data in [workload]")
    for data in (train, val):
        check_lengths(data)
        try:
            sample = data[0]
        except DamagedSample as error:
            return Check("data", "warn", f"{message}; {error}", "more than 1% damaged samples stop a run: repair them")
        check_losses(setup.workload, setup.workload.collate([sample]))
    return Check("data", "ok", f"{message}, at most {int(max(train.lengths)):,} tokens each")


def check_packing(workload: Workload, unpacked: Workload, *, free: float | None = None) -> tuple[Check, bool]:
    """Whether the disk has room for the packed store, and whether one will exist.

    Args:
        workload: A workload that packs its data.
        unpacked: Its `unpacked()`; they differ in one option, a mode of `trainer.data.packed`.
        free: Free bytes. Default: those of the disk.
    """
    options = unpacked.model_dump()
    option, mode = next((name, value) for name, value in workload.model_dump().items() if value != options[name])
    splits = {"train": unpacked.train_data(), "val": unpacked.val_data()}
    places = [*(path.parent / INDEX for _, path in list_paths(workload)), OTHER_INDEX]
    if all(any(_holds(place, len(data)) for place in places) for data in splits.values()):
        return Check("packed data", "ok", f"packed by an earlier run, in {places[0]}"), True
    folder = find_nearest_folder(places[0])
    free = shutil.disk_usage(folder).free if free is None else free
    try:
        needed = [estimate(data) for data in splits.values()]
    except CannotPack as error:
        if mode is True:
            return Check("packed data", "fail", f"not packed: {error}", f"use workload.{option} = false"), False
        return Check("packed data", "warn", f"not packed: {error}", "repair the data"), False
    total = sum(part.num_bytes for part in needed)
    message = f"{format_bytes(total)} of {format_bytes(free)} free in {folder}"
    if mode is True and total > free:
        remedy = f"free some space, or use workload.{option} = false"
        return Check("packed data", "fail", f"the packed store needs {message}", remedy), False
    if mode == "auto" and max(part.num_bytes for part in needed) > min(AUTO_BYTES, AUTO_SHARE * free):
        bound = f"{format_bytes(AUTO_BYTES)} or a quarter of the free space"
        remedy = f"free some space, or use workload.{option} = true"
        reason = f"not packed, so files are read one by one: a store needs {message}, more than {bound}"
        return Check("packed data", "warn", reason, remedy), False
    return Check("packed data", "ok", f"the first use packs it: {message}, about {_time(needed)}"), True


def _time(needed: list[Estimate]) -> str:
    return duration(sum(part.seconds for part in needed))


def _holds(place: Path, num_samples: int) -> bool:
    """Whether the folder has a complete store with this number of samples."""
    for header in place.glob(f"*.packed/{HEADER}"):
        try:
            values = json.loads(header.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(values, Mapping) and values.get("num_samples") == values.get("num_done") == num_samples:
            return True
    return False


def check_loader(
    setup: Setup, plan: AccelerationPlan, device: Capabilities, batch_size: int, *, shared: float | None = None
) -> Check:
    """Whether the loader workers have enough cores, and shared memory for prefetched batches.

    Args:
        batch_size: The largest of the search space.
        shared: Bytes free in /dev/shm. Default: this machine's.
    """
    wanted = setup.config.num_workers or 0
    if wanted > device.cores:
        return Check("loader", "warn", f"train.num_workers {wanted} and {device.cores} cores", "use fewer, or unset it")
    if not plan.num_workers:
        return Check("loader", "ok", f"no workers: {plan.reasons['loader workers']}")
    data = setup.workload.train_data()
    longest = np.argsort(data.lengths)[::-1][: 2 * batch_size]
    samples, _ = read_samples(data, longest, batch_size)
    batch = setup.workload.collate(samples, plan.pad_multiple)
    needed = plan.num_workers * PREFETCHED * storage_bytes(batch.inputs.values())
    if shared is None:
        shared = psutil.disk_usage(str(SHM)).free if SHM.is_dir() else float("inf")
    message = f"{plan.num_workers} workers on {device.cores} cores"
    if shared == float("inf"):
        return Check("loader", "ok", message)
    message += f", {format_bytes(needed)} of {format_bytes(shared)} in {SHM} for the longest batches of {batch_size}"
    if needed > shared:
        remedy = "give the container more (docker run --shm-size=8g), or use train.num_workers = 0"
        return Check("loader", "fail", f"{message}: a worker would crash with a bus error", remedy)
    return Check("loader", "ok", message)
