"""A checkpoint loads in each of its forms, and keys that do not fit are listed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from torch import Tensor

from studies.indextts2.model import GPTConfig, IndexTTS2GPT
from studies.indextts2.weights import TEXT_ROWS, count_pieces, load_base_checkpoint, read_weights
from tests.studies.tiny_corpus import TINY_GPT
from trainer.errors import UserError

CONFIG = GPTConfig(**TINY_GPT)
ENCODER_KEYS = {
    "conditioning_encoder.embed.conv.0.weight": (4, 1, 3, 3),
    "perceiver_encoder.latents": (32, 8),
    "emo_conditioning_encoder.after_norm.bias": (8,),
    "emo_perceiver_encoder.latents": (1, 8),
    "emo_layer.weight": (8, 8),
    "emovec_layer.bias": (8,),
}


def new_model(seed: int = 1, **changes: int) -> IndexTTS2GPT:
    torch.manual_seed(seed)
    return IndexTTS2GPT(GPTConfig(**{**TINY_GPT, **changes}))


def published(**changes: int) -> dict[str, Tensor]:
    """A `gpt.pth` at reduced size, its encoders included."""
    encoders = {key: torch.randn(shape) for key, shape in ENCODER_KEYS.items()}
    return encoders | {key: tensor.clone() for key, tensor in new_model(seed=0, **changes).state_dict().items()}


def with_lora(state: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "gpt.h.0.attn.c_attn"
    state[f"{name}.base_layer.weight"] = state.pop(f"{name}.weight")
    state[f"{name}.base_layer.bias"] = state.pop(f"{name}.bias")
    return state | {f"{name}.lora_A.default.weight": torch.zeros(4, 32)}


def with_aliases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    aliases = {f"inference_model.transformer.{key}": state[key] for key in ("gpt.ln_f.weight", "gpt.ln_f.bias")}
    return state | aliases | {"gpt.wte.weight": torch.zeros(34, 32)}


def assert_loaded(model: IndexTTS2GPT, expected: dict[str, Tensor]) -> None:
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[key].float(), rtol=0, atol=0, msg=key)


@pytest.mark.parametrize(
    ("form", "dropped"),
    [
        (lambda state: state, []),
        (lambda state: {"model": state}, []),
        (lambda state: {"model": state, "optimizer": {"state": {}}, "optimizer_type": "prodigy", "step": 3}, []),
        (lambda state: {f"_orig_mod.{key}": tensor for key, tensor in state.items()}, []),
        (with_lora, ["gpt.h.0.attn.c_attn.lora_A.default.weight"]),
        (
            lambda state: {"model": with_aliases(with_lora(state))},
            [
                "gpt.h.0.attn.c_attn.lora_A.default.weight",
                "inference_model.transformer.gpt.ln_f.weight",
                "inference_model.transformer.gpt.ln_f.bias",
                "gpt.wte.weight",
            ],
        ),
        (lambda state: {key: tensor.half() for key, tensor in state.items()}, []),
    ],
)
def test_each_form_of_checkpoint_loads(
    tmp_path: Path, form: Callable[[dict[str, Tensor]], dict[str, Any]], dropped: list[str]
) -> None:
    content = form(published())
    torch.save(content, tmp_path / "gpt.pth")
    model = new_model()
    report = load_base_checkpoint(model, tmp_path / "gpt.pth")
    expected = published()
    if dropped == [] and next(iter(content.values())).__class__ is Tensor:
        expected = {key: tensor.to(next(iter(content.values())).dtype) for key, tensor in expected.items()}
    assert_loaded(model, expected)
    assert sorted(report.dropped) == sorted(dropped)
    assert report.shared_pieces is None
    assert read_weights(tmp_path / "gpt.pth").encoders == tuple(
        key for key in content.get("model", content) if key.removeprefix("_orig_mod.") in ENCODER_KEYS
    )


def test_torchs_older_file_form_loads(tmp_path: Path) -> None:
    torch.save(published(), tmp_path / "gpt.pth", _use_new_zipfile_serialization=False)
    model = new_model()
    load_base_checkpoint(model, tmp_path / "gpt.pth")
    assert_loaded(model, published())


def test_file_is_mapped_not_copied(tmp_path: Path) -> None:
    torch.save(published(), tmp_path / "gpt.pth")
    weights = read_weights(tmp_path / "gpt.pth")
    assert str(tmp_path / "gpt.pth") in Path("/proc/self/maps").read_text()
    assert weights.tensors["final_norm.weight"].shape == (32,)


class Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def truncate(path: Path, num_bytes: int, content: Any = None) -> None:
    torch.save(content or published(), path)
    path.write_bytes(path.read_bytes()[:-num_bytes])


@pytest.mark.parametrize(
    ("write", "complaint"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_bytes(b""), "is damaged or no checkpoint"),
        (lambda path: path.write_text("hello"), "is damaged or no checkpoint"),
        (lambda path: truncate(path, 20_000), "is damaged (its end is missing)"),
        (lambda path: truncate(path, 300), "is damaged (its end is missing)"),
        (lambda path: truncate(path, 300, {"weight": torch.zeros(1000)}), "is damaged (its end is missing)"),
        (lambda path: torch.save([1, 2], path), "holds no weights"),
        (lambda path: torch.save({"model": "gpt"}, path), "holds no weights"),
        (lambda path: torch.save({"model": {}}, path), "holds no weights"),
        (lambda path: torch.save({"step": 3, "weight": torch.zeros(3)}, path), "holds no weights"),
        (lambda path: torch.save({"model": Code(path.parent / "ran")}, path), "nothing in it was executed"),
        (lambda path: path.write_bytes(pickle.dumps(Code(path.parent / "ran"))), "nothing in it was executed"),
    ],
)
def test_other_file_than_a_checkpoint_is_refused_and_not_run(
    tmp_path: Path, write: Callable[[Path], object], complaint: str
) -> None:
    path = tmp_path / "gpt.pth"
    write(path)
    with pytest.raises(UserError) as caught:
        load_base_checkpoint(new_model(), path)
    assert str(caught.value).startswith(f"checkpoint {path} ")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def change(**changes: Any) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({key.replace("__", "."): value for key, value in changes.items()})


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda state: state.pop("mel_head.bias"), "1 missing (mel_head.bias)"),
        (change(gpt__wpe__weight=torch.zeros(4, 32)), "1 unknown (gpt.wpe.weight)"),
        (
            change(mel_head__weight=torch.zeros(30, 32)),
            "1 mis-shaped (mel_head.weight is 30x32, the model's 34x32)",
        ),
        (change(_orig_mod__mel_head__bias=torch.zeros(34)), "holds mel_head.bias twice"),
    ],
)
def test_keys_that_do_not_fit_are_listed_and_nothing_is_loaded(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], complaint: str
) -> None:
    state = published()
    edit(state)
    torch.save(state, tmp_path / "gpt.pth")
    model = new_model()
    with pytest.raises(UserError) as caught:
        load_base_checkpoint(model, tmp_path / "gpt.pth")
    assert complaint in str(caught.value)
    assert_loaded(model, new_model().state_dict())


def test_list_of_keys_is_short_and_counts_them_all(tmp_path: Path) -> None:
    torch.save(published(layers=1), tmp_path / "gpt.pth")
    with pytest.raises(UserError, match=r"does not fit: 12 missing \((gpt\.h\.1\.\S+, ){4}\.\.\.\): use the config"):
        load_base_checkpoint(new_model(), tmp_path / "gpt.pth")


def test_width_that_differs_from_the_checkpoint_is_an_error_with_both(tmp_path: Path) -> None:
    torch.save(published(), tmp_path / "gpt.pth")
    with pytest.raises(UserError, match=r"is 32 wide and the config's model_dim is 64"):
        load_base_checkpoint(new_model(model_dim=64), tmp_path / "gpt.pth")


def train_tokenizer(folder: Path, name: str, words: list[str], size: int, **options: Any) -> Path:
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(words * 50),
        model_prefix=str(folder / name),
        vocab_size=size,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return folder / f"{name}.model"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, new): two vocabularies with some pieces in common."""
    folder = tmp_path_factory.mktemp("tokenizers")
    base = train_tokenizer(folder, "base", ["hello world", "low lower", "new newer"], 24)
    # The new one counts its special pieces in another order, so that rows 0 and 1 would move with their pieces.
    words, ids = ["hello 세계", "low 낮은", "새로운 new", "안녕하세요"], {"bos_id": 0, "eos_id": 1, "unk_id": 2}
    new = train_tokenizer(folder, "new", words, 36, **ids)
    return base, new


