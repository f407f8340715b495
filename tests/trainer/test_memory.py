"""Memory estimates under FakeTensorMode, against the bytes of real tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studies.indextts2 import IndexTTS2
from tests.studies.test_weights import tokenizers  # noqa: F401
from tests.studies.tiny_corpus import TINY_GPT, write_tiny_corpus
from tests.toy import Toy, ToyModel
from trainer.acceleration import Capabilities
from trainer.config import TrainConfig
from trainer.errors import UserError
from trainer.live_bytes import LiveBytes
from trainer.memory import CUDA_CONTEXT, MemoryEstimate, NoEstimate, Probe, estimate


def config(**values: Any) -> TrainConfig:
    return TrainConfig(steps=1, **values)


def toy_estimate(device: str = "cpu", precision: str = "fp32", toy: Toy | None = None, **values: Any) -> MemoryEstimate:
    return estimate(toy or Toy(width=64), config(**values), device=device, precision=precision)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_tiny_corpus(folder, num_train=24, num_val=8)
    return folder


def gpt(folder: Path, **options: Any) -> IndexTTS2:
    values = {"train_manifests": ["train_pairs.jsonl"], "val_manifests": ["val_pairs.jsonl"], "gpt": TINY_GPT}
    return IndexTTS2.model_validate(values | options, context={"base_dir": folder})


@pytest.mark.parametrize(
    ("precision", "values", "options"),
    [
        ("fp32", {"optimizer": "adamw", "grad_accumulation": 3}, {}),
        ("bf16", {"optimizer": "adamw"}, {"dropout": 0.0}),
        ("bf16", {"slice_p": 11}, {"gradient_checkpointing": True}),
        ("fp32", {}, {"freeze": ("gpt.h.0.",)}),
    ],
)
def test_tensors_without_contents_take_as_many_bytes_as_real_ones(
    corpus: Path, precision: str, values: dict[str, Any], options: dict[str, Any]
) -> None:
    workload = gpt(corpus, **options)
    estimated, counted = (
        Probe(workload, config(**values), device="cpu", precision=precision, contents=real).estimate()
        for real in (False, True)
    )
    assert vars(estimated) == pytest.approx(vars(counted), rel=0.002)
    assert estimated.parameters == counted.parameters and estimated.optimizer_state == counted.optimizer_state


def test_known_tensors_are_counted() -> None:
    live = LiveBytes()
    before = torch.zeros(1000)
    with live:
        live.add([before])
        assert live.live == 4000
        x = torch.ones(1000, dtype=torch.float64)
        view = x[10:20]
        y = x + 1
        assert live.live == 4000 + 16_000
        del x
        assert live.live == 4000 + 16_000, "the view keeps the memory"
        del view
        assert (live.live, live.peak) == (4000 + 8000, 4000 + 16_000)
        z = y * 2
        assert live.peak_without([z]) == 4000 + 16_000 and live.peak == 4000 + 16_000
        assert live.peak_without([before, y, z]) == 8000


def test_parts_of_the_toy_model_are_estimated() -> None:
    num_parameters = sum(p.numel() for p in ToyModel(64, 0.0).parameters())
    found = toy_estimate(batch_size=8)
    assert found.parameters == found.gradients == 4 * num_parameters
    assert found.num_slots == 8 * 39, "the longest samples have 39 tokens"
    assert found.checkpoint == found.parameters + found.optimizer_state
    assert found.step_peak >= found.parameters + found.gradients + found.optimizer_state
    assert found.total == found.peak == max(found.training_peak, found.step_peak, found.evaluation_peak)
    assert found.fits(found.total) and not found.fits(found.total - 1)
    # At least the logits and the copy that softmax keeps.
    assert found.activations > 2 * 4 * 8 * 39 * 17


@pytest.mark.parametrize(
    ("values", "bytes_a_parameter"),
    [({}, 16), ({"slice_p": 11}, 8 + 8 / 11), ({"slice_p": 2}, 12), ({"optimizer": "adamw"}, 8)],
)
def test_bytes_of_an_optimizers_state(values: dict[str, Any], bytes_a_parameter: float) -> None:
    found = toy_estimate(toy=Toy(width=512), **values)
    assert found.optimizer_state / found.parameters * 4 == pytest.approx(bytes_a_parameter, rel=0.005)


def test_frozen_parameters_have_neither_gradients_nor_state(corpus: Path) -> None:
    whole, frozen = (
        estimate(gpt(corpus, freeze=freeze), config(batch_size=2), device="cpu", precision="fp32")
        for freeze in ((), ("gpt.h.0.", "text_embedding"))
    )
    assert frozen.parameters == whole.parameters
    model = gpt(corpus).build_model()
    named = model.named_parameters()
    num_frozen = sum(p.numel() for name, p in named if name.startswith(("gpt.h.0.", "text_embedding")))
    assert whole.gradients - frozen.gradients == 4 * num_frozen > 0
    assert whole.optimizer_state - frozen.optimizer_state == pytest.approx(16 * num_frozen, rel=0.01)


@pytest.mark.parametrize(("device", "precision"), [("cpu", "fp32"), ("cuda", "bf16")])
def test_gradient_checkpointing_lowers_activations(corpus: Path, device: str, precision: str) -> None:
    larger = TINY_GPT | {"layers": 6}
    kept, again = (
        estimate(
            gpt(corpus, gpt=larger, gradient_checkpointing=on), config(batch_size=8), device=device, precision=precision
        )
        for on in (False, True)
    )
    assert again.activations < 0.6 * kept.activations
    assert again.parameters == kept.parameters


def test_activations_grow_with_the_batch_alone() -> None:
    of = {n: toy_estimate(batch_size=n) for n in (8, 16, 32, 64)}
    assert of[16].optimizer_state == of[8].optimizer_state
    steps = [of[16].training_peak - of[8].training_peak, of[32].training_peak - of[16].training_peak]
    assert steps[0] > 0 and steps[1] == pytest.approx(2 * steps[0], rel=0.05)


def test_accumulated_gradients_live_through_the_next_forward_pass() -> None:
    once, twice = (toy_estimate(batch_size=32, toy=Toy(width=128), grad_accumulation=n) for n in (1, 2))
    assert twice.training_peak - once.training_peak > 0.8 * once.gradients, "all but the head's"


def test_activations_are_counted_without_the_gradients() -> None:
    found = toy_estimate(toy=Toy(width=512), batch_size=1)
    assert found.activations < 0.5 * found.gradients
    assert found.training_peak > found.parameters + found.optimizer_state + 0.9 * found.gradients


def test_validation_larger_than_a_step_decides_the_estimate() -> None:
    found = toy_estimate(batch_size=1)
    assert found.evaluation_peak > found.training_peak and found.peak == found.evaluation_peak


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 64)
        self.head = nn.Linear(64, 17)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).unsqueeze(1)
        y = F.scaled_dot_product_attention(x, x, x, dropout_p=0.1, is_causal=True)
        return self.head(F.dropout(y.squeeze(1), 0.1, self.training))


class AttentiveToy(Toy):
    repeats: int = 10

    def build_model(self) -> nn.Module:
        return Attentive()

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().loss_sums(model, {name: x.repeat(1, self.repeats) for name, x in inputs.items()})


def test_on_cuda_no_attention_matrix_is_kept() -> None:
    toy = AttentiveToy()
    matrix = 8 * (39 * toy.repeats) ** 2 * 4
    cpu, cuda = (toy_estimate(device=device, toy=toy, batch_size=8) for device in ("cpu", "cuda"))
    assert cpu.activations > 2 * matrix
    assert cuda.activations < 1.5 * matrix
    assert toy_estimate(device="cuda", toy=toy, batch_size=8, sdpa="math").activations > 2 * matrix
    assert cuda.allowance > CUDA_CONTEXT and cpu.allowance == 0


def test_bf16_halves_what_is_kept_between_linear_layers(corpus: Path) -> None:
    workload = gpt(corpus, gpt=TINY_GPT | {"layers": 6})
    full, half = (
        estimate(workload, config(batch_size=8), device="cuda", precision=name).activations for name in ("fp32", "bf16")
    )
    assert 0.4 * full < half < 0.9 * full


def test_largest_batch_size_that_fits_is_found() -> None:
    probe = Probe(Toy(width=64), config(batch_size=8), device="cpu", precision="fp32")
    for wanted in (20, 37, 200):
        needed = probe.estimate(wanted).total
        assert probe.largest_batch_size(needed) == wanted
        assert probe.largest_batch_size(needed - 1) < wanted
    assert probe.largest_batch_size(probe.parameters) == 0
    assert probe.largest_batch_size(1e12) == 256, "no more than the data has"


def test_estimate_keeps_the_random_state_and_the_weights() -> None:
    before = torch.get_rng_state()
    toy_estimate()
    assert torch.equal(torch.get_rng_state(), before)


def test_model_larger_than_the_machine_is_estimated_too() -> None:
    found = toy_estimate(toy=Toy(width=1_000_000), optimizer="adamw")
    assert found.parameters > 4e12 and found.optimizer_state == pytest.approx(2 * found.parameters)


def test_base_checkpoint_is_free_and_must_exist(
    corpus: Path,
    tmp_path: Path,
    tokenizers: tuple[Path, Path],  # noqa: F811
) -> None:
    base, new = tokenizers
    torch.save(gpt(corpus, tokenizer=base).build_model().state_dict(), tmp_path / "gpt.pth")
    moved = {"tokenizer": new, "base_tokenizer": base}
    with_base, without = (
        estimate(gpt(corpus, **options), config(batch_size=2), device="cpu", precision="fp32")
        for options in ({"base_checkpoint": tmp_path / "gpt.pth", **moved}, {"tokenizer": new})
    )
    assert with_base == without
    with pytest.raises(UserError, match=r"none\.pth does not exist"):
        estimate(gpt(corpus, base_checkpoint=tmp_path / "none.pth"), config(), device="cpu", precision="fp32")


class Reading(Toy):
    how: str = "item"

    def loss_sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sums = super().loss_sums(model, inputs)
        getattr(next(iter(sums.values())).detach(), self.how)()
        return sums


@pytest.mark.parametrize("how", ["item", "tolist", "numpy", "nonzero"])
def test_model_that_reads_values_has_no_estimate(how: str) -> None:
    with pytest.raises(NoEstimate, match="reads the values"):
        toy_estimate(toy=Reading(how=how))


def test_damaged_samples_are_skipped() -> None:
    longest = Toy().train_data().lengths.argsort()[::-1][:4]
    assert toy_estimate(toy=Toy(width=64, damaged=tuple(map(int, longest)))).parameters > 0
    with pytest.raises(UserError, match=r"4 training samples 0 could be read.* tokens\.npy is missing"):
        toy_estimate(toy=Toy(num_train=4, damaged=(0, 1, 2, 3)))


def test_probe_chooses_the_precision_of_the_plan() -> None:
    gpu = Capabilities("cuda", "GPU", cores=4, memory=10**10, compute_capability=(8, 9))
    avx = Capabilities("cpu", "CPU", cores=4, memory=10**10, avx512_bf16=True)
    for device, settings, precision in [(gpu, {}, "bf16"), (gpu, {"precision": "fp32"}, "fp32"), (avx, {}, "fp32")]:
        probe = Probe.on_device(Toy(width=8), TrainConfig(steps=1, batch_size=2, **settings), device)
        assert (probe.device, probe.precision) == (device.kind, precision)
