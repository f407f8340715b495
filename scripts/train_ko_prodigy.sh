#!/usr/bin/env bash
# Starts a fine-tuning of IndexTTS-2's GPT in Korean with Prodigy: `tuner train` with settings from the environment.
#
#   TRAIN_MANIFEST=data/train.jsonl::ko VAL_MANIFEST=data/val.jsonl::ko bash scripts/train_ko_prodigy.sh
#
# Paths are relative to the current folder; unset ones are those of studies/indextts2/study.toml. Separate several
# manifests with commas or blanks. Arguments are passed to `tuner train`: --no-track, --set train.d_coef=0.5.
set -euo pipefail
here=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
    echo "train_ko_prodigy.sh: $*" >&2
    exit 2
}

number() { # NAME DEFAULT [LOWEST]: the variable as a whole number
    local value=${!1:-$2}
    [[ $value =~ ^(0|[1-9][0-9]{0,14})$ ]] && ((value >= ${3:-1})) || die "$1=$value: give a whole number from ${3:-1} on."
    echo "$value"
}

decimal() { # NAME: the variable as a number that is not negative
    [[ ${!1} =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$ ]] || die "$1=${!1}: give a number, such as 0.01."
    # TOML wants a digit on both sides of the point.
    LC_ALL=C printf '%.10g\n' "${!1}"
}

refuse() { # NAME REMEDY: a variable of the original training that has no meaning here
    [ -z "${!1:-}" ] || die "$1=${!1}: $2"
}