def pieces_of(path: Path) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromFile(str(path))
    return [processor.IdToPiece(i) for i in range(processor.GetPieceSize())]


def test_text_rows_move_by_piece_and_the_other_new_rows_stay_fresh(
    tmp_path: Path, tokenizers: tuple[Path, Path]
) -> None:
    base, new = (pieces_of(path) for path in tokenizers)
    shared = set(base) & set(new)
    assert len(base) != len(new) and 5 < len(shared) < len(new) - 5
    assert any(base.index(piece) != new.index(piece) for piece in shared)
    state = published(number_text_tokens=len(base))
    torch.save(state, tmp_path / "gpt.pth")
    model = new_model(number_text_tokens=len(new))
    fresh = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = load_base_checkpoint(model, tmp_path / "gpt.pth", tokenizer=tokenizers[1], base_tokenizer=tokenizers[0])
    assert report.shared_pieces == len(shared)
    for key, tensor in model.state_dict().items():
        if key not in TEXT_ROWS:
            assert torch.equal(tensor, state[key]), key
            continue
        for row in range(len(new) + 1):
            if row in (CONFIG.start_text_token, CONFIG.stop_text_token):
                expected = state[key][row]
            elif row < len(new) and new[row] in shared:
                expected = state[key][base.index(new[row])]
            else:
                expected = fresh[key][row]
            assert torch.equal(tensor[row], expected), (key, row)


