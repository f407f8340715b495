#!/usr/bin/env bash
# Style, types and tests. Arguments go to pytest: scripts/test.sh -m slow
source "$(dirname "$0")/setup_venv.sh" dev
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
