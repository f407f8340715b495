"""Manifests: indexed once, refused by line, and every damaged sample named."""

from __future__ import annotations

import json
import logging
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from studies.indextts2 import manifest as manifest_module
from studies.indextts2.dataset import PairedUtterances
from studies.indextts2.manifest import ManifestSpec, open_manifest
from studies.indextts2.model import GPTConfig
from tests.studies.tiny_corpus import TINY_GPT, write_tiny_corpus
from trainer.errors import DamagedSample, UserError

CONFIG = GPTConfig(**TINY_GPT)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_tiny_corpus(tmp_path, num_train=6, num_val=4)
    return tmp_path


def records(manifest: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def rewrite(manifest: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    lines = records(manifest)
    change(lines)
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))


def num_indexed(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.getMessage().startswith("indexing") for record in caplog.records)


def test_sample_equals_its_files(corpus: Path) -> None:
    data = PairedUtterances([f"{corpus}/train_pairs.jsonl::ko"], CONFIG)
    assert len(data) == 6
    for i, record in enumerate(records(corpus / "train_pairs.jsonl")):
        utterance = data[i]
        np.testing.assert_array_equal(utterance.text, np.load(corpus / record["target_text_ids_path"]))
        np.testing.assert_array_equal(utterance.codes, np.load(corpus / record["target_codes_path"]))
        np.testing.assert_array_equal(utterance.condition, np.load(corpus / record["prompt_condition_path"]))
        np.testing.assert_array_equal(utterance.emo_vec, np.load(corpus / record["prompt_emo_vec_path"]))
        assert data.lengths[i] == 34 + len(utterance.text) + 2 + len(utterance.codes) + 1


def test_several_manifests_are_mixed_one_after_the_other(corpus: Path, tmp_path: Path) -> None:
    write_tiny_corpus(tmp_path / "more", num_train=3, num_val=1, seed=5)
    specs = [str(corpus / "train_pairs.jsonl"), f"{tmp_path}/more/train_pairs.jsonl::en"]
    mixed, *parts = (PairedUtterances(chosen, CONFIG) for chosen in (specs, specs[:1], specs[1:]))
    assert len(mixed) == 9
    np.testing.assert_array_equal(mixed.lengths, np.concatenate([part.lengths for part in parts]))
    for i in range(9):
        part, j = (parts[0], i) if i < 6 else (parts[1], i - 6)
        np.testing.assert_array_equal(mixed[i].codes, part[j].codes)
    assert mixed.digests == (*parts[0].digests, *parts[1].digests)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("a/b.jsonl", ("a/b.jsonl", None)),
        ("a/b.jsonl::ko", ("a/b.jsonl", "ko")),
        ("a::b/c.jsonl::zh-CN", ("a::b/c.jsonl", "zh-CN")),
        ("a::b/c.jsonl", ("a::b/c.jsonl", None)),
        ("a/b@2.jsonl::en@.15", ("a/b@2.jsonl", "en", 0.15)),
    ],
)
def test_language_and_share_are_split_off(spec: str, parts: tuple[str, str | None]) -> None:
    assert ManifestSpec.parse(spec) == ManifestSpec(*parts)


