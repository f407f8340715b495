#!/usr/bin/env bash
# Workers of a study on Slurm, one job of an array each. Launch the study once before, so that the storage has it:
#
#   tuner launch study.toml --trials 1 --storage "$TUNER_STORAGE"
#   export TUNER_STORAGE=postgresql://me@db/studies    # the password in ~/.pgpass
#   sbatch --array=1-8 scripts/cluster/slurm.sh my-study /shared/runs
#
# Slurm sends SIGTERM 120 s before the time limit: the trial stops with a checkpoint, and the requeued job continues it.
#SBATCH --job-name=tuner
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=tuner-%A-%a.log
set -euo pipefail
study=${1:?usage: slurm.sh STUDY RUN_ROOT}
run_root=${2:?usage: slurm.sh STUDY RUN_ROOT}
code=0
# srun passes signals on to the worker.
srun tuner worker "$study" --run-root "$run_root" || code=$?
if [ "$code" -eq 130 ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
