# Sourced by the other scripts: makes .venv where there is none, with the project and the extras named in $1.
# An unpinned torch would bring gigabytes of CUDA; the project pins it, and pip takes the build that fits.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
stamp=.venv/installed-$1
if ! [ -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    echo "installing prodigy-tuner[$1] into .venv (once, a few minutes)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install -qq --disable-pip-version-check "torch~=2.13.0"
    .venv/bin/python -m pip install -qq --disable-pip-version-check --editable ".[$1]"
    touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
