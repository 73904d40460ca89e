"""What is said about settings that do not exist or cannot be: one screen, the nearest, the remedy, exit status 2."""

import pytest
import yaml

from helpers.terminal import maiht
from maiht_lightning.cli import main
from maiht_lightning.command_line.catalog import COMMANDS
from maiht_lightning.command_line.parser import LONGEST, CommandParser
from maiht_lightning.validation import nearest

BASE = ["--model.name_or_path", "x", "--data", "WikiText2DataModule"]
ON_THE_COMMAND_LINE = {
    "--pruning.sparsty 0.5": "no setting --pruning.sparsty: did you mean --pruning.sparsity?",
    "--pruning.sparsty=0.5": "no setting --pruning.sparsty: did you mean --pruning.sparsity?",
    "--sparsity 0.5": "no setting --sparsity: did you mean --pruning.sparsity?",
    "--trainer.max_epoch 3": "no setting --trainer.max_epoch: did you mean --trainer.max_epochs?",
    "--pruning.evaluation.perplexty [x]": "did you mean --pruning.evaluation.perplexity?",
    "--pruning.sparsity abc": "--pruning.sparsity must be a number, but found 'abc'",
    "--pruning.offload dsk": "--pruning.offload must be one of none, cpu, disk, but found 'dsk': did you mean disk?",
    "--trainer.precision bf17-true": "but found 'bf17-true': did you mean bf16-true?",
    "--data WikiText3DataModule": "--data: no class WikiText3DataModule: did you mean WikiText2DataModule?",
    "--data.seqlenn 3": "--data: WikiText2DataModule has no setting seqlenn: did you mean seqlen?",
    "--data.seqlen abc": "--data.seqlen must be a whole number, but found 'abc'",
    "--pruning.calibration C5Calibration": "no class C5Calibration: did you mean C4Calibration?",
    "--pruning.config.mue 3": "--pruning.config: MAIHTConfig has no setting mue: did you mean mu?",
    "--trainer.logger WandbLoger": "--trainer.logger: no class WandbLoger: did you mean WandbLogger?",
    "--trainer.callbacks [{class_path: ModelChekpoint}]": "no class ModelChekpoint: did you mean ModelCheckpoint?",
    "stray": "'stray' is no setting",
    "--config nowhere.yaml": "--config must be a file, but found none at",
}
IN_A_FILE = {
    "pruning: {sparsty: 0.5}": "no setting pruning.sparsty: did you mean pruning.sparsity?",
    "prunning: {sparsity: 0.5}": "no section prunning: did you mean pruning?",
    "model: {name_or_pth: x}": "no setting model.name_or_pth: did you mean model.name_or_path?",
    "pruning: {evaluation: {perplexty: [x]}}": "did you mean pruning.evaluation.perplexity?",
    "pruning: {offload: dsk}": "--pruning.offload must be one of none, cpu, disk, but found 'dsk': did you mean disk?",
    "pruning: {config: {mue: 1}}": "--pruning.config: MAIHTConfig has no setting mue: did you mean mu?",
    "data: {class_path: WikiText2DataModule, init_args: {seqlenn: 3}}": "no setting seqlenn: did you mean seqlen?",
    "trainer: {logger: {class_path: WandbLogger, init_args: {projct: x}}}": "did you mean project?",
    "pruning: {calibration: {class_path: C4Calibraton}}": "no class C4Calibraton: did you mean C4Calibration?",
    "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {save_topk: 2}}]}": "did you mean save_top_k?",
}


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    out, said = capsys.readouterr()
    assert out == ""
    lines = said.splitlines()
    assert lines[0].startswith("maiht: error: ")
    # One screen, of words and not of Python's types, with the way to the list of settings.
    assert len(lines) <= LONGEST + 2
    assert "usage" not in said
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("words", ON_THE_COMMAND_LINE)
def test_on_the_command_line_the_nearest_is_suggested(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, "fit", *BASE, *words.split(" ", 1))
    assert ON_THE_COMMAND_LINE[words] in said
    assert "maiht fit --help shows the settings that people turn, --help_all every one." in said
    assert "<class" not in said


