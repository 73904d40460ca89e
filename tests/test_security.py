"""What a user was given is data: no pickle of it is opened, no code in it is run, and no name in it is markup."""

import ast
import json
import pickle
from pathlib import Path

import pytest
import torch

from helpers.byte_model import byte_tokenizer, llama_config, save_folder
from helpers.html_page import Page
from maiht_lightning import load_compact, load_model, load_tokenizer, prune, save_compact
from maiht_lightning.cli import main
from maiht_lightning.estimate.shape import ModelShape
from maiht_lightning.models.compact_index import CompactFileError
from maiht_lightning.reporting.comparison.rows import comparison, write_comparison
from maiht_lightning.reporting.comparison.runs import read_run
from maiht_lightning.reporting.run.page import write_page
from maiht_lightning.reporting.summary import Summary
from maiht_lightning.training.sparse_finetune import saved_pruning

ROOT = Path(__file__).parents[1]
EVIL = "<script>alert('&')</script>"


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.fixture
def evil(tmp_path):
    """The file that must not appear, and what makes it appear."""
    mark = tmp_path / "code was run"
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()  # so that the tests could fail
    mark.unlink()
    yield mark, Evil(mark)
    assert not mark.exists()


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_folder(tmp_path / "tiny")
    return [
        *("--model.name_or_path", "tiny", "--data", "PythonDocsDataModule", "--data.init_args.seqlen", "32"),
        *("--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.max_steps", "1"),
        *("--pruning.calibration", "PythonDocsCalibration", "--pruning.calibration.samples", "2"),
        *("--pruning.calibration.seqlen", "32", "--pruning.evaluation.perplexity", "[]", "--output_dir", "out"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "prune", "validate", "test"])
def test_checkpoints_are_not_unpickled(command, evil, options):
    _, bomb = evil
    torch.save({"state_dict": {}, "callbacks": {}, "bomb": bomb}, "given.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        main([command, *options, "--ckpt_path", "given.ckpt"])


def test_checkpoints_are_not_unpickled_to_see_what_they_are(evil, tmp_path):
    _, bomb = evil
    torch.save({"callbacks": {}, "bomb": bomb}, tmp_path / "given.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        saved_pruning(str(tmp_path / "given.ckpt"))


def test_weights_in_pickles_are_not_unpickled(evil, tmp_path):
    _, bomb = evil
    llama_config().save_pretrained(tmp_path / "model")
    torch.save({"bomb": bomb}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises((OSError, ValueError, pickle.UnpicklingError)):
        load_model(str(tmp_path / "model"))


@pytest.fixture
def with_code(evil, tmp_path, monkeypatch):
    """A folder whose config names Python files beside it."""
    mark, _ = evil
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever is asked says yes
    folder = tmp_path / "with code"
    folder.mkdir()
    classes = {
        "AutoConfig": "given.Given",
        "AutoModelForCausalLM": "given.Given",
        "AutoTokenizer": ["given.Given", None],
    }
    config = {"model_type": "given", "architectures": ["Given"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Given", "auto_map": classes}))
    (folder / "given.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Given: pass\n")
    return folder


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: load_model(str(folder)),
        lambda folder: load_model(str(folder / "config.json")),
        lambda folder: load_model(str(folder), blocks_on_disk=True),
        lambda folder: load_tokenizer(str(folder)),
        lambda folder: ModelShape.from_source(str(folder)),
    ],
    ids=["model", "config", "disk", "tokenizer", "estimate"],
)
def test_python_beside_the_weights_is_not_run(with_code, load):
    with pytest.raises((ValueError, OSError)):
        load(with_code)


def test_python_beside_compact_files_is_not_run(with_code, tiny_llama, tmp_path):
    model = tiny_llama(vocab_size=64)
    prune(model, torch.randint(64, (1, 8)), method="magnitude", progress=False)
    folder = save_compact(model, tmp_path / "compact", tokenizer=byte_tokenizer())
    for file in with_code.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    index = json.loads((folder / "compact.json").read_text())
    (folder / "compact.json").write_text(json.dumps({**index, "files": {}}))
    with pytest.raises(CompactFileError, match=r"config\.json gives no model"):
        load_compact(folder)


@pytest.mark.slow
def test_yaml_makes_no_objects(evil, options, capsys):
    mark, _ = evil
    Path("run.yaml").write_text(f"seed_everything: !!python/object/apply:pathlib.Path.touch [{str(mark)!r}]\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "run.yaml", *options])


def run_folder(folder, config):
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    (folder / "layers.csv").write_text(f"name,relative_error\n{EVIL},0.1\n")
    stages = {stage: {"perplexity": {EVIL: 5.0}, "tasks": {EVIL: {"acc": 0.5}}} for stage in ("dense", "pruned")}
    summary = {"method": EVIL, "sparsity": 0.5, "pattern": "unstructured", "measured_sparsity": 0.5, "stages": stages}
    (folder / "summary.json").write_text(json.dumps({**summary, "seconds": {EVIL: 1.0}, "peak_memory_bytes": 1}))
    return folder


def test_the_configuration_of_a_run_makes_no_objects(evil, tmp_path):
    mark, _ = evil
    folder = run_folder(tmp_path / "run", f"model: !!python/object/apply:pathlib.Path.touch [{str(mark)!r}]\n")
    with pytest.raises(ValueError, match="cannot be read"):
        read_run(folder)


def test_pages_hold_names_and_no_markup(tmp_path):
    """Of models, methods, texts, tasks, layers, phases and settings, in a run's page and in that of several."""
    folder = run_folder(tmp_path / EVIL.replace("/", "_"), json.dumps({"model": {"name_or_path": EVIL, EVIL: EVIL}}))
    written = write_comparison(tmp_path / "comparison", comparison([read_run(folder)]))
    settings = {"model": EVIL, EVIL: {EVIL: [EVIL]}}
    single = write_page(tmp_path, Summary.read(folder), [], {}, settings, {EVIL: EVIL}, f"maiht {EVIL}")
    for path in (written, single):
        text = path.read_text()
        assert "&lt;script&gt;alert" in text
        assert "<script" not in text
        assert "script" not in Page(text).tags


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


@pytest.mark.parametrize(
    "path", [p for folder in ("src", "scripts", "docs") for p in sorted((ROOT / folder).rglob("*.py"))], ids=str
)
def test_the_sources_open_nothing_that_runs_code(path):
    tree = ast.parse(path.read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not modules & {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
    for name, keywords in calls(tree):
        assert name != "torch.load" or keywords.get("weights_only") == "True"
        assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system")
        assert keywords.get("trust_remote_code", "False") == "False"
        assert keywords.get("allow_pickle", "False") == "False"
        assert keywords.get("shell", "False") == "False"
