#!/usr/bin/env bash
# The main job in minutes on a CPU: corpus, study, promotion, and what was won. Run again, it reuses what is there.
source "$(dirname "$0")/setup_venv.sh" demo
exec python scripts/quickstart.py "$@"
