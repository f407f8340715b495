"""The demo's hook: generated codes are the model's own choices, and sound has the bands of its codes."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from studies.indextts2 import IndexTTS2
from studies.indextts2.dataset import Utterance
from studies.korean_demo import listen, speech
from tests.studies.tiny_corpus import TINY_GPT, write_tiny_corpus
from trainer import TrainConfig, UserError
from trainer.checkpoint import write_checkpoint
from tuner.spec.setups import Setup
from tuner.study.tracked_run import Runtime, tracked_train


@pytest.fixture
def workload(tmp_path: Path) -> IndexTTS2:
    write_tiny_corpus(tmp_path)
    np.save(tmp_path / "codebook.npy", np.random.default_rng(0).normal(-6, 2, (32, 40)).astype(np.float32))
    manifests = {f"{split}_manifests": [f"{tmp_path}/{split}_pairs.jsonl"] for split in ("train", "val")}
    return IndexTTS2.model_validate({**manifests, "gpt": TINY_GPT, "pack": False})


def test_generated_codes_are_those_that_the_model_ranks_first_after_their_own_prefix(workload: IndexTTS2) -> None:
    model, config = workload.build_model().eval(), workload.gpt_config
    utterance: Utterance = workload.val_data()[0]
    with torch.no_grad():
        model.mel_head.weight.mul_(50)  # else it repeats one code
        model.mel_head.bias[config.stop_mel_token] = -9.0
    codes = listen.generate(model, config, utterance)
    assert len(codes) == min(2 * len(utterance.codes), config.max_mel_tokens) and len(set(codes.tolist())) > 3
    assert listen.predict(model, config, utterance, codes)[:-1].tolist() == codes.tolist()
    with torch.no_grad():
        model.mel_head.bias[config.stop_mel_token] = 99.0
    assert len(listen.generate(model, config, utterance)) == 0


def test_sound_has_its_energy_in_the_band_of_its_codes() -> None:
    codebook = np.full((2, speech.NUM_BANDS), np.log(1e-5), np.float32)
    codebook[0, 12], codebook[1, 30] = 0.0, 0.0
    samples = listen.vocode(np.array([0] * 20 + [1] * 20), codebook)
    assert len(samples) / speech.SAMPLE_RATE == pytest.approx(40 / speech.CODES_PER_SECOND, abs=0.05)
    heard = speech.log_mel((3000 * samples / samples.std()).astype(np.int16))
    assert (heard[2:18].argmax(1) == 12).all() and (heard[22:38].argmax(1) == 30).all()


def test_checkpoint_of_a_run_is_heard(workload: IndexTTS2, tmp_path: Path) -> None:
    config = TrainConfig(steps=2, batch_size=4, precision="fp32")
    run = tracked_train(
        Setup(workload, config), tmp_path / "run", Runtime(tmp_path, track=False), experiment="it", lineage={}
    )
    assert listen.main(["--checkpoint", str(run.run_dir / "best_mel_model.pth"), "--out", str(tmp_path / "out")]) == 0
    lengths = {}
    for name in ("original", "teacher_forced", "generated"):
        with wave.open(str(tmp_path / f"out/{name}.wav")) as file:
            assert file.getframerate() == 22_050
            lengths[name] = file.getnframes()
    utterance: Utterance = workload.val_data()[0]
    assert lengths["original"] == pytest.approx(len(utterance.codes) * 882, abs=1024)
    assert json.loads((tmp_path / "out/metrics.json").read_text()).keys() == {"code_accuracy", "length_ratio"}


def test_other_checkpoint_is_a_mistake_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint({"model": {}}, tmp_path / "other.pth")
    assert listen.main(["--checkpoint", str(tmp_path / "other.pth"), "--out", str(tmp_path)]) == 2
    assert "is no checkpoint of the Korean demo" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not exist"):
        listen.listen(tmp_path / "none.pth", tmp_path)
