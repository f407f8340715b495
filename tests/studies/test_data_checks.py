"""The verdict on paired manifests names each fault of a corpus, and passes a good one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from studies.indextts2 import IndexTTS2, data_scan
from studies.indextts2.data_checks import common_syllables
from tests.studies.pieces import write_pieces
from tests.studies.tiny_corpus import TINY_GPT
from trainer.check import Check

Records = dict[str, list[dict[str, Any]]]
TEXT = "가나다 라마"


def save(folder: Path, name: str, text: list[int], codes: list[int]) -> dict[str, Any]:
    np.save(folder / f"{name}.text.npy", np.array(text, np.int32))
    np.save(folder / f"{name}.codes.npy", np.array(codes, np.int32))
    return {
        "target_text_ids_path": f"{name}.text.npy",
        "target_text_len": len(text),
        "target_codes_path": f"{name}.codes.npy",
        "target_code_len": len(codes),
    }


def judge(folder: Path, change: Callable[[Records, Path], Any] = lambda records, folder: None) -> dict[str, Check]:
    """The checks of a corpus of 40 training and 10 validation lines, after a change of its lines or files."""
    write_pieces(folder / "ko.model", ["\u2581", *"가나다라마"])
    records: Records = {"train": [], "val": []}
    random = np.random.default_rng(0)
    for speaker in range(2):
        np.save(folder / f"{speaker}.npy", np.zeros((32, 32), np.float16))
    for split, number in (("train", 40), ("val", 10)):
        for index in range(number):
            name = f"{split}{index}"
            # Pieces from 4 on are characters; 3 is the space.
            files = save(folder, name, random.integers(4, 9, 9).tolist(), random.integers(0, 32, 20).tolist())
            names = {"id": name, "target_id": name, "prompt_id": "other", "speaker": f"s{index % 2}", "language": "ko"}
            prompt = {"prompt_condition_path": f"{index % 2}.npy", "prompt_emo_vec_path": f"{index % 2}.npy"}
            records[split].append({**files, **names, **prompt, "target_text": TEXT})
    change(records, folder)
    for split, lines in records.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    options = {"gpt": TINY_GPT, "tokenizer": "ko.model", "pack": False}
    options |= {"train_manifests": ["train.jsonl::ko"], "val_manifests": ["val.jsonl::ko"]}
    work = IndexTTS2.model_validate(options, context={"base_dir": folder})
    steps: list[tuple[int, int]] = []
    found = list(work.check_data(whole=True, progress=lambda *step: steps.append(step)))
    total = sum(map(len, records.values()))
    assert steps[-1] == (total, total)
    return {check.name: check for check in found}


def test_good_corpus_passes(tmp_path: Path) -> None:
    found = judge(tmp_path)
    assert {name for name, check in found.items() if check.state != "ok"} == {"hangul"}
    assert found["hangul"].message.endswith(
        "of 2,350 common syllables 2,345 unknown and 0 in bytes (각 간 갇 갈 갉 갊 감 갑)"
    )
    assert found["tokens"].message == "1.00 tokens per character, without spaces"
    assert len(common_syllables()) == 2350


def change(split: str, numbers: range | list[int], **values: Any) -> Callable[[Records, Path], None]:
    def apply(records: Records, folder: Path) -> None:
        for number in numbers:
            records[split][number].update(values)

    return apply


def rewrite(split: str, index: int, text: list[int], codes: list[int]) -> Callable[[Records, Path], Any]:
    return lambda records, folder: records[split][index].update(save(folder, f"{split}{index}", text, codes))


def copy(count: int) -> Callable[[Records, Path], None]:
    def apply(records: Records, folder: Path) -> None:
        names = ("target_text_ids_path", "target_text_len", "target_codes_path", "target_code_len")
        for number in range(count):
            records["val"][number].update({name: records["train"][number][name] for name in names})

    return apply


@pytest.mark.parametrize(
    ("change", "name", "state", "message"),
    [
        (
            lambda records, folder: records["train"][3].update(prompt_id="train3"),
            "self pairs",
            "fail",
            "1 of 50 lines (2%), such as train3",
        ),
        (
            change("val", [3], prompt_condition_path="none.npy"),
            "validation files",
            "fail",
            "10 lines (10%), such as val3",
        ),
        (
            change("val", [3], prompt_emo_vec_path="short.npy"),
            "validation files",
            "fail",
            "10 lines (10%), such as val3",
        ),
        (rewrite("train", 5, [2, 4, 4], [1, 2, 3]), "unknown tokens", "warn", "(2%), such as train5"),
        (change("val", [0], target_text="가 뷁 뷁 Z"), "hangul", "warn", "without a piece: '뷁' 2;"),
        (
            lambda records, folder: (
                rewrite("val", 0, [2], [1, 2])(records, folder),
                change("val", [0], target_text="Z뷁뷁")(records, folder),
            ),
            "unknown tokens",
            "warn",
            "from '뷁' 2, 'Z' 1",
        ),
        (rewrite("train", 7, [4, 5], [3] * 20), "codes", "fail", "1 of 50 lines (2%), such as train7"),
        (copy(2), "val targets", "fail", "2 of 10 validation targets are in the training (20%), such as val0, val1"),
        (copy(2), "val texts", "warn", "2 of 10 texts of the validation are in the training (20%), such as val0, val1"),
        (
            lambda records, folder: records["train"].extend([records["train"][4] | {"id": "again"}] * 2),
            "training repeats",
            "warn",
            "2 of 42 lines repeat another one (4.8%), such as again, again; 40 different targets",
        ),
        (change("train", range(30), speaker="one"), "speakers", "warn", "training: 3 (one 75%"),
        (change("train", [0], target_text_len=21), "lengths", "warn", "training: up to 21 of 20 text tokens"),
        (change("train", [0], target_text_len=21), "training files", "fail", "1 of 40 lines (2.5%), such as train0"),
        (change("val", range(10), language="en"), "languages", "warn", "the validation has en 100%"),
        (
            lambda records, folder: [line.update(language="en") for lines in records.values() for line in lines],
            "languages",
            "warn",
            "no line has the label ko",
        ),
        (lambda records, folder: [line.pop("prompt_id") for line in records["train"]], "self pairs", "ok", "none of"),
    ],
)
def test_fault_is_named_with_the_ids_of_examples(
    tmp_path: Path, change: Callable[[Records, Path], Any], name: str, state: str, message: str
) -> None:
    found = judge(tmp_path, change)[name]
    assert (found.state, bool(found.remedy)) == (state, state != "ok"), found
    assert message in found.message


def test_languages_are_those_that_training_draws(tmp_path: Path) -> None:
    """By the shares of the manifests, and without the lines that are left out for their length."""
    judge(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    english = [{**line, "language": "en"} for line in lines[:4]]
    unnamed = [{key: value for key, value in line.items() if key != "language"} for line in lines[:8]]
    for name, written in (("en", english), ("zh", unnamed + [{**unnamed[0], "target_text_len": 21}] * 9)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    options = {"gpt": TINY_GPT, "tokenizer": "ko.model", "pack": False, "val_manifests": ["val.jsonl::ko"]}
    given = {"train_manifests": ["train.jsonl::ko", "en.jsonl::en@0.4", "zh.jsonl::zh"]}
    work = IndexTTS2.model_validate(options | given, context={"base_dir": tmp_path})
    (found,) = [check for check in work.check_data(whole=True) if check.name == "languages"]
    assert found.message.startswith("the training draws ko 50%, en 40%, zh 10%; the validation has ko 100%")


def test_syllable_in_bytes_is_told_from_one_without_any_spelling(tmp_path: Path) -> None:
    def with_bytes(records: Records, folder: Path) -> None:
        write_pieces(folder / "ko.model", ["\u2581", *"가나다라마"], byte_fallback=True)
        # The three bytes of a syllable: one character.
        ids = [3 + byte for byte in "뷁".encode()]
        rewrite("train", 0, [*ids, *[3 + 256 + 1] * 3], [1, 2])(records, folder)
        change("train", [0], target_text="뷁")(records, folder)

    found = judge(tmp_path, with_bytes)
    assert "'뷁' 1; of 2,350 common syllables 0 unknown and 2,345 in bytes" in found["hangul"].message


def test_several_processes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = judge(tmp_path, copy(3))
    monkeypatch.setattr(data_scan, "MANY", 1)
    monkeypatch.setattr(data_scan.os, "sched_getaffinity", lambda _: {0, 1})
    assert judge(tmp_path, copy(3)) == alone


def test_sample_has_no_check_that_needs_all_lines(tmp_path: Path) -> None:
    judge(tmp_path)
    options = {"gpt": TINY_GPT, "tokenizer": "ko.model", "pack": False}
    options |= {"train_manifests": ["train.jsonl::ko"], "val_manifests": ["train.jsonl::ko"]}
    work = IndexTTS2.model_validate(options, context={"base_dir": tmp_path})
    found = {check.name: check for check in work.check_data()}
    assert found.keys().isdisjoint({"speakers", "training repeats", "val texts"})
    assert (
        found["val in train"].state == "warn"
        and "train.jsonl is a training manifest too" in found["val in train"].message
    )
