"""The check of a release sees what is missing and what is too much in what was built."""

import io
import re
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from helpers.small_texts import load_script, run_script

ROOT = Path(__file__).parents[2]
FILES = {"maiht_lightning/cli.py", "maiht_lightning/py.typed", "maiht_lightning/reporting/templates/report.jinja"}
INFO = "maiht_lightning-0.1.0.dist-info"
ENTRY = "[console_scripts]\nmaiht = maiht_lightning.cli:main\n"


@pytest.fixture
def script(monkeypatch):
    return load_script("check_release", monkeypatch)


def wheel_with(folder, names, entry=ENTRY):
    path = folder / "maiht_lightning-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
        archive.writestr(f"{INFO}/entry_points.txt", entry)
    return path


def test_a_whole_wheel_passes(script, tmp_path):
    script.check_wheel(wheel_with(tmp_path, [*FILES, f"{INFO}/licenses/LICENSE", f"{INFO}/METADATA"]), FILES)


@pytest.mark.parametrize(
    ("names", "entry", "message"),
    [
        (FILES - {"maiht_lightning/py.typed"}, ENTRY, r"lacks maiht_lightning/py\.typed"),
        (FILES | {"tests/conftest.py"}, ENTRY, r"should not have tests/conftest\.py"),
        (FILES, "", "no command maiht"),
    ],
)
def test_a_wheel_that_is_not_whole_is_named(script, tmp_path, names, entry, message):
    with pytest.raises(script.Unfit, match=message):
        script.check_wheel(wheel_with(tmp_path, [*names, f"{INFO}/licenses/LICENSE"], entry), FILES)


def test_a_wheel_without_its_licence_is_named(script, tmp_path):
    with pytest.raises(script.Unfit, match="no licence"):
        script.check_wheel(wheel_with(tmp_path, FILES), FILES)


def test_a_source_distribution_has_the_repositorys_files(script, tmp_path):
    path = tmp_path / "maiht_lightning-0.1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("src/maiht_lightning/cli.py", "configs/quickstart.yaml"):
            archive.addfile(tarfile.TarInfo(f"maiht_lightning-0.1.0/{name}"), io.BytesIO())
    script.check_sdist(path, {"configs/quickstart.yaml"})
    with pytest.raises(script.Unfit, match=r"lacks constraints\.txt$"):
        script.check_sdist(path, {"configs/quickstart.yaml", "constraints.txt"})


def test_what_fails_in_an_environment_is_shown_and_nothing_of_this_one_is_handed_on(script, tmp_path, monkeypatch):
    monkeypatch.setenv("MAIHT_DATA_DIR", "/mine")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    show = "import os; print([name for name, value in os.environ.items() if value == '/mine'], os.environ['HOME'])"
    assert script.run([sys.executable, "-c", show], tmp_path, HOME="/empty") == "[] /empty\n"
    with pytest.raises(script.Unfit, match=r"(?s)ended with 3:.*the reason"):
        script.run([sys.executable, "-c", "print('the reason'); raise SystemExit(3)"], tmp_path)


def test_every_extra_is_tried_in_turn(script, monkeypatch, tmp_path, capsys):
    extras = list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    assert script.MODULES.keys() == set(extras)
    wheel, sdist = tmp_path / "a.whl", tmp_path / "a.tar.gz"
    wheel.write_text("w")
    sdist.write_text("s")
    tried = []
    monkeypatch.setattr(script, "build", lambda folder: (wheel, sdist))
    monkeypatch.setattr(script, "check_wheel", lambda *_: None)
    monkeypatch.setattr(script, "check_sdist", lambda *_: None)

    monkeypatch.setattr(script, "install", lambda wheel, extra, folder: tried.append(extra))
    used = []
    monkeypatch.setattr(script, "use", lambda folder: used.append(folder.is_dir()))
    run_script(script, monkeypatch, "--extras", "all", "--keep", tmp_path / "dist")
    assert tried == ["", *extras]
    assert used == [True] * len(tried)
    assert {path.name for path in (tmp_path / "dist").iterdir()} == {"a.whl", "a.tar.gz"}
    assert len(re.findall("installed and used", capsys.readouterr().out)) == len(tried)
    tried.clear()
    run_script(script, monkeypatch, "--extras", "lora")
    assert tried == ["", "lora"]
