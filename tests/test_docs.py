"""README.md and docs/: their commands parse, their snippets run, what they name exists, and tables are the results'."""

import argparse
import ast
import importlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from itertools import pairwise
from math import exp, log
from pathlib import Path

import jsonargparse
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import maiht_lightning
from helpers.byte_model import byte_tokenizer, llama_config, save_folder
from helpers.own_module import OwnModule, trainer
from helpers.sharp_model import perplexity_by_definition
from helpers.small_texts import SCRIPTS, load_script, run_script, write_texts
from helpers.wandb_file import read_run
from maiht_lightning import C4Calibration, cli, commands
from maiht_lightning.distributed import Ranks
from maiht_lightning.solvers import METHODS, LayerSolver, PruningSpec, parse_pattern

ROOT = Path(__file__).parents[1]
# For those who change the package or read its files: what they name is code, not commands and figures.
APART = {
    "docs/architecture.md",
    "docs/compact_format.md",
    "docs/gpu.md",
    "docs/reliability.md",
    "docs/results/README.md",
}
SITE = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
PAGES = ("README.md", *(page for page in SITE if page not in APART))
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
PACKAGE = ROOT / "src" / "maiht_lightning"
DEVELOPERS_PAGES = ("docs/architecture.md", "CONTRIBUTING.md")
DEVELOPERS_TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in DEVELOPERS_PAGES}
RESULTS = ROOT / "docs" / "results"


def fenced(language):
    """All fenced blocks of a language, with the page they stand on."""
    return [
        (page, match)
        for page, text in TEXTS.items()
        for match in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    ]


def command_lines():
    """The commands of the bash blocks, as lists of words, without variables set before them."""
    found = []
    for _, block in fenced("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                found.append(words)
    return list(map(list, dict.fromkeys(map(tuple, found))))


COMMANDS = command_lines()


class Parsed(BaseException):
    """Ends a command once its options are known to be right; not to be caught on the way."""


def parse_only(parser_class, monkeypatch):
    """Let parsers of a class parse as ever, and then stop."""
    parse = parser_class.parse_args

    def stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(parser_class, "parse_args", stop)


# ---- Commands


def test_there_are_commands_of_every_kind():
    assert Counter(words[0] for words in COMMANDS).keys() == {"bash", "cp", "maiht", "python"}
    assert {words[1] for words in COMMANDS if words[0] == "maiht"} == {
        *commands.COMMANDS.keys() & {"evaluate", "report", "estimate", "export"},
        "doctor",
        "fit",
        "prune",
    }


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_is_one_that_its_program_takes(words, tmp_path, monkeypatch, capsys):
    program, *arguments = words
    if program == "bash":
        assert (ROOT / arguments[0]).is_file()
        if arguments[0] != "scripts/quickstart.sh" or not arguments[1:]:
            return
        # It hands its options to `maiht fit`.
        program, arguments = "maiht", ["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), *arguments[1:]]
    if program == "cp":
        assert arguments[0].startswith("runs/")
        assert (ROOT / arguments[1]).parent.is_dir()
        return
    if arguments[:3] == ["-m", "pip", "install"]:
        # From the clone, with extras that there are; scripts/check_release.py installs each.
        option, file, package = arguments[3:]
        assert (option, (ROOT / file).is_file()) == ("--constraint", True)
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.fullmatch(r"\.\[([\w,]+)\]", package)[1].split(",")) <= extras.keys()
        return
    if program == "python":
        assert (ROOT / arguments[0]).is_file()
        parse_only(argparse.ArgumentParser, monkeypatch)
        if arguments[0].startswith("docs/examples/"):
            monkeypatch.setattr(sys, "argv", arguments)
            with pytest.raises(Parsed):
                runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
            return
        script = load_script(Path(arguments[0]).stem, monkeypatch)
        if arguments[0] == "scripts/render_docs.py":
            assert len(arguments) == 1
            return
        if hasattr(script, "maiht"):
            # It hands all it is given, and its own options, to `maiht fit`.
            monkeypatch.setattr(script, "fetch", lambda: "model.gguf")
            monkeypatch.setattr(script, "maiht", lambda command: cli.main([*command, "--print_config"]))
            with pytest.raises(SystemExit) as stopped:
                run_script(script, monkeypatch, *arguments[1:])
            assert not stopped.value.code, capsys.readouterr().err
            return
        with pytest.raises(Parsed):
            run_script(script, monkeypatch, *arguments[1:])
        return
    # A file of one's own, whatever it holds.
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    own = tmp_path / "configs" / "smollm2_wikitext2.yaml"
    shutil.copy(own, tmp_path / "run.yaml")
    monkeypatch.chdir(tmp_path)
    arguments = [str(own) if word == "..." else word for word in arguments]
    if arguments[0] in commands.COMMANDS:
        parse_only(jsonargparse.ArgumentParser, monkeypatch)
        with pytest.raises(Parsed):
            cli.main(arguments)
        return
    more = [] if arguments[0] == "doctor" else ["--print_config"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, *more])
    assert not stopped.value.code, capsys.readouterr().err
    if not more or not {"--help", "--help_all"}.isdisjoint(arguments):
        return
    # Each option has come to stand where its name says.
    config = yaml.safe_load(capsys.readouterr().out)
    for name, value in pairwise(arguments):
        if name.startswith("--") and name != "--config":
            found = setting(config, name[2:])
            if isinstance(found, dict):
                assert found["class_path"].rpartition(".")[2] == value, name
            else:
                assert str(found) == str(yaml.safe_load(value)), name


