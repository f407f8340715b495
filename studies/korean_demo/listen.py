"""The demo's hook: turns codes back into sound, so that a checkpoint can be heard.

    python -m studies.korean_demo.listen --checkpoint best_mel_model.pth --out samples/

Writes for one validation sentence: original.wav (its own codes: the best that this codebook can sound like),
teacher_forced.wav (each code predicted from the true ones before it), generated.wav (greedy, from the text alone),
text.txt, and metrics.json. Runs on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import wave
from pathlib import Path

import numpy as np
import torch
from scipy.signal import istft, stft
from torch import Tensor

from studies.indextts2 import IndexTTS2
from studies.indextts2.dataset import Utterance
from studies.indextts2.manifest import ManifestSpec
from studies.indextts2.model import GPTConfig, IndexTTS2GPT
from studies.indextts2.workload import collate
from studies.korean_demo.speech import CODES_PER_SECOND, FFT_SIZE, SAMPLE_RATE, mel_filters
from trainer.checkpoint import read_checkpoint
from trainer.errors import UserError

FRAMES_PER_CODE = 3
"""Codes are 40 ms apart. Windows of 46 ms need more frames to overlap, which are interpolated."""
ITERATIONS = 32


@torch.inference_mode()
def predict(model: IndexTTS2GPT, config: GPTConfig, utterance: Utterance, codes: np.ndarray) -> Tensor:
    """[len(codes) + 1]: the code that the model ranks first after each prefix of `codes`."""
    inputs = collate([utterance._replace(codes=codes)], config).inputs
    # The model may be told the length, which is not that of the prefix.
    return model.mel_logits({**inputs, "code_lengths": torch.tensor([len(utterance.codes)])}).argmax(-1)


def generate(model: IndexTTS2GPT, config: GPTConfig, utterance: Utterance) -> np.ndarray:
    """Codes, int32, greedily: up to the stop token, or to twice the length of the original."""
    codes = np.empty(0, np.int32)
    for _ in range(min(2 * len(utterance.codes), config.max_mel_tokens)):
        code = int(predict(model, config, utterance, codes)[-1])
        if code >= config.num_codes:
            break
        codes = np.append(codes, np.int32(code))
    return codes


def vocode(codes: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Float samples at SAMPLE_RATE: the codes' log-mel frames, inverted by Griffin and Lim's method."""
    times = np.arange(len(codes) * FRAMES_PER_CODE) / FRAMES_PER_CODE
    log_mel = np.stack([np.interp(times, np.arange(len(codes)), band) for band in codebook[codes].T])
    energy = np.maximum(np.exp(log_mel) - 1e-5, 0)
    magnitude = np.sqrt(np.maximum(np.linalg.pinv(mel_filters(FFT_SIZE)).T @ energy, 0))
    window = {
        "fs": SAMPLE_RATE,
        "nperseg": FFT_SIZE,
        "noverlap": FFT_SIZE - SAMPLE_RATE // (CODES_PER_SECOND * FRAMES_PER_CODE),
    }
    phase = np.exp(2j * np.pi * np.random.default_rng(0).random(magnitude.shape))
    for _ in range(ITERATIONS):
        _, samples = istft(magnitude * phase, **window)
        _, _, spectrum = stft(samples, **window)
        phase = np.exp(1j * np.angle(spectrum[:, : magnitude.shape[1]]))
    _, samples = istft(magnitude * phase, **window)
    return np.asarray(samples)


def write_wav(path: Path, samples: np.ndarray) -> None:
    """16 bits, as loud as they can hold."""
    scaled = 0.9 * samples / max(1e-9, float(np.abs(samples).max(initial=0)))
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes((scaled * 32767).astype("<i2").tobytes())


def listen(checkpoint: Path, out: Path, index: int = 0) -> dict[str, float]:
    """Write the sounds of one validation sentence; returns its metrics.

    Raises:
        UserError: The checkpoint is not of this workload, or its corpus is missing or has no codebook.
    """
    state = read_checkpoint(checkpoint)
    try:
        workload = IndexTTS2.model_validate(state["lineage"]["workload"]["options"]).without_initial_weights()
    except (KeyError, ValueError) as error:
        raise UserError(f"{checkpoint} is no checkpoint of the Korean demo: give one of its run directory.") from error
    path = Path(ManifestSpec.parse(workload.val_manifests[0]).path).parent / "codebook.npy"
    if not path.exists():
        raise UserError(f"{path} is missing: make the corpus again with python -m studies.korean_demo.corpus.")
    codebook, config = np.load(path), workload.gpt_config
    data = workload.val_data()
    if not 0 <= index < len(data):
        raise UserError(f"--index {index}: there are {len(data)} validation sentences, counted from 0.")
    utterance: Utterance = data[index]
    model = workload.build_model().eval()
    model.load_state_dict(state["model"])
    forced = predict(model, config, utterance, utterance.codes)[:-1].numpy()
    generated = generate(model, config, utterance)
    out.mkdir(parents=True, exist_ok=True)
    for name, codes in (("original", utterance.codes), ("teacher_forced", forced), ("generated", generated)):
        # A start or stop token is no sound.
        write_wav(out / f"{name}.wav", vocode(codes[codes < config.num_codes], codebook))
    if workload.tokenizer is not None:
        import sentencepiece

        decode = sentencepiece.SentencePieceProcessor(model_file=str(workload.tokenizer)).decode
        (out / "text.txt").write_text(decode(utterance.text.tolist()) + "\n", encoding="utf-8")
    metrics = {
        "code_accuracy": float(np.mean(forced == utterance.codes)),
        "length_ratio": len(generated) / len(utterance.codes),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return metrics


def main(command_line: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 2 after a UserError."""
    parser = argparse.ArgumentParser(description="Makes a checkpoint of the Korean demo heard.")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the .wav files")
    parser.add_argument("--index", type=int, default=0, help="of the validation sentence")
    arguments = parser.parse_args(command_line)
    torch.set_num_threads(1)  # the training has the cores
    try:
        metrics = listen(arguments.checkpoint, arguments.out, arguments.index)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{arguments.out}: {', '.join(f'{name} {value:.3f}' for name, value in metrics.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
