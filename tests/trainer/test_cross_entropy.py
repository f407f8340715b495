"""The chunked cross-entropy is the plain one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer import cross_entropy
from trainer.cross_entropy import cross_entropy_sum


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 64)


def plain(x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(x).float(), targets, ignore_index=-100, reduction="sum")


def setting(dtype: torch.dtype = torch.float32) -> tuple[Tensor, nn.Linear, Tensor]:
    x = torch.randn(21, 8, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 17, (21,))
    targets[::5] = -100
    return x, nn.Linear(8, 17).to(dtype), targets


def gradients(loss: Tensor, x: Tensor, head: nn.Linear) -> list[Tensor]:
    return list(torch.autograd.grad(0.37 * loss, (x, *head.parameters())))


def test_sum_and_gradients_are_those_of_all_logits_at_once() -> None:
    x, head, targets = setting(torch.float64)
    ours, reference = cross_entropy_sum(x, head, targets), plain(x, head, targets)
    torch.testing.assert_close(ours.double(), reference.double(), rtol=1e-6, atol=0)
    for one, other in zip(gradients(ours, x, head), gradients(reference, x, head), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_under_autocast_it_is_as_exact_as_all_logits_at_once() -> None:
    x, head, targets = setting()
    exact = gradients(plain(x, head, targets), x, head)
    with torch.autocast("cpu", torch.bfloat16):
        ours, reference = cross_entropy_sum(x, head, targets), plain(x, head, targets)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(reference.item(), rel=1e-6)
    errors = [
        sum(float((a - b).square().sum()) for a, b in zip(gradients(loss, x, head), exact, strict=True))
        for loss in (ours, reference)
    ]
    assert errors[0] < 1.2 * errors[1]


def test_frozen_parameters_get_no_gradient() -> None:
    x, head, targets = setting()
    head.weight.requires_grad_(False)
    cross_entropy_sum(x, head, targets).backward()
    assert head.weight.grad is None and head.bias.grad is not None and x.grad is not None


def test_loss_without_gradients_computes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    x, head, targets = setting()
    made: list[object] = []
    monkeypatch.setattr(Tensor, "scatter_add_", lambda *arguments: made.append(arguments))
    monkeypatch.setattr(Tensor, "addmm_", lambda *arguments: made.append(arguments))
    with torch.no_grad():
        loss = cross_entropy_sum(x, head, targets)
    assert not loss.requires_grad and not made
    assert loss.item() == pytest.approx(plain(x, head, targets).item(), rel=1e-6)