def setting(config, name):
    """The value of a dotted name in a configuration, also where a class stands in between."""
    for part in name.split("."):
        config = config[part] if part in config else config["init_args"][part]
    return config


def test_a_misspelt_option_would_be_seen(tmp_path, monkeypatch, capsys):
    """Guards the test above: a command that its program does not take fails it."""
    for words in (["maiht", "evaluate", "--modell", "x"], ["python", "scripts/bench_frozen.py", "--modell", "x"]):
        with pytest.raises(SystemExit) as stopped, monkeypatch.context() as patch:
            test_every_command_is_one_that_its_program_takes(words, tmp_path, patch, capsys)
        assert stopped.value.code == 2


@pytest.fixture(scope="module")
def settings_of_a_fit():
    """The whole configuration of `maiht fit`, nested."""
    import contextlib
    import io

    out = io.StringIO()
    config = ROOT / "configs" / "smollm2_recovery.yaml"
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        cli.main(["fit", "--config", str(config), "--print_config"])
    return yaml.safe_load(out.getvalue())


def inline_options():
    """Options that stand within sentences and tables, such as `--pruning.offload cpu`."""
    spans = [span for text in TEXTS.values() for span in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", strip_fences(text))]
    return sorted({name for span in spans for name in re.findall(r"(?<![\w-])--([a-z][\w.-]*)", span)})


def strip_fences(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def test_options_within_sentences_exist(settings_of_a_fit):
    known = {"config", "help", "print_config"}
    folder = ROOT / "src" / "maiht_lightning"
    for source in [*SCRIPTS.glob("*.py"), folder / "commands.py", *(folder / "command_line").glob("*.py")]:
        known |= set(re.findall(r"add_argument\(\s*\"--([\w-]+)", source.read_text()))
    known |= set(commands.Evaluation.__dataclass_fields__)
    # A preset's name stands for all of them.
    settings_of_a_fit["pruning"]["config"] = dict.fromkeys(maiht_lightning.MAIHTConfig.__dataclass_fields__)
    options = inline_options()
    assert len(options) > 15
    for option in options:
        if option not in known:
            try:
                setting(settings_of_a_fit, option)
            except (KeyError, TypeError):
                pytest.fail(f"there is no option --{option}")


def test_extras_files_and_links_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = "\n".join(TEXTS.values())
    named = set(re.findall(r"maiht-lightning\[(\w+)\]", text)) | set(re.findall(r"extra `(\w+)`", text))
    assert named == {"lora", "lowmem", "eval", "wandb"} <= set(extras)
    for page, content in {**TEXTS, **DEVELOPERS_TEXTS}.items():
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", content):
            assert ((ROOT / page).parent / link).exists(), (page, link)
        for path in re.findall(r"(?:configs|scripts|docs/examples)/\w+\.\w+", content):
            assert (ROOT / path).is_file(), (page, path)


# ---- Names of the code


def spans_of(text):
    """What stands between backticks within sentences."""
    return re.findall(r"`([^`]+)`", strip_fences(text))


def members_of(folder):
    """What the Python files of a folder define, by the class that defines it, and by None outside classes."""
    members = {None: set()}
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text())
        members[None] |= defined(tree.body)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                members[None].add(node.name)
                members.setdefault(node.name, set()).update(defined(node.body))
            elif isinstance(node, ast.FunctionDef):
                arguments = {argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]}
                members[None] |= {node.name, *arguments, *defined(node.body)}
    return members


def defined(body):
    """Functions, and names that are assigned to."""
    found = set()
    for node in body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_files_that_developers_are_told_of_exist():
    folders = (ROOT, PACKAGE, PACKAGE / "solvers", ROOT / "tests" / "solvers")
    seen = set()
    for page, text in DEVELOPERS_TEXTS.items():
        for span in spans_of(text):
            if re.fullmatch(r"\.?[\w/-]+(\.(py|md|toml|sh|txt|json)|/)", span) and "NAME" not in span:
                seen.add(span)
                found = any((folder / span).exists() for folder in folders)
                # Files of a run are described in docs/reference/run-folder.md.
                assert found or span in ("summary.json", "constraints.txt"), (page, span)
    assert len(seen) > 25


@pytest.mark.slow
@pytest.mark.parametrize("page", DEVELOPERS_PAGES)
def test_names_that_developers_are_told_of_exist(page):
    """Functions, classes, their methods and fields, as the sources and for CONTRIBUTING the tests define them."""
    members = members_of(PACKAGE)
    anywhere = set().union(*members.values(), METHODS)
    if page == "CONTRIBUTING.md":
        anywhere |= members_of(ROOT / "tests")[None]
    # Of other programs; a variable of a shell; a folder; the mark of a test.
    others = {"from_pretrained", "nn.Linear.weight", "PYTHON", "src", "slow"}
    checked = 0
    for span in spans_of(DEVELOPERS_TEXTS[page]):
        match = re.fullmatch(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(([\w, ]*)\))?", span)
        if match is None or match[1] in others or match[1].startswith("MAIHT_") or (ROOT / match[1]).exists():
            continue
        owner, _, name = match[1].rpartition(".")
        if name in ("py", "json", "txt", "html", "csv"):
            continue
        checked += 1
        assert name in members.get(owner, anywhere), span
        assert set(filter(None, re.split(r"[, ]+", match[2] or ""))) <= anywhere, span
    assert checked > 20


