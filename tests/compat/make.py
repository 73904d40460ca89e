"""Do the runs of `setting.py` with an older version of the package, and keep what tests need of them beside this file.

PYTHONPATH=OLDER_VERSION/src python tests/compat/make.py
"""

import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from compat.setting import INTERRUPTED_AT, RUNS, write_setting  # noqa: E402

# Files of each run's folder.
KEPT = {
    "schedule": ("config.yaml",),
    "recovery": ("config.yaml", "summary.json", "layers.csv", "journal"),
}


def make(name: str) -> None:
    """Do one run and keep what tests need of it."""
    from maiht_lightning.cli import main

    Path("run.yaml").write_text(yaml.safe_dump(RUNS[name]))
    main(["fit", "--config", "run.yaml", "--output_dir", name])
    target = HERE / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for kept in KEPT[name]:
        source = Path(name) / kept
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target / kept)
    (checkpoint,) = Path(name).rglob(f"*step={INTERRUPTED_AT}.ckpt")
    shutil.copy(checkpoint, target / "interrupted.ckpt")
    shutil.copy(Path(name) / "model_finetuned" / "model.safetensors", target / "finetuned.safetensors")


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        write_setting(Path(folder))
        os.environ["MAIHT_DATA_DIR"] = "texts"
        for run in RUNS:
            make(run)
        os.chdir(HERE)
