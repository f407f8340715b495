#!/usr/bin/env bash
# Style, types and tests. Arguments are passed to pytest: scripts/test.sh -m slow
source "$(dirname "$0")/setup_venv.sh" dev
ruff check .
ruff format --check .
mypy
# Two at a time: most tests wait for child processes, and the models are tiny.
exec python -m pytest --numprocesses 2 "$@"
