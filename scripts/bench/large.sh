#!/usr/bin/env bash
# `tuner bench` at the larger size of the records: width 256, 6 layers, 8,194 codes. Arguments are passed to `tuner bench`.
# `python -m scripts.bench.training --sizes large` makes the corpus.
#
#   bash scripts/bench/large.sh --rounds 2 --steps 6 --json > scripts/records/bench_cpu.json
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
corpus=../../data/korean_demo_256
exec tuner bench studies/korean_demo/study.toml "$@" \
    --set 'workload.gpt={model_dim=256,layers=6,heads=4,max_text_tokens=120,max_mel_tokens=400,number_mel_codes=8194}' \
    --set "workload.train_manifests=[\"$corpus/train_pairs.jsonl::ko\"]" \
    --set "workload.val_manifests=[\"$corpus/val_pairs.jsonl::ko\"]"
