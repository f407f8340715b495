"""A tiny random data set in the form of an IndexTTS-2 preprocessing run, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

TINY_GPT = {
    "model_dim": 32,
    "layers": 2,
    "heads": 2,
    "max_text_tokens": 20,
    "max_mel_tokens": 40,
    "number_text_tokens": 30,
    "number_mel_codes": 34,
    "start_text_token": 0,
    "stop_text_token": 1,
    "start_mel_token": 32,
    "stop_mel_token": 33,
}
"""A `gpt:` section that fits the corpus: 25,000 parameters at width 32."""


def write_tiny_corpus(
    folder: Path,
    *,
    num_train: int = 64,
    num_val: int = 16,
    width: int = 32,
    seed: int = 0,
    max_text_len: int = 12,
    max_code_len: int = 30,
    num_text_tokens: int = 30,
    num_codes: int = 32,
    num_speakers: int = 3,
) -> None:
    """Write `train_pairs.jsonl`, `val_pairs.jsonl` and their .npy files under `folder`.

    Utterance i is the same for every `num_train` and `num_val` of one seed and split. The codes follow the
    text (with noise), so a model can learn them: a few hundred steps bring the loss well below log(32).
    """
    folder = Path(folder)
    for name in ("text_ids", "codes", "condition", "emo_vec"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for speaker in range(num_speakers):
        random = np.random.default_rng((seed, 2, speaker))
        condition = random.standard_normal((32, width), np.float32) * np.float32(0.3)
        np.save(folder / f"condition/spk{speaker}.npy", condition)
        np.save(folder / f"emo_vec/spk{speaker}.npy", condition.mean(0))
    for split, count in enumerate((num_train, num_val)):
        name = ("train", "val")[split]
        lines = []
        for i in range(count):
            random = np.random.default_rng((seed, split, i))
            text = random.integers(2, num_text_tokens, random.integers(2, max_text_len + 1), np.int32)
            code_len = int(random.integers(len(text), max_code_len + 1))
            codes = np.repeat(text, -(-code_len // len(text)))[:code_len] % num_codes
            codes = np.where(random.random(code_len) < 0.1, random.integers(0, num_codes, code_len), codes)
            sample, speaker = f"{name}_{i:05d}", int(random.integers(num_speakers))
            np.save(folder / f"text_ids/{sample}.npy", text)
            np.save(folder / f"codes/{sample}.npy", codes.astype(np.int32))
            lines.append(_line(sample, speaker, len(text), code_len))
        (folder / f"{name}_pairs.jsonl").write_text("".join(lines), encoding="utf-8")


def _line(sample: str, speaker: int, text_len: int, code_len: int) -> str:
    record = {
        "id": f"{sample}__spk{speaker}",
        "prompt_id": f"spk{speaker}",
        "target_id": sample,
        "language": "ko",
        "speaker": f"spk{speaker}",
        "prompt_condition_path": f"condition/spk{speaker}.npy",
        "prompt_condition_len": 32,
        "prompt_emo_vec_path": f"emo_vec/spk{speaker}.npy",
        "target_text_ids_path": f"text_ids/{sample}.npy",
        "target_text_len": text_len,
        "target_codes_path": f"codes/{sample}.npy",
        "target_code_len": code_len,
    }
    return json.dumps(record) + "\n"
