#!/usr/bin/env bash
# Style, types and tests. Arguments are passed to pytest: scripts/test.sh -m slow
source "$(dirname "$0")/setup_venv.sh" dev
ruff check .
ruff format --check .
# It takes a minute of one core, so it runs beside the tests.
mypy &
types=$!
# Two at a time: most tests wait for child processes, and the models are tiny.
python -m pytest --numprocesses 2 "$@"
wait "$types" || { echo "mypy has found errors: see above" >&2; exit 1; }
