"""An exported folder loads alone, at the published size, and a disagreement in its vocabulary is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors
import sentencepiece
import torch
import yaml
from torch import Tensor

from studies.indextts2 import IndexTTS2
from studies.indextts2.model import GPTConfig, IndexTTS2GPT
from studies.indextts2.weights import ENCODERS, TEXT_ROWS
from tests.studies.pieces import write_pieces
from tests.studies.test_export import KEYS
from tests.studies.test_weights import new_model, published
from tests.studies.test_workload import CONFIG_YAML
from trainer.errors import UserError

PUBLISHED_CONFIG = """\
dataset:
    bpe_model: bpe.model  # the tokenizer
    sample_rate: 24000
gpt:
    model_dim: 1280
    max_mel_tokens: 1815
    max_text_tokens: 600
    heads: 20
    layers: 24
    number_text_tokens: 12000   # grows with the vocabulary
    number_mel_codes: 8194
    start_mel_token: 8192
    stop_mel_token: 8193
    condition_module: {output_size: 512, num_blocks: 6}\r
gpt_checkpoint: gpt.pth
version: 2.0"""


def shaped(text_rows: int, value: float) -> dict[str, Tensor]:
    """Every key of the published file at its shape. All entries of a tensor share one number, so 3.5 GB take no
    memory."""
    shapes = {key: [int(size) for size in shape.split("x")] for key, shape in KEYS}
    shapes |= {key: [text_rows, *shapes[key][1:]] for key in TEXT_ROWS}
    return {key: torch.tensor(value).expand(shape) for key, shape in shapes.items()}


def workload(folder: Path, **options: Any) -> IndexTTS2:
    given = {"train_manifests": ["a"], "val_manifests": ["b"], "config": "config.yaml", "base_checkpoint": "gpt.pth"}
    return IndexTTS2.model_validate(given | options, context={"base_dir": folder})


def write(work: IndexTTS2, state: dict[str, Tensor], folder: Path, **options: Any) -> list[str]:
    folder.mkdir()
    files = work.export_files(state, **options)
    for name, write_file in files.items():
        write_file(folder / name)
    return list(files)


def test_folder_alone_builds_the_model_at_the_published_shapes(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(PUBLISHED_CONFIG.encode())
    write_pieces(tmp_path / "korean.model", [f"p{number}" for number in range(24_000 - 3)])
    torch.save(shaped(12_001, 0.25), tmp_path / "gpt.pth")
    trained = {key: tensor for key, tensor in shaped(24_001, 0.5).items() if not key.startswith(ENCODERS)}
    work = workload(tmp_path, tokenizer="korean.model")
    assert write(work, trained, tmp_path / "to") == ["gpt.pth", "config.yaml", "bpe.model"]

    folder = tmp_path / "to"
    config = yaml.safe_load((folder / "config.yaml").read_bytes())
    assert (folder / "config.yaml").read_bytes() == PUBLISHED_CONFIG.replace("12000", "24000").encode()
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / config["dataset"]["bpe_model"]))
    assert tokenizer.vocab_size() == config["gpt"]["number_text_tokens"] == 24_000
    with torch.device("meta"):
        model = IndexTTS2GPT(GPTConfig(**config["gpt"]))
    weights = torch.load(folder / config["gpt_checkpoint"], weights_only=True)
    assert list(weights) == [key for key, _ in KEYS]
    found = {key: tensor for key, tensor in weights.items() if not key.startswith(ENCODERS)}
    model.load_state_dict(found, assign=True)
    values = {key: float(tensor[(0,) * tensor.ndim]) for key, tensor in weights.items()}
    assert values == {key: 0.25 if key.startswith(ENCODERS) else 0.5 for key in weights}
    assert len(weights["text_embedding.weight"]) == 24_001


def small(folder: Path, pieces: int = 27, **options: Any) -> IndexTTS2:
    """A workload of a small model with a tokenizer of 30 pieces, that of the weights, unless `pieces` differs."""
    (folder / "config.yaml").write_text(CONFIG_YAML)
    write_pieces(folder / "ko.model", [f"p{number}" for number in range(pieces)])
    torch.save(published(layers=3), folder / "gpt.pth")
    return workload(folder, **{"tokenizer": "ko.model"} | options)


@pytest.mark.parametrize(
    ("rows", "pieces", "config", "complaint"),
    [
        # 24,000 pieces need 24,001 rows: the same here, a thousandth of it.
        (30, 28, CONFIG_YAML, "the weights have 31 text rows, and the 31 pieces of .*ko.model need 32"),
        (31, 27, CONFIG_YAML, "the weights have 32 text rows, and the 30 pieces of .*ko.model need 31"),
        (30, 27, CONFIG_YAML.replace("number_text_tokens: 30", "number_texts: 30"), "has no gpt.number_text_tokens"),
        (30, 27, CONFIG_YAML.replace("max_mel_tokens: 40", "max_mel_tokens: 41"), "mel_pos_embedding.emb.weight is 43"),
        (30, 27, CONFIG_YAML.replace("layers: 3", "layers: 4"), "gpt.h.3.ln_1.weight is missing"),
        (31, None, CONFIG_YAML, "number_text_tokens 30 of .*config.yaml needs 31: set it to 31"),
    ],
)
def test_disagreement_is_refused_in_one_line(
    tmp_path: Path, rows: int, pieces: int | None, config: str, complaint: str
) -> None:
    work = small(tmp_path, **{"pieces": pieces} if pieces else {"tokenizer": None})
    (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(UserError, match=complaint) as caught:
        work.export_files(new_model(layers=3, number_text_tokens=rows).state_dict())
    assert "\n" not in str(caught.value)


def test_wrong_vocabulary_in_the_config_is_corrected(tmp_path: Path) -> None:
    work = small(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG_YAML.replace("tokens: 30", "tokens: 31"))
    write(work, dict(new_model(layers=3).state_dict()), tmp_path / "to")
    assert (tmp_path / "to/config.yaml").read_text() == CONFIG_YAML


def test_published_tokenizer_beside_the_config_is_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    work, state = small(tmp_path, tokenizer=None), dict(new_model(layers=3).state_dict())
    assert "bpe.model" not in work.export_files(state) and "no tokenizer" in caplog.text
    (tmp_path / "bpe.model").write_bytes((tmp_path / "ko.model").read_bytes())
    assert write(work, state, tmp_path / "to", format="safetensors") == ["gpt.safetensors", "config.yaml", "bpe.model"]
    with safetensors.safe_open(tmp_path / "to/gpt.safetensors", "pt") as file:
        assert len(file.get_tensor("text_head.bias")) == 31


def test_inline_size_becomes_a_config(tmp_path: Path) -> None:
    gpt = yaml.safe_load(CONFIG_YAML)["gpt"]
    state = dict(new_model(layers=3).state_dict())
    write(small(tmp_path, config=None, gpt=gpt), state, tmp_path / "to")
    config = yaml.safe_load((tmp_path / "to/config.yaml").read_text())
    assert GPTConfig(**config["gpt"]) == GPTConfig(**gpt)
    assert (tmp_path / "to" / config["dataset"]["bpe_model"]).is_file()
