"""A checkpoint of the GPT in any of its forms has one loss: the one that its run reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from studies.indextts2 import IndexTTS2
from studies.indextts2.weights import count_pieces
from tests.studies.test_weights import published, tokenizers, with_aliases, with_lora  # noqa: F401
from tests.studies.tiny_corpus import TINY_GPT, write_tiny_corpus
from trainer import UserError
from trainer.checkpoint import read_checkpoint
from tuner.promotion.evaluate import evaluate_checkpoint
from tuner.promotion.export import export
from tuner.spec.setups import full_setup
from tuner.spec.study_toml import StudySpec
from tuner.study.tracked_run import Runtime, tracked_train


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_tiny_corpus(tmp_path, num_train=16, num_val=20, num_text_tokens=20)
    return tmp_path


def spec(folder: Path, **workload: Any) -> StudySpec:
    values = {
        "study": {"name": "tiny", "workload": "studies.indextts2:IndexTTS2"},
        "workload": {
            "train_manifests": ["train_pairs.jsonl"],
            "val_manifests": ["val_pairs.jsonl"],
            "gpt": TINY_GPT,
            **workload,
        },
        "train": {"batch_size": 4, "precision": "fp32", "val_samples": 18},
        "search": {},
        "trial": {"samples": 8, "evaluations": 1},
        "full": {"steps": 6, "eval_every": 8},
    }
    return StudySpec.build(values, base_dir=folder)


def run(study: StudySpec, folder: Path) -> Path:
    tracked_train(full_setup(study, {}), folder / "run", Runtime(folder, track=False), experiment="it", lineage={})
    return folder / "run"


def test_every_form_of_a_runs_weights_has_the_loss_that_the_run_reported(corpus: Path) -> None:
    torch.save(published(), corpus / "gpt.pth")
    study = spec(corpus, base_checkpoint="gpt.pth")
    run_dir = run(study, corpus)
    for name in ("latest.pth", "step_000000006.pth", "best_text_model.pth", "best_mel_model.pth"):
        found = evaluate_checkpoint(study, run_dir / name)
        reported = read_checkpoint(run_dir / name)["metrics"]
        assert found.metrics.keys() == {"val/loss", "val/text_loss", "val/mel_loss", "val/mel_top1"}
        assert found.metrics == pytest.approx(reported, abs=1e-6)
    export(run_dir, corpus / "out.pth")
    assert evaluate_checkpoint(study, corpus / "out.pth").metrics == pytest.approx(reported, abs=1e-6)


@pytest.mark.parametrize(
    "form",
    [
        lambda state: {"model": state},
        lambda state: {f"_orig_mod.{key}": tensor for key, tensor in state.items()},
        lambda state: with_aliases(with_lora(state)),
    ],
)
def test_every_form_of_a_gpt_pth_has_one_loss(
    corpus: Path, form: Callable[[dict[str, Tensor]], dict[str, Any]]
) -> None:
    torch.manual_seed(2)
    state = published()
    torch.save(state, corpus / "gpt.pth")
    torch.save(form(state), corpus / "form.pth")
    expected, found = (evaluate_checkpoint(spec(corpus), corpus / name) for name in ("gpt.pth", "form.pth"))
    assert found.metrics == expected.metrics


def test_base_with_rows_to_move_has_the_loss_of_its_runs_first_validation(
    corpus: Path,
    tokenizers: tuple[Path, Path],  # noqa: F811
) -> None:
    torch.save(published(number_text_tokens=count_pieces(tokenizers[0])), corpus / "gpt.pth")
    options = {"tokenizer": str(tokenizers[1]), "base_tokenizer": str(tokenizers[0])}
    study = spec(corpus, base_checkpoint="gpt.pth", **options)
    torch.manual_seed(0)
    model = full_setup(study, {}).workload.build_model()
    torch.save(model.state_dict(), corpus / "moved.pth")
    found = evaluate_checkpoint(study, corpus / "gpt.pth")
    assert found.metrics == evaluate_checkpoint(study, corpus / "moved.pth").metrics
    run_dir = run(study, corpus)
    for name in ("best_mel_model.pth", "latest.pth"):
        reported = read_checkpoint(run_dir / name)["metrics"]
        assert evaluate_checkpoint(study, run_dir / name).metrics == pytest.approx(reported, abs=1e-6)
        assert reported != pytest.approx(found.metrics, abs=1e-6)


def test_base_checkpoint_is_not_read_needlessly(corpus: Path) -> None:
    torch.save(published(), corpus / "gpt.pth")
    study = spec(corpus, base_checkpoint="is/not/there.pth")
    with pytest.raises(UserError, match="does not exist"):
        IndexTTS2.model_validate(study.workload, context={"base_dir": corpus}).build_model()
    assert evaluate_checkpoint(study, corpus / "gpt.pth").samples == 18


def test_another_duration_than_the_runs_is_logged(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = run(spec(corpus, duration="length"), corpus)
    found = evaluate_checkpoint(spec(corpus), run_dir / "latest.pth")
    assert found.metrics != pytest.approx(read_checkpoint(run_dir / "latest.pth")["metrics"], abs=1e-6)
    assert "workload.duration was 'length' and is now 'binary'" in caplog.text


def test_text_of_another_tokenizer_is_an_error_with_the_vocabulary(
    tmp_path: Path,
    tokenizers: tuple[Path, Path],  # noqa: F811
) -> None:
    size = count_pieces(tokenizers[1])
    write_tiny_corpus(tmp_path, num_train=8, num_val=4, num_text_tokens=200)
    with pytest.raises(UserError, match=f"has the id \\d+, beyond the vocabulary of {size}"):
        run(spec(tmp_path, tokenizer=str(tokenizers[1])), tmp_path)


def test_codes_of_another_codebook_are_an_error_with_its_size(tmp_path: Path) -> None:
    write_tiny_corpus(tmp_path, num_train=8, num_val=4, num_codes=500)
    with pytest.raises(UserError, match=r"has the id \d+, beyond the codebook of 32"):
        run(spec(tmp_path), tmp_path)
