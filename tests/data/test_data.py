import gzip
import json
import random
import warnings
from itertools import combinations, count
from types import SimpleNamespace

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from maiht_lightning.data.c4 import C4Calibration, crop_windows, shuffled
from maiht_lightning.data.calibration import CalibrationSource
from maiht_lightning.data.local import local_copy
from maiht_lightning.data.module import TextDataModule
from maiht_lightning.data.python_docs import PythonDocsCalibration, PythonDocsDataModule
from maiht_lightning.data.sources import iterate_texts, load_texts, python_docs_texts
from maiht_lightning.data.wikitext2 import WikiText2DataModule
from maiht_lightning.data.windows import cut_windows, evaluation_windows, pack_windows
from maiht_lightning.pruning.pruner import check_windows


class Bytes:
    """A tokenizer with a token a byte, one in front of every text, and a count of its calls."""

    eos_token = "\x03"
    bos_token = None

    def __init__(self):
        self.seen = []

    def __call__(self, text, verbose=True):
        self.seen.append(text)
        return {"input_ids": [256, *text.encode()]}


def write_c4(folder, texts, split="train"):
    (folder / "c4").mkdir(exist_ok=True)
    with gzip.open(folder / "c4" / f"{split}.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text, "url": "u"}) + "\n" for text in texts)


@pytest.fixture
def corpus(tmp_path, monkeypatch, no_hub):
    """A function that makes its texts the local C4."""
    monkeypatch.setenv("MAIHT_DATA_DIR", str(tmp_path))
    return lambda texts, split="train": write_c4(tmp_path, texts, split)


@pytest.fixture
def hub(monkeypatch):
    """Answers `load_dataset` with three texts; a list of the calls' arguments."""
    monkeypatch.delenv("MAIHT_DATA_DIR", raising=False)
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": ["one", "", "three"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


# --- local copies ---


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variable_there_is_no_local_copy(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("MAIHT_DATA_DIR", raising=False)
    else:
        monkeypatch.setenv("MAIHT_DATA_DIR", value)
    assert local_copy("c4/train.jsonl.gz") is None


def test_local_copy_is_the_file_below_the_folder(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("x")
    monkeypatch.setenv("MAIHT_DATA_DIR", str(tmp_path))
    assert local_copy("text.txt") == tmp_path / "text.txt"


def test_a_missing_folder_or_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MAIHT_DATA_DIR", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=rf"MAIHT_DATA_DIR.*{tmp_path}/absent:.*unset"):
        local_copy("c4/train.jsonl.gz")
    monkeypatch.setenv("MAIHT_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"MAIHT_DATA_DIR.*{tmp_path}/c4/train.jsonl.gz:.*unset"):
        local_copy("c4/train.jsonl.gz")


# --- windows ---


@given(st.integers(0, 60), st.integers(1, 9), st.none() | st.integers(1, 8))
def test_windows_are_the_stream_in_order_without_its_tail(length, seqlen, samples):
    ids = list(range(length))
    whole = length // seqlen
    if whole < (samples or 1):
        with pytest.raises(ValueError, match=rf"must fill {samples or 1} window.*but found {length} tokens"):
            cut_windows(ids, seqlen, samples)
        return
    windows = cut_windows(ids, seqlen, samples)
    assert windows.dtype == torch.long
    assert windows.shape == (samples or whole, seqlen)
    assert windows.flatten().tolist() == ids[: windows.numel()]


@settings(deadline=None)
@given(st.lists(st.text("ab\n", max_size=12), max_size=20), st.integers(1, 6), st.integers(1, 9))
def test_reading_only_as_far_as_needed_gives_the_same_windows(texts, samples, seqlen):
    ids = Bytes()("|".join(texts))["input_ids"]
    if len(ids) < samples * seqlen:
        with pytest.raises(ValueError, match=f"found {len(ids)} tokens"):
            pack_windows(texts, Bytes(), seqlen, samples=samples, separator="|")
    else:
        windows = pack_windows(iter(texts), Bytes(), seqlen, samples=samples, separator="|")
        assert windows.flatten().tolist() == ids[: samples * seqlen]


def test_samples_of_an_endless_source_are_found():
    windows = pack_windows((f"text {number}" for number in count()), Bytes(), 10, samples=7)
    assert windows.shape == (7, 10)


def test_default_separator_is_eos_else_bos_else_a_blank_line():
    tokenizer = Bytes()
    for eos, bos, expected in [("E", "B", "aEb"), (None, "B", "aBb"), (None, None, "a\n\nb")]:
        tokenizer.eos_token, tokenizer.bos_token = eos, bos
        pack_windows(["a", "b"], tokenizer, 2)
        assert tokenizer.seen[-1] == expected


def test_windows_with_a_real_tokenizer(tokenizer):
    texts = ["The first text.", "", "A second one, longer than the first."]
    ids = tokenizer("\n\n".join(texts))["input_ids"]
    windows = pack_windows(texts, tokenizer, 5, separator="\n\n")
    assert windows.tolist() == [ids[start : start + 5] for start in range(0, len(ids) - 4, 5)]
    packed = pack_windows(texts, tokenizer, 3, samples=2)
    assert packed.flatten().tolist() == tokenizer(tokenizer.eos_token.join(texts))["input_ids"][:6]


def test_no_warning_about_the_length(tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(tokenizer, "model_max_length", 4)
    with caplog.at_level("WARNING"):
        pack_windows(["one two three four five six seven"], tokenizer, 2)
    assert not caplog.records


# --- texts by name ---


@pytest.mark.slow
def test_wikitext2_is_the_exact_copy(real_data, no_hub, tokenizer):
    lines = load_texts("wikitext2", "validation")
    assert len(lines) == 3760
    windows = evaluation_windows("wikitext2", tokenizer, 64, max_windows=3)
    test = "\n\n".join(load_texts("wikitext2", "test"))
    assert windows.flatten().tolist() == tokenizer(test[:2000])["input_ids"][: 3 * 64]


@pytest.mark.slow
def test_wikitext2_evaluation_takes_all_whole_windows(local_data, tokenizer):
    ids = tokenizer("\n\n".join(load_texts("wikitext2", "test")))["input_ids"]
    windows = evaluation_windows("wikitext2", tokenizer, 2048)
    assert windows.shape == (len(ids) // 2048, 2048)
    assert windows.flatten().tolist() == ids[: windows.numel()]


def test_c4_evaluation_is_the_first_documents_joined_by_spaces(corpus):
    corpus([f"document {number:04d}" for number in range(1500)], "validation")
    windows = evaluation_windows("c4", Bytes(), 30)
    assert windows.shape == (256, 30)
    tokenizer = Bytes()
    evaluation_windows("c4", tokenizer, 30, max_windows=2)
    assert tokenizer.seen[0].startswith("document 0000 document 0001 ")
    assert tokenizer.seen[0].endswith(" document 1099")


def test_python_docs_evaluation_is_the_text_held_out():
    ids = Bytes()("\n\n".join(python_docs_texts("heldout")))["input_ids"]
    windows = evaluation_windows("python_docs", Bytes(), 500)
    assert windows.tolist() == [ids[start : start + 500] for start in range(0, len(ids) - 499, 500)]
    assert torch.equal(evaluation_windows("python_docs", Bytes(), 500, max_windows=7), windows[:7])


def test_a_text_file_is_one_text(tmp_path):
    file = tmp_path / "story.txt"
    file.write_text("Grüße " * 10, encoding="utf-8")
    assert load_texts(str(file), "train") == ["Grüße " * 10]
    assert len(evaluation_windows(str(file), Bytes(), 8)) == 10
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        load_texts(str(tmp_path / "absent.txt"), "train")


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("ptb", "test", "text must be one of wikitext2, c4, python_docs.*but found 'ptb'"),
        ("wikitext2", "heldout", "split of wikitext2 must be one of train, validation, test, but found 'heldout'"),
        ("c4", "test", "split of c4 must be one of train, validation, but found 'test'"),
        ("python_docs", "dev", "split of python_docs must be one of .*train.*but found 'dev'"),
    ],
)
def test_unknown_names_and_splits_are_refused_before_anything_is_read(name, split, message, no_hub):
    with pytest.raises(ValueError, match=message):
        iterate_texts(name, split)


def test_max_windows_below_one_is_refused():
    with pytest.raises(ValueError, match="max_windows must be at least 1, but found 0"):
        evaluation_windows("python_docs", Bytes(), 8, max_windows=0)


def test_a_text_shorter_than_a_window_is_refused(tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("short")
    with pytest.raises(ValueError, match=r"must fill 1 window.*seqlen=512.*but found 6 tokens"):
        evaluation_windows(str(file), Bytes(), 512)


def test_wikitext2_from_the_hub(hub):
    assert load_texts("wikitext2", "test") == ["one", "", "three"]
    assert hub == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]


@pytest.mark.parametrize(
    ("split", "shard"),
    [
        ("train", "en/c4-train.00000-of-01024.json.gz"),
        ("validation", "en/c4-validation.00000-of-00008.json.gz"),
    ],
)
def test_c4_from_the_hub_is_one_shard_streamed(hub, split, shard):
    assert load_texts("c4", split) == ["one", "", "three"]
    assert hub == [(("allenai/c4",), {"data_files": {split: shard}, "split": split, "streaming": True})]


def test_a_hub_that_fails_points_to_local_copies(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.delenv("MAIHT_DATA_DIR", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConnectionError) as failure:
        load_texts("wikitext2", "test")
    assert "MAIHT_DATA_DIR" in failure.value.__notes__[0]


# --- the Python reference ---

SPLITS = ("train", "calibration", "heldout")


def test_python_docs_splits_share_no_topic_and_no_paragraph():
    def paragraphs(split):
        return [" ".join(paragraph.split()) for text in python_docs_texts(split) for paragraph in text.split("\n\n")]

    def titles(split):
        return [text.split("\n", 1)[0] for text in python_docs_texts(split)]

    for first, second in combinations(SPLITS, 2):
        assert not set(titles(first)) & set(titles(second))
        common = set(paragraphs(first)) & set(paragraphs(second))
        assert all(len(paragraph) < 80 for paragraph in common)
    for split in SPLITS:
        long = [paragraph for paragraph in paragraphs(split) if len(paragraph) >= 80]
        assert len(long) == len(set(long))


def test_python_docs_splits_are_large_enough(tokenizer):
    tokens = {split: len(tokenizer("\n\n".join(python_docs_texts(split)))["input_ids"]) for split in SPLITS}
    assert tokens["train"] >= 50_000
    assert tokens["calibration"] >= 20_000
    assert tokens["heldout"] >= 15_000


def test_python_docs_aliases_and_copies():
    assert python_docs_texts("validation") == python_docs_texts("test") == python_docs_texts("heldout")
    python_docs_texts("train").clear()
    assert python_docs_texts("train")


def test_python_docs_calibration(tokenizer):
    source = PythonDocsCalibration()
    windows = source.windows(tokenizer, 2048)
    assert windows.shape == (64, 256)
    assert (windows == tokenizer.eos_token_id).any()
    check_windows(windows, model_padding_with(tokenizer.eos_token_id))
    assert torch.equal(windows, source.windows(tokenizer, 8))
    assert not torch.equal(windows, PythonDocsCalibration(seed=1).windows(tokenizer, 2048))
    assert PythonDocsCalibration(samples=3, seqlen=None).windows(tokenizer, 40).shape == (3, 40)
    with pytest.raises(ValueError, match=r"must fill 64 window\(s\) of seqlen=2048.*fewer samples"):
        PythonDocsCalibration(seqlen=2048).windows(tokenizer, 256)


def test_python_docs_train_helps_heldout():
    """Heldout words are mostly known from train: the splits are of one kind."""
    train = set(" ".join(python_docs_texts("train")).lower().split())
    heldout = " ".join(python_docs_texts("heldout")).lower().split()
    assert sum(word in train for word in heldout) / len(heldout) > 0.8


# --- C4 ---

LONG = [f"<{name}>" + "".join(f"{name}{place:03d}." for place in range(40)) for name in "pqrstu"]  # 203 bytes
SHORT = [f"short document {number}" for number in range(30)]


def text_of(windows):
    return [bytes(row).decode() for row in windows.tolist()]


@pytest.mark.parametrize("sampling", ["wanda", "packed"])
def test_the_seed_decides_the_windows(corpus, sampling):
    corpus(SHORT + LONG)
    source = C4Calibration(4, 50, sampling, seed=3)
    state = random.getstate(), torch.random.get_rng_state()
    windows = source.windows(Bytes(), 99)
    assert random.getstate() == state[0]
    assert torch.equal(torch.random.get_rng_state(), state[1])
    assert windows.shape == (4, 50)
    assert windows.dtype == torch.long
    random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(windows, source.windows(Bytes(), 99))
    assert torch.equal(windows, C4Calibration(4, 50, sampling, seed=3).windows(Bytes(), 99))
    assert not torch.equal(windows, C4Calibration(4, 50, sampling, seed=4).windows(Bytes(), 99))


def test_the_length_is_the_callers_unless_given(corpus):
    corpus(LONG)
    assert C4Calibration(2).windows(Bytes(), 30).shape == (2, 30)
    assert C4Calibration(2, seqlen=20).windows(Bytes(), 30).shape == (2, 20)


def test_wanda_crops_one_window_from_each_of_different_long_documents(corpus):
    corpus(SHORT + LONG)
    windows = C4Calibration(6, 60).windows(Bytes(), 0)
    assert all(sum(crop in text for text in LONG) == 1 for crop in text_of(windows))
    assert {next(text for text in LONG if crop in text) for crop in text_of(windows)} == set(LONG)


def test_wanda_tokenizes_no_more_than_it_needs(corpus):
    corpus(SHORT + LONG)
    tokenizer = Bytes()
    C4Calibration(2, 60).windows(tokenizer, 0)
    assert len(tokenizer.seen) == 2


def test_wanda_crops_few_long_documents_again_elsewhere(corpus):
    corpus(SHORT + LONG[:2])
    with pytest.warns(UserWarning, match="only 2 of 32 documents are longer than 60 tokens"):
        windows = C4Calibration(10, 60).windows(Bytes(), 0)
    assert len({tuple(row) for row in windows.tolist()}) > 5


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(2, 20), st.integers(1, 6))
def test_crops_come_from_documents_longer_than_the_window(lengths, seqlen, samples):
    texts = [chr(97 + number) * length for number, length in enumerate(lengths)]
    longer = sum(length + 1 > seqlen for length in lengths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not longer:
            with pytest.raises(ValueError, match=f"found 0 among {len(texts)} documents"):
                crop_windows(texts, Bytes(), seqlen, samples=samples, rng=random.Random(0))
            return
        windows = crop_windows(texts, Bytes(), seqlen, samples=samples, rng=random.Random(0))
    assert windows.shape == (samples, seqlen)
    assert len({row[-1] for row in windows.tolist()}) == min(samples, longer)


def test_a_corpus_without_long_documents_is_looked_at_once_and_not_tokenized(corpus):
    corpus(SHORT * 100)
    tokenizer = Bytes()
    with pytest.raises(ValueError, match="but found 0 among 3000 documents: use sampling: packed"):
        C4Calibration(128, 2048).windows(tokenizer, 0)
    assert tokenizer.seen == []


def test_packed_is_whole_documents_end_to_end(corpus):
    corpus(SHORT)
    windows = C4Calibration(5, 20, "packed").windows(Bytes(), 0)
    stream = windows.flatten().tolist()
    assert stream[0] == 256
    documents = bytes(stream[1:]).decode().split("\x03")
    assert set(documents[:-1]) <= set(SHORT)
    assert documents[:-1] != SHORT[: len(documents) - 1]
    with pytest.raises(ValueError, match=r"must fill 99 window\(s\) of seqlen=20 tokens \(1980 tokens\), but found"):
        C4Calibration(99, 20, "packed").windows(Bytes(), 0)


def model_padding_with(token):
    """A model as far as the check of windows asks for it, whose tokenizer pads with the end-of-text token."""
    return SimpleNamespace(config=SimpleNamespace(pad_token_id=token, eos_token_id=token, bos_token_id=None))


def test_packed_windows_that_begin_or_end_between_documents_are_not_padded(corpus):
    corpus(SHORT * 3)
    windows = C4Calibration(100, 7, "packed").windows(Bytes(), 0)
    assert (windows[:, 0] == 3).any()
    assert (windows[:, -1] == 3).any()
    check_windows(windows, model_padding_with(3))


@given(st.lists(st.integers()), st.integers(1, 10), st.integers())
def test_shuffled_loses_nothing(items, buffer_size, seed):
    assert sorted(shuffled(items, random.Random(seed), buffer_size)) == sorted(items)


def test_shuffled_reads_no_further_than_its_buffer():
    source = iter(range(100))
    stream = shuffled(source, random.Random(0), 10)
    first = [next(stream) for _ in range(5)]
    assert next(source) == 15
    assert first != sorted(first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, but found 0"),
        ({"seqlen": 1}, "seqlen must be at least 2, but found 1"),
        ({"sampling": "random"}, "sampling must be one of wanda, packed, but found 'random'"),
    ],
)
def test_bad_settings_fail_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        C4Calibration(**settings)
    if "sampling" not in settings:
        with pytest.raises(ValueError, match=message):
            PythonDocsCalibration(**settings)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_both_sources_can_be_named_in_a_configuration():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--calibration", type=CalibrationSource)
    for name in ("c4.C4Calibration", "python_docs.PythonDocsCalibration"):
        arguments = [f"--calibration=maiht_lightning.data.{name}", "--calibration.samples=7"]
        chosen = parser.instantiate_classes(parser.parse_args(arguments))
        assert chosen.calibration.samples == 7


@pytest.mark.slow
def test_real_c4(real_data, no_hub, tokenizer):
    # About 110 documents are that long, so `wanda` crops some twice, now and then at the same place.
    for sampling, different in (("wanda", 120), ("packed", 128)):
        source = C4Calibration(128, 1024, sampling)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            windows = source.windows(tokenizer, 0)
        assert windows.shape == (128, 1024)
        check_windows(windows, model_padding_with(tokenizer.eos_token_id))
        assert len(windows.unique(dim=0)) >= different
        assert 0 <= windows.min() <= windows.max() < len(tokenizer)


# --- DataModules ---


class Bigram(LightningModule):
    """The smallest language model; it keeps the shapes of its batches."""

    def __init__(self, tokenizer=None, vocabulary=257):
        super().__init__()
        self.tokenizer = tokenizer
        self.table = torch.nn.Embedding(vocabulary, 8)
        self.head = torch.nn.Linear(8, vocabulary)
        self.batches = {"fit": [], "val": [], "test": []}

    def loss(self, batch, stage):
        ids = batch["input_ids"]
        self.batches[stage].append(ids)
        logits = self.head(self.table(ids[:, :-1]))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def training_step(self, batch, index):
        return self.loss(batch, "fit")

    def validation_step(self, batch, index):
        self.loss(batch, "val")

    def test_step(self, batch, index):
        self.loss(batch, "test")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder, **settings):
    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **settings,
    )


def rows(batches):
    return [tuple(row) for batch in batches for row in batch.tolist()]


@pytest.mark.slow
def test_datamodule_feeds_a_trainer(tmp_path):
    model, data = Bigram(Bytes()), PythonDocsDataModule(seqlen=1000, batch_size=50)
    runner = trainer(tmp_path)
    runner.fit(model, datamodule=data)
    runner.test(model, datamodule=data, verbose=False)
    train = pack_windows(python_docs_texts("train"), Bytes(), 1000, separator="\n\n")
    assert sorted(rows(model.batches["fit"])) == sorted(map(tuple, train.tolist()))
    assert rows(model.batches["fit"]) != list(map(tuple, train.tolist()))
    heldout = evaluation_windows("python_docs", Bytes(), 1000)
    assert rows(model.batches["val"]) == rows(model.batches["test"]) == list(map(tuple, heldout.tolist()))
    assert {batch.dtype for batch in model.batches["fit"]} == {torch.long}


@pytest.mark.slow
def test_the_seed_orders_the_batches(tmp_path):
    from lightning.pytorch import seed_everything

    orders = []
    for seed in (1, 1, 2):
        seed_everything(seed, verbose=False)
        model = Bigram(Bytes())
        trainer(tmp_path, limit_val_batches=0).fit(model, datamodule=PythonDocsDataModule(seqlen=4000))
        orders.append(rows(model.batches["fit"]))
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.slow
def test_wikitext2_datamodule_on_local_copies(local_data, no_hub, tokenizer, tmp_path):
    model, data = Bigram(tokenizer, len(tokenizer)), WikiText2DataModule(seqlen=32, batch_size=2)
    trainer(tmp_path, limit_train_batches=2, limit_val_batches=1).fit(model, datamodule=data)
    assert [batch.shape for batch in model.batches["fit"]] == [(2, 32), (2, 32)]
    validation = load_texts("wikitext2", "validation")
    ids = tokenizer("\n\n".join(validation[:20]))["input_ids"]
    assert model.batches["val"][0].flatten().tolist() == ids[:64]


def test_a_missing_local_copy_stops_the_fit_before_training(tmp_path, monkeypatch, no_hub):
    monkeypatch.setenv("MAIHT_DATA_DIR", str(tmp_path))
    model = Bigram(Bytes())
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/wikitext2/train.parquet"):
        trainer(tmp_path).fit(model, datamodule=WikiText2DataModule())
    assert not model.batches["fit"]


def test_downloading_needs_no_tokenizer(hub):
    WikiText2DataModule().prepare_data()
    assert [kwargs["split"] for _, kwargs in hub] == ["train", "validation", "test"]


def test_without_any_tokenizer_the_error_says_what_to_do(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"but found Bigram without one: set `tokenizer`"):
        trainer(tmp_path).fit(Bigram(), datamodule=PythonDocsDataModule())
    with pytest.raises(MisconfigurationException, match="found no Trainer"):
        PythonDocsDataModule().setup("fit")


@pytest.mark.slow
def test_a_named_tokenizer_wins_over_the_models(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = PythonDocsDataModule(seqlen=100, tokenizer=str(tmp_path / "tokenizer"))
    model = Bigram(Bytes(), len(tokenizer))
    trainer(tmp_path, limit_train_batches=0).validate(model, datamodule=data, verbose=False)
    assert rows(model.batches["val"]) == rows([evaluation_windows("python_docs", tokenizer, 100)])


def test_a_small_text_still_trains(tmp_path):
    class Small(TextDataModule):
        def texts(self, split):
            return ["a few words in " + split]

    model = Bigram(Bytes())
    trainer(tmp_path).fit(model, datamodule=Small(seqlen=5, batch_size=8))
    assert [batch.shape for batch in model.batches["fit"]] == [(4, 5)]
    with pytest.raises(ValueError, match="must fill 1 window"):
        trainer(tmp_path).fit(Bigram(Bytes()), datamodule=Small(seqlen=500))
    with pytest.raises(NotImplementedError, match="TextDataModule must say"):
        TextDataModule().prepare_data()


@pytest.mark.parametrize("setting", [{"seqlen": 1}, {"batch_size": 0}, {"num_workers": -1}])
def test_bad_datamodule_settings_fail_at_once(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} must be at least"):
        WikiText2DataModule(**setting)
