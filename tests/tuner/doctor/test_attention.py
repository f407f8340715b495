"""The calls of attention in a step, and whether the GPU's flash kernel takes them."""

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
from tuner.doctor.attention import Attention, check_attention, record_attention, takes_flash
from tuner.doctor.check import Check


def cuda(major: int, minor: int) -> Capabilities:
    return Capabilities("cuda", f"sm{major}{minor}", cores=8, memory=24 * 10**9, compute_capability=(major, minor))


CPU = Capabilities("cpu", "CPU", cores=2, memory=10**10, amx_bf16=True)
RTX_4090, RTX_2080 = cuda(8, 9), cuda(7, 5)
GPT = Attention(16, 80, 80, 500, 500, "bf16", causal=True, dropout=0.1)


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
def test_shapes_are_those_of_a_step_of_the_model(precision: str) -> None:
    with record_attention(precision) as calls:
        Probe(AttentiveToy(), TrainConfig(steps=1, batch_size=1), device="cpu", precision=precision).estimate()
    assert dict(calls) == {Attention(2, 8, 8, 39, 39, precision, causal=True, dropout=0.2): 1}, "no validation's"


def checked(device: Capabilities, call: Attention, **values: Any) -> Check:
    config = TrainConfig(steps=100, **values)
    size = RunSize(10**8, 100, 4000.0, 100)
    return check_attention({call: 24}, plan(device, config, size), device)


@pytest.fixture(params=[True, False])
def flash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the flash kernel of a GPU takes every call."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("tuner.doctor.attention.takes_flash", lambda call: request.param)
    return bool(request.param)


def test_flash_kernel_of_the_gpu_is_tried_with_the_calls(flash: bool) -> None:
    found = checked(RTX_4090, GPT)
    if flash:
        assert (found.state, found.message) == (
            "ok",
            "the GPU's flash kernel: 16 heads of 80, bf16, causal, no mask, dropout 0.1",
        )
    else:
        assert found.state == "warn" and "so efficient or math for 16 heads of 80" in found.message
        assert "can_use_flash_attention" in found.remedy


def test_without_a_gpu_the_calls_are_listed_and_nothing_is_concluded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in (CPU, RTX_4090):
        found = checked(device, replace(GPT, mask=True))
        assert (found.state, found.message) == ("ok", "16 heads of 80, bf16, causal, with a mask, dropout 0.1")


def test_plan_without_flash_gives_its_reason() -> None:
    assert checked(RTX_4090, GPT, sdpa="math").message.startswith("math, as set: 16 heads")
    assert "flash needs compute capability 8.0" in checked(RTX_2080, GPT).message


def test_model_without_attention_has_no_eligible_calls() -> None:
    config, size = TrainConfig(steps=100), RunSize(10**6, 10, 400.0, 100)
    assert check_attention({}, plan(CPU, config, size), CPU).state == "ok"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"head_dim": 264, "value_dim": 264}, False),
        ({"precision": "fp32"}, False),
        ({"mask": True}, False),
        ({"num_dims": 3}, False),
    ],
)
def test_torch_knows_what_its_flash_kernel_takes(changes: dict[str, Any], expected: bool) -> None:
    assert takes_flash(replace(GPT, **changes)) == expected
