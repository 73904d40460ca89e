#!/usr/bin/env bash
# Install what the tests need and run them: bash scripts/test.sh [options of pytest, such as -m "not slow"]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh '.[dev,docs,gguf,eval,lora,lowmem,wandb]'
# Linters and types are judged by the pinned versions: LINT=no leaves them out where others are installed.
if [ "${LINT:-yes}" = yes ]; then
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/mypy
fi
# One process per core, and one thread in each: the tests' layers are too small to be shared out to threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# OpenMP's threads wait for each other by spinning: beside other work, that takes longer than the work does.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
# Where no bytecode may be written, each process would rewrite the assertions of all tests again.
unset PYTHONDONTWRITEBYTECODE
exec .venv/bin/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal "$@"
