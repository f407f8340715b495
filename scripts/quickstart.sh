#!/usr/bin/env bash
# The main job in minutes on a CPU: corpus, study, promotion, and the results. A second run reuses the existing files.
source "$(dirname "$0")/setup_venv.sh" demo
# OpenMP's threads wait for each other actively. On a machine that has other load, each wait then costs
# a time slice (a step took 3 to 17 times as long); after 10,000 turns they now yield (8% on a quiet machine).
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
exec python -m scripts.quickstart "$@"