@pytest.mark.parametrize("text", IN_A_FILE)
def test_in_a_file_the_nearest_is_suggested(text, capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    said = refused(capsys, "fit", "--config", str(path))
    assert IN_A_FILE[text] in said
    assert "maiht fit --help shows" in said
    assert "<class" not in said


def test_a_file_that_is_no_yaml_is_told_with_the_place(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("a: b: c\n")
    assert "line 1, column 5" in refused(capsys, "fit", "--config", str(tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("evaluate", "missing: --model"),
        ("evaluate --model x --perplexty [a]", "no setting --perplexty: did you mean --perplexity?"),
        ("evaluate --model x --dtype float46", "--dtype must be one of auto, float32, bfloat16, float16, but found"),
        ("evaluate --model x --dtype float46", "did you mean float16?"),
        ("evaluate --mdl x", "no setting --mdl"),
        ("estimate --model x --optimizer adam", "--optimizer must be one of adamw, adamw_8bit, but found 'adam'"),
        ("estimate --model x --gpu h100", "but found 'h100': did you mean h100-80gb?"),
        ("export --model x", "missing: --output"),
        ("doctor --jsn", "no setting --jsn: did you mean --json?"),
        ("fit --trainer.max_steps 2 --data WikiText2DataModule", "missing: --model.name_or_path"),
        ("fit --model.name_or_path x", "missing: --data, such as WikiText2DataModule"),
    ],
)
def test_commands_say_what_is_missing_or_wrong(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    ("word", "asked"), [("fitt", ": did you mean fit?"), ("Estimate", ": did you mean estimate?"), ("frobnicate", "\n")]
)
def test_an_unknown_command_hears_of_all_of_them(word, asked, terminal):
    done = maiht(word, terminal=terminal)
    said = (done.out if terminal else done.err).replace("\r\n", "\n")
    assert done.status == 2
    assert said.startswith(f"maiht: error: no command '{word}'{asked}")
    assert f"Commands: {', '.join(COMMANDS)}." in said
    assert len(said.splitlines()) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [False, True])
def test_the_real_command_refuses_a_slip_on_one_screen(terminal):
    # Imports, and what is said in them, are as in the other.
    done = maiht("fit", *BASE, "--pruning.sparsty", "0.5", terminal=terminal, warm=terminal)
    said = (done.out if terminal else done.err).replace("\r\n", "\n")
    assert done.status == 2
    assert said == (
        "maiht: error: no setting --pruning.sparsty: did you mean --pruning.sparsity?\n"
        "maiht fit --help shows the settings that people turn, --help_all every one.\n"
    )


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (["--pruning.method", "wnada"], "did you mean wanda?"),
        (["--pruning.config", "balenced"], "did you mean balanced?"),
        (["--pruning.pattern", "unstructred"], "did you mean unstructured?"),
    ],
)
def test_names_that_the_package_checks_are_suggested(options, asked, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert asked in refused(capsys, "prune", "--model.name_or_path", "x", *options)


def test_a_texts_name_is_suggested():
    from maiht_lightning.data.sources import load_texts

    with pytest.raises(ValueError, match=r"but found 'wikitext': did you mean wikitext2\?"):
        load_texts("wikitext", "test")


def test_a_message_that_nobody_knows_is_cut_to_a_screen(capsys):
    parser = CommandParser(prog="maiht thing")
    with pytest.raises(SystemExit) as stopped:
        parser.error("\n".join(f"line {number}" for number in range(100)))
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "maiht: error: line 0"
    assert lines[-2:] == ["...", "maiht thing --help shows the settings that people turn, --help_all every one."]
    assert len(lines) == LONGEST + 2


def test_the_nearest_word():
    known = ["--pruning.sparsity", "--sparse_finetune.max_steps", "--trainer.max_steps", "--fresh"]
    assert nearest("--pruning.sparsity", known) == "--pruning.sparsity"
    assert nearest("--prunning.Sparsity", known) == "--pruning.sparsity"
    assert nearest("--sparsty", known) == "--pruning.sparsity"
    assert nearest("--max_step", known) == "--sparse_finetune.max_steps"
    assert nearest("--trainer.maxsteps", known) == "--trainer.max_steps"
    assert nearest("--colour", known) is None
    assert nearest("", known) is None


# ---- A printed configuration


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--print_config"])
    assert not stopped.value.code
    return capsys.readouterr().out


def test_the_printed_configuration_explains_itself_and_is_the_same_when_read(capsys, tmp_path, monkeypatch):
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_top_k": 2}}
    config = {
        "model": {"name_or_path": "a: b # 'c'\n  sparsity: 3\n"},
        "data": {"class_path": "PythonDocsDataModule", "init_args": {"seqlen": 64}},
        "trainer": {"callbacks": [callback]},
        "pruning": {"prune_at": {"step:1": 0.3, "end": 0.6}, "config": {"mu": 0.25}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    text = printed(capsys, "fit", "--config", str(tmp_path / "run.yaml"))
    with monkeypatch.context() as patch:
        patch.setattr("maiht_lightning.command_line.parser.commented", lambda text, parser: text)
        plain = printed(capsys, "fit", "--config", str(tmp_path / "run.yaml"))
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    assert lines == [line for line in plain.splitlines() if not line.startswith("#")]
    found = yaml.safe_load(text)
    assert found["model"]["name_or_path"] == config["model"]["name_or_path"]
    assert found["pruning"]["prune_at"] == config["pruning"]["prune_at"]

    def before(key):
        """The comment above a key, as one line."""
        lines, kept = text.splitlines(), []
        number = next(number for number, line in enumerate(lines) if line.startswith(key))
        while lines[number - 1].lstrip().startswith("#"):
            number -= 1
            kept.insert(0, lines[number].strip("# "))
        return " ".join(kept)

    assert before("  sparsity:").startswith("Fraction of zeros, in [0, 1)")
    assert before("pruning:").startswith("Prune a causal language model in one shot")
    assert before("  config:").startswith("A preset's name")
    # Of classes that were chosen, also in a list.
    assert before("    seqlen: 64") == "Tokens per window."
    assert before("      save_top_k: 2")
    assert max(map(len, (line for line in text.splitlines() if line.lstrip().startswith("#")))) <= 100
    (tmp_path / "again.yaml").write_text(text)
    assert printed(capsys, "fit", "--config", str(tmp_path / "again.yaml")) == text


def test_other_commands_print_theirs_as_well(capsys):
    text = printed(capsys, "evaluate", "--model", "x")
    assert "# Only the first windows of each text or loader, for a quick look.\nmax_windows: null\n" in text
