"""Shares of the mix: how many samples of each manifest are drawn, and which."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from studies.indextts2 import IndexTTS2
from studies.indextts2.mix import draw_shares
from tests.studies.tiny_corpus import TINY_GPT, write_tiny_corpus
from trainer import UserError
from trainer.laws import check_workload


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_tiny_corpus(folder, num_train=40, num_val=8)
    lines = (folder / "train_pairs.jsonl").read_text().splitlines(keepends=True)
    (folder / "en.jsonl").write_text("".join(lines[:10]))
    return folder


def workload(folder: Path, *manifests: str, **options: Any) -> IndexTTS2:
    given = {"train_manifests": manifests, "val_manifests": ["val_pairs.jsonl"], "gpt": TINY_GPT}
    return IndexTTS2.model_validate(given | options, context={"base_dir": folder})


@pytest.mark.parametrize(
    ("sizes", "shares", "numbers"),
    [
        ([900, 100], [None, 0.15], [850, 150]),
        ([600, 300, 100], [None, None, 0.5], [333, 167, 500]),
        ([900, 100], [0.25, 0.75], [250, 750]),
    ],
)
def test_share_is_the_part_of_the_samples_drawn_and_the_others_divide_the_rest_by_size(
    sizes: list[int], shares: list[float | None], numbers: list[int]
) -> None:
    drawn = draw_shares(sizes, shares, epoch=3, seed=1)
    counts = np.histogram(drawn, bins=np.cumsum([0, *sizes]))[0]
    assert counts.tolist() == numbers and sum(numbers) == 1000


def test_manifest_is_used_up_before_a_sample_of_it_comes_again() -> None:
    sizes, shares = [97, 30], [None, 0.4]
    seen: list[int] = []
    for epoch in range(20):
        seen += draw_shares(sizes, shares, epoch, seed=5).tolist()
        for first, size in ((0, 97), (97, 30)):
            times = Counter(index for index in seen if first <= index < first + size)
            counts = [times[index] for index in range(first, first + size)]
            assert max(counts) - min(counts) <= 1


def test_turns_of_a_manifest_differ_and_repeat_with_the_seed() -> None:
    one, again, other = (draw_shares([4, 20], [None, 0.9], 0, seed) for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert not np.array_equal(one[:4], draw_shares([4, 20], [None, 0.9], 1, 1)[:4])


def test_laws_hold_with_shares(corpus: Path) -> None:
    work = workload(corpus, "train_pairs.jsonl::ko", "en.jsonl::en@0.6")
    check_workload(work)
    drawn = work.draw_epoch(0, 0)
    assert drawn is not None and np.count_nonzero(drawn >= 40) == 30 and len(drawn) == len(work.train_data())
    assert workload(corpus, "train_pairs.jsonl::ko", "en.jsonl::en").draw_epoch(0, 0) is None


def test_run_with_other_shares_is_another_one(corpus: Path) -> None:
    digests = {
        workload(corpus, "train_pairs.jsonl::ko", f"en.jsonl::en{share}").data_digest()
        for share in ("", "@0.6", "@0.5")
    }
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("manifests", "val", "complaint"),
    [
        (("a.jsonl::ko", "b.jsonl::en@15"), "v.jsonl", "the share '15' is not between 0 and 1; write it as ::en@0.15"),
        (("a.jsonl::ko", "b.jsonl::en@15%"), "v.jsonl", "the share '15%' is not"),
        (("a.jsonl::ko@0.5", "b.jsonl::en@0.4"), "v.jsonl", "they sum to 0.9: they must sum to 1"),
        (("a.jsonl::ko@0.6", "b.jsonl::en@0.4", "c.jsonl"), "v.jsonl", "leaves nothing for the manifests without one"),
        (("a.jsonl",), "v.jsonl::ko@0.5", "the validation set is fixed"),
    ],
)
def test_share_that_makes_no_sense_is_refused(
    corpus: Path, manifests: tuple[str, ...], val: str, complaint: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        workload(corpus, *manifests, val_manifests=[val])
    assert complaint in str(caught.value)


def test_share_stays_as_it_was_written(corpus: Path) -> None:
    shares = ("0.3333333", "0.3333333", "0.33333335", "0.00000005")
    given = [f"train_pairs.jsonl::ko@{share}" for share in shares]
    work = workload(corpus, *given)
    assert work.train_manifests == [str(corpus / spec) for spec in given]
    assert work.unpacked().train_manifests == work.train_manifests


@pytest.mark.parametrize("shares", [("", "@0.2"), ("@0.2", "")])
def test_manifest_without_a_usable_utterance_has_no_share(corpus: Path, shares: tuple[str, str]) -> None:
    (corpus / "long.jsonl").write_text(
        (corpus / "en.jsonl").read_text().splitlines()[0].replace('"target_text_len": ', '"target_text_len": 9999')
    )
    work = workload(corpus, f"train_pairs.jsonl::ko{shares[0]}", f"long.jsonl::en{shares[1]}")
    with pytest.raises(UserError, match=r"long.jsonl::en.*: none of its utterances fits"):
        work.draw_epoch(0, 0)
