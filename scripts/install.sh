# Sourced by the other scripts: install "$1" (such as '.[dev]') into .venv with the versions of constraints.txt.
# An unchanged project is not installed twice.
python=${PYTHON:-python3}
stamp=.venv/installed-$(echo "$1" | cksum | cut -d' ' -f1)
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "maiht-lightning needs Python 3.11 or newer, but $("$python" --version) was found; set PYTHON=/path/to/python" >&2
        exit 1
    }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    echo "Installing $1 into .venv (some minutes the first time) ..." >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable "$1"
    touch "$stamp"
fi
