"""What holds the GPUs' memory, from answers of the driver that are written down here."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from tuner.doctor.gpus import MIB, Gpu, GpuProcess, check_gpus, from_nvml, parse_nvidia_smi, visible

TWO_GPUS = """0, GPU-aaaa-1, NVIDIA GeForce RTX 4090, 24564, 24100
1, GPU-bbbb-2, NVIDIA GeForce RTX 4090, 24564, 4096
"""
PROCESSES = """GPU-bbbb-2, 4242, /usr/bin/python3.11, 19800
GPU-bbbb-2, 4343, /opt/a, b/server, [N/A]
GPU-bbbb-2, 4444, [Not Found], [N/A]
"""
RTX = Gpu(0, "GPU-aaaa-1", "RTX 4090", total=24 * 10**9, free=int(23.8e9))


def test_nvidia_smi_is_read() -> None:
    first, second = parse_nvidia_smi(TWO_GPUS, PROCESSES)
    assert first == Gpu(0, "GPU-aaaa-1", "NVIDIA GeForce RTX 4090", 24564 * MIB, 24100 * MIB)
    assert second.processes[0] == GpuProcess(4242, "python3.11", 19800 * MIB)
    assert second.processes[-1] == GpuProcess(4444, "[Not Found]", None)


@pytest.mark.parametrize(
    ("gpus", "processes", "count"),
    [
        ("", "", 0),
        ("0, GPU-a, NVIDIA GB10, [N/A], [N/A]\n", "", 0),
        ("0, GPU-a, Tesla T4, 15360, 15000\n", "No running processes found\n", 1),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", "", 0),
    ],
)
def test_what_nvidia_smi_does_not_know_is_left_out(gpus: str, processes: str, count: int) -> None:
    found = parse_nvidia_smi(gpus, processes)
    assert len(found) == count and not any(gpu.processes for gpu in found)


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
        return SimpleNamespace(total=100 * MIB, free=60 * MIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> Any:
        return [SimpleNamespace(pid=os.getpid(), usedGpuMemory=None), SimpleNamespace(pid=2**22 + 1, usedGpuMemory=7)]

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return "GPU-cccc"

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "H100"


def test_nvml_is_asked_and_closed_again() -> None:
    nvml = FakeNvml()
    (gpu,) = from_nvml(nvml)
    assert (gpu.uuid, gpu.name, gpu.total, gpu.free) == ("GPU-cccc", "H100", 100 * MIB, 60 * MIB)
    assert gpu.processes[1] == GpuProcess(2**22 + 1, "a process", 7), "one that is not seen from here"
    assert not nvml.is_open


@pytest.mark.parametrize(
    ("value", "indices"),
    [(None, [0, 1]), ("1", [1]), ("1,0", [1, 0]), ("", []), ("-1", []), ("GPU-bbbb", [1]), ("0,7,1", [0])],
)
def test_only_the_gpus_that_cuda_would_see_are_judged(value: str | None, indices: list[int]) -> None:
    environment = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert [gpu.index for gpu in visible(parse_nvidia_smi(TWO_GPUS, ""), environment)] == indices


def states(gpu: Gpu) -> tuple[str, str]:
    (check,) = check_gpus([gpu], {})
    assert bool(check.remedy) == (check.state != "ok")
    return check.state, check.message


def changed(**values: Any) -> Gpu:
    return Gpu(**{**vars(RTX), **values})


def test_a_free_gpu_is_ok_also_beside_a_desktop() -> None:
    assert states(RTX) == ("ok", "RTX 4090: 23.80 GB of 24.00 GB free")
    assert states(changed(free=int(22e9)))[0] == "ok"


def test_another_process_is_named_with_its_memory() -> None:
    state, message = states(changed(free=int(20e9), processes=(GpuProcess(77, "python", int(3.5e9)),)))
    assert state == "warn" and "on it: python (pid 77, 3.50 GB)" in message


def test_memory_held_by_what_is_not_seen_is_a_warning() -> None:
    state, message = states(changed(free=int(9e9)))
    assert state == "warn" and "not seen from here" in message


def test_a_gpu_without_room_for_a_process_is_a_fail() -> None:
    assert states(changed(free=300_000_000))[0] == "fail"


def test_this_process_and_its_parents_are_not_in_their_own_way() -> None:
    own = (GpuProcess(os.getpid(), "python", 10), GpuProcess(os.getppid(), "bash", 10))
    assert states(changed(processes=own))[0] == "ok"
