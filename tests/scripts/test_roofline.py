"""The arithmetic of docs/gpu.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.bench.roofline import (
    H100,
    RTX_4090,
    Batch,
    Model,
    activation_bytes,
    batch_flops,
    find_gpu,
    format_parts,
    format_savings,
    format_sizes,
    savings_ms,
    step_ms,
    utilization,
    validation_seconds,
)
from studies.indextts2.model import GPTConfig, IndexTTS2GPT
from trainer.acceleration import COMPILE_GAIN

PAGE = (Path(__file__).parent.parent.parent / "docs" / "gpu.md").read_text(encoding="utf-8")
MODEL, BATCH = Model(), Batch()


def test_page_has_the_tables() -> None:
    for table in (format_parts, format_sizes, format_savings):
        assert "\n".join(table()) in PAGE


@pytest.mark.parametrize(
    "sizes", [{"model_dim": 64, "layers": 3, "heads": 2}, {"model_dim": 32, "layers": 1, "heads": 1}]
)
def test_parameters_are_those_of_the_model(sizes: dict[str, int]) -> None:
    config = GPTConfig(**sizes, number_text_tokens=70, number_mel_codes=8194)
    model = Model(width=config.model_dim, layers=config.layers, text_tokens=71, codes=8194)
    assert model.parameters == sum(p.numel() for p in IndexTTS2GPT(config).parameters())
    products = {name: p.numel() for name, p in IndexTTS2GPT(config).gpt.h.named_parameters() if p.dim() == 2}
    assert model.blocks == sum(products.values())


def test_figures_of_the_text() -> None:
    assert round(MODEL.parameters / 1e6) == 527 and BATCH.length == 394
    floor = step_ms(MODEL, BATCH, RTX_4090)
    least, most = sum(floor.values()) - floor["activations"], sum(floor.values())
    assert (round(least), round(most)) == (87, 111)
    assert [f"{utilization(MODEL, BATCH, RTX_4090, ms / 1e3):.0%}" for ms in (least, most)] == ["65%", "51%"]
    floor = step_ms(MODEL, BATCH, H100)
    times = sum(floor.values()), sum(floor.values()) - floor["activations"]
    assert [f"{utilization(MODEL, BATCH, H100, ms / 1e3):.0%}" for ms in times] == ["37%", "51%"]
    assert [f"{utilization(MODEL, BATCH, RTX_4090, s):.0%}" for s in (0.52, 0.20, 0.135)] == ["11%", "28%", "42%"]
    assert f"{sum(batch_flops(MODEL, BATCH).values()) / RTX_4090.flops / 0.55:.3f}" == "0.103"
    assert round(sum(step_ms(MODEL, BATCH, RTX_4090, share=0.7).values())) == 135
    assert round(240_000 * 0.135 / 3600, 1) == 9.0
    assert round(validation_seconds(MODEL, RTX_4090, samples=2000)) == 12
    for phrase in (
        "between 87 and 111 ms",
        "at most 65%",
        "0.52 s a step is an MFU of 11%",
        "0.103 s",
        "in 9.0 hours",
        "between 37% and 51%",
    ):
        assert phrase in " ".join(PAGE.split())


def test_larger_batches_share_the_optimizers_bytes() -> None:
    ms = [step_ms(MODEL, Batch(size), H100) for size in (4, 8, 16, 32)]
    assert len({each["optimizer"] for each in ms}) == 1
    shares = [each["optimizer"] / sum(each.values()) for each in ms]
    assert shares == sorted(shares, reverse=True)


def test_compilation_saves_at_least_what_the_plan_assumes() -> None:
    assert activation_bytes(MODEL, BATCH, compiled=True) < activation_bytes(MODEL, BATCH, compiled=False)
    for gpu in (RTX_4090, H100):
        eager = sum(step_ms(MODEL, BATCH, gpu, compiled=False, share=0.7).values())
        assert savings_ms(MODEL, BATCH, gpu)["compilation: bytes of activations"] / eager > 0.9 * COMPILE_GAIN


def test_gpu_is_found_by_its_name() -> None:
    assert find_gpu("NVIDIA GeForce RTX 4090") == RTX_4090 and find_gpu("NVIDIA H100 80GB HBM3") == H100
    assert find_gpu("CPU") is None
