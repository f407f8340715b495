"""Processes that hold the GPUs' memory, from recorded answers of the driver."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from tuner.doctor.gpus import Gpu, GpuProcess, check_gpus, read_nvml, select_visible

RTX = Gpu(0, "GPU-aaaa-1", "RTX 4090", total=24 * 10**9, free=int(23.8e9))


class FakeNvml:
    """The functions of `pynvml` that are used, for a machine with one GPU."""

    def __init__(self) -> None:
        self.is_open = False

    def nvmlInit(self) -> None:
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=100_000_000, free=60_000_000)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> Any:
        return [SimpleNamespace(pid=os.getpid(), usedGpuMemory=None), SimpleNamespace(pid=2**22 + 1, usedGpuMemory=7)]

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return "GPU-cccc"

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "H100"


def test_nvml_is_read_and_closed() -> None:
    nvml = FakeNvml()
    (gpu,) = read_nvml(nvml)
    assert (gpu.uuid, gpu.name, gpu.total, gpu.free) == ("GPU-cccc", "H100", 100_000_000, 60_000_000)
    assert gpu.processes[1] == GpuProcess(2**22 + 1, "a process", 7), "one that is not visible from here"
    assert not nvml.is_open


@pytest.mark.parametrize(
    ("value", "indices"),
    [(None, [0, 1]), ("1", [1]), ("1,0", [1, 0]), ("", []), ("-1", []), ("GPU-bbbb", [1]), ("0,7,1", [0])],
)
def test_only_the_gpus_that_cuda_would_see_are_judged(value: str | None, indices: list[int]) -> None:
    environment = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    gpus = [RTX, changed(index=1, uuid="GPU-bbbb-2")]
    assert [gpu.index for gpu in select_visible(gpus, environment)] == indices


def states(gpu: Gpu) -> tuple[str, str]:
    (check,) = check_gpus([gpu], {})
    assert bool(check.remedy) == (check.state != "ok")
    return check.state, check.message


def changed(**values: Any) -> Gpu:
    return Gpu(**{**vars(RTX), **values})


def test_free_gpu_is_ok_also_beside_a_desktop() -> None:
    assert states(RTX) == ("ok", "RTX 4090: 23.8 GB of 24.0 GB free")
    assert states(changed(free=int(22e9)))[0] == "ok"


def test_another_process_is_named_with_its_memory() -> None:
    state, message = states(changed(free=int(20e9), processes=(GpuProcess(77, "python", int(3.5e9)),)))
    assert state == "warn" and "used by python (pid 77, 3.5 GB)" in message


def test_memory_held_by_an_invisible_process_is_a_warning() -> None:
    state, message = states(changed(free=int(9e9)))
    assert state == "warn" and "not visible from here" in message


def test_gpu_without_room_for_a_process_fails() -> None:
    assert states(changed(free=300_000_000))[0] == "fail"


def test_own_processes_do_not_occupy_the_gpu() -> None:
    own = (GpuProcess(os.getpid(), "python", 10), GpuProcess(os.getppid(), "bash", 10))
    assert states(changed(processes=own))[0] == "ok"