absolute() {
    case $1 in
    /* | "~"*) echo "$1" ;;
    *) echo "$here/$1" ;;
    esac
}

quoted() { # a TOML string
    local text=${1//\\/\\\\}
    echo "\"${text//\"/\\\"}\""
}

manifests() { # a TOML list
    local list="" manifest path=$1 names=("$1")
    # If a file with this whole name exists, it is one name with blanks.
    if [[ $1 =~ ^(.*)::[A-Za-z_-]+$ ]]; then path=${BASH_REMATCH[1]}; fi
    [ -f "$path" ] || IFS=$', \t\n' read -r -d '' -a names <<<"$1" || true
    for manifest in "${names[@]}"; do list+=$(quoted "$(absolute "$manifest")"),; done
    echo "[$list]"
}

if [ -n "${RESUME:-}" ] && [ "$RESUME" != never ]; then
    die "RESUME=$RESUME: this script starts a new run; to continue one, use scripts/resume_ko_prodigy.sh."
fi
case ${AMP:-1} in
1) precision=auto ;;
0) precision=fp32 ;;
*) die "AMP=$AMP: give 1 (bf16 where the device has it) or 0 (float32)." ;;
esac
optimizer=${OPTIMIZER:-prodigy}
schedule=${SCHEDULER:-wsd}
case $schedule in
none | constant) schedule=none ;;
wsd) ;;
cosine) [ "$optimizer" != prodigy ] ||
    die "SCHEDULER=cosine is AdamW's: give wsd (Prodigy's rate falls at the end of the run) or none, or OPTIMIZER=adamw." ;;
*) die "SCHEDULER=$schedule: give wsd, none, or with OPTIMIZER=adamw cosine." ;;
esac
if [ "$optimizer" = prodigy ]; then
    refuse LR "Prodigy finds its rate: leave it out and set the factor on it, --set train.d_coef=0.5, or OPTIMIZER=adamw."
    [ "${WARMUP_STEPS:-0}" = 0 ] || refuse WARMUP_STEPS "Prodigy's step size grows from small by itself: leave it out, or \
use --set train.warmup_steps=$WARMUP_STEPS --set train.safeguard_warmup=true."
fi
[[ ${WSD_MIN_LR_RATIO:-0} =~ ^0*\.?0*$ ]] ||
    refuse WSD_MIN_LR_RATIO "the rate falls to zero: leave it out, and set the length of the fall with WSD_STABLE_RATIO."
if [ -n "${WSD_STABLE_RATIO:-}" ]; then
    [[ $WSD_STABLE_RATIO =~ ^0?\.0*[1-9][0-9]*$ ]] ||
        die "WSD_STABLE_RATIO=$WSD_STABLE_RATIO: give the share of the run before the rate falls, such as 0.8, or SCHEDULER=none."
    [ "$schedule" = wsd ] || die "WSD_STABLE_RATIO=$WSD_STABLE_RATIO is for SCHEDULER=wsd: leave it out with $schedule."
fi
refuse EPOCHS "the length is in steps: leave it out and set MAX_STEPS; the log names the epochs."
refuse TIMEOUT_SECS "leave it out and run \`timeout -s INT ${TIMEOUT_SECS:-} bash scripts/train_ko_prodigy.sh\`: \
it stops with a checkpoint, and scripts/resume_ko_prodigy.sh continues."
refuse BEST_STEP_ROUND "best weights are kept after every validation: leave it out and set VAL_INTERVAL."

batch_size=$(number BATCH_SIZE 8)
grad_accumulation=$(number GRAD_ACC 1)
steps=$(number MAX_STEPS 240000)
val_interval=$(number VAL_INTERVAL 10000)
log_every=$(number LOG_INTERVAL 200)
# Packed data needs no loader workers: NUM_WORKERS=0 then frees the cores.
num_workers=$(number NUM_WORKERS 32 0)
seed=$(number SEED 1234 0)

settings=(
    --set "train.optimizer=$(quoted "$optimizer")"
    --set "train.batch_size=$batch_size"
    --set "train.grad_accumulation=$grad_accumulation"
    --set "train.num_workers=$num_workers"
    --set "train.log_every=$log_every"
    --set "train.precision=$precision"
    --set "train.seed=$seed"
    --set "full.steps=$steps"
    # The evaluation grid is in samples, equal for every batch size.
    --set "full.eval_every=$((val_interval * batch_size * grad_accumulation))"
)
for pair in train.lr:LR train.weight_decay:WEIGHT_DECAY train.max_grad_norm:GRAD_CLIP \
    workload.text_loss_weight:TEXT_LOSS_WEIGHT workload.mel_loss_weight:MEL_LOSS_WEIGHT; do
    name=${pair#*:}
    if [ -n "${!name:-}" ]; then
        value=$(decimal "$name")
        settings+=(--set "${pair%%:*}=$value")
    fi
done
if [ -n "${WARMUP_STEPS:-}" ]; then
    warmup_steps=$(number WARMUP_STEPS 0 0)
    settings+=(--set "train.warmup_steps=$warmup_steps")
fi
if [ -n "${SCHEDULER:-}" ]; then settings+=(--set "full.schedule=$(quoted "$schedule")"); fi
if [ -n "${WSD_STABLE_RATIO:-}" ]; then
    fraction=$(awk -v stable="$WSD_STABLE_RATIO" 'BEGIN { printf "%.6g\n", 1 - stable }')
    settings+=(--set "full.decay_fraction=$fraction")
fi
if [ -n "${TRAIN_MANIFEST:-}" ]; then settings+=(--set "workload.train_manifests=$(manifests "$TRAIN_MANIFEST")"); fi
if [ -n "${VAL_MANIFEST:-}" ]; then settings+=(--set "workload.val_manifests=$(manifests "$VAL_MANIFEST")"); fi
for pair in tokenizer:TOKENIZER_MODEL base_tokenizer:BASE_TOKENIZER_MODEL config:CONFIG_PATH \
    base_checkpoint:BASE_CHECKPOINT; do
    name=${pair#*:}
    if [ -n "${!name:-}" ]; then settings+=(--set "workload.${pair%%:*}=$(quoted "$(absolute "${!name}")")"); fi
done

if ! command -v tuner >/dev/null; then
    source "$root/scripts/setup_venv.sh" indextts2
    cd "$here"
fi
# The arguments may contain `--resume` again: the last one counts.
exec tuner train "$root/studies/indextts2/study.toml" \
    --run-dir "$(absolute "${OUTPUT_DIR:-runs/ko_prodigy}")" --resume never "${settings[@]}" "$@"