def test_the_tree_is_the_packages():
    (tree,) = re.findall(r"```\nsrc/maiht_lightning/\n(.*?)```", DEVELOPERS_TEXTS["docs/architecture.md"], re.DOTALL)
    named = re.findall(r"^  (\S+)", tree, re.MULTILINE)
    there = {path.name + "/" * path.is_dir() for path in PACKAGE.iterdir()} - {"__pycache__/", "py.typed"}
    assert len(named) == len(set(named))
    assert set(named) == there


def test_the_diagram_names_rooms():
    text = DEVELOPERS_TEXTS["docs/architecture.md"]
    (diagram,) = re.findall(r"```\n(text ──.*?)```", text, re.DOTALL)
    rooms = {room for group in re.findall(r"\(([a-z, ]+)\)", diagram) for room in group.split(", ")}
    assert rooms == {"data", "capture", "solvers", "pruning", "journal"}
    assert all((PACKAGE / room).is_dir() for room in rooms - {"journal"})


def test_every_public_name_is_that_of_its_home():
    """Also for type checkers, which read the imports that are never made."""
    (block,) = [node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If)]
    assert {node.names[0].asname: node.module for node in block.body} == maiht_lightning._HOME
    assert all(node.names[0].name == node.names[0].asname for node in block.body)
    for name, home in maiht_lightning._HOME.items():
        assert getattr(maiht_lightning, name) is getattr(importlib.import_module(f"maiht_lightning.{home}"), name)
        assert name in dir(maiht_lightning)
    for name in ("Evaluation", "count_zeros", "load_model", "load_tokenizer"):
        assert name in maiht_lightning.__all__


def test_the_package_alone_loads_nothing_heavy():
    program = "import sys, maiht_lightning; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# ---- Python


def snippet(text):
    """The only Python block that holds a text."""
    assert text in SNIPPETS
    (found,) = [block for page, block in fenced("python") if text in block]
    return found


# What the tests below know the Python blocks by.
SNIPPETS = {
    "import MAIHTPruning",
    'output_dir="runs/mine"',
    "sparse_finetune(trainer",
    "my_metric",
    "FrozenSparsity()",
    "count_zeros",
    "C4Calibration(samples=128)",
    "prune_at=",
}


def test_every_python_block_is_run_by_a_test():
    for page, block in fenced("python"):
        assert any(key in block for key in SNIPPETS), (page, block)


