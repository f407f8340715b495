"""The Korean demo corpus: its form on disk, its promises, and when it is made again."""

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from studies.korean_demo import corpus, speech
from trainer.errors import UserError

for package in ("espeakng_loader", "sentencepiece", "sklearn"):
    pytest.importorskip(package)
if importlib.util.find_spec("konlpy") is None:  # only its texts are used: importing it would ask for Java
    pytest.skip("could not find 'konlpy'", allow_module_level=True)

WIDTH = 16
NUM_SENTENCES = 48
KEYS = {"id", "target_text_ids_path", "target_codes_path", "prompt_condition_path", "prompt_emo_vec_path"}
KEYS |= {"target_text_len", "target_code_len", "prompt_condition_len", "prompt_id", "target_id"}
KEYS |= {"language", "speaker"}


def make(folder: Path, **changes: Any) -> dict[str, Any]:
    return corpus.make_corpus(folder, **{"width": WIDTH, "num_sentences": NUM_SENTENCES, **changes})


def read_pairs(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}_pairs.jsonl").read_text("utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "korean_demo"
    assert make(folder, num_workers=2)["reused"] is False
    return folder


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short noise in place of speech: much faster, and enough for tests that need no voices."""

    def speak(
        utterances: list[speech.Utterance], num_workers: int, progressed: speech.Progressed
    ) -> dict[str, np.ndarray]:
        random = np.random.default_rng(0)
        return {
            one.id: random.normal(size=(random.integers(10, 60), speech.NUM_BANDS)).astype(np.float32)
            for one in utterances
        }

    monkeypatch.setattr(speech, "speak", speak)


@pytest.mark.parametrize("split", ["train", "val"])
def test_manifests_point_to_arrays_of_the_form_they_state(made: Path, split: str) -> None:
    pairs = read_pairs(made, split)
    assert len(pairs) == json.loads((made / "corpus.json").read_text())[f"num_{split}"] > 0
    for pair in pairs:
        assert set(pair) == KEYS
        paths = [pair[key] for key in sorted(KEYS) if key.endswith("_path")]
        assert not any(Path(path).is_absolute() for path in paths)
        condition, emotion, codes, text_ids = (np.load(made / path) for path in paths)
        assert (codes.dtype, codes.shape) == (np.int32, (pair["target_code_len"],))
        assert (text_ids.dtype, text_ids.shape) == (np.int32, (pair["target_text_len"],))
        assert (condition.dtype, condition.shape) == (np.float32, (pair["prompt_condition_len"], WIDTH))
        assert (emotion.dtype, emotion.shape) == (np.float32, (WIDTH,))
        assert pair["prompt_condition_len"] == 32
        assert condition.std() == pytest.approx(0.3, abs=0.01)
        assert emotion.std() == pytest.approx(0.3, abs=0.01)
        assert pair["language"] == "ko"


@pytest.mark.parametrize("split", ["train", "val"])
def test_prompt_is_another_utterance_of_its_speaker_and_split(made: Path, split: str) -> None:
    pairs = read_pairs(made, split)
    speakers = {pair["target_id"]: pair["speaker"] for pair in pairs}
    assert len({pair["id"] for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert pair["prompt_id"] != pair["target_id"]
        assert speakers[pair["prompt_id"]] == pair["speaker"]
        assert pair["prompt_emo_vec_path"] == f"emo_vec/{pair['prompt_id']}.npy"
        assert pair["target_codes_path"] == f"codes/{pair['target_id']}.npy"


def test_text_ids_are_a_sentence_and_codes_are_centres(made: Path) -> None:
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(made / "tokenizer.model"))
    specials = tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()
    assert (tokenizer.vocab_size(), *specials) == (corpus.VOCAB_SIZE, 0, 1, 2)
    sentences, all_codes = set(speech.read_sentences()), []
    for pair in read_pairs(made, "train") + read_pairs(made, "val"):
        ids = np.load(made / pair["target_text_ids_path"])
        assert ids.min() > 2 and ids.max() < corpus.VOCAB_SIZE
        assert tokenizer.decode(ids.tolist()) in sentences
        all_codes.append(np.load(made / pair["target_codes_path"]))
    codes = np.concatenate(all_codes)
    assert codes.min() >= 0 and codes.max() <= 255
    assert len(np.unique(codes)) > 200
    assert np.bincount(codes).max() < 0.1 * len(codes)  # no code stands for silence all over


def test_longer_text_is_a_longer_speech(made: Path) -> None:
    pairs = read_pairs(made, "train")
    lengths = np.array([(pair["target_text_len"], pair["target_code_len"]) for pair in pairs])
    assert np.corrcoef(lengths.T)[0, 1] > 0.9  # so the codes are those of the text


def test_no_sentence_is_in_both_splits(made: Path) -> None:
    train, val = (
        {tuple(np.load(made / pair["target_text_ids_path"])) for pair in read_pairs(made, split)}
        for split in ("train", "val")
    )
    assert not train & val
    assert 0.05 * len(train) < len(val) < 0.3 * len(train)


def test_speakers_sound_different(made: Path) -> None:
    pairs = read_pairs(made, "train")
    frequencies, conditions, texts = {}, {}, {}
    for name in sorted({pair["speaker"] for pair in pairs}):
        mine = [pair for pair in pairs if pair["speaker"] == name]
        codes = np.concatenate([np.load(made / pair["target_codes_path"]) for pair in mine])
        frequencies[name] = np.bincount(codes, minlength=256) / len(codes)
        conditions[name] = np.load(made / mine[0]["prompt_condition_path"])
        texts[name] = {pair["target_id"].rsplit("-")[-1] for pair in mine}
    names = list(frequencies)
    assert len(names) >= 3
    for position, one in enumerate(names):
        for other in names[position + 1 :]:
            # Half of the speech falls on codes that the other speaker does not share; one speaker's two halves
            # would share nearly all.
            assert np.minimum(frequencies[one], frequencies[other]).sum() < 0.6, (one, other)
            assert np.abs(conditions[one] - conditions[other]).mean() > 0.1
    assert any(texts[one] & texts[other] for one in names for other in names if one != other)


def test_same_call_makes_the_same_bytes_with_any_number_of_workers(made: Path, tmp_path: Path) -> None:
    assert make(tmp_path / "again", num_workers=1)["reused"] is False
    assert contents(tmp_path / "again") == contents(made)


def test_complete_corpus_is_not_rebuilt(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PACKAGES", ("a_package_that_is_not_there",))
    about = make(made)
    assert about.pop("reused") is True
    assert about == json.loads((made / "corpus.json").read_text())


@pytest.mark.parametrize("harm", ["no corpus.json", "torn corpus.json", "file lost", "file changed"])
def test_damaged_corpus_is_rebuilt(made: Path, noise: None, tmp_path: Path, harm: str) -> None:
    folder = shutil.copytree(made, tmp_path / "korean_demo")
    about, codes = folder / "corpus.json", next((folder / "codes").iterdir())
    if harm == "no corpus.json":
        about.unlink()
    elif harm == "torn corpus.json":
        about.write_bytes(about.read_bytes()[:50])
    elif harm == "file lost":
        codes.unlink()
    else:
        codes.write_bytes(codes.read_bytes()[:-1] + b"\x01")
    assert make(folder)["reused"] is False
    assert make(folder)["reused"] is True


def test_other_parameters_or_another_recipe_make_another_corpus(
    made: Path, noise: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(made, tmp_path / "korean_demo")
    assert make(folder, width=8)["reused"] is False
    assert np.load(next((folder / "emo_vec").iterdir())).shape == (8,)
    monkeypatch.setattr(corpus, "RECIPE", corpus.RECIPE + 1)
    assert make(folder, width=8)["reused"] is False


def test_interruption_keeps_the_old_corpus(
    made: Path, noise: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(made, tmp_path / "korean_demo")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(speech, "quantize", interrupted)
        make(folder, width=8)
    assert contents(folder) == contents(made)
    assert sorted(os.listdir(tmp_path)) == [".korean_demo.lock", "korean_demo"]


def test_leftovers_of_a_killed_process_are_removed_or_restored(made: Path, noise: None, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "korean_demo")
    (tmp_path / ".korean_demo.making" / "codes").mkdir(parents=True)
    folder.rename(tmp_path / ".korean_demo.replaced")  # killed between the two renames
    assert make(folder)["reused"] is True
    shutil.copytree(folder, tmp_path / ".korean_demo.replaced")  # killed after them
    assert make(folder, width=8)["reused"] is False
    assert sorted(os.listdir(tmp_path)) == [".korean_demo.lock", "korean_demo"]


def test_utterances_beyond_the_limits_are_dropped(noise: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_CODE_LEN", 50)
    monkeypatch.setattr(corpus, "MAX_TEXT_LEN", 40)
    about = make(tmp_path / "korean_demo")
    pairs = read_pairs(tmp_path / "korean_demo", "train") + read_pairs(tmp_path / "korean_demo", "val")
    assert max(pair["target_code_len"] for pair in pairs) <= 50
    assert max(pair["target_text_len"] for pair in pairs) <= 40
    assert len(pairs) == about["num_train"] + about["num_val"] == 2 * NUM_SENTENCES - about["num_dropped"]
    assert about["num_dropped"] > 0


def test_sentences_are_korean_distinct_and_of_bounded_length() -> None:
    sentences = speech.read_sentences()
    assert len(sentences) == len(set(sentences)) >= 800
    assert all(6 <= len(sentence) <= 120 for sentence in sentences)
    assert "대한민국의 주권은 국민에게 있고, 모든 권력은 국민으로부터 나온다." in sentences


def test_missing_package_is_a_user_error_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PACKAGES", ("konlpy", "a_package_that_is_not_there"))
    with pytest.raises(UserError, match=r"a_package_that_is_not_there.*pip install 'prodigy-tuner\[demo\]'"):
        make(tmp_path / "korean_demo")
    assert not list(tmp_path.iterdir())


def test_folder_with_other_files_is_refused_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        make(tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}
    with pytest.raises(UserError, match="is a file"):
        make(tmp_path / "thesis.txt")


@pytest.mark.parametrize("wrong", [{"width": 0}, {"num_sentences": 39}, {"num_workers": 0}])
def test_impossible_arguments_are_users_errors(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))} .* too small"):
        make(tmp_path / "korean_demo", **wrong)


def test_command_exits_2_with_one_line_on_a_user_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").touch()
    assert corpus.main(["--folder", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "thesis.txt" in err


def test_corpus_command_prints_its_contents(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = json.loads((made / "corpus.json").read_text())
    folder = made.with_name("default_form")
    shutil.copytree(made, folder)
    parameters = {"width": WIDTH, "num_sentences": None}
    (folder / "corpus.json").write_text(json.dumps({**about, "parameters": parameters}))
    assert corpus.main(["--folder", str(folder), "--width", str(WIDTH)]) == 0
    assert f"{about['num_train']} training and {about['num_val']} validation pairs" in capsys.readouterr().out


def test_failed_speech_process_ends_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mute = speech.Speaker("mute", "xx-no-such-voice", 50, 175)
    monkeypatch.setattr(speech, "SPEAKERS", (*speech.SPEAKERS[:3], mute))
    with pytest.raises(RuntimeError, match="the process of speaker mute failed"):
        make(tmp_path / "korean_demo")
    assert "espeak-ng has no voice xx-no-such-voice" in capfd.readouterr().err
    assert os.listdir(tmp_path) == [".korean_demo.lock"]
