#!/usr/bin/env bash
# Fine-tune, prune and measure SmolLM2-135M on this machine: bash scripts/quickstart.sh [options of `maiht fit`]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh '.[gguf]'
model=$(.venv/bin/python scripts/fetch_smollm2.py)
# OpenMP's threads wait for each other by spinning: beside other work, that takes longer than the work does.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
# The run is offline, and its last lines name its folder: WANDB_SILENT=false shows what W&B says.
export WANDB_SILENT=${WANDB_SILENT:-true}
exec .venv/bin/maiht fit --config configs/quickstart.yaml --model.name_or_path "$model" "$@"
