"""Which attention may go through the flash kernel, over described devices and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.toy import Toy
from trainer.acceleration import Capabilities, RunSize, plan
from trainer.config import TrainConfig
from trainer.memory import Probe
from tuner.doctor.attention import Attention, check_attention, flash_obstacle, recorded
from tuner.doctor.check import Check


def cuda(major: int, minor: int) -> Capabilities:
    return Capabilities("cuda", f"sm{major}{minor}", cores=8, memory=24 * 10**9, compute_capability=(major, minor))


CPU = Capabilities("cpu", "CPU", cores=2, memory=10**10, amx_bf16=True)
RTX_4090, A100, H100, RTX_2080 = cuda(8, 9), cuda(8, 0), cuda(9, 0), cuda(7, 5)
GPT = Attention(16, 80, 80, 500, 500, "bf16", causal=True, dropout=0.1)


@pytest.mark.parametrize(
    ("device", "changes", "obstacle"),
    [
        (RTX_4090, {}, None),
        (A100, {"head_dim": 256, "value_dim": 256}, None),
        (RTX_4090, {"precision": "fp16"}, None),
        (RTX_4090, {"precision": "fp32"}, "bf16 only"),
        (RTX_2080, {}, "compute capability 8.0"),
        (RTX_4090, {"mask": True}, "a mask is given"),
        (RTX_4090, {"head_dim": 264, "value_dim": 264}, "above 256"),
        (RTX_4090, {"value_dim": 64}, "values of 64"),
        (RTX_4090, {"num_dims": 3}, "3 dimensions"),
        (RTX_4090, {"key_length": 600}, "another number of queries"),
        (RTX_4090, {"key_length": 600, "causal": False}, None),
        # The cards with little shared memory lack some backward passes.
        (RTX_4090, {"head_dim": 200, "value_dim": 200}, "no backward pass"),
        (cuda(12, 0), {"head_dim": 200, "value_dim": 200}, "no backward pass"),
        (A100, {"head_dim": 200, "value_dim": 200}, None),
        (H100, {"head_dim": 200, "value_dim": 200}, None),
        (RTX_4090, {"head_dim": 256, "value_dim": 256}, "no backward pass"),
        (RTX_4090, {"head_dim": 256, "value_dim": 256, "dropout": 0.0}, None),
        (CPU, {}, "no dropout"),
        (CPU, {"dropout": 0.0, "precision": "fp32", "mask": True}, None),
    ],
)
def test_what_keeps_a_call_from_the_flash_kernel(
    device: Capabilities, changes: dict[str, Any], obstacle: str | None
) -> None:
    found = flash_obstacle(replace(GPT, **changes), device)
    if obstacle is None:
        assert found is None
    else:
        assert found is not None
        what, remedy = found
        assert obstacle in what and remedy


class Attentive(nn.Module):
    """Two heads of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(17, 16), nn.Linear(16, 17)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).unflatten(-1, (2, 8)).transpose(1, 2)
        y = F.scaled_dot_product_attention(x, x, x, dropout_p=0.2 if self.training else 0.0, is_causal=True)
        return self.head(y.transpose(1, 2).flatten(2))


class AttentiveToy(Toy):
    def build_model(self) -> nn.Module:
        return Attentive()

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().loss_sums(model, inputs)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_shapes_are_those_of_a_step_of_the_model(precision: str) -> None:
    with recorded(precision) as calls:
        Probe(AttentiveToy(), TrainConfig(steps=1, batch_size=1), device="cpu", precision=precision).estimate()
    assert dict(calls) == {Attention(2, 8, 8, 39, 39, precision, causal=True, dropout=0.2): 1}, "no validation's"


def checked(device: Capabilities, call: Attention, **values: Any) -> Check:
    config = TrainConfig(steps=100, **values)
    size = RunSize(10**8, 100, 4000.0, 100)
    return check_attention({call: 24}, plan(device, config, size), device)


def test_an_eligible_model_is_ok_and_its_heads_are_said() -> None:
    found = checked(RTX_4090, GPT)
    assert found.state == "ok" and "GPU's flash kernel: 16 heads of 80, bf16, causal, no mask" in found.message


def test_a_mask_is_a_warning_with_its_remedy_and_the_kernels_that_are_left() -> None:
    found = checked(RTX_4090, replace(GPT, mask=True))
    assert found.state == "warn" and "efficient or math" in found.message and "leave the mask out" in found.remedy


def test_kernels_that_the_spec_chose_are_no_matter_of_complaint() -> None:
    found = checked(RTX_4090, GPT, sdpa="math")
    assert found.state == "ok" and "math, as train.sdpa says" in found.message


def test_a_cpu_with_dropout_takes_the_math_kernel() -> None:
    found = checked(CPU, GPT)
    assert found.state == "warn" and "no dropout" in found.message and "; math (" in found.message
    assert checked(CPU, replace(GPT, dropout=0.0)).state == "ok"


def test_a_model_without_attention_has_nothing_to_be_eligible() -> None:
    config, size = TrainConfig(steps=100), RunSize(10**6, 10, 400.0, 100)
    assert check_attention({}, plan(CPU, config, size), CPU).state == "ok"


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"head_dim": 264, "value_dim": 264}, {"precision": "fp32"}])
def test_torch_says_the_same_on_the_device_that_is_here(changes: dict[str, Any]) -> None:
    from trainer.acceleration import detect
    from tuner.doctor.attention import torch_obstacle

    assert torch.cuda.is_available()
    call, device = replace(GPT, **changes), detect()
    assert (torch_obstacle(call, device) is None) == (flash_obstacle(call, device) is None)
