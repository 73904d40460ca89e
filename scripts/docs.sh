#!/usr/bin/env bash
# Build the documentation's site into site/, or show it while it is written: bash scripts/docs.sh [serve]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
stamp=.venv/installed-docs
# The site is built from the sources as they are read, so that neither torch nor the package need be installed.
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    echo "Installing the tools of the documentation into .venv ..." >&2
    .venv/bin/python - > .venv/docs.txt <<'EOF'
import tomllib
print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"]))
EOF
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt -r .venv/docs.txt
    touch "$stamp"
fi
if [ "${1:-}" = serve ]; then
    exec .venv/bin/python -m mkdocs serve
fi
exec .venv/bin/python -m mkdocs build --strict "$@"