def test_index_is_rebuilt_only_when_the_manifest_changes(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = corpus / "train_pairs.jsonl"
    first = open_manifest(str(path))
    again = open_manifest(f"{path}::ko")
    assert num_indexed(caplog) == 1
    assert first.digest == again.digest
    np.testing.assert_array_equal(first.offsets, again.offsets)
    rewrite(path, lambda lines: lines.pop(0))
    changed = open_manifest(str(path))
    assert num_indexed(caplog) == 2
    assert len(changed.text_lengths) == 5
    assert changed.digest != first.digest
    os.utime(path, ns=(1, 1))
    assert open_manifest(str(path)).digest == changed.digest
    assert num_indexed(caplog) == 3


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"{}" + content[2:], lambda _: b""])
def test_damaged_index_is_rebuilt(
    corpus: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    lengths = open_manifest(f"{corpus}/train_pairs.jsonl").text_lengths.tolist()
    (index,) = (corpus / ".tuner-index").iterdir()
    content = index.read_bytes()
    index.unlink()
    index.write_bytes(damage(content))
    assert open_manifest(f"{corpus}/train_pairs.jsonl").text_lengths.tolist() == lengths
    assert num_indexed(caplog) == 2


def test_index_is_under_data_if_the_manifest_folder_is_read_only(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (corpus / ".tuner-index").write_text("a file, so no index can lie in it")
    (corpus / "elsewhere").mkdir()
    monkeypatch.chdir(corpus / "elsewhere")
    for _ in range(2):
        assert len(open_manifest(f"{corpus}/train_pairs.jsonl").text_lengths) == 6
    assert num_indexed(caplog) == 1
    (index,) = Path("data/index").iterdir()
    assert index.name.startswith("train_pairs.jsonl-")


def test_indexing_needs_little_memory(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "_BLOCK_BYTES", 1 << 16)
    path = corpus / "train_pairs.jsonl"
    path.write_text(path.read_text() * 2000)
    assert path.stat().st_size > 4e6
    tracemalloc.start()
    manifest = open_manifest(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(manifest.text_lengths) == 12_000
    assert manifest.record(11_999)["id"] == manifest.record(5)["id"]
    assert peak < 1.5e6


def test_opening_looks_at_no_samples_file(corpus: Path) -> None:
    for path in corpus.glob("*/*.npy"):
        path.unlink()
    data = PairedUtterances([f"{corpus}/train_pairs.jsonl"], CONFIG)
    assert len(data.lengths) == 6
    with pytest.raises(DamagedSample, match=r"^train_00000__spk\d: .*text_ids/train_00000.npy is missing$"):
        data[0]


def test_pickling_for_a_spawned_worker_carries_no_columns(corpus: Path) -> None:
    data = PairedUtterances([f"{corpus}/train_pairs.jsonl"], CONFIG)
    data.lengths  # noqa: B018
    pickled = pickle.dumps(data)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled)[5].codes, data[5].codes)


def test_blank_lines_crlf_and_a_byte_order_mark_are_read(corpus: Path) -> None:
    path = corpus / "train_pairs.jsonl"
    ids = [record["id"] for record in records(path)]
    text = path.read_text().replace("\n", "\r\n\r\n").removesuffix("\r\n\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    manifest = open_manifest(str(path))
    assert [manifest.record(i)["id"] for i in range(6)] == ids


def test_prompts_emotion_is_used_before_the_targets(corpus: Path) -> None:
    vectors = {name: np.full(32, value, np.float32) for name, value in (("prompt", 1), ("target", 2))}
    for name, vector in vectors.items():
        np.save(corpus / f"{name}.npy", vector)

    def change(lines: list[dict[str, Any]]) -> None:
        for line in lines[:3]:
            line.update(prompt_emo_vec_path="prompt.npy", target_emo_vec_path="target.npy")
        del lines[1]["prompt_emo_vec_path"]
        lines[2]["prompt_emo_vec_path"] = ""

    rewrite(corpus / "train_pairs.jsonl", change)
    data = PairedUtterances([f"{corpus}/train_pairs.jsonl"], CONFIG)
    assert [float(data[i].emo_vec[0]) for i in range(3)] == [1, 2, 2]


def test_utterances_longer_than_the_position_tables_are_dropped_and_counted(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def change(lines: list[dict[str, Any]]) -> None:
        lines[1]["target_text_len"] = CONFIG.max_text_tokens + 1
        lines[4]["target_code_len"] = CONFIG.max_mel_tokens + 1

    whole = PairedUtterances([f"{corpus}/train_pairs.jsonl"], CONFIG)
    kept = [0, 2, 3, 5]
    lengths, codes = whole.lengths[kept], [whole[i].codes for i in kept]
    rewrite(corpus / "train_pairs.jsonl", change)
    data = PairedUtterances([f"{corpus}/train_pairs.jsonl::ko", f"{corpus}/val_pairs.jsonl"], CONFIG)
    assert len(data) == 4 + 4
    np.testing.assert_array_equal(data.lengths[:4], lengths)
    for i in range(4):
        np.testing.assert_array_equal(data[i].codes, codes[i])
    assert "train_pairs.jsonl (ko): 6 utterances, 2 of them left out" in caplog.text
    with pytest.raises(UserError, match="max_mel_tokens 2"):
        PairedUtterances([f"{corpus}/train_pairs.jsonl"], CONFIG.model_copy(update={"max_mel_tokens": 2}))


def set_key(key: str, value: Any) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda lines: lines[2].update({key: value}))


def drop_key(key: str) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda lines: lines[2].pop(key))


def replace_line(line: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        lines = path.read_bytes().splitlines(keepends=True)
        lines[2] = line
        path.write_bytes(b"".join(lines))

    return change


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (replace_line(b'{"id": "x", \n'), ":3: the line is not JSON"),
        (replace_line(b"{} {}\n"), ":3: the line holds more than one JSON object"),
        (replace_line(b"[" * 100_000 + b"\n"), ":3: the line is not JSON"),
        (replace_line(b'{"id": "\xff"}\n'), ":3: the line is not UTF-8"),
        (replace_line(b"[1, 2]\n"), ":3: the line is not an object whose paths are strings"),
        (drop_key("id"), ":3: the line has no 'id'"),
        (drop_key("target_codes_path"), ":3: the line has no 'target_codes_path'"),
        (drop_key("prompt_emo_vec_path"), ":3: the line has no 'prompt_emo_vec_path'"),
        (drop_key("target_text_len"), ":3: the line has no 'target_text_len'"),
        (set_key("target_code_len", "12"), ":3: the line needs whole numbers"),
        (set_key("target_code_len", -1), ":3: the line needs whole numbers"),
        (set_key("target_code_len", 1 << 40), ":3: the line has a length of more than 31 bits"),
        (set_key("target_codes_path", 7), ":3: the line is not an object whose paths are strings"),
        (set_key("target_codes_path", "../x.npy"), "'../x.npy', which leaves the manifest's folder"),
        (set_key("prompt_condition_path", "a/../../x.npy"), "which leaves the manifest's folder"),
        (set_key("prompt_emo_vec_path", "/etc/x.npy"), "which leaves the manifest's folder"),
        (lambda path: path.write_text(" \n\n"), "is empty"),
        (lambda path: path.write_text(""), "is empty"),
        (lambda path: path.unlink(), "No such file or directory"),
        (lambda path: (path.unlink(), path.mkdir()), "is not a file"),
    ],
)
def test_broken_manifest_is_refused_in_one_line_with_its_position(
    corpus: Path, break_it: Callable[[Path], object], complaint: str
) -> None:
    path = corpus / "train_pairs.jsonl"
    break_it(path)
    with pytest.raises(UserError) as caught:
        open_manifest(str(path))
    assert str(path) in str(caught.value)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    index = corpus / ".tuner-index"
    assert not index.exists() or not list(index.iterdir())


