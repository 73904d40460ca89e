"""`maiht --help` and the first screen of each command: what, an example that works, and settings as they are."""

import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from lightning.pytorch import Trainer

from helpers.byte_model import llama_config, save_folder
from helpers.small_texts import write_texts
from helpers.terminal import environment, maiht
from helpers.warm import python
from maiht_lightning import MAIHTPruning
from maiht_lightning.cli import RUNS, main
from maiht_lightning.command_line.catalog import COMMANDS, MODEL, command_help, group_help
from maiht_lightning.command_line.parser import OneScreen
from maiht_lightning.commands import COMMANDS as FUNCTIONS
from maiht_lightning.solvers.config import PRESETS


def test_the_help_of_all_commands_fits_one_screen():
    shown = maiht("--help")
    assert (shown.status, shown.err) == (0, "")
    lines = shown.out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    named = [match[1] for line in lines if (match := re.match(r"  (\w+)  +[A-Z]", line))]
    assert named == list(COMMANDS)
    assert named[:4] == ["doctor", "estimate", "fit", "prune"]
    assert set(named) == {"doctor", *RUNS, *FUNCTIONS}
    # Each line says what the command does, and each exit status is documented.
    assert all(command.line in shown.out for command in COMMANDS.values())
    status = shown.out[shown.out.index("Exit status") :]
    assert all(re.search(rf"\b{number}\b", status) for number in (0, 1, 2, 130, 143))


def test_without_a_command_the_help_is_an_error():
    shown = maiht()
    assert (shown.status, shown.out) == (2, "")
    assert shown.err == group_help() + "\n"


def test_the_version_is_the_packages():
    from maiht_lightning import __version__

    assert maiht("--version").out == f"maiht {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["doctor", "-h"], ["frobnicate"], []])
def test_help_and_unknown_commands_load_nothing_heavy(arguments):
    program = f"""
import sys
from maiht_lightning.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
found = {{"torch", "lightning", "transformers", "jsonargparse", "numpy"}} & sys.modules.keys()
sys.exit(f"loaded: {{found}}" if found else 0)
"""
    done = maiht(program=("-c", program))
    assert done.status == 0, done.err


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("name", COMMANDS)
def test_the_first_screen_of_a_command(name, columns):
    shown = maiht(name, "--help", COLUMNS=str(columns))
    assert (shown.status, shown.err) == (0, "")
    command, lines = COMMANDS[name], shown.out.splitlines()
    assert " ".join(shown.out.split()).startswith(command.purpose)
    first = lines.index("Example:")
    assert first <= 4
    assert lines[first + 1].startswith(f"  maiht {name}")
    assert len(lines) <= 36
    # What is copied is not wrapped, and stays within eighty columns all the same.
    assert max(map(len, lines)) <= columns
    assert "  " + command.example in shown.out
    assert " ".join(command.more.split()) in " ".join(shown.out.split())
    # A dozen settings, each with what it is or when to turn it.
    assert len(command.settings) <= 16
    for setting in command.settings:
        # Two spaces at least part what is typed from what is said of it, which takes no second line.
        head = f"  {setting.name} {setting.value}".rstrip() + "  "
        (line,) = [line for line in lines if line.startswith(head)]
        text = f"{setting.text} [{setting.default}]" if setting.default else setting.text
        assert line[len(head) :].strip() == text
    assert f"maiht {name} --help_all" in shown.out


def parser_of(name, monkeypatch):
    """The parser that a command makes, caught before it parses."""

    class Caught(BaseException):
        pass

    def catch(self, *args, **kwargs):
        raise Caught(self)

    with monkeypatch.context() as patch:
        patch.setattr(OneScreen, "parse_args", catch)
        with pytest.raises(Caught) as caught:
            main([name])
    (parser,) = caught.value.args
    return parser._subparsers._group_actions[0].choices[name] if name in RUNS else parser


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "doctor"])
def test_the_settings_shown_exist_and_have_these_defaults(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    known = {option: action for action in parser_of(name, monkeypatch)._actions for option in action.option_strings}
    # What holds where a parser has None.
    pruning = MAIHTPruning()
    (preset,) = [preset for preset, config in PRESETS.items() if config == pruning.spec.config]
    in_effect = {
        "--pruning.config": preset,
        "--pruning.calibration": type(pruning.calibration).__name__,
        "--trainer.precision": Trainer(logger=False, barebones=True).precision,
    }
    for setting in COMMANDS[name].settings:
        if setting.name.startswith("--data."):
            assert setting.name in known or setting.name.removeprefix("--data.") in ("seqlen", "batch_size")
            continue
        if not setting.name.startswith("--"):
            continue
        default = known[setting.name].default
        if setting.default:
            value = yaml.safe_load(setting.default)
            found = in_effect.get(setting.name, default) if default is None else default
            assert found in (value, [value]), setting
        elif not known[setting.name].required:
            assert default in (None, "", [], -1) or setting.name in ("--device", "--entity"), (setting, default)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder in which the examples' model is a small one, with texts, and `maiht` on the path."""
    folder = tmp_path_factory.mktemp("world")
    save_folder(folder / MODEL, llama_config(max_position_embeddings=512))
    texts = write_texts(folder / "texts")
    program = folder / "bin" / "maiht"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.join(python())} -m maiht_lightning.cli "$@"\n')
    program.chmod(0o755)
    variables = environment(MAIHT_DATA_DIR=str(texts), PYTHONPATH=environment()["PYTHONPATH"])
    variables["PATH"] = f"{program.parent}:{variables['PATH']}"
    return folder, variables


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_examples_work_as_they_stand(world):
    """One after another, in the order of the help: what a run leaves is what later ones take."""
    folder, variables = world
    for name, command in COMMANDS.items():
        done = subprocess.run(
            ["sh", "-c", command.example], cwd=folder, env=variables, capture_output=True, text=True, check=False
        )
        if name == "push":
            # All that works without the hub.
            assert (done.returncode, "could not be pushed to USER/NAME" in done.stderr) == (2, True), done.stderr
            continue
        assert done.returncode == 0, (name, done.stderr[-3000:])
        if name in ("fit", "prune"):
            (run,) = [path for path in (folder / "runs").iterdir() if path.name[0].isdigit()]
            run.rename(run.with_name({"fit": "A", "prune": "B"}[name]))
        if name == "prune":
            (folder / "runs" / "NAME").mkdir()
            (folder / "runs" / "B" / "model").rename(folder / "runs" / "NAME" / "model")
            shutil.copy(folder / "runs" / "B" / "summary.json", folder / "runs" / "NAME")
    assert (folder / "small").is_dir()
    assert list((folder / "reports").glob("*/report.html"))


def test_the_help_is_wrapped_to_what_there_is_room_for():
    for columns in (70, 80, 100, 200):
        lines = command_help("doctor", columns).splitlines()
        assert max(map(len, lines)) <= min(columns, 100)


@pytest.mark.slow
def test_every_setting_is_listed_below_one_line_of_usage():
    shown = maiht("fit", "--help_all", warm=True)
    assert shown.status == 0
    assert shown.out.startswith("usage: maiht fit [SETTINGS]\n\nFine-tune a causal")
    for name in ("--trainer.gradient_clip_val", "--pruning.hidden_states", "--sparse_finetune.temperature"):
        assert name in shown.out
