#!/usr/bin/env bash
# A hook for IndexTTS-2: a checkpoint speaks two sentences, and their character error rate goes into metrics.json.
# NOT RUN YET: it was written without IndexTTS-2's environment and without a GPU. Read it before you use it.
#
#   [hooks]
#   command = "bash ../../scripts/hooks/indextts2.sh {checkpoint} {out}"   # relative to the study.toml
#   timeout = 1800
#
# INDEXTTS_DIR   checkout of IndexTTS-2 with its own .venv and checkpoints/
# VOICE          a .wav of the speaker to imitate
# TEXTS          a file with one sentence a line
# CUDA_VISIBLE_DEVICES=1 puts it on another GPU. On the GPU of the training both must fit: the inference takes
# several GB, and a training that runs out of memory ends.
set -euo pipefail
checkpoint=$1 out=$2
: "${INDEXTTS_DIR:?set it to the checkout of IndexTTS-2}" "${VOICE:?set it to a .wav}" "${TEXTS:?set it to a text file}"

# IndexTTS-2 reads all of its models from one folder: links to its own, with this gpt.pth in place of theirs.
models=$(mktemp -d "$out/models.XXXX")
trap 'rm -rf "$models"' EXIT
ln -s "$INDEXTTS_DIR"/checkpoints/* "$models/"
rm -f "$models/gpt.pth"
# The exported file has the encoders of the base checkpoint, which a training checkpoint lacks.
tuner export "$(dirname "$(dirname "$out")")" --checkpoint "$checkpoint" --to "$models/gpt.pth"

# Its environment needs `pip install faster-whisper jiwer` for the error rate.
cd "$INDEXTTS_DIR"
.venv/bin/python - "$models" "$VOICE" "$TEXTS" "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

import jiwer
from faster_whisper import WhisperModel
from indextts.infer_v2 import IndexTTS2

models, voice, texts, out = sys.argv[1:]
sentences = Path(texts).read_text(encoding="utf-8").split("\n")
sentences = [sentence for sentence in sentences if sentence.strip()][:2]
tts = IndexTTS2(cfg_path=f"{models}/config.yaml", model_dir=models, use_fp16=True)
listener = WhisperModel("large-v3")
heard = []
for number, sentence in enumerate(sentences):
    path = f"{out}/sentence-{number}.wav"
    tts.infer(spk_audio_prompt=voice, text=sentence, output_path=path)
    segments, _ = listener.transcribe(path, language="ko")
    heard.append("".join(segment.text for segment in segments))
rate = jiwer.cer([sentence.replace(" ", "") for sentence in sentences], [text.replace(" ", "") for text in heard])
Path(out, "heard.txt").write_text("\n".join(heard) + "\n", encoding="utf-8")
Path(out, "metrics.json").write_text(json.dumps({"cer": rate}))
PYTHON
