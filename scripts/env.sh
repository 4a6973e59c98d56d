# Sourced by the other scripts: makes .venv once, installs the project into it, and leaves it active.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
STAMP=.venv/.installed
want=$(cat pyproject.toml constraints.txt setup.py kernels/*/*.cpp kernels/*/*.h | cksum)
if [ ! -f "$STAMP" ] || [ "$(cat "$STAMP")" != "$want" ]; then
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/it" >&2; exit 2; }
  [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
  echo "installing into .venv (a few minutes the first time)" >&2
  # torch first and by its exact version: where an index offers several builds, this takes the one that is tested.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,gguf]'
  echo "$want" > "$STAMP"
fi
# shellcheck disable=SC1091
source .venv/bin/activate