def half_zero(folder):
    from maiht_lightning.models.loading import load_model
    from maiht_lightning.models.sparsity import count_zeros, measured_sparsity

    return measured_sparsity(count_zeros(load_model(str(folder)))) == 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer."""
    return save_folder(tmp_path_factory.mktemp("model") / "tiny", llama_config(max_position_embeddings=512))


@pytest.fixture
def namespace(folder, tmp_path, monkeypatch):
    """What the snippets take for granted, in an empty folder with small texts and a pruned `runs/NAME/model`."""
    from maiht_lightning.models.loading import load_model

    tokenizer = byte_tokenizer()
    # The order of the windows depends on it, and in some orders steps of this size end in NaN.
    torch.manual_seed(0)

    class MyModule(OwnModule):
        def __init__(self):
            super().__init__(load_model(str(folder)).train())
            self.tokenizer, self.learning_rate = tokenizer, 1.0

        def training_step(self, batch, batch_idx):
            return super().training_step(batch["input_ids"], batch_idx)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.learning_rate)

    monkeypatch.setenv("MAIHT_DATA_DIR", str(write_texts(tmp_path / "texts")))
    monkeypatch.chdir(tmp_path)
    pruned = load_model(str(folder))
    maiht_lightning.prune(pruned, torch.randint(0, 257, (2, 16)), method="magnitude", progress=False)
    pruned.save_pretrained("runs/NAME/model")
    tokenizer.save_pretrained("runs/NAME/model")
    return {
        "my_module": MyModule(),
        "my_data": maiht_lightning.WikiText2DataModule(seqlen=32, batch_size=16),
        "tokenizer": tokenizer,
        "model": load_model(str(folder)),
        "inputs": torch.randn(200, 32, generator=torch.Generator().manual_seed(0)),
        "weight": torch.randn(16, 32, generator=torch.Generator().manual_seed(1)),
        # Where a snippet goes on from the page's text or another file.
        **{name: getattr(maiht_lightning, name) for name in ("MAIHTPruning", "SparseFinetune", "sparse_finetune")},
    }


def execute(block, names):
    exec(compile(block, "README.md", "exec"), names)


@pytest.mark.slow
def test_the_readmes_callback_prunes_and_recovers(namespace):
    execute(snippet("import MAIHTPruning"), namespace)
    (run,) = Path("runs").glob("2*")
    assert half_zero(run / "model")
    assert list(json.loads((run / "summary.json").read_text())["stages"]) == ["dense", "pruned"]
    # As the page has it, `sparse_finetune` follows the fit; this Trainer's is over.
    fit, rest = snippet("sparse_finetune(trainer").split("\n", 1)
    assert fit == "trainer.fit(my_module, my_data)"
    before = namespace["trainer"].global_step
    execute(rest, namespace)
    assert namespace["trainer"].global_step == 2 * before
    assert namespace["my_module"].learning_rate == 1e-4
    assert half_zero(run / "model_finetuned")
    assert list(json.loads((run / "summary.json").read_text())["stages"]) == ["dense", "pruned", "finetuned"]


@pytest.mark.slow
def test_the_guides_callback_prunes_into_its_folder(namespace):
    from lightning.pytorch import Trainer

    execute(snippet('output_dir="runs/mine"'), {**namespace, "Trainer": Trainer})
    assert half_zero(Path("runs/mine/model"))


@pytest.mark.slow
def test_the_readmes_own_data_are_used(namespace):
    batches = [
        {"input_ids": torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(n))} for n in (1, 2)
    ]
    names = {
        "my_metric": lambda model: {"parameters": model.num_parameters()},
        "Evaluation": maiht_lightning.Evaluation,
    }
    block = snippet("my_metric").replace("\nMAIHTPruning(", "\npruning = MAIHTPruning(output_dir='own', ")
    namespace |= {**names, "train_loader": batches, "val_loader": iter(batches)}
    execute(block, namespace)
    trainer(namespace["pruning"]).fit(namespace["my_module"], namespace["my_data"])
    assert half_zero(Path("own/model"))
    stages = json.loads(Path("own/summary.json").read_text())["stages"]
    assert [list(stages["pruned"][kind]) for kind in ("perplexity", "metrics")] == [["mine"], ["parameters"]]
    assert namespace["pruning"].run.windows.samples == 4


@pytest.mark.slow
def test_the_readmes_frozen_training_keeps_zeros(namespace):
    from lightning.pytorch import Trainer

    execute(snippet("FrozenSparsity()"), {**namespace, "Trainer": Trainer})
    (checkpoint,) = Path().glob("lightning_logs/**/*.ckpt")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    layers = [weight for name, weight in weights.items() if "_proj" in name]
    assert len(layers) == 14
    assert 2 * sum(int((weight == 0).sum()) for weight in layers) == sum(weight.numel() for weight in layers)


@pytest.mark.slow
def test_the_readmes_notebook_measures(namespace):
    block = snippet("count_zeros")
    execute(block.replace('perplexity=["wikitext2"]', 'perplexity=["wikitext2"], seqlen=32, max_windows=3'), namespace)
    weights = namespace["model"].state_dict().items()
    assert namespace["zeros"] == sum(int((weight == 0).sum()) for name, weight in weights if "_proj" in name) > 0
    found = namespace["evaluation"].measure(namespace["model"], namespace["tokenizer"]).perplexity["wikitext2"]
    windows = namespace["evaluation"].windows["wikitext2"]
    assert found == pytest.approx(perplexity_by_definition(namespace["model"], windows), rel=1e-5)


@pytest.mark.slow
def test_the_readmes_notebook_prunes(namespace):
    """With fewer and shorter windows than the page's."""
    block = snippet("C4Calibration(samples=128)")
    execute(block.replace("samples=128", "samples=4").replace("seqlen=2048", "seqlen=64"), namespace)
    assert namespace["windows"].shape == (4, 64)
    assert namespace["report"].sparsity == 0.5
    assert (namespace["result"].weight.view(16, 8, 4) == 0).sum(-1).unique().tolist() == [2]


def test_the_readmes_schedule_is_one():
    pruning = eval(snippet("prune_at="), {"MAIHTPruning": maiht_lightning.MAIHTPruning})
    steps = [(step.name, step.spec.sparsity) for step in pruning.schedule]
    assert steps == [("epoch:1", 0.3), ("epoch:2", 0.5), ("end", 0.6)]


def test_the_readmes_yaml_is_a_configuration(tmp_path, capsys):
    (block,) = [block for _, block in fenced("yaml") if "program:" not in block]
    (tmp_path / "more.yaml").write_text(block)
    base = str(ROOT / "configs" / "smollm2_wikitext2.yaml")
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", base, "--config", str(tmp_path / "more.yaml"), "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["pruning"]["evaluation"]
    assert yaml.safe_load(block)["pruning"]["evaluation"].items() <= found.items()


def test_every_public_name_stands_on_a_page_or_in_the_changelog():
    text = "\n".join(TEXTS.values()) + (ROOT / "CHANGELOG.md").read_text()
    for name in maiht_lightning.__all__:
        # What is only returned needs no mention.
        assert re.search(rf"\b{name}\b", text) or name in ("LayerResult", "PruningReport", "Perplexity"), name


# ---- Tables


