# Sourced by the other scripts: installs the project into .venv, with the extras named in $1, if it is not up to date.
# The versions are those of scripts/constraints.txt if it exists.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Where it is set, each process compiles this project and what it imports anew: seconds of each start.
unset PYTHONDONTWRITEBYTECODE
python=${PYTHON:-python3}
stamp=.venv/installed-$1
constraints=scripts/constraints.txt
files=(pyproject.toml)
options=()
if [ -f "$constraints" ]; then
    files+=("$constraints")
    options=(--constraint "$constraints")
fi
# The stamp is the checksum of the files: an edit or another checkout installs again.
checksum=$(cat "${files[@]}" | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$checksum" ]; then
    echo "installing prodigy-tuner[$1] into .venv (once, a few minutes)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # Without --no-compile, pip compiles thousands of modules that are never imported: a minute.
    .venv/bin/python -m pip install -qq --no-compile --disable-pip-version-check "${options[@]}" --editable ".[$1]"
    echo "$checksum" >"$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
