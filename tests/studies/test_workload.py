"""The options of `[workload]`, the batches, and the run's log lines about the data."""

from __future__ import annotations

import sys
import tomllib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import studies.indextts2
from studies.indextts2 import IndexTTS2
from studies.indextts2.model import NO_TARGET
from tests.studies.test_weights import tokenizers  # noqa: F401
from tests.studies.tiny_corpus import TINY_GPT, write_tiny_corpus
from trainer.data.batching import BatchOrder
from trainer.data.loader import fixed_batches, train_batches
from trainer.errors import UserError
from trainer.laws import check_workload
from trainer.workload import Batch

CONFIG_YAML = """
gpt:
    model_dim: 32
    layers: 3
    heads: 2
    max_text_tokens: 20
    max_mel_tokens: 40
    number_text_tokens: 30
    number_mel_codes: 34
    start_mel_token: 32
    stop_mel_token: 33
    condition_type: "conformer_perceiver"
    condition_module:
        output_size: 512
vocoder:
    name: "x"
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_tiny_corpus(folder, num_train=16, num_val=8)
    (folder / "config.yaml").write_text(CONFIG_YAML)
    return folder


def workload(folder: Path, **options: Any) -> IndexTTS2:
    given = {"train_manifests": ["train_pairs.jsonl::ko"], "val_manifests": ["val_pairs.jsonl"]}
    if "config" not in options:
        given["gpt"] = TINY_GPT
    return IndexTTS2.model_validate(given | options, context={"base_dir": folder})


def mean_loss(work: IndexTTS2, model: torch.nn.Module, num_samples: int = 4) -> float:
    batch = work.collate([work.train_data()[i] for i in range(num_samples)])
    with torch.no_grad():
        sums = work.loss_sums(model, batch.inputs)
    return sum(weight * float(sums[name]) / batch.counts[name] for name, weight in work.loss_weights.items())


def test_laws_of_a_workload_hold(corpus: Path) -> None:
    check_workload(workload(corpus))


def test_paths_are_relative_to_the_study_and_stored_absolute(corpus: Path) -> None:
    work = workload(corpus, config="config.yaml", base_checkpoint="../gpt.pth", tokenizer="/x/bpe.model")
    assert work.train_manifests == [f"{corpus}/train_pairs.jsonl::ko"]
    assert work.val_manifests == [f"{corpus}/val_pairs.jsonl"]
    assert (work.config, work.base_checkpoint) == (corpus / "config.yaml", corpus.parent / "gpt.pth")
    assert IndexTTS2.model_validate(work.model_dump(mode="json")) == work


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"gpt": None}, "exactly one of 'config'"),
        ({"gpt": TINY_GPT, "config": "config.yaml"}, "exactly one of 'config'"),
        ({"base_tokenizer": "bpe.model"}, "'base_tokenizer' is only of use with"),
        ({"text_loss_weight": 0.0, "mel_loss_weight": 0.0}, "can't both be 0"),
        ({"train_manifests": []}, "at least 1 item"),
        ({"durations": "binary"}, "Extra inputs"),
        ({"duration": "seconds"}, "'binary' or 'length'"),
        ({"dropout": 1.0}, "less than 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(corpus: Path, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        workload(corpus, **options)


def test_model_is_built_from_the_config_file(corpus: Path) -> None:
    model = workload(corpus, config="config.yaml").build_model()
    assert len(model.gpt.h) == 3
    assert model.text_embedding.weight.shape == (31, 32)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "can't be read: No such file"),
        ("vocoder: {}", "has no gpt: section"),
        ("- 1", "has no gpt: section"),
        ("gpt: 3", "gpt: Input should be"),
        ("gpt: {model_dim: wide}", "gpt.model_dim: Input should be a valid integer"),
        ("gpt: {model_dim: 30, heads: 4}", "model_dim 30 is not a multiple of heads 4"),
        ("gpt: [", "is not YAML"),
    ],
)
def test_broken_config_is_refused_in_one_line(tmp_path: Path, content: str | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    for use in (IndexTTS2.build_model, IndexTTS2.train_data):
        with pytest.raises(UserError) as caught:
            use(workload(tmp_path, config="config.yaml"))
        assert str(caught.value).startswith(f"config {tmp_path}/config.yaml")
        assert complaint in str(caught.value)
        assert "\n" not in str(caught.value)


def test_packages_of_the_extra_are_named_where_they_are_missing(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    for options in ({"config": "config.yaml"}, {"tokenizer": "bpe.model"}):
        with pytest.raises(UserError, match=r"pip install 'prodigy-tuner\[indextts2\]'"):
            workload(corpus, **options).build_model()


@pytest.mark.parametrize(
    ("manifests", "parts"),
    [
        (["a.jsonl::ko"], ["", ""]),
        (["a.jsonl::ko", "b.jsonl::en"], ["ko", "en"]),
        (["a.jsonl::ko", "b.jsonl::ko"], ["a", "b"]),
        (["a.jsonl::ko", "b.jsonl"], ["a", "b"]),
        (["a.jsonl", "c/a.jsonl"], ["a-0", "a-1"]),
    ],
)
def test_several_validation_manifests_are_parts_by_language_or_name(
    corpus: Path, tmp_path: Path, manifests: list[str], parts: list[str]
) -> None:
    for name in ("text_ids", "codes", "condition", "emo_vec"):
        (tmp_path / name).symlink_to(corpus / name)
    (tmp_path / "c").mkdir()
    for name in ("a", "b", "c/a"):
        (tmp_path / f"{name}.jsonl").write_bytes((corpus / "val_pairs.jsonl").read_bytes())
    work = workload(tmp_path, train_manifests=["a.jsonl"], val_manifests=manifests, pack=False)
    assert [work.val_part(0), work.val_part(len(work.val_data()) - 1)] == parts


def test_vocabulary_is_the_tokenizers(corpus: Path, tokenizers: tuple[Path, Path]) -> None:  # noqa: F811
    work = workload(corpus, tokenizer=tokenizers[1])
    size = work.gpt_config.number_text_tokens
    assert size != 30
    assert work.build_model().text_head.weight.shape == (size + 1, 32)


def test_base_checkpoint_is_loaded_and_its_rows_moved(
    corpus: Path,
    tmp_path: Path,
    tokenizers: tuple[Path, Path],  # noqa: F811
) -> None:
    base = workload(corpus, tokenizer=tokenizers[0]).build_model()
    torch.save(base.state_dict(), tmp_path / "gpt.pth")
    torch.manual_seed(7)
    model = workload(
        corpus, base_checkpoint=tmp_path / "gpt.pth", tokenizer=tokenizers[1], base_tokenizer=tokenizers[0]
    ).build_model()
    assert torch.equal(model.mel_head.weight, base.mel_head.weight)
    assert torch.equal(model.text_embedding.weight[:2], base.text_embedding.weight[:2])
    assert len(model.text_embedding.weight) != len(base.text_embedding.weight)


def test_seed_repeats_the_initialisation(corpus: Path) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(11)
        states.append(workload(corpus).build_model().state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_padded_batch_has_few_shapes_and_real_counts(corpus: Path) -> None:
    work = workload(corpus)
    data = work.train_data()
    for indices in ([0, 1, 2, 3], [7, 4, 6, 5]):
        batch = work.collate([data[i] for i in indices], 64)
        chosen = [data[i] for i in indices]
        num_text = sum(len(utterance.text) + 1 for utterance in chosen)
        num_mel = sum(len(utterance.codes) + 1 for utterance in chosen)
        assert batch.counts == {"text_loss": num_text, "mel_loss": num_mel, "mel_top1": num_mel}
        assert (batch.num_samples, batch.num_slots) == (4, 4 * 128)
        assert batch.num_tokens == data.lengths[indices].sum()
        assert {name: tuple(tensor.shape) for name, tensor in batch.inputs.items()} == {
            "condition": (4, 32, 32),
            "emo_vec": (4, 32),
            "ids": (4, 128 - 34),
            "positions": (4, 128 - 34),
            "is_mel": (4, 128 - 34),
            "code_lengths": (4,),
            "text_index": (256,),
            "text_targets": (256,),
            "mel_index": (256,),
            "mel_targets": (256,),
        }
        for kind, count in (("text", num_text), ("mel", num_mel)):
            assert int((batch.inputs[f"{kind}_targets"] != NO_TARGET).sum()) == count


def batches(work: IndexTTS2, num_workers: int) -> list[Batch]:
    data = work.train_data()
    order = BatchOrder(data.lengths, 4, seed=3)
    cpu = torch.device("cpu")
    return list(islice(train_batches(work, data, order, start=(0, 0), num_workers=num_workers, device=cpu), 8))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_packed_corpus_gives_the_same_batches_bit_for_bit(corpus: Path, num_workers: int) -> None:
    packed, plain = workload(corpus, pack=True), workload(corpus, pack=False)
    assert packed.train_data().mapped and not hasattr(plain.train_data(), "mapped")
    for one, other in zip(batches(packed, num_workers), batches(plain, 0), strict=True):
        assert one.inputs.keys() == other.inputs.keys()
        for name, tensor in one.inputs.items():
            assert tensor.dtype == other.inputs[name].dtype and torch.equal(tensor, other.inputs[name])
        assert (one.counts, one.num_tokens, one.num_slots) == (other.counts, other.num_tokens, other.num_slots)


def stores(folder: Path) -> list[Path]:
    return sorted(folder.glob(".tuner-index/*.packed"))


def test_store_is_beside_the_manifest_and_made_by_reading_only(tmp_path: Path) -> None:
    write_tiny_corpus(tmp_path, num_train=8, num_val=4)
    work = workload(tmp_path)
    digest = work.data_digest()
    assert not stores(tmp_path)
    work.train_data(), work.val_data()
    assert [path.name.partition("-")[0] for path in stores(tmp_path)] == ["train_pairs.jsonl", "val_pairs.jsonl"]
    assert workload(tmp_path, pack=False).data_digest() == workload(tmp_path).data_digest() == digest


def test_changed_manifest_rebuilds_its_store(tmp_path: Path) -> None:
    write_tiny_corpus(tmp_path, num_train=8, num_val=4)
    before = workload(tmp_path).train_data()
    manifest = tmp_path / "train_pairs.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[3:]))
    after = workload(tmp_path).train_data()
    assert (len(before), len(after)) == (8, 5)
    np.testing.assert_array_equal(after[0].codes, before[3].codes)
    assert len(stores(tmp_path)) == 1


def test_model_with_other_checks_has_its_own_store(tmp_path: Path) -> None:
    write_tiny_corpus(tmp_path, num_train=32, num_val=4)
    assert max(int(workload(tmp_path).train_data()[i].codes.max()) for i in range(32)) >= 16
    smaller = workload(tmp_path, gpt=TINY_GPT | {"start_mel_token": 16}, pack=True)
    with pytest.raises(UserError, match="samples probed are missing or damaged"):
        smaller.train_data()
    shorter = workload(tmp_path, gpt=TINY_GPT | {"max_mel_tokens": 20}).train_data()
    assert 0 < len(shorter) < 32 and len(stores(tmp_path)) == 2
    assert max(len(shorter[i].codes) for i in range(len(shorter))) <= 20


def test_store_is_under_data_if_the_manifest_folder_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_corpus(tmp_path, num_train=8, num_val=4)
    (tmp_path / ".tuner-index").write_text("a file, so no store can lie in it")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for _ in range(2):
        assert workload(tmp_path).train_data().mapped
    assert len(list(Path("data/index").glob("train_pairs.jsonl-*.packed"))) == 1


def test_sample_damaged_when_packed_is_skipped_and_counted_until_repaired(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tiny_corpus(tmp_path, num_train=128, num_val=4)
    broken = tmp_path / "codes/train_00005.npy"
    content = broken.read_bytes()
    broken.write_bytes(content[:-4])
    assert workload(tmp_path).train_data().mapped
    order = [np.arange(128)]
    work = workload(tmp_path)
    assert [batch.num_samples for batch in fixed_batches(work, work.train_data(), order)] == [127]
    assert "skipped: train_00005__spk" in caplog.text
    broken.write_bytes(content)
    work = workload(tmp_path)
    assert [batch.num_samples for batch in fixed_batches(work, work.train_data(), order)] == [128]


def test_loss_weights_are_options(corpus: Path) -> None:
    work = workload(corpus)
    assert dict(work.loss_weights) == {"text_loss": 0.2, "mel_loss": 0.8}
    model = work.build_model().eval()
    batch = work.collate([work.train_data()[i] for i in range(4)])
    with torch.no_grad():
        sums = work.loss_sums(model, batch.inputs)
    text, mel = (sums[name].item() / batch.counts[name] for name in ("text_loss", "mel_loss"))
    assert mean_loss(work, model) == pytest.approx(0.2 * text + 0.8 * mel)
    assert mean_loss(workload(corpus, text_loss_weight=0.0, mel_loss_weight=3.0), model) == pytest.approx(3 * mel)


def test_dropout_duration_and_checkpointing_reach_the_model(corpus: Path) -> None:
    model = workload(corpus, dropout=0.3, duration="length", gradient_checkpointing=True).build_model()
    assert (model.dropout, model.duration, model.gradient_checkpointing) == (0.3, "length", True)
    assert model.gpt.h[0].attn.dropout == model.gpt.h[0].mlp.dropout == 0.3
    assert workload(corpus).build_model().dropout == 0.1


def test_frozen_parts_stay_unchanged(corpus: Path) -> None:
    work = workload(corpus, freeze=["gpt.h.0.", "text_embedding"], dropout=0.0)
    model = work.build_model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = work.collate([work.train_data()[i] for i in range(4)])
    sum(work.loss_sums(model, batch.inputs).values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    for key, tensor in model.state_dict().items():
        frozen = key.startswith(("gpt.h.0.", "text_embedding"))
        assert torch.equal(tensor, before[key]) == frozen, key


@pytest.mark.parametrize(
    ("freeze", "complaint"),
    [
        (["gpt.h.9."], "freeze names 'gpt.h.9.', and no parameter starts so"),
        (["gpt", "text", "mel", "final", "speed"], "leaves nothing to train"),
    ],
)
def test_freezing_nothing_or_everything_is_an_error(corpus: Path, freeze: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        workload(corpus, freeze=freeze).build_model()


def test_digest_depends_on_the_contents_alone(tmp_path: Path) -> None:
    digests = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_tiny_corpus(tmp_path / place, num_train=4, num_val=2, seed=seed)
        digests.append(workload(tmp_path / place).data_digest())
    assert digests[0] == digests[1] != digests[2]
    swapped = workload(tmp_path / "a", train_manifests=["val_pairs.jsonl"], val_manifests=["train_pairs.jsonl"])
    assert swapped.data_digest() != digests[0]
    other_validation = workload(tmp_path / "a", val_manifests=[str(tmp_path / "c/val_pairs.jsonl")])
    assert other_validation.data_digest() != digests[0]
    more_heads = workload(tmp_path / "a", gpt=TINY_GPT | {"heads": 4})
    assert more_heads.data_digest() != digests[0]


def test_model_learns_the_tiny_corpus(corpus: Path) -> None:
    torch.manual_seed(0)
    work = workload(corpus, dropout=0.0)
    model = work.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    batch = work.collate([work.train_data()[i] for i in range(8)])
    first = mean_loss(work, model.eval(), 8)
    for _ in range(30):
        sums = work.loss_sums(model.train(), batch.inputs)
        loss = sum(weight * sums[name] / batch.counts[name] for name, weight in work.loss_weights.items())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
    assert mean_loss(work, model.eval(), 8) < 0.75 * first


def test_best_checkpoints_go_by_text_and_by_mel_loss(corpus: Path) -> None:
    files = {"val/mel_loss": "best_mel_model.pth", "val/text_loss": "best_text_model.pth"}
    assert list(workload(corpus).best_checkpoints().items()) == list(files.items()), "the first is exported"


def test_input_files_are_the_manifests_without_their_language(corpus: Path) -> None:
    files = [("train_manifests", corpus / "train_pairs.jsonl"), ("val_manifests", corpus / "val_pairs.jsonl")]
    assert workload(corpus).input_files() == files


def test_unpacked_data_is_read_from_its_files_though_a_store_is_open(corpus: Path) -> None:
    work = workload(corpus, pack=True, config="config.yaml")
    assert work.train_data().mapped
    unpacked = work.unpacked()
    assert not hasattr(unpacked.train_data(), "mapped") and unpacked.unpacked() is unpacked
    assert unpacked == work.model_copy(update={"pack": False})


def test_gradient_checkpointing_saves_memory_where_it_is_off(corpus: Path) -> None:
    (saver,) = workload(corpus).memory_savers()
    options = tomllib.loads(saver)
    assert workload(corpus, **options).memory_savers() == ()


def test_real_study_names_options_that_exist() -> None:
    folder = Path(studies.indextts2.__file__).parent
    study = tomllib.loads((folder / "study.toml").read_text())
    assert study["study"]["workload"] == "studies.indextts2:IndexTTS2"
    work = IndexTTS2.model_validate(study["workload"], context={"base_dir": folder})
    assert work.config is not None and work.config.is_absolute()
    searched = {name.removeprefix("workload.") for name in study["search"] if name.startswith("workload.")}
    assert searched <= set(IndexTTS2.model_fields)
    assert np.isclose(sum(work.loss_weights.values()), 1)