def test_training_checkpoint_has_its_rows_moved(tmp_path: Path, tokenizers: tuple[Path, Path]) -> None:
    size = count_pieces(tokenizers[1])
    state = new_model(seed=0, number_text_tokens=size).state_dict()
    for content in ({"model": state, "optimizer_type": "prodigy"}, {"model": state, "optimizer": {}}, state):
        torch.save(content, tmp_path / "latest.pth")
        model = new_model(number_text_tokens=size)
        report = load_base_checkpoint(
            model, tmp_path / "latest.pth", tokenizer=tokenizers[1], base_tokenizer=tokenizers[0]
        )
        assert_loaded(model, state)
        assert report.shared_pieces is None


def test_tokenizers_of_one_size_move_the_rows_of_a_base_checkpoint_alone(
    tmp_path: Path, tokenizers: tuple[Path, Path]
) -> None:
    other = train_tokenizer(tmp_path, "other", ["abcd", "dabe"], 9, model_type="char")
    base = train_tokenizer(tmp_path, "base", ["dcxy", "xyz"], 9, model_type="char")
    size = count_pieces(other)
    assert size == count_pieces(base)
    state = new_model(seed=0, number_text_tokens=size).state_dict()
    for content, moved in ((state, True), ({"model": state, "optimizer_type": "prodigy"}, False)):
        torch.save(content, tmp_path / "gpt.pth")
        model = new_model(number_text_tokens=size)
        load_base_checkpoint(model, tmp_path / "gpt.pth", tokenizer=other, base_tokenizer=base)
        assert torch.equal(model.text_head.weight, state["text_head.weight"]) != moved


def test_vocabulary_of_another_size_needs_both_tokenizers(tmp_path: Path, tokenizers: tuple[Path, Path]) -> None:
    size = count_pieces(tokenizers[1])
    torch.save(published(number_text_tokens=count_pieces(tokenizers[0])), tmp_path / "gpt.pth")
    model = new_model(number_text_tokens=size)
    with pytest.raises(UserError, match=r"3 mis-shaped .* name tokenizer and base_tokenizer"):
        load_base_checkpoint(model, tmp_path / "gpt.pth", tokenizer=tokenizers[1])
    with pytest.raises(UserError, match=r"text rows; base_tokenizer .* name the tokenizer of the checkpoint"):
        load_base_checkpoint(model, tmp_path / "gpt.pth", tokenizer=tokenizers[1], base_tokenizer=tokenizers[1])


def test_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        count_pieces(tmp_path / "bpe.model")
    (tmp_path / "bpe.model").write_text("hello")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        count_pieces(tmp_path / "bpe.model")
