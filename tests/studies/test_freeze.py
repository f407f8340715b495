"""Frozen rows of the text tables: they stay as they are, whatever the optimizer, and no file shows the difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from studies.indextts2 import IndexTTS2
from studies.indextts2.weights import TEXT_ROWS, find_shared_rows
from tests.studies.test_weights import tokenizers  # noqa: F401
from tests.studies.tiny_corpus import TINY_GPT, write_tiny_corpus
from trainer import TrainConfig, UserError, train
from trainer.checkpoint import read_checkpoint

CONFIG = TrainConfig(steps=6, batch_size=4, weight_decay=0.1, d0=1e-3, precision="fp32", save_every=3)
FREEZE = ("text_embedding[0:12]", "text_embedding[20:21]", "text_head[0:12]")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_tiny_corpus(folder, num_train=16, num_val=8)
    return folder


def workload(folder: Path, **options: Any) -> IndexTTS2:
    given = {"train_manifests": ["train_pairs.jsonl"], "val_manifests": ["val_pairs.jsonl"], "gpt": TINY_GPT}
    return IndexTTS2.model_validate(given | options, context={"base_dir": folder})


@pytest.mark.parametrize("optimizer", ["prodigy", "adamw"])
def test_frozen_rows_stay_bit_for_bit_and_the_others_are_trained(corpus: Path, tmp_path: Path, optimizer: str) -> None:
    work = workload(corpus, freeze=FREEZE)
    torch.manual_seed(CONFIG.seed)
    before = workload(corpus).build_model().state_dict()
    train(work, CONFIG.model_copy(update={"optimizer": optimizer, "lr": None}), run_dir=tmp_path)
    state = read_checkpoint(tmp_path / "latest.pth")
    after = state["model"]
    assert after.keys() == before.keys()
    for name in TEXT_ROWS:
        kept = (after[name] == before[name]).reshape(31, -1).all(1)
        frozen = {*range(12), *([20] if "embedding" in name else [])}
        assert set(kept.nonzero().flatten().tolist()) == frozen, name
    # The optimizer has no entry for a frozen row, so neither decay nor d sees it.
    sizes = {len(one["exp_avg"]) for one in state["optimizer"]["state"].values() if one["exp_avg"].shape[1:] == (32,)}
    assert {18, 19} <= sizes and 31 not in sizes


def test_model_with_frozen_rows_computes_what_the_whole_one_does(corpus: Path) -> None:
    whole, split = workload(corpus, dropout=0.0), workload(corpus, dropout=0.0, freeze=FREEZE)
    model, other = whole.build_model(), split.build_model()
    other.load_state_dict(model.state_dict())
    batch = whole.collate([whole.train_data()[index] for index in range(4)])
    gradients = []
    for one in (model, other):
        sum(whole.loss_sums(one, batch.inputs).values()).backward()  # type: ignore[union-attr]
        gradients.append({name.replace("parametrizations.", ""): p.grad for name, p in one.named_parameters()})
    whole_gradients, of_rows = gradients
    for name, rows in (("text_embedding.weight", [*range(12, 20), *range(21, 31)]), ("text_head.bias", range(12, 31))):
        assert torch.equal(of_rows.pop(f"{name}.original"), whole_gradients[name][list(rows)])
    assert torch.equal(of_rows.pop("text_head.weight.original"), whole_gradients["text_head.weight"][12:])
    assert all(torch.equal(gradient, whole_gradients[name]) for name, gradient in of_rows.items())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in other.state_dict().items())


def test_run_with_frozen_rows_continues_bit_for_bit_and_takes_whole_weights(corpus: Path, tmp_path: Path) -> None:
    work = workload(corpus, freeze=FREEZE, condition_dropout=0.5)
    torch.manual_seed(7)
    torch.save(workload(corpus).build_model().state_dict(), tmp_path / "gpt.pth")
    for name in ("whole", "parts"):
        for steps in (6,) if name == "whole" else (3, 6):
            config = CONFIG.model_copy(update={"steps": steps})
            train(work, config, run_dir=tmp_path / name, init=tmp_path / "gpt.pth")
    whole, parts = (read_checkpoint(tmp_path / name / "latest.pth")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert torch.equal(whole[TEXT_ROWS[0]][:12], read_checkpoint(tmp_path / "gpt.pth")[TEXT_ROWS[0]][:12])


def test_base_rows_are_those_of_shared_pieces(corpus: Path, tokenizers: tuple[Path, Path]) -> None:  # noqa: F811
    base, new = tokenizers
    work = workload(corpus, tokenizer=new, base_tokenizer=base, freeze=["text_embedding[base]"])
    shared = find_shared_rows(work.gpt_config, new, base)
    model = work.build_model()
    trained = model.get_parameter("text_embedding.parametrizations.weight.original")
    assert 5 < len(shared) < work.gpt_config.number_text_tokens
    assert len(trained) == work.gpt_config.number_text_tokens + 1 - len(shared)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ("text_embedding[base]", "needs tokenizer and base_tokenizer"),
        ("text_embedding[0:99]", "the table has the rows 0:31"),
        ("mel_head[0:3]", "rows are those of text_embedding and text_head"),
        ("text_head[3]", 'are written as "text_embedding[base]"'),
    ],
)
def test_rows_that_do_not_exist_are_refused(corpus: Path, entry: str, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        workload(corpus, freeze=[entry]).build_model()
    assert complaint in str(caught.value)