def test_path_may_contain_dot_dot_inside_the_folder(corpus: Path) -> None:
    set_key("target_codes_path", "text_ids/../codes/train_00002.npy")(corpus / "train_pairs.jsonl")
    rewrite(
        corpus / "train_pairs.jsonl",
        lambda lines: lines[3].update(target_codes_path=str(corpus.resolve() / "codes/train_00003.npy")),
    )
    data = PairedUtterances([f"{corpus}/train_pairs.jsonl"], CONFIG)
    for i in (2, 3):
        np.testing.assert_array_equal(data[i].codes, np.load(corpus / f"codes/train_{i:05d}.npy"))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def save_pickle(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def save_archive(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3))


def save(values: Any) -> Callable[[Path], None]:
    return lambda path: np.save(path, values)


def change_entry(place: int, value: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        values = np.load(path)
        values[place] = value
        np.save(path, values)

    return change


@pytest.mark.parametrize(
    ("key", "damage", "complaint"),
    [
        ("target_codes_path", Path.unlink, "is missing"),
        ("target_codes_path", cut_off, "can't be read"),
        ("target_codes_path", lambda path: path.write_bytes(b""), "can't be read"),
        ("target_codes_path", lambda path: path.write_bytes(b"PK\x03\x04 and no more"), "can't be read"),
        ("target_codes_path", save_pickle, "can't be read: its header is damaged, or not that of an array of numbers"),
        ("target_codes_path", save_archive, "can't be read: it is an archive, not one array"),
        ("target_codes_path", save(np.zeros(0, np.int32)), "is empty"),
        ("target_codes_path", save(np.zeros((4, 4), np.int32)), "is int32[4, 4], not a row of integers"),
        ("target_codes_path", save(np.zeros(4)), "is float64[4], not a row of integers"),
        ("target_codes_path", save(np.zeros(39, np.int32)), "has 39 entries, the manifest expects"),
        ("target_codes_path", change_entry(1, 32), "has the id 32, beyond the codebook of 32"),
        ("target_text_ids_path", change_entry(0, 30), "has the id 30, beyond the vocabulary of 30"),
        ("target_text_ids_path", change_entry(0, -1), "has the id -1, beyond the vocabulary of 30"),
        (
            "prompt_condition_path",
            save(np.zeros((32, 16), np.float32)),
            "is float32[32, 16], not float32[32, 32]",
        ),
        (
            "prompt_condition_path",
            save(np.zeros((31, 32), np.float32)),
            "is float32[31, 32], not float32[32, 32]",
        ),
        ("prompt_emo_vec_path", save(np.zeros(32, np.int32)), "is int32[32], not float32[32]"),
        ("prompt_emo_vec_path", save(np.full(32, np.nan, np.float32)), "has entries that are not finite"),
    ],
)
def test_damaged_sample_is_named_with_its_file_and_fault(
    corpus: Path, key: str, damage: Callable[[Path], object], complaint: str
) -> None:
    record = records(corpus / "train_pairs.jsonl")[2]
    data = PairedUtterances([f"{corpus}/train_pairs.jsonl"], CONFIG)
    damage(corpus / record[key])
    with pytest.raises(DamagedSample) as caught:
        data[2]
    assert str(caught.value).startswith(f"{record['id']}: {corpus / record[key]} {complaint}")
    assert "\n" not in str(caught.value)


def test_manifest_changed_during_a_run_is_detected(corpus: Path) -> None:
    path = corpus / "train_pairs.jsonl"
    data = PairedUtterances([str(path)], CONFIG)
    lines = path.read_text().splitlines(keepends=True)
    length = f'"target_code_len": {records(path)[2]["target_code_len"]}'
    other = length[:-1] + str((int(length[-1]) + 1) % 10)
    path.write_text(path.read_text().replace(length, other))
    with pytest.raises(DamagedSample, match="sample 2 changed while the run read it"):
        data[2]
    path.write_text("".join(lines[1:]))
    with pytest.raises(DamagedSample, match="sample 2 changed while the run read it"):
        data[2]
    path.unlink()
    with pytest.raises(DamagedSample, match="sample 2 changed while the run read it"):
        data[2]
