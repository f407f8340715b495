#!/usr/bin/env bash
# Continues a Prodigy run of train_ko_prodigy.sh, with the same variables and arguments.
#
#   bash scripts/resume_ko_prodigy.sh                                     # the newest checkpoint in OUTPUT_DIR
#   RESUME=old/latest.pth OUTPUT_DIR=new bash scripts/resume_ko_prodigy.sh   # another checkpoint, into a new folder
set -euo pipefail
resume=${RESUME:-auto}
output=${OUTPUT_DIR:-runs/ko_prodigy}
unset RESUME

die() {
    echo "resume_ko_prodigy.sh: $*" >&2
    exit 2
}

if [ "${OPTIMIZER:-prodigy}" != prodigy ]; then
    die "OPTIMIZER=$OPTIMIZER: this script resumes only Prodigy runs; use \`tuner train\` for another optimizer."
fi
if [ "$resume" = auto ] || [ "$resume" -ef "$output/latest.pth" ]; then
    resume=auto
    compgen -G "$output/step_*.pth" >/dev/null || [ -f "$output/latest.pth" ] ||
        die "$output has no checkpoint to continue from: start with scripts/train_ko_prodigy.sh, or set OUTPUT_DIR or RESUME."
elif [ ! -f "$resume" ]; then
    die "RESUME=$resume: no such checkpoint; give auto or a path."
else
    resume=$(realpath "$resume")
fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_ko_prodigy.sh" --resume "$resume" "$@"
