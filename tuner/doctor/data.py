"""A spec's data: whether it is there, can be read and packed, and how it comes to the device."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from trainer.acceleration import AccelerationPlan, Capabilities
from trainer.errors import DamagedSample
from trainer.live_bytes import storage_bytes
from trainer.loader import check_lengths, check_losses
from trainer.memory import read_samples
from trainer.packed import AUTO_BYTES, AUTO_SHARE
from trainer.packed_store import HEADER
from trainer.packing import CannotPack, Estimate, duration, estimate
from trainer.workload import Workload
from tuner.doctor.check import Check, State, size
from tuner.doctor.disk import nearest
from tuner.spec.setups import Setup

INDEX, OTHER_INDEX = ".tuner-index", Path("data/index")
"""Where packed stores lie: in such a folder beside a manifest, else in the second."""
SHM = Path("/dev/shm")
PREFETCHED = 4
"""Batches that each of the trainer's loader workers has ready."""


def check_paths(workload: Workload) -> Iterator[Check]:
    """Whether what the options name is there, one check for each that is not. Opens nothing.

    A manifest is read, whatever the workload; of other paths only the workload knows whether it reads or makes them.
    """
    for option, path in named_paths(workload):
        manifest = "manifest" in option
        remedy = f"correct workload.{option}" + (", or make the data" if manifest else "")
        if not path.exists():
            missing: State = "fail" if manifest else "warn"
            yield Check("data", missing, f"{path}, which workload.{option} names, is not there", remedy)
        elif not os.access(path, os.R_OK):
            yield Check("data", "fail", f"{path}, which workload.{option} names, can't be read", "correct who may read")
        elif manifest and path.is_file() and not path.stat().st_size:
            yield Check("data", "fail", f"{path}, which workload.{option} names, is empty", remedy)


def named_paths(workload: Workload) -> Iterator[tuple[str, Path]]:
    """(option, path) for each option that is a path, and each manifest "PATH" or "PATH::language"."""
    for option, value in workload.model_dump().items():
        for entry in value if isinstance(value, list | tuple) else [value]:
            if isinstance(entry, Path):
                yield option, entry
            elif isinstance(entry, str) and "manifest" in option:
                yield option, Path(re.sub(r"::[\w-]+$", "", entry))


def check_data(setup: Setup) -> Check:
    """Whether the data can be opened, and its first samples be read and collated.

    Raises:
        UserError: It can't be opened, or does not fit its lengths or the workload's losses.
    """
    train, val = setup.workload.train_data(), setup.workload.val_data()
    message = f"{len(train):,} samples to train on, {len(val):,} to validate"
    if not (len(train) and len(val)):
        return Check("data", "fail", f"{message}: a split is empty", "name data for it in [workload]")
    for data in (train, val):
        check_lengths(data)
        try:
            sample = data[0]
        except DamagedSample as error:
            return Check("data", "warn", f"{message}; {error}", "more than 1% of such samples stop a run: repair them")
        check_losses(setup.workload, setup.workload.collate([sample]))
    return Check("data", "ok", f"{message}, at most {int(max(train.lengths)):,} tokens each")


def check_packing(setup: Setup, mode: Any, *, free: float | None = None) -> tuple[Check, bool]:
    """Whether the disk holds the packed store that the first use makes, and whether there will be one.

    Args:
        setup: With data that is not packed.
        mode: The spec's `workload.pack`: "auto", or True.
        free: Bytes, in place of those that are free on the disk.
    """
    splits = {"train": setup.workload.train_data(), "val": setup.workload.val_data()}
    places = [*(path.parent / INDEX for _, path in named_paths(setup.workload)), OTHER_INDEX]
    if all(any(_holds(place, len(data)) for place in places) for data in splits.values()):
        return Check("packed data", "ok", f"packed by an earlier run, in {places[0]}"), True
    folder = nearest(places[0])
    free = shutil.disk_usage(folder).free if free is None else free
    try:
        needed = [estimate(data) for data in splits.values()]
    except CannotPack as error:
        if mode is True:
            return Check("packed data", "fail", f"not packed: {error}", "use workload.pack = false"), False
        return Check("packed data", "warn", f"not packed: {error}", "repair the data"), False
    total = sum(part.num_bytes for part in needed)
    message = f"{size(total)} of {size(free)} free in {folder}"
    if mode is True and total > free:
        remedy = "free some space, or use workload.pack = false"
        return Check("packed data", "fail", f"the packed store needs {message}", remedy), False
    if mode == "auto" and max(part.num_bytes for part in needed) > min(AUTO_BYTES, AUTO_SHARE * free):
        bound = f"{size(AUTO_BYTES)} or a quarter of what is free"
        remedy = "free some space, or use workload.pack = true"
        reason = f"not packed, so files are read one by one: a store needs {message}, more than {bound}"
        return Check("packed data", "warn", reason, remedy), False
    return Check("packed data", "ok", f"the first use packs it: {message}, about {_time(needed)}"), True


def _time(needed: list[Estimate]) -> str:
    return duration(sum(part.seconds for part in needed))


def _holds(place: Path, num_samples: int) -> bool:
    """Whether a whole store of so many samples lies there."""
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
    """Whether the loader's workers have cores, and shared memory for the batches that wait.

    Args:
        batch_size: The largest searched.
        shared: Bytes free in /dev/shm. Default: this machine's.
    """
    reason = next(r for r in plan.reasons if r.startswith("loader workers: ")).removeprefix("loader workers: ")
    wanted = setup.config.num_workers or 0
    if wanted > device.cores:
        return Check("loader", "warn", f"train.num_workers {wanted} and {device.cores} cores", "use fewer, or leave it")
    if not plan.num_workers:
        return Check("loader", "ok", f"no workers: {reason.partition(': ')[2]}")
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
    message += f", {size(needed)} of {size(shared)} in {SHM} for the longest batches of {batch_size}"
    if needed > shared:
        remedy = "give the container more (docker run --shm-size=8g), or use train.num_workers = 0"
        return Check("loader", "fail", f"{message}: a worker would die of a bus error", remedy)
    return Check("loader", "ok", message)
