"""Build wheel and source distribution, look into them, and use the wheel in empty environments.

    python scripts/check_release.py                      # the package alone
    python scripts/check_release.py --extras lora wandb  # and with these extras, each in an environment of its own
    python scripts/check_release.py --extras all --keep dist

Some minutes an environment; needs the package index. In each one, with an empty home and empty caches, the command
shows its help, looks at the machine (`maiht doctor`) and prunes a small model. Versions are those of constraints.txt.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "maiht_lightning"
# A module of each extra, which can be imported where it is installed.
MODULES = {
    "gguf": "gguf",
    "eval": "lm_eval",
    "lowmem": "torchao",
    "lora": "peft",
    "wandb": "wandb_workspaces",
    "docs": "mkdocs",
    "dev": "pytest",
}
# Beside the package, what a source distribution needs for its tests, site and quickstart.
NEEDED = ("constraints.txt", "CHANGELOG.md", "LICENSE", "mkdocs.yml", "pyproject.toml", "README.md")
FOLDERS = ("configs", "docs", "scripts", "tests")
SMALL = ["--pruning.calibration", "PythonDocsCalibration", "--pruning.calibration.samples", "4"]
SMALL += ["--pruning.calibration.seqlen", "32", "--pruning.evaluation.seqlen", "32"]
SMALL += ["--pruning.evaluation.perplexity", "[python_docs]", "--pruning.evaluation.max_windows", "4"]


class Unfit(RuntimeError):
    """What was built is not what should be released; the message says why."""


def tracked(*below: str) -> set[str]:
    """The repository's own files, by their paths in it."""
    listed = subprocess.run(["git", "ls-files", "--", *below], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(listed.stdout.splitlines())


def check_wheel(wheel: Path, package: set[str]) -> None:
    """See that a wheel has the package's files and no others, and the command.

    Args:
        wheel: The file.
        package: The files of the package, as `maiht_lightning/cli.py`.

    Raises:
        Unfit: It has not.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        info = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
        entries = "".join(archive.read(name).decode() for name in info if name.endswith("/entry_points.txt"))
    for what, found in (("lacks", package - names), ("should not have", names - info - package)):
        if found:
            raise Unfit(f"{wheel.name} {what} {', '.join(sorted(found))}")
    if f"maiht = {PACKAGE}.cli:main" not in entries:
        raise Unfit(f"{wheel.name} has no command maiht")
    if not any(name.endswith("/LICENSE") for name in info):
        raise Unfit(f"{wheel.name} has no licence")


def check_sdist(sdist: Path, wanted: set[str]) -> None:
    """See that a source distribution has the repository's files.

    Raises:
        Unfit: It has not.
    """
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    if wanted - names:
        raise Unfit(f"{sdist.name} lacks {', '.join(sorted(wanted - names))}")


def run(command: list[object], folder: Path, **variables: str) -> str:
    """Run a command in a folder; returns what it printed on stdout.

    Raises:
        Unfit: It ends with an error.
    """
    # Neither this process's package nor its settings.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MAIHT_", "HF_"))}
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        cwd=folder,
        env={**kept, **variables},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise Unfit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def environment(folder: Path) -> Path:
    """Make an empty virtual environment; returns its Python."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def build(folder: Path) -> tuple[Path, Path]:
    """Build both distributions from the files that git knows; returns wheel and source distribution."""
    source = folder / "source"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    python = environment(folder / "tools")
    run([python, "-m", "pip", "install", "--quiet", "build"], folder)
    # The wheel is built from the source distribution, which so has all that it needs.
    run([python, "-m", "build", "--outdir", folder / "dist", source], folder)
    (wheel,), (sdist,) = (list((folder / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    return wheel, sdist


def install(wheel: Path, extra: str, folder: Path) -> None:
    """Install a wheel with an extra, or with none (""), into a new environment in `folder`.

    Raises:
        Unfit: Requirements do not go together, or the extra's module is not there.
    """
    python = environment(folder / "venv")
    wanted = f"{wheel}[{extra}]" if extra else str(wheel)
    run([python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wanted], folder)
    run([python, "-m", "pip", "check"], folder)
    if extra:
        run([python, "-c", f"import {MODULES[extra]}"], folder)


def use(folder: Path) -> None:
    """Use what is installed in `folder`, with an empty home, empty caches and no network.

    Raises:
        Unfit: Something does not work.
    """
    home = folder / "home"
    home.mkdir()
    empty = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    python, maiht = (folder / "venv" / "bin" / name for name in ("python", "maiht"))
    if "\n  prune " not in run([maiht, "--help"], folder, **empty):
        raise Unfit("maiht --help does not list its commands")
    json.loads(run([maiht, "doctor", "--json"], folder, **empty))
    make = "from helpers.byte_model import save_folder; save_folder('small')"
    run([python, "-c", make], folder, **empty, PYTHONPATH=str(ROOT / "tests"))
    run([maiht, "prune", "--model.name_or_path", "small", "--output_dir", "run", *SMALL], folder, **empty)
    summary = json.loads((folder / "run" / "summary.json").read_text())
    if summary["failures"] or not 0.49 < summary["measured_sparsity"] <= 0.5:
        raise Unfit(f"the pruning is not what it should be: {summary}")
    for name in ("report.html", "model/config.json", "model/README.md"):
        if not (folder / "run" / name).is_file():
            raise Unfit(f"the run has no {name}")


def main() -> None:
    """Build, look, install, use."""
    extras = list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--extras", nargs="+", default=[], choices=["all", *extras], metavar="NAME", help=", ".join(extras)
    )
    parser.add_argument("--keep", type=Path, help="folder for wheel and source distribution")
    args = parser.parse_args()
    chosen = ["", *(extras if "all" in args.extras else args.extras)]
    with tempfile.TemporaryDirectory(prefix="release-") as name:
        folder = Path(name)
        wheel, sdist = build(folder)
        check_wheel(wheel, {path.removeprefix("src/") for path in tracked(f"src/{PACKAGE}")})
        check_sdist(sdist, tracked("src", *NEEDED, *FOLDERS))
        print(f"{wheel.name} and {sdist.name} are whole", flush=True)
        for extra in chosen:
            place = folder / (extra or "alone")
            place.mkdir()
            install(wheel, extra, place)
            use(place)
            print(f"installed and used {f'with {extra}' if extra else 'alone'}", flush=True)
            # An environment is some gigabytes.
            shutil.rmtree(place)
        if args.keep is not None:
            args.keep.mkdir(parents=True, exist_ok=True)
            for file in (wheel, sdist):
                shutil.copy(file, args.keep)


if __name__ == "__main__":
    try:
        main()
    except Unfit as error:
        sys.exit(f"check_release: {error}")
