"""The character model of Korean law texts: the three laws, its data, and its study from launch to promotion."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from studies.korean_chars import KoreanChars
from studies.korean_chars.workload import PADDING, UNKNOWN, Windows
from trainer import UserError
from trainer.laws import check_workload
from tuner import Runtime, StudySpec, launch, promote

SPEC = Path(__file__).parents[2] / "studies/korean_chars/study.toml"
needs_konlpy = pytest.mark.skipif(importlib.util.find_spec("konlpy") is None, reason="konlpy is not installed")


@needs_konlpy
@pytest.mark.parametrize("context", [64, 50])
def test_workload_keeps_the_three_laws(context: int) -> None:
    # 50: padded to a multiple of 32, a batch is longer than the position table.
    check_workload(KoreanChars(context=context, width=32, layers=1))


@needs_konlpy
def test_no_validation_window_is_in_the_training_text() -> None:
    workload = KoreanChars()
    train, val = workload.train_data(), workload.val_data()
    assert len(train) > 1_000 and len(val) > 50
    assert max(train.lengths) == max(val.lengths) == workload.context
    known = np.concatenate([sample for sample in train.samples])
    assert UNKNOWN not in known and not any(PADDING in sample for sample in [*train.samples, *val.samples])
    # Bills repeat each other's phrases, but few windows whole.
    windows = {bytes(text[i : i + 65]) for text in workload._texts[0] for i in range(len(text))}
    assert sum(bytes(sample) in windows for sample in val.samples) < len(val) / 10


def test_windows_predict_every_character_but_the_first_once() -> None:
    data = Windows([np.arange(10), np.arange(20, 25)], context=4, stride=4)
    assert [list(sample) for sample in data.samples] == [
        [0, 1, 2, 3, 4],
        [4, 5, 6, 7, 8],
        [8, 9],
        [20, 21, 22, 23, 24],
    ]
    assert list(data.lengths) == [4, 4, 1, 4]


@needs_konlpy
def test_study_is_launched_and_promoted(tmp_path: Path, runtime: Runtime) -> None:
    short = {"trial.samples": 128, "trial.evaluations": 1, "full.samples": 512, "workload.width": 32}
    spec = StudySpec.load(SPEC, short)
    study = launch(spec, storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime, num_trials=2)
    result = promote(study, runtime=runtime)
    # Chance is the logarithm of 539 characters, 6.3.
    assert result.finished and result.metrics["val/loss"] < 6
    assert 0 < result.metrics["val/char_top1"] < 1


def test_missing_konlpy_is_one_line_with_the_remedy(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "konlpy", None)
    with pytest.raises(UserError, match=r"konlpy, which is missing: pip install 'prodigy-tuner\[demo\]'$"):
        launch(SPEC, storage=f"sqlite:///{tmp_path}/tuner.db", runtime=runtime)
    assert not (tmp_path / "runs").exists()
