"""A run's page: the right numbers, nothing from outside, nothing unescaped."""

import os
import re
import socket

import pytest

from helpers.html_page import Page
from maiht_lightning.records import LayerRecord, StageResult, Stages
from maiht_lightning.reporting.environment import environment
from maiht_lightning.reporting.formats import duration, flatten, perplexity
from maiht_lightning.reporting.run.figures import draw_figures
from maiht_lightning.reporting.run.page import LISTED_LAYERS, write_page
from maiht_lightning.reporting.summary import Summary

STAGES = {
    "finetuned": {"perplexity": {"wikitext2": 38.104}},
    "dense": {
        "perplexity": {"wikitext2": 29.934, "c4": 35.2},
        "tasks": {
            "boolq": {"acc": 0.6012, "acc_stderr": 0.0123},
            "hellaswag": {"acc": 0.4, "acc_stderr": 0.01, "acc_norm": 0.45, "acc_norm_stderr": 0.011},
        },
        "mean_accuracy": 0.5006,
    },
    "pruned": {
        "perplexity": {"wikitext2": 59.868, "c4": float("inf")},
        "tasks": {"boolq": {"acc": 0.5, "acc_stderr": 0.02}},
        "mean_accuracy": 0.5,
    },
}


@pytest.fixture
def records():
    return [
        LayerRecord(f"model.layers.{i}.mlp.up_proj", i, (4, 8), 16, relative_error=0.001 * (i + 1), seconds=20.0 - i)
        for i in range(12)
    ]


def page(folder, summary, records, settings=None, command="maiht fit --config a.yaml", **figures):
    return Page(write_page(folder, summary, records, figures, settings or {}, {"torch": "9.9"}, command).read_text())


def full():
    stages = Stages({name: StageResult.from_json(stage) for name, stage in STAGES.items()})
    return Summary("maiht", 0.5, "unstructured", 0.5, stages, {"capture": 28.36, "solve": 131.13}, 3 * 2**30)


def test_the_stage_table_holds_every_measurement(records, tmp_path):
    table = page(tmp_path, full(), records).tables[0]
    assert table == [
        ["measure", "dense", "pruned", "finetuned"],
        ["perplexity, wikitext2", "29.93", "59.87", "38.10"],
        ["perplexity, c4", "35.20", "∞", "–"],
        ["boolq acc, %", "60.12 ± 1.23", "50.00 ± 2.00", "–"],
        ["hellaswag acc, %", "40.00 ± 1.00", "–", "–"],
        ["hellaswag acc_norm, %", "45.00 ± 1.10", "–", "–"],
        ["mean accuracy, %", "50.06", "50.00", "–"],
    ]


def test_the_headline_says_the_result(records, tmp_path):
    text = page(tmp_path, full(), records).text
    for part in (
        "mAIHT: 50 % unstructured",
        "12 linear layers in 12 decoder blocks",
        "50.0000 %",
        "29.93 → 59.87 → 38.10",
        "dense → pruned → finetuned: × 1.27",
        "35.20 → ∞",
        "50.1 → 50.0 %",
        "0.0065",
    ):
        assert part in text


def test_worst_and_slowest_layers(records, tmp_path):
    _, worst, slowest, *_ = page(tmp_path, full(), records).tables
    assert len(worst) == len(slowest) == 1 + LISTED_LAYERS
    assert worst[1] == ["11", "mlp.up_proj", "4 × 8", "0.012", "9.00 s"]
    assert slowest[1] == ["0", "mlp.up_proj", "4 × 8", "0.001", "20.0 s"]


def test_time_memory_environment_and_settings(records, tmp_path):
    settings = {"config": {"mu": 0.1, "seqlen": None}, "tasks": ["boolq", "rte"]}
    *_, cost, versions, table = page(tmp_path, full(), records, settings).tables
    assert cost == [
        ["capture", "28.4 s"],
        ["solve", "2 min 11 s"],
        ["sum", "2 min 39 s"],
        ["highest memory", "3.00 GiB"],
    ]
    assert versions == [["torch", "9.9"]]
    assert table == [["config.mu", "0.1"], ["config.seqlen", "–"], ["tasks", "boolq, rte"]]


@pytest.mark.slow
def test_the_page_needs_nothing_from_outside(records, tmp_path):
    figures = draw_figures(tmp_path / "figures", full(), records)
    found = page(tmp_path, full(), records, **figures)
    assert len(found.links) == len(figures) == 3
    assert all(link.startswith("data:image/png;base64,iVBOR") for link in found.links)
    assert not {"script", "link", "iframe", "object"} & set(found.tags)
    assert not re.search(r"https?:|//[a-z]", re.sub(r"base64,[^\"]+", "", (tmp_path / "report.html").read_text()))


def test_everything_is_escaped(records, tmp_path):
    evil = "<script>alert('&')</script>"
    (tmp_path / "config.yaml").write_text(f"name: {evil}\n")
    records[0].name, records[0].relative_error = f"model.layers.0.{evil}", 1.0
    summary = Summary(evil, 0.5, evil, 0.5, Stages({evil: StageResult({evil: 2.0}, {evil: {evil: 0.5}})}))
    found = page(tmp_path, summary, records, {evil: evil}, command=evil)
    assert "script" not in found.tags
    assert found.text.count(evil) >= 8
    assert found.tables[0][0] == ["measure", evil]


def test_the_configuration_is_shown_where_there_is_one(records, tmp_path):
    assert "config.yaml" not in page(tmp_path, full(), records).text
    (tmp_path / "config.yaml").write_text("pruning:\n  sparsity: 0.5\n")
    text = page(tmp_path, full(), records).text
    assert "pruning:\n  sparsity: 0.5\n" in text
    assert "maiht fit --config a.yaml" in text


def test_a_run_without_measurements_or_layers_has_a_page(tmp_path):
    found = page(tmp_path, Summary("wanda", 0.5, "2:4"), [], command="")
    assert found.tables == [[], [["torch", "9.9"]]]
    assert "Wanda: 50 % 2:4" in found.text
    assert "How to run it again" not in found.text
    found = page(tmp_path, Summary("wanda", 0.5, "2:4"), [], {"sparsity": 0.5}, command="")
    assert "Prune again with the settings above" in found.text


def test_formats():
    assert [perplexity(x) for x in (5.678, 1234.5, 1.5e7, float("inf"), float("nan"))] == [
        "5.68",
        "1,234",
        "1.50e+07",
        "∞",
        "NaN",
    ]
    assert [duration(x) for x in (0.1234, 12.34, 99.99, 131.1, 3599.0, 3599.9, 7325.0)] == [
        "0.12 s",
        "12.3 s",
        "1 min 40 s",
        "2 min 11 s",
        "59 min 59 s",
        "1 h 0 min",
        "2 h 2 min",
    ]
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": None}) == {"a.b.c": 1, "a.d": {}, "e": None}


def test_the_environment_names_versions_and_device_but_nobody(monkeypatch):
    import torch

    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["threads"] == str(torch.get_num_threads())
    assert found["seed"] == "7"
    assert {"maiht_lightning", "lightning", "transformers", "Python", "platform", "device"} <= set(found)
    values = " ".join(found.values())
    assert socket.gethostname() not in values
    assert os.path.expanduser("~") not in values
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert "seed" not in environment()