def rows_after(heading):
    """The cells of the only Markdown table whose heading line begins so."""
    (text,) = [text for text in TEXTS.values() if heading in text]
    lines = text[text.index(heading) :].splitlines()[2:]
    table = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_table_of_methods_names_all_methods():
    named = [name for row in rows_after("| `method` |") for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == sorted(METHODS)


def test_the_table_of_patterns_is_true_of_a_layer():
    named = [name for row in rows_after("| `pattern` |") for name in re.findall(r"`([\w:]+)`", row[0])]
    assert named == ["unstructured", "row", "2:4", "4:8", "N:M"]
    weight, inputs = torch.randn(15, 40), torch.randn(90, 40)
    for name in (*named[:-1], "5:8"):
        sparsity = 0.43 if ":" not in name else parse_pattern(name, 0.5).sparsity
        mask = maiht_lightning.prune_layer(weight, inputs.T @ inputs, sparsity=sparsity, pattern=name).weight == 0
        if name == "unstructured":
            assert int(mask.sum()) == 258  # 0.43 · 600
        elif name == "row":
            assert mask.sum(1).tolist() == [17] * 15  # floor(17.2)
        else:
            kept, group = map(int, name.split(":"))
            assert mask.view(15, -1, group).sum(-1).unique().tolist() == [group - kept]


@pytest.mark.slow
def test_the_table_of_files_is_a_runs_folder(folder, tmp_path, monkeypatch):
    """A run with all that the table names, and nothing beside it."""
    import wandb

    monkeypatch.setenv("MAIHT_DATA_DIR", str(write_texts(tmp_path / "texts")))
    monkeypatch.chdir(tmp_path)
    options = {
        "model.name_or_path": folder,
        "data": "WikiText2DataModule",
        "data.seqlen": 32,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.limit_val_batches": 1,
        "trainer.val_check_interval": 1,
        "trainer.log_every_n_steps": 1,
        "trainer.logger": "WandbLogger",
        "trainer.logger.offline": "true",
        "pruning.method": "wanda",
        "pruning.compact": "true",
        "pruning.save_dense": "true",
        "pruning.calibration": "C4Calibration",
        "pruning.calibration.samples": 2,
        "pruning.calibration.seqlen": 32,
        "pruning.evaluation.seqlen": 32,
        "pruning.evaluation.max_windows": 2,
        "sparse_finetune.max_steps": 2,
        "output_dir": "run",
    }
    cli.main(["fit", *(str(word) for name, value in options.items() for word in (f"--{name}", value))])
    wandb.finish()
    named = {row[0].strip("`").rstrip("/") for row in rows_after("| file |")}
    there = {path.name for path in Path("run").iterdir()}
    assert named <= there
    # Lightning's checkpoint of the dense phase lies in a folder with the W&B project's name.
    rows = {path.name for path in Path("run").glob("wandb-*.jsonl")}
    assert there - named <= {"lightning_logs"} | rows
    assert list(Path("run/sparse_checkpoints").glob("*.ckpt"))
    assert list(Path("run/figures").glob("*.png"))
    summary = json.loads(Path("run/summary.json").read_text())
    assert {"method", "measured_sparsity", "stages", "seconds", "peak_memory_bytes"} <= summary.keys()
    compact = maiht_lightning.load_compact("run/model_compact").state_dict()
    finetuned = maiht_lightning.CausalLMModule("run/model_finetuned")
    finetuned.configure_model()
    assert all(torch.equal(weight, compact[name]) for name, weight in finetuned.model.state_dict().items())
    check_sections({name for row in read_run(Path("run"))[0] for name in row})


def check_sections(logged):
    """The table of what is in a W&B run names all that this one has logged, and nothing else."""
    # These need tasks, metrics of one's own, reconstruction, or rescaling.
    absent = {"mean_accuracy", "tasks/TASK/METRIC", "metrics/NAME"}
    absent |= {f"{measure}/{when}" for measure in ("block_error", "divergence") for when in ("before", "after")}
    sections = set()
    for section, content, _ in rows_after("| section |"):
        names = re.findall(r"`(\w+)`", section)
        sections |= set(names)
        for span in set(re.findall(r"`([\w/]+)`", content)) - absent:
            for name in [span] if span.split("/")[0] in names else [f"{name}/{span}" for name in names]:
                pattern = re.sub(r"[A-Z]+", ".+", name)
                # A table's are `layers.nrows` and so on.
                assert any(re.fullmatch(rf"{pattern}(\.nrows)?", each) for each in logged), name
    # The axis of the training is a name of its own.
    assert {name.split("/")[0] for name in logged if "/" in name} == sections - {"tasks"} | {"trainer"}
    alone = {name for name in logged if "/" not in name and not name.startswith("_")}
    assert alone == {"epoch", "peak_memory_bytes"}


# ---- Counts in the text


def test_products_of_the_solver():
    """131 products with the Gram matrix at 50 + 30 iterations, and two more for the relative error."""
    assert "50 + 30 iterations costs 131 products" in " ".join(TEXTS["docs/methods/maiht.md"].split())
    weight, inputs = torch.randn(64, 32), torch.randn(80, 32)
    solver = LayerSolver(inputs.T @ inputs, PruningSpec.parse(config="paper"))
    with FlopCounterMode(display=False) as all_of_it:
        result = solver.prune(weight)
    from maiht_lightning.solvers.problem import relative_error

    with FlopCounterMode(display=False) as of_the_error:
        relative_error(weight, result.weight, solver.gram)
    product = 2 * 64 * 32**2
    assert all_of_it.get_total_flops() == 133 * product
    assert of_the_error.get_total_flops() == 2 * product


def test_how_far_processes_help_with_a_block_of_llama_7b():
    page = " ".join(TEXTS["docs/guides/several-gpus.md"].split())
    assert "so that a block of LLaMA-7B is solved at most 2.3 times as fast" in page
    hidden, inner = 4096, 11008
    groups = [3 * hidden**3, hidden**3, 2 * inner * hidden**2, hidden * inner**2]
    for processes in (4, 8):
        ranks = Ranks()
        ranks.size = processes
        load = Counter()
        for owner, cost in zip(ranks.assign_by_cost(groups), groups, strict=True):
            load[owner] += cost
        assert round(sum(groups) / max(load.values()), 1) == 2.3


# ---- Figures


def number(cell):
    return float(cell.replace(",", ""))


def tables_named(name):
    """The rows of a generated table, wherever it stands, without heading and rule; none where nothing was measured."""
    found = []
    for text in TEXTS.values():
        for content in re.findall(rf"<!-- table {name} -->(.*?)<!-- end -->", text, re.DOTALL):
            lines = [line for line in content.strip().splitlines() if line.startswith("|")]
            if not lines:
                assert "Not measured" in content
            found.append([[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]])
    assert found, name
    return found


def results_of(name):
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def test_tables_without_results_say_so():
    import importlib.util

    spec = importlib.util.spec_from_file_location("render_docs", SCRIPTS / "render_docs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    used = {name for text in TEXTS.values() for name in re.findall(r"<!-- table ([\w-]+) -->", text)}
    assert used == set(script.TABLES)
    for name, (file, _) in script.TABLES.items():
        for table in tables_named(name):
            assert bool(table) == (RESULTS / file).exists(), (name, file)
    for page, text in TEXTS.items():
        assert script.rendered(text) == text, f"{page}: run scripts/render_docs.py"


# `best` without its last step.
BLOCKS = "maiht:best,rescaling_epochs=0"
LABELS = {
    "magnitude": "magnitude",
    "Wanda": "wanda",
    "SparseGPT": "sparsegpt",
    "ADMM-Grad": "admm",
    "mAIHT": "maiht",
    "mAIHT, paper": "maiht:paper",
    "mAIHT, balanced": "maiht:balanced",
    "mAIHT, best": "maiht:best",
    **{
        f"mAIHT, best, no factors{more.replace('=', ' ').replace(',', ', ')}": f"{BLOCKS}{more}"
        for more in (
            "",
            ",allocation=depth",
            ",reconstruction_epochs=0",
            ",reconstruction_epochs=0,allocation=depth",
            ",reconstruction_epochs=1,allocation=depth",
        )
    },
}
PUBLISHED = ["magnitude", "wanda", "sparsegpt", "admm", "maiht:paper"]


@pytest.mark.parametrize(
    ("name", "file"),
    [("methods", "smollm2.json"), ("more-text", "smollm2_64.json"), ("most-text", "smollm2_128.json")],
)
def test_the_tables_of_methods_are_the_results(name, file):
    found = results_of(file)
    for table in tables_named(name):
        if found is None:
            continue
        dense, *rows = table
        texts = [text for text in ("wikitext2", "c4") if text in found["dense"]["perplexity"]]
        for cell, text in zip(dense[2:], texts, strict=False):
            assert number(cell) == pytest.approx(found["dense"]["perplexity"][text], abs=0.00501)
        runs = {(run["setting"], run["method"]): run for run in found["runs"]}
        seen = set()
        for setting, method, *middle, error in rows:
            key = (setting if ":" in setting else f"{float(setting.rstrip(' %')) / 100:g}", LABELS[method])
            seen.add(key)
            for cell, text in zip(middle, texts, strict=False):
                if text not in runs[key]["perplexity"]:
                    assert not cell
                    continue
                value = runs[key]["perplexity"][text]
                assert number(cell) == pytest.approx(value, abs=0.00501 if value < 1000 else 0.501)
            assert number(error) == pytest.approx(runs[key]["mean_relative_error"], abs=0.0000501)
            accuracies = len(found["dense"].get("tasks", {})) + ("mean_accuracy" in found["dense"])
            assert len(middle) == len(texts) + accuracies
        assert seen == set(runs)
    if found is not None:
        assert all(
            run["pattern"] == "row" for run in found["runs"] if run["method"] == "wanda" and ":" not in run["setting"]
        )
        # Zeros are counted: floor(sparsity · numel) in each layer is at most a weight a layer less than asked for.
        for run in found["runs"]:
            loss = 600 if run["pattern"] == "row" else 1e5  # at most one weight a row, or a layer
            # A kept weight may be 0 by itself, as many are in a file of 4 bits: with N:M none takes its place.
            least = -1e-5 if run["pattern"] == "2:4" else 0
            assert least <= run["sparsity"] - run["measured_sparsity"] < 1 / loss, run


def test_the_figure_shows_the_results(monkeypatch):
    found = results_of("smollm2.json")
    if found is None:
        pytest.skip("docs/results/smollm2.json is not there")
    from PIL import Image

    script = load_script("render_docs", monkeypatch)
    with Image.open(ROOT / "docs" / "results-perplexity.png") as image:
        assert image.text["results"] == script.digest(found), "run scripts/render_docs.py"


def test_what_the_page_says_of_the_methods_follows_from_the_results():
    """Sentence by sentence of `What the figures show`."""
    found = results_of("smollm2.json")
    if found is None:
        pytest.skip("docs/results/smollm2.json is not there")
    perplexity = {(run["setting"], run["method"]): run["perplexity"]["wikitext2"] for run in found["runs"]}
    error = {(run["setting"], run["method"]): run["mean_relative_error"] for run in found["runs"]}
    settings = list(dict.fromkeys(run["setting"] for run in found["runs"]))
    for setting in settings:
        # From the best to the worst, as far as they were measured there.
        order = ["maiht:best", BLOCKS, "maiht:balanced", "admm", "maiht:paper", "sparsegpt", "wanda", "magnitude"]
        values = [perplexity[setting, name] for name in order if (setting, name) in perplexity]
        if setting == "0.3":
            assert max(values) < 1.003 * min(values)
            continue
        assert values == sorted(values)
        if (setting, "maiht:paper") in error:
            assert error[setting, "admm"] < error[setting, "maiht:paper"]
    untrained, uneven = (f"{BLOCKS},reconstruction_epochs=0{more}" for more in ("", ",allocation=depth"))
    assert perplexity["0.5", uneven] < perplexity["0.5", untrained]
    assert perplexity["0.5", BLOCKS] < perplexity["0.5", f"{BLOCKS},allocation=depth"]
    for one, other in ((uneven, untrained), (BLOCKS, f"{BLOCKS},allocation=depth")):
        assert perplexity["0.5", one] == pytest.approx(perplexity["0.5", other], rel=0.03)
    # What training is worth, by what there is without.
    for trained, other in ((BLOCKS, untrained), (f"{BLOCKS},allocation=depth", uneven)):
        both = [setting for setting in ("0.5", "0.7") if {(setting, trained), (setting, other)} <= perplexity.keys()]
        gains = [1 - perplexity[setting, trained] / perplexity[setting, other] for setting in both]
        assert gains == sorted(gains)
        assert min(gains) > 0


def test_what_the_page_says_of_more_text_follows_from_the_results():
    more, less = results_of("smollm2_64.json"), results_of("smollm2.json")
    if more is None or less is None:
        pytest.skip("docs/results has not both")
    assert more["settings"]["calibration"] == {**less["settings"]["calibration"], "samples": 64}
    assert less["settings"]["calibration"]["samples"] == 32
    found, before = (
        {run["method"]: run["perplexity"]["wikitext2"] for run in each["runs"] if run["setting"] == "0.7"}
        for each in (more, less)
    )
    trained = f"{BLOCKS},allocation=depth"
    gained = {method: 1 - found[method] / before[method] for method in ("admm", trained)}
    assert gained[trained] > 3 * gained["admm"] > 0
    most = results_of("smollm2_128.json")
    assert most["settings"]["calibration"] == {**less["settings"]["calibration"], "samples": C4Calibration().samples}
    # On the page of the presets: `balanced` with the most text does more than `best` with the least.
    (balanced,) = (run for run in most["runs"] if (run["setting"], run["method"]) == ("0.7", "maiht:balanced"))
    assert balanced["perplexity"]["wikitext2"] < before[BLOCKS]
    few, many = (
        {(run["setting"], run["method"]): run["perplexity"]["wikitext2"] for run in each["runs"]}
        for each in (less, most)
    )
    for (setting, method), value in many.items():
        if method in ("maiht:balanced", BLOCKS) and (setting, method) in few:
            gained, theirs = (1 - many[setting, each] / few[setting, each] for each in (method, "admm"))
            assert gained > 2 * theirs > 0
            # The project's README: further ahead of the best of the published.
            assert value / many[setting, "admm"] < few[setting, method] / few[setting, "admm"]
    for setting in ("0.5", "0.6", "0.7", "2:4"):
        values = {run["method"]: run["perplexity"] for run in most["runs"] if run["setting"] == setting}
        both = [method for method, perplexity in values.items() if "c4" in perplexity]
        if setting in ("0.6", "0.7"):
            assert set(both) <= {BLOCKS, "maiht:best"}
        else:
            assert set(both) == values.keys()
        orders = [sorted(both, key=lambda method: values[method][text]) for text in ("wikitext2", "c4")]
        assert orders[0] == orders[1]
        for method, perplexity in values.items():
            # What factors gain, on both texts.
            if method != "maiht:best" and "maiht:best" in values:
                assert all(values["maiht:best"][text] < value for text, value in perplexity.items())


@pytest.mark.parametrize(("name", "file"), [("ratios", "smollm2.json"), ("most-ratios", "smollm2_128.json")])
def test_the_table_of_ratios_is_the_results(name, file):
    found = results_of(file)
    for table in tables_named(name):
        if found is None:
            continue
        perplexity = {(run["setting"], run["method"]): run["perplexity"]["wikitext2"] for run in found["runs"]}
        assert len(table) == len({setting for setting, _ in perplexity})
        for label, name, value, *cells in table:
            setting = label if ":" in label else f"{float(label.rstrip(' %')) / 100:g}"
            best = min(perplexity[setting, entry] for entry in PUBLISHED if (setting, entry) in perplexity)
            assert perplexity[setting, LABELS[name]] == best
            assert number(value) == pytest.approx(best, abs=0.00501)
            ours = [entry for entry in ("maiht:balanced", BLOCKS, "maiht:best") if entry in {e for _, e in perplexity}]
            for cell, entry in zip(cells, ours, strict=True):
                if (setting, entry) not in perplexity:
                    assert not cell
                else:
                    assert number(cell) == pytest.approx(perplexity[setting, entry] / best, abs=0.000501)


def test_the_table_of_parts_is_the_results():
    found = results_of("ablation.json")
    for table in tables_named("ablation"):
        if found is None:
            continue
        value = {run["method"]: run["perplexity"]["wikitext2"] for run in found["runs"]}
        assert {run["setting"] for run in found["runs"]} == {"0.7"}
        assert len(table) == len(value)
        for (label, shown, ratio), (entry, each) in zip(table, value.items(), strict=True):
            # The words of the entry, as the command has them.
            words = label.removeprefix("mAIHT, ").replace("no factors", "rescaling_epochs=0")
            assert words.replace(", ", ",").replace(" ", "=") == entry.removeprefix("maiht:")
            assert number(shown) == pytest.approx(each, abs=0.00501)
            assert number(ratio) == pytest.approx(each / value["maiht:paper"], abs=0.000501)


def test_what_the_page_says_of_parts_follows_from_the_results():
    found = results_of("ablation.json")
    if found is None:
        pytest.skip("docs/results/ablation.json is not there")
    value = {run["method"].removeprefix("maiht:"): run["perplexity"]["wikitext2"] for run in found["runs"]}
    trained = "paper,reconstruction_epochs=4"
    assert {entry for entry, each in value.items() if each > value["paper"]} == {"paper,sublayers=true"}
    assert value["paper,allocation=depth"] < value["paper"]
    best = BLOCKS.removeprefix("maiht:")
    untrained = f"{best},reconstruction_epochs=0,allocation=depth"
    assert value[best] < value[trained] < value[f"{best},allocation=depth"] < value["balanced"] < value[untrained]
    assert value[untrained] < value["paper"]
    # Training is worth most of what one part does.
    assert value[trained] == min(each for entry, each in value.items() if entry.startswith("paper"))
    assert found["settings"] == results_of("smollm2.json")["settings"]


def test_the_table_of_layer_errors_is_the_results():
    found = results_of("layer_error.json")
    for table in tables_named("layer-errors"):
        if found is None:
            continue
        for label, *cells in table:
            entry = "reference" if label == "float64 reference" else f"maiht:{label[7:]}" if "," in label else None
            entry = entry or LABELS[label]
            rows = [row for row in found["rows"] if row["set"] == "set-aside"]
            for cell, setting in zip(cells, dict.fromkeys(row["setting"] for row in rows), strict=False):
                logs = [
                    log(row["errors"][entry] / row["errors"]["maiht:paper"])
                    for row in rows
                    if row["setting"] == setting
                ]
                assert number(cell) == pytest.approx(exp(sum(logs) / len(logs)), abs=0.000501)


def test_what_the_page_says_of_layers_follows_from_the_results():
    found = results_of("layer_error.json")
    if found is None:
        pytest.skip("docs/results/layer_error.json is not there")
    gains = {}
    for row in found["rows"]:
        errors = row["errors"]
        assert errors["maiht:accurate"] < errors["reference"] < errors["maiht:paper"], row
        gains.setdefault(row["layer"], []).append(errors["maiht:accurate"] / errors["maiht:paper"])
    ordered = sorted(gains, key=lambda layer: sum(gains[layer]))
    assert len(ordered) == 20
    assert {layer for layer in ordered if layer.endswith("o_proj")} <= set(ordered[:5])


@pytest.mark.parametrize("name", ["solver-speed", "solver-speed-large"])
def test_the_tables_of_times_are_the_results(name):
    found = results_of(f"{name.replace('-', '_')}.json")
    for table in tables_named(name):
        if found is None:
            continue
        assert len(table) == len(found["rows"])
        for cells, row in zip(table, found["rows"], strict=True):
            layer, shape, iterations, method, ratio, error = cells
            assert (layer, shape) == (row["layer"], " × ".join(map(str, row["shape"])))
            assert LABELS.get(method, method) == row["method"]
            settings = found["settings"]
            assert iterations == f"{settings['iterations']} + {settings['refine_iterations']}"
            assert number(ratio) == pytest.approx(row["times_bare_products"], abs=0.00501)
            assert number(error) == pytest.approx(row["relative_error"], abs=0.0000501)
        by_method = {(row["layer"], row["method"]): row["times_bare_products"] for row in found["rows"]}
        for (layer, method), ratio in by_method.items():
            # What the page says beside the table: ADMM-Grad takes less time than mAIHT, a naive mAIHT more.
            if method == "admm":
                assert ratio < by_method[layer, "maiht"]
            if method == "naive mAIHT":
                assert ratio > by_method[layer, "maiht"]


def test_the_tables_of_recovery_and_of_frozen_zeros_are_the_results():
    found = results_of("recovery.json")
    for table in tables_named("recovery"):
        for cells, run in zip(table, (found or {}).values(), strict=True):
            for cell, stage in zip(cells[1:], ("dense", "pruned", "finetuned"), strict=True):
                assert number(cell) == pytest.approx(run[stage]["wikitext2"], abs=0.00501)
            # Recovery works, and keeps the zeros.
            assert run["dense"]["wikitext2"] < run["finetuned"]["wikitext2"] < run["pruned"]["wikitext2"]
            assert run["settings"]["sparsity"] == 0.6
            assert 0 <= 0.6 - run["measured_sparsity"] < 1e-5
    found = results_of("frozen.json")
    for table in tables_named("frozen"):
        for cells in table:
            assert number(cells[2]) == found["results"]["frozen_weights"]
            assert number(cells[3]) == pytest.approx(100 * found["results"]["share_of_a_step"], abs=0.0501)


def test_no_measured_figure_stands_outside_the_generated_tables():
    """A decimal number in a sentence would be a figure without its file."""
    allowed = {"2.0", "2.3", "3.11"}  # the licence; processes, counted above; Python
    for page, text in TEXTS.items():
        prose = re.sub(r"<!-- table .*?<!-- end -->", "", strip_fences(text), flags=re.DOTALL)
        prose = re.sub(r"`[^`]*`|\]\([^)]*\)|arXiv [\d.]+", "", prose)
        assert set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\.\d)", prose)) <= allowed, page


def test_results_name_no_folder_of_a_machine():
    for path in RESULTS.glob("*.json"):
        assert not re.search(r'"(/|~)|/(home|root|tmp|work)/', path.read_text()), path
