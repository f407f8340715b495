"""LoRA: adapters alone are trained and stored, and merged they are the model that was trained."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from studies.indextts2 import IndexTTS2
from studies.indextts2.weights import ENCODERS, TEXT_ROWS
from tests.studies.test_evaluation import run, spec
from tests.studies.test_weights import published, tokenizers  # noqa: F401
from tests.studies.tiny_corpus import TINY_GPT, write_tiny_corpus
from trainer import TrainConfig, UserError, train
from trainer.averaging import average_checkpoints
from trainer.checkpoint import num_bytes, read_checkpoint
from trainer.laws import check_workload
from trainer.memory import estimate
from tuner.promotion.evaluate import evaluate_all, evaluate_checkpoint
from tuner.promotion.export import export

LORA = {"base_checkpoint": "gpt.pth", "lora_rank": 4, "lora_alpha": 8}
CONFIG = TrainConfig(steps=8, batch_size=4, d0=1e-3, precision="fp32", save_every=4)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_tiny_corpus(tmp_path, num_train=16, num_val=8, num_text_tokens=20)
    torch.save(published(), tmp_path / "gpt.pth")
    return tmp_path


def workload(folder: Path, **options: Any) -> IndexTTS2:
    given = {"train_manifests": ["train_pairs.jsonl"], "val_manifests": ["val_pairs.jsonl"], "gpt": TINY_GPT}
    return IndexTTS2.model_validate(given | options, context={"base_dir": folder})


def test_laws_hold_with_adapters(corpus: Path) -> None:
    check_workload(workload(corpus, **LORA))


def test_new_adapters_change_nothing_and_merged_ones_are_the_model_within_1e_5(corpus: Path) -> None:
    work = workload(corpus, **LORA, lora_train=["text_head"])
    model, base = work.build_model().eval(), workload(corpus, base_checkpoint="gpt.pth").build_model().eval()
    inputs = work.collate([work.train_data()[index] for index in range(4)]).inputs
    with torch.no_grad():
        assert torch.equal(model.mel_logits(inputs), base.mel_logits(inputs))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
        work.export_weights(model.state_dict(), corpus / "merged.pth")
        workload(corpus).load_weights(base, corpus / "merged.pth")
        logits, merged = model.mel_logits(inputs), base.mel_logits(inputs)
    assert (
        logits - workload(corpus, base_checkpoint="gpt.pth").build_model().eval().mel_logits(inputs)
    ).abs().max() > 0.1
    torch.testing.assert_close(merged, logits, rtol=1e-5, atol=1e-5)


def test_run_stores_adapters_alone_and_continues_bit_for_bit(corpus: Path) -> None:
    work = workload(corpus, **LORA)
    train(work, CONFIG, run_dir=corpus / "whole")
    for steps in (4, 8):
        train(work, CONFIG.model_copy(update={"steps": steps}), run_dir=corpus / "parts")
    whole, parts = (read_checkpoint(corpus / name / "latest.pth") for name in ("whole", "parts"))
    for name, tensor in whole["model"].items():
        assert ".lora_" in name or name == "lora_base"
        assert torch.equal(tensor, parts["model"][name])
    assert whole["optimizer"]["param_groups"][0]["d"] == parts["optimizer"]["param_groups"][0]["d"]
    # 32 -> 96, 32 -> 32, 32 -> 128 and 128 -> 32, in 2 layers.
    numbers = 2 * 4 * (32 + 96 + 32 + 32 + 32 + 128 + 128 + 32)
    assert num_bytes(whole["model"]) == 4 * numbers + 32
    sizes = [len(one["exp_avg"].flatten()) for one in whole["optimizer"]["state"].values()]
    assert sum(sizes) == numbers and sum(p.numel() for p in work.build_model().parameters()) > 5 * numbers
    found = estimate(work, CONFIG, device="cuda", precision="bf16")
    assert (found.weights, found.gradients) == (4 * numbers + 32, 4 * numbers)
    assert found.checkpoint == found.weights + found.optimizer_state and found.optimizer_state < 5 * found.weights


def test_checkpoints_of_a_run_are_evaluated_and_exported(corpus: Path) -> None:
    study = spec(corpus, **LORA)
    run_dir = run(study, corpus)
    reported = read_checkpoint(run_dir / "best_mel_model.pth")["metrics"]
    assert evaluate_checkpoint(study, run_dir).metrics == pytest.approx(reported)
    (best,) = [one for one in evaluate_all(run_dir) if "best_mel_model" in one.names]
    assert best.metrics == pytest.approx(reported)
    export(run_dir, corpus / "merged.pth")
    plain = spec(corpus, base_checkpoint="gpt.pth")
    assert evaluate_checkpoint(plain, corpus / "merged.pth").metrics == pytest.approx(reported, rel=1e-5)
    merged, base = read_checkpoint(corpus / "merged.pth"), read_checkpoint(corpus / "gpt.pth")
    changed = {name for name, tensor in base.items() if not torch.equal(tensor, merged[name])}
    assert merged.keys() == base.keys() and changed
    assert all(".attn.c_" in name or ".mlp.c_" in name for name in changed)
    export(run_dir, corpus / "release")
    assert (corpus / "release" / "gpt.pth").read_bytes() == (corpus / "merged.pth").read_bytes()


def test_new_vocabulary_is_trained_beside_the_adapters_and_exported(
    corpus: Path,
    tokenizers: tuple[Path, Path],  # noqa: F811
) -> None:
    base, new = tokenizers
    pieces = workload(corpus, tokenizer=base).gpt_config.number_text_tokens
    torch.save(published(number_text_tokens=pieces), corpus / "gpt.pth")
    rows = ("text_embedding[base]", "text_head[base]")
    work = workload(corpus, **LORA, tokenizer=new, base_tokenizer=base, freeze=rows)
    train(work, CONFIG, run_dir=corpus / "run")
    state = read_checkpoint(corpus / "run" / "latest.pth")["model"]
    assert set(TEXT_ROWS) < state.keys()
    torch.manual_seed(99)
    work.export_weights(state, corpus / "merged.pth")
    merged = read_checkpoint(corpus / "merged.pth")
    assert all(torch.equal(merged[name], state[name]) for name in TEXT_ROWS)
    assert {name for name in merged if name.startswith(ENCODERS)} == {
        name for name in published() if name.startswith(ENCODERS)
    }


def test_adapters_are_refused_where_they_do_not_belong(corpus: Path) -> None:
    work = workload(corpus, **LORA)
    train(work, CONFIG, run_dir=corpus / "run")
    latest = corpus / "run" / "latest.pth"
    torch.save({name: tensor + 1 for name, tensor in published().items()}, corpus / "other.pth")
    wrong = workload(corpus, **(LORA | {"base_checkpoint": "other.pth"}))
    other_rank = workload(corpus, **(LORA | {"lora_rank": 2}))
    for one, complaint in ((wrong, "another base_checkpoint"), (other_rank, "does not fit lora_rank")):
        with pytest.raises(UserError, match=complaint):
            one.load_weights(one.build_model(), latest)
    with pytest.raises(UserError, match="holds whole weights, and with lora_rank checkpoints hold adapters"):
        work.load_weights(work.build_model(), corpus / "gpt.pth")
    plain = workload(corpus, base_checkpoint="gpt.pth")
    with pytest.raises(UserError, match="holds LoRA adapters alone"):
        plain.load_weights(plain.build_model(), latest)
    with pytest.raises(UserError, match="holds LoRA adapters alone"):
        plain.export_weights(read_checkpoint(latest)["model"], corpus / "x.pth")
    other = Path(shutil.copy(latest, corpus / "other.pth"))
    with pytest.raises(UserError, match="holds LoRA adapters, and the product of two means"):
        average_checkpoints([latest, other], corpus / "mean.pth")


def test_mistakes_in_the_options_are_named(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="'lora_rank' needs 'base_checkpoint'"):
        workload(corpus, lora_rank=4)
    with pytest.raises(UserError, match="lora_train names 'texthead', and no parameter starts so"):
        workload(corpus, **LORA, lora_train=["texthead"]).build_model()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'prodigy-tuner\[lora\]'"):
        workload(corpus, **LORA).build_model()
