"""The plan, over a table of described devices and run lengths."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from trainer import TrainConfig, UserError
from trainer.acceleration import Capabilities, RunSize, allocator_settings, apply, detect, plan, sustained_flops

GB = 10**9
DEVICES = {
    "RTX 4090": Capabilities(
        "cuda", "RTX 4090", cores=16, memory=24 * GB, compute_capability=(8, 9), multiprocessors=128
    ),
    "A100": Capabilities("cuda", "A100", cores=32, memory=80 * GB, compute_capability=(8, 0), multiprocessors=108),
    "H100": Capabilities("cuda", "H100", cores=26, memory=80 * GB, compute_capability=(9, 0), multiprocessors=132),
    "RTX 2080": Capabilities("cuda", "RTX 2080", cores=8, memory=8 * GB, compute_capability=(7, 5), multiprocessors=46),
    "CPU with AMX": Capabilities("cpu", "CPU", cores=2, memory=24 * GB, amx_bf16=True, avx512_bf16=True),
    "CPU with AVX-512 bf16": Capabilities("cpu", "CPU", cores=2, memory=24 * GB, avx512_bf16=True),
    "CPU without": Capabilities("cpu", "CPU", cores=2, memory=24 * GB),
}
# 527 M parameters in 302 tensors, eight utterances of 350 tokens.
REAL = RunSize(527_000_000, 302, 2800.0, remaining_steps=240_000)
DEMO = RunSize(1_300_000, 62, 1200.0, remaining_steps=1_200)


def decide(device: str, size: RunSize = REAL, **settings: Any) -> Any:
    return plan(DEVICES[device], TrainConfig(steps=1, **settings), size)


@pytest.mark.parametrize(
    ("device", "precision", "tf32", "sdpa", "workers", "pad_multiple"),
    [
        ("RTX 4090", "bf16", True, ("flash", "efficient", "math"), 8, 8),
        ("A100", "bf16", True, ("flash", "efficient", "math"), 8, 8),
        ("H100", "bf16", True, ("flash", "efficient", "math"), 8, 8),
        ("RTX 2080", "fp32", False, ("efficient", "math"), 7, 8),
        ("CPU with AMX", "bf16", False, ("flash", "math"), 0, 1),
        ("CPU with AVX-512 bf16", "bf16", False, ("flash", "math"), 0, 1),
        ("CPU without", "fp32", False, ("flash", "math"), 0, 1),
    ],
)
def test_full_run_works_on_each_device(
    device: str, precision: str, tf32: bool, sdpa: tuple[str, ...], workers: int, pad_multiple: int
) -> None:
    chosen = decide(device)
    assert (chosen.precision, chosen.tf32, chosen.sdpa) == (precision, tf32, sdpa)
    assert (chosen.num_workers, chosen.pad_multiple) == (workers, pad_multiple)
    cuda = DEVICES[device].kind == "cuda"
    assert chosen.cudnn_benchmark == chosen.pin_memory == chosen.compile == cuda
    assert chosen.fused_optimizer


@pytest.mark.parametrize("device", [name for name in DEVICES if DEVICES[name].kind == "cuda"])
@pytest.mark.parametrize("steps", [1, 50, 120])
def test_few_steps_never_repay_compilation(device: str, steps: int) -> None:
    chosen = decide(device, replace(DEMO, remaining_steps=steps))
    assert not chosen.compile
    assert any(f"compile: off: {steps} steps would not repay about" in reason for reason in chosen.log_lines().values())


def test_cpu_compiles_only_on_request() -> None:
    assert not decide("CPU with AMX", replace(REAL, remaining_steps=10**9)).compile
    explicit = decide("CPU with AMX", compile="on")
    assert explicit.compile and explicit.pad_multiple == 8


def test_compilation_is_chosen_from_the_length_that_repays_it_on() -> None:
    lengths = [10**power for power in range(1, 8)]
    choices = [decide("RTX 4090", replace(REAL, remaining_steps=steps)).compile for steps in lengths]
    assert choices == sorted(choices) and set(choices) == {False, True}


def test_compiled_code_on_disk_is_used_by_shorter_runs() -> None:
    lengths = range(100, 20_000, 100)
    cold, warm = (
        [decide("RTX 4090", replace(REAL, remaining_steps=steps, compiled_before=before)).compile for steps in lengths]
        for before in (False, True)
    )
    assert sum(warm) > sum(cold)


def test_slow_gpu_repays_compilation_in_fewer_steps() -> None:
    shortest = {
        device: next(n for n in range(0, 10**6, 100) if decide(device, replace(REAL, remaining_steps=n)).compile)
        for device in ("RTX 2080", "RTX 4090", "H100")
    }
    assert list(shortest.values()) == sorted(shortest.values())
    assert shortest["H100"] > 4 * shortest["RTX 4090"]


@pytest.mark.parametrize(
    ("capability", "multiprocessors", "peak"),
    [((8, 0), 108, 312e12), ((8, 6), 82, 71e12), ((8, 9), 128, 165e12), ((9, 0), 132, 989e12), ((12, 0), 170, 210e12)],
)
def test_speed_of_a_gpu_is_near_its_data_sheet(capability: tuple[int, int], multiprocessors: int, peak: float) -> None:
    device = replace(DEVICES["A100"], compute_capability=capability, multiprocessors=multiprocessors)
    assert 0.25 * peak < sustained_flops(device, bf16=True, tf32=True) < 0.6 * peak


def test_new_architecture_counts_as_the_latest_known_one() -> None:
    newest = replace(DEVICES["A100"], compute_capability=(12, 1))
    known = replace(newest, compute_capability=(12, 0))
    assert sustained_flops(newest, bf16=True, tf32=True) == sustained_flops(known, bf16=True, tf32=True)
    chosen = plan(newest, TrainConfig(steps=1), REAL)
    assert (chosen.precision, chosen.sdpa[0], chosen.tf32) == ("bf16", "flash", True)


def test_allocator_settings_of_the_user_are_kept() -> None:
    assert allocator_settings({}) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert allocator_settings({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}) == {}
    assert allocator_settings({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}) == {}


def test_budget_in_seconds_decides_by_them() -> None:
    short = RunSize(527_000_000, 302, 2800.0, remaining_steps=None, remaining_seconds=60)
    assert not decide("RTX 4090", short).compile
    assert decide("RTX 4090", replace(short, remaining_seconds=36_000)).compile


def test_without_a_compiler_nothing_is_compiled() -> None:
    device = replace(DEVICES["A100"], compiler=False)
    chosen = plan(device, TrainConfig(steps=1), REAL)
    assert not chosen.compile and "compile: off: Triton is not installed" in chosen.log_lines().values()
    with pytest.raises(UserError, match=r'train.compile "on" needs Triton'):
        plan(device, TrainConfig(steps=1, compile="on"), REAL)


def test_small_models_stay_in_float32_on_a_cpu_without_amx() -> None:
    assert decide("CPU with AVX-512 bf16", DEMO).precision == "fp32"
    assert decide("CPU with AMX", DEMO).precision == "bf16"


def test_mapped_data_needs_no_workers() -> None:
    assert decide("RTX 4090", replace(REAL, mapped_data=True)).num_workers == 0


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("precision", "fp32", "precision: fp32: as set"),
        ("tf32", False, "tf32: off: as set"),
        ("cudnn_benchmark", False, "cudnn autotune: off: as set"),
        ("sdpa", ("math",), "attention: math: as set"),
        ("compile", False, "compile: off: as set"),
        ("num_workers", 3, "loader workers: 3: as set"),
        ("pin_memory", False, "pinned memory: off: as set"),
        ("fused_optimizer", False, "fused optimizer: off: as set"),
    ],
)
def test_every_choice_can_be_overridden_with_a_reason(setting: str, value: Any, reason: str) -> None:
    given = {"sdpa": "math", "compile": "off"}.get(setting, value)
    before, after = decide("RTX 4090"), decide("RTX 4090", **{setting: given})
    assert getattr(before, setting) != value and getattr(after, setting) == value
    assert reason in after.log_lines().values()


@pytest.mark.parametrize(
    ("device", "settings"),
    [
        ("RTX 2080", {"sdpa": "flash"}),
        ("RTX 4090", {"sdpa": "flash", "precision": "fp32"}),
        ("CPU without", {"sdpa": "efficient"}),
    ],
)
def test_unusable_kernel_is_refused(device: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f'train.sdpa "{settings["sdpa"]}"'):
        decide(device, **settings)


def test_reasons_are_by_topic_without_the_choice() -> None:
    reasons = decide("CPU without").reasons
    assert reasons["loader workers"] == "the cores are busy computing"
    assert reasons["device"].startswith("CPU, ") and "tf32" not in reasons


def test_more_workers_than_cores_are_not_started() -> None:
    chosen = decide("RTX 2080", num_workers=32)
    assert chosen.num_workers == 8
    assert "loader workers: 8: 32 set, limited by the cores" in chosen.log_lines().values()


def test_this_machine_is_described() -> None:
    found = detect("cpu")
    assert found.kind == "cpu" and found.cores >= 1 and found.memory > 10**8


def test_missing_gpu_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(UserError, match=r'train\.device "cuda": this machine shows no CUDA device'):
        detect("cuda")


def test_applying_a_plan_switches_attention_and_logs_each_reason(caplog: pytest.LogCaptureFixture) -> None:
    everything = decide("CPU without")
    try:
        with caplog.at_level(logging.INFO, "trainer"):
            apply(decide("CPU without", sdpa="math"))
        assert not torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert "attention: math: as set" in caplog.messages
        assert caplog.messages == list(decide("CPU without", sdpa="math").log_lines().values())
    finally:
        apply(everything)
    assert torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.cudnn_sdp_enabled()
