"""`maiht doctor`: what is here, what is missing and the command for it; never a failure without a network."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError, requires, version

import pytest

from helpers.terminal import maiht
from maiht_lightning.cli import main
from maiht_lightning.command_line import environment_checks

# Nothing listens there.
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9", "WANDB_BASE_URL": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}


@pytest.mark.slow
def test_all_is_told_without_a_network(tmp_path):
    done = maiht("doctor", "--json", cwd=tmp_path, warm=True, MAIHT_DATA_DIR="", WANDB_MODE="", **NOWHERE)
    assert (done.status, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["pruning_works"] is True
    assert found["problems"] == []
    for name in ("torch", "lightning", "transformers"):
        assert found["versions"][name] == version(name)
    assert "cores, 1 threads" in found["devices"]["processor"]
    assert "GiB free" in found["devices"]["memory"]
    assert str(tmp_path) in found["disk"]["disk"]
    assert "not set" in found["data"]["MAIHT_DATA_DIR"]
    assert "http://127.0.0.1:9 not reached" in found["network"]["Hugging Face hub"]
    assert "--trainer.logger.offline true" in found["network"]["W&B"]
    assert [each["extra"] for each in found["features"]] == ["gguf", "eval", "lora", "lowmem", "wandb"]


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [False, True])
def test_the_same_is_shown_to_people(terminal, tmp_path):
    done = maiht("doctor", cwd=tmp_path, terminal=terminal, warm=True, **NOWHERE)
    assert done.status == 0
    lines = done.out.replace("\r\n", "\n").splitlines()
    assert lines[-1] == "Pruning can work here."
    assert lines[0].split() == ["maiht-lightning", version("maiht-lightning")]
    assert any(line.startswith("torch ") and line.split()[1] == version("torch") for line in lines)
    if not terminal:
        # Each thing is a line, to be searched for.
        assert any(line.startswith("Hugging Face hub") and "not reached" in line for line in lines)


@pytest.fixture
def shown(monkeypatch, capsys):
    """Run the doctor in this process: its exit status and what it found."""
    for name, value in NOWHERE.items():
        monkeypatch.setenv(name, value)

    def look(*options):
        with pytest.raises(SystemExit) as stopped:
            main(["doctor", *options])
        return stopped.value.code, capsys.readouterr().out

    return look


def replace_versions(monkeypatch, **changed):
    def found(name):
        if changed.get(name, "") is None:
            raise PackageNotFoundError(name)
        return changed.get(name) or version(name)

    monkeypatch.setattr(environment_checks, "version", found)


@pytest.mark.slow
def test_an_extra_that_is_missing_has_its_command_and_is_no_failure(shown, monkeypatch):
    replace_versions(monkeypatch, peft=None, torchao="0.1")
    status, text = shown()
    assert status == 0
    lines = {line.partition("  ")[0]: line for line in text.splitlines()}
    assert lines["LoRA on a pruned model"].endswith("missing; pip install 'maiht-lightning[lora]'")
    assert lines["8-bit optimizer for large models"].endswith("missing; pip install 'maiht-lightning[lowmem]'")
    listed = {each["extra"]: each for each in json.loads(shown("--json")[1])["features"]}
    assert listed["lora"]["missing"] == ["peft (missing)"]
    assert listed["lowmem"]["missing"] == ["torchao (found 0.1)"]
    assert listed["gguf"]["ready"] == (listed["gguf"]["missing"] == [])


@pytest.mark.slow
@pytest.mark.parametrize(("found", "told"), [(None, "missing"), ("4.0", "found 4.0")])
def test_what_pruning_needs_is_a_failure(shown, monkeypatch, found, told):
    replace_versions(monkeypatch, transformers=found)
    status, text = shown()
    assert status == 1
    (problem,) = [line for line in text.splitlines() if line.startswith("Problem: transformers")]
    assert problem.endswith(f": {told}")
    (requirement,) = [each for each in requires("maiht-lightning") if each.startswith("transformers")]
    assert f"  pip install '{requirement}'" in text.splitlines()
    assert text.splitlines()[-1] == "Pruning cannot work here: see the problems."


@pytest.mark.slow
def test_a_layer_that_cannot_be_pruned_is_a_failure(shown, monkeypatch):
    def broken(*_):
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr("maiht_lightning.solvers.prune_layer", broken)
    status, text = shown("--json")
    assert status == 1
    (problem,) = json.loads(text)["problems"]
    assert problem["what"] == "a small layer cannot be pruned: RuntimeError: illegal instruction"


def test_what_is_in_a_cache_is_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("MAIHT_CACHE_DIR", str(tmp_path / "cache"))
    for words in ("made when it is needed", "1 entry, ", "2 entries, "):
        if words[0].isdigit():
            (tmp_path / "cache" / words[0]).mkdir(parents=True)
        assert f"{tmp_path / 'cache'}, {words}" in environment_checks.caches()["cache of maiht"]


def test_too_few_zeros_are_a_failure(monkeypatch):
    import torch

    class Result:
        weight = torch.ones(16, 32)

    monkeypatch.setattr("maiht_lightning.solvers.prune_layer", lambda *_: Result)
    with pytest.raises(RuntimeError, match="0 of 512 weights are zero"):
        environment_checks.try_pruning()


@pytest.mark.slow
def test_a_library_that_cannot_be_loaded_is_told(tmp_path):
    (tmp_path / "lightning").mkdir()
    (tmp_path / "lightning" / "__init__.py").write_text("raise ImportError('a broken wheel')\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from maiht_lightning.cli import main; main(['doctor'])"
    )
    done = maiht(program=("-c", program), **NOWHERE)
    assert done.status == 1
    assert "Problem: a small layer cannot be pruned: ImportError: a broken wheel" in done.out
    assert "pip install --force-reinstall" in done.out


class Server(BaseHTTPRequestHandler):
    """Answers every request with an error, as a server does that wants to know who asks."""

    def do_HEAD(self):
        """Refuse."""
        self.send_response(401)
        self.end_headers()

    def log_message(self, *_):
        """Say nothing."""


def test_a_server_that_answers_is_reached_and_offline_is_a_choice(monkeypatch):
    from maiht_lightning.command_line.network_checks import reachable

    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.delenv("WANDB_MODE", raising=False)
        assert reachable() == {"Hugging Face hub": f"{address} reached", "W&B": f"{address} reached"}
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("WANDB_MODE", "offline")
        found = reachable()
        assert found["Hugging Face hub"].startswith("offline, as HF_HUB_OFFLINE says")
        assert found["W&B"] == "offline, as WANDB_MODE says"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_server_that_is_silent_is_not_waited_for(monkeypatch):
    import socket

    from maiht_lightning.command_line import network_checks

    monkeypatch.setattr(network_checks, "TIMEOUT", 0.2)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", address)
        assert network_checks.reachable()["W&B"].startswith(f"{address} not reached (timed out")


@pytest.mark.parametrize("kind", ["unset", "absent", "partial"])
def test_the_data_folder(kind, tmp_path, monkeypatch):
    if kind == "unset":
        monkeypatch.delenv("MAIHT_DATA_DIR", raising=False)
    elif kind == "absent":
        monkeypatch.setenv("MAIHT_DATA_DIR", str(tmp_path / "nowhere"))
    else:
        (tmp_path / "wikitext2").mkdir()
        for split in ("train", "test"):
            (tmp_path / "wikitext2" / f"{split}.parquet").touch()
        monkeypatch.setenv("MAIHT_DATA_DIR", str(tmp_path))
    told = environment_checks.data_folder()["MAIHT_DATA_DIR"]
    expected = {
        "unset": "not set: ",
        "absent": f"{tmp_path / 'nowhere'} is no folder",
        "partial": f"{tmp_path}, without c4/train.jsonl.gz, c4/validation.jsonl.gz, tasks",
    }
    assert told.startswith(expected[kind])


def test_extras_are_those_of_the_package():
    import tomllib

    from helpers.terminal import ROOT

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(environment_checks.FEATURES) == set(extras) - {"dev", "docs"}  # for those who change the package
    assert sys.version_info >= (3, 11)
