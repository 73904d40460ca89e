"""The journal: a pruning that is cut off resumes where it stopped, with the same result."""

import importlib
import json
import os
import signal
import subprocess
import time
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file

from helpers.warm import kill, python
from maiht_lightning.data.batches import Windows
from maiht_lightning.models.blocks import find_blocks, find_linears
from maiht_lightning.pruning.block_pruner import PruningError
from maiht_lightning.pruning.journal import Journal, drop_weights, fingerprint, read_records
from maiht_lightning.pruning.pruner import prune
from maiht_lightning.records import LayerRecord
from maiht_lightning.solvers import MAIHTConfig, PruningSpec
from maiht_lightning.solvers.config import PRESETS

# `maiht_lightning.prune` may hide its module's name.
solving = importlib.import_module("maiht_lightning.pruning.solving")

WINDOWS = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make(tiny_llama):
    """Makes the same small model each time."""

    def new(**settings):
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
        return tiny_llama(vocab_size=64, **{**sizes, **settings})

    return new


@pytest.fixture
def solved(monkeypatch):
    """Counts the groups solved; `solved.fail_at = n` makes the n-th raise."""

    class Count:
        groups, fail_at = 0, None

    def solve(gram, spec, drift=None):
        Count.groups += 1
        if Count.groups == Count.fail_at:
            raise ValueError("out of luck")
        return original(gram, spec, drift)

    original = solving.LayerSolver
    monkeypatch.setattr(solving, "LayerSolver", solve)
    return Count


def same(one, two):
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))


def run(model, folder, windows=WINDOWS, **settings):
    return prune(model, windows, journal_dir=folder, progress=False, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [True, False], ids=["reloaded model", "model left in memory"])
@pytest.mark.parametrize(("fails_in", "dtype"), [(1, torch.float32), (3, torch.float32), (2, torch.bfloat16)])
def test_resumed_is_as_uninterrupted(make, solved, tmp_path, fails_in, fresh, dtype):
    whole = make().to(dtype)
    expected = prune(whole, WINDOWS, config="paper", progress=False)
    assert solved.groups == 16  # 4 a block

    solved.groups, solved.fail_at = 0, 4 * fails_in + 2
    model = make().to(dtype)
    with pytest.raises(PruningError, match=f"layers.{fails_in}"):
        run(model, tmp_path / "journal", config="paper")
    assert sorted(p.name for p in (tmp_path / "journal").iterdir()) == [
        *(f"block_{i:05d}.safetensors" for i in range(fails_in)),
        "settings.json",
    ]

    solved.groups, solved.fail_at = 0, None
    model = make().to(dtype) if fresh else model
    blocks = []
    report = run(model, tmp_path / "journal", config="paper", on_block=blocks.append)
    assert solved.groups == 16 - 4 * fails_in
    same(model, whole)
    assert len(blocks) == 4
    for found, wanted in zip(report.layers, expected.layers, strict=True):
        assert (found.name, found.block, found.shape, found.zeros, found.objective) == (
            wanted.name,
            wanted.block,
            wanted.shape,
            wanted.zeros,
            wanted.objective,
        )
        assert (found.relative_error, found.accelerated) == (wanted.relative_error, wanted.accelerated)

    # And a third time nothing is left to do.
    solved.groups = 0
    same_again = make().to(dtype) if fresh else model
    run(same_again, tmp_path / "journal", config="paper")
    assert solved.groups == 0
    same(same_again, whole)
    assert list(tmp_path.iterdir()) == [tmp_path / "journal"]


def test_another_prunings_journal_is_moved_aside_whole(make, solved, tmp_path, caplog):
    folder = tmp_path / "journal"
    run(make(), folder, method="wanda")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    solved.groups = 0
    run(make(), folder, method="wanda", sparsity=0.6)
    assert solved.groups == 16
    moved = tmp_path / "journal.1"
    assert {path.name: path.read_bytes() for path in moved.iterdir()} == before
    assert f"moved to {moved}" in caplog.text
    # The one in place is the new one now; another change moves it to the next number.
    solved.groups = 0
    run(make(), folder, method="magnitude")
    assert solved.groups == 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal", "journal.1", "journal.2"]
    assert {path.name: path.read_bytes() for path in moved.iterdir()} == before


# For each setting another value; those that must not matter are in the test after the next.
CONFIG = {
    "mu": 0.2,
    "iterations": 3,
    "refine_iterations": 2,
    "step_scale": 0.9,
    "precision": "float64",
    "tolerance": 0.1,
    "keep_zeros": True,
    "candidates": "preconditioned",
    "sublayers": True,
    "reconstruction_epochs": 1,
    "reconstruction_rate": 0.02,
    "rescaling_epochs": 1,
    "allocation": "depth",
    "allocation_spread": 0.1,
}
# One that has a sense with another alone.
TOGETHER = {"sublayers": True, "dense_targets": 0.5}
BASE = {"sparsity": 0.5, "pattern": "row", "method": "wanda", "config": MAIHTConfig()}


def test_every_setting_of_the_solver_is_looked_at():
    assert {field.name for field in fields(MAIHTConfig)} == CONFIG.keys() | TOGETHER.keys() | {"memory_budget"}


@pytest.mark.parametrize(
    ("change", "layers"),
    [
        ({"sparsity": 0.51}, {}),
        ({"sparsity": 0.5 + 2**-30}, {}),
        ({"pattern": "unstructured"}, {}),
        ({"pattern": "2:4"}, {}),
        ({"method": "magnitude"}, {}),
        *(({"config": replace(BASE["config"], **{name: value})}, {}) for name, value in CONFIG.items()),
        ({"config": MAIHTConfig(precision="mixed")}, {}),
        ({"config": replace(BASE["config"], **TOGETHER)}, {}),
        ({"windows": WINDOWS.flip(0)}, {}),
        ({"windows": WINDOWS.view(3, 16)}, {}),
        ({"windows": WINDOWS[:3]}, {}),
        ({"windows": (WINDOWS + 1) % 64}, {}),
        ({}, {"model.layers.1.mlp.up_proj": lambda w: w[5, 5].add_(1e-6)}),
        ({}, {"model.layers.1.mlp.up_proj": lambda w: w.copy_(w.flip(0))}),
        ({}, {"model.layers.0.self_attn.k_proj": lambda w: w.copy_(w.flip(1))}),
        ({}, {"model.norm": lambda w: w[3].add_(1e-6)}),
        ({}, {"model.embed_tokens": lambda w: w.copy_(w[torch.randperm(64)])}),
        ({}, {"lm_head": lambda w: w.copy_(w.roll(1))}),
    ],
)
def test_what_decides_the_result_makes_it_another_pruning(make, solved, tmp_path, change, layers):
    """One entry or the order of entries of a weight or of the windows is enough."""
    folder = tmp_path / "journal"
    run(make(num_hidden_layers=2), folder, **BASE)
    model, solved.groups = make(num_hidden_layers=2), 0
    with torch.no_grad():
        for path, edit in layers.items():
            edit(model.get_submodule(path).weight)
    run(model, folder, **{**BASE, **change})
    assert solved.groups == 8
    assert (tmp_path / "journal.1").is_dir()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"config": replace(BASE["config"], memory_budget=10**6)},
        {"config": "paper"},
        {"config": None},
        {"config": MAIHTConfig(precision="float32")},  # what `auto` is on a CPU
        {"progress": True},
        {"batch_size": 2},
        {"hidden_states": "disk"},
        {"device": "cpu"},
        {"on_block": lambda records: None},
    ],
)
def test_what_does_not_decide_it_resumes(make, solved, tmp_path, change):
    folder = tmp_path / "journal"
    whole = make(num_hidden_layers=2)
    run(whole, folder, **BASE)
    (folder / "block_00001.safetensors").unlink()
    model, solved.groups = make(num_hidden_layers=2), 0
    prune(model, WINDOWS, journal_dir=folder, **{**BASE, "progress": False, **change})
    assert solved.groups == 4
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]
    same(model, whole)


def test_what_auto_was_stands_in_the_journal(make, tmp_path, monkeypatch):
    """As on a device where it is another precision than on this one."""

    def on(spec, device):
        assert torch.device(device).type == "cpu"
        return replace(spec, config=replace(spec.config, precision="fp16x3"))

    monkeypatch.setattr(PruningSpec, "on", on)
    run(make(num_hidden_layers=1), tmp_path / "journal", method="magnitude")
    assert json.loads((tmp_path / "journal" / "settings.json").read_text())["config"]["precision"] == "fp16x3"


def test_a_pattern_has_one_sparsity(make, solved, tmp_path):
    """Left at its default or given: the pruning is the same."""
    run(make(num_hidden_layers=2), tmp_path / "journal", method="wanda", pattern="1:4")
    solved.groups = 0
    run(make(num_hidden_layers=2), tmp_path / "journal", method="wanda", pattern="1:4", sparsity=0.75)
    assert solved.groups == 0


@pytest.mark.slow
def test_a_pruned_model_without_its_journal_is_another_model(make, solved, tmp_path):
    """Only blocks that the journal holds may differ from the dense model."""
    model, folder = make(), tmp_path / "journal"
    run(model, folder)
    (folder / "block_00001.safetensors").unlink()
    solved.groups = 0
    run(model, folder)
    assert solved.groups == 16
    assert (tmp_path / "journal.1").is_dir()


@pytest.mark.slow
def test_partial_files_are_ignored(make, solved, tmp_path):
    folder = tmp_path / "journal"
    whole = make()
    run(whole, folder, config="fast")
    last = folder / "block_00003.safetensors"
    (folder / "block_00003.safetensors.partial").write_bytes(last.read_bytes()[:100])
    last.unlink()
    solved.groups, model = 0, make()
    run(model, folder, config="fast")
    assert solved.groups == 4
    same(model, whole)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", *[".safetensors"] * 4]


def test_a_folder_with_only_a_partial_settings_file_is_a_new_journal(make, tmp_path):
    folder = tmp_path / "journal"
    folder.mkdir()
    (folder / "settings.json.partial").write_text('{"spar')
    run(make(), folder, method="magnitude")
    assert json.loads((folder / "settings.json").read_text())["method"] == "magnitude"
    assert list(tmp_path.iterdir()) == [folder]


def test_unreadable_settings_are_moved_aside(make, tmp_path):
    folder = tmp_path / "journal"
    folder.mkdir()
    (folder / "settings.json").write_text("{")
    run(make(), folder, method="magnitude")
    assert (tmp_path / "journal.1" / "settings.json").read_text() == "{"


def flip(path, find, offset=0):
    """Flip a bit so many bytes after a text, or in the middle of the weights."""
    written = bytearray(path.read_bytes())
    place = written.index(find) + offset if find else (len(written) + 8 + int.from_bytes(written[:8], "little")) // 2
    written[place] ^= 1
    path.write_bytes(written)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:500]),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: flip(path, None),
        lambda path: flip(path, b'"digest"', 12),
        lambda path: flip(path, b'"digest"', 3),
        lambda path: flip(path, b'"block"', 3),
        lambda path: flip(path, b'zeros\\": ', 10),
        lambda path: flip(path, b"mlp.up_proj"),
        lambda path: path.write_bytes((path.parent / "block_00000.safetensors").read_bytes()),
    ],
    ids=["half", "shorter", "empty", "weight", "digest", "no-digest", "no-block", "record", "name", "other-block"],
)
def test_a_damaged_block_is_pruned_again_with_a_warning(make, solved, tmp_path, caplog, damage):
    folder = tmp_path / "journal"
    whole = make()
    expected = run(whole, folder, method="magnitude")
    path = folder / "block_00001.safetensors"
    written = path.read_bytes()
    damage(path)
    assert path.read_bytes() != written
    solved.groups, model = 0, make()
    report = run(model, folder, method="magnitude")
    assert solved.groups == 4
    same(model, whole)
    assert [(r.name, r.zeros) for r in report.layers] == [(r.name, r.zeros) for r in expected.layers]
    assert f"{path} is damaged" in caplog.text
    assert "pruned again" in caplog.text
    assert load_file(path).keys() == {record.layer for record in report.layers if record.block == 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["journal"]


def test_a_model_that_was_pruned_is_not_pruned_again_for_a_damaged_block(make, solved, tmp_path):
    """The weights from before are gone: the journal cannot be resumed with this model."""
    folder, model = tmp_path / "journal", make()
    run(model, folder, method="magnitude")
    flip(folder / "block_00001.safetensors", None)
    run(model, folder, method="magnitude")
    assert (tmp_path / "journal.1").is_dir()


def test_files_are_brought_to_the_disk_before_they_have_their_names(make, tmp_path, monkeypatch):
    durable = importlib.import_module("maiht_lightning.models.durable")
    seen, sync, fsync = [], durable.sync, os.fsync

    def note(path):
        seen.append(os.path.relpath(path, tmp_path))
        sync(path)

    synced = []
    monkeypatch.setattr(durable, "sync", note)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), fsync(descriptor)))
    run(make(num_hidden_layers=2), tmp_path / "journal", method="magnitude")
    assert seen == [
        *("journal/settings.json.partial", "journal"),
        *("journal/block_00000.safetensors.partial", "journal"),
        *("journal/block_00001.safetensors.partial", "journal"),
    ]
    assert len(synced) == 7  # and the folder in which the journal is


def test_settings_name_versions_that_do_not_decide(make, solved, tmp_path):
    folder = tmp_path / "journal"
    run(make(), folder, method="magnitude")
    path = folder / "settings.json"
    settings = json.loads(path.read_text())
    assert settings["versions"].keys() == {"journal", "maiht_lightning", "torch"}
    for versions, groups in (({**settings["versions"], "torch": "1.0"}, 0), (None, 0), ({"journal": 99}, 16)):
        path.write_text(json.dumps({**{k: v for k, v in settings.items() if k != "versions"}, "versions": versions}))
        if versions is None:
            path.write_text(json.dumps({k: v for k, v in settings.items() if k != "versions"}))
        solved.groups = 0
        run(make(), folder, method="magnitude")
        assert solved.groups == groups
    assert json.loads((tmp_path / "journal.1" / "settings.json").read_text())["versions"] == {"journal": 99}


def test_records_outlast_the_weights(make, solved, tmp_path):
    folder, whole = tmp_path / "journal", make()
    report = run(whole, folder, method="magnitude")
    assert read_records(folder) == report.layers
    drop_weights(folder)
    assert {path.name for path in folder.iterdir()} == {"settings.json", "records.json"}
    assert read_records(folder) == report.layers
    drop_weights(folder)
    drop_weights(tmp_path / "nowhere")
    assert read_records(folder) == report.layers
    # Called again, the same pruning begins anew in the same folder.
    solved.groups, model, blocks = 0, make(), []
    run(model, folder, method="magnitude", on_block=lambda records: blocks.append(len(read_records(folder))))
    assert solved.groups == 16
    assert blocks == [7, 14, 21, 28]
    same(model, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]


def test_a_crash_between_the_deletions_costs_no_record(make, tmp_path, monkeypatch):
    folder = tmp_path / "journal"
    report = run(make(), folder, method="magnitude")
    unlink = type(folder).unlink

    def fail(path, *args, **kwargs):
        if path.name == "block_00002.safetensors":
            raise OSError("out of luck")
        unlink(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "unlink", fail)
        with pytest.raises(OSError, match="out of luck"):
            drop_weights(folder)
    assert (folder / "block_00003.safetensors").exists()
    assert read_records(folder) == report.layers
    # Once more, with half of the blocks, it still keeps all records.
    drop_weights(folder)
    assert read_records(folder) == report.layers


def test_damaged_files_cost_their_own_records_alone(make, tmp_path, caplog):
    folder = tmp_path / "journal"
    report = run(make(), folder, method="magnitude")
    (folder / "block_00001.safetensors").write_bytes(b"")
    assert read_records(folder) == [record for record in report.layers if record.block != 1]
    assert "block_00001.safetensors is damaged" in caplog.text


def test_a_folder_of_other_things_is_refused_and_left(make, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"is no journal but holds thesis\.tex"):
        run(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_a_failed_write_leaves_no_block_file(make, tmp_path, monkeypatch):
    module = importlib.import_module("maiht_lightning.pruning.journal")

    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        with pytest.raises(OSError, match="no space"):
            run(make(), tmp_path / "journal", config="fast")
    assert [p.name for p in (tmp_path / "journal").iterdir()] == ["settings.json"]
    model, whole = make(), make()
    run(model, tmp_path / "journal", config="fast")
    prune(whole, WINDOWS, config="fast", progress=False)
    same(model, whole)


def test_saved_blocks_come_back(tmp_path):
    journal = Journal(tmp_path / "deep" / "journal", {"blocks": ["a"]})
    assert journal.load(7) is None
    weights = {"a.b": torch.randn(3, 4).T, "c": torch.randn(2, 2).bfloat16()}
    records = [LayerRecord("x.a.b", 7, (4, 3), 5, 0.25, [1.0, 0.5], [0.0], 2.5), LayerRecord("x.c", 7, (2, 2), 1, 0.0)]
    journal.save(7, weights, records)
    found, found_records = journal.load(7)
    assert found_records == records
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[n], weights[n]) and found[n].dtype == weights[n].dtype for n in weights)
    assert found_records[0].sparsity == 5 / 12


def test_fingerprint_sees_every_parameter_and_token(make):
    model = make()
    blocks = find_blocks(model)
    before = fingerprint(model, Windows.parse(WINDOWS))
    assert fingerprint(make(), Windows.parse(WINDOWS.clone())) == before
    other = WINDOWS.clone()
    other[3, 11] = (other[3, 11] + 1) % 64
    assert fingerprint(model, Windows.parse(other))["windows"] != before["windows"]
    pruned = {id(linear.weight) for block in blocks.modules for linear in find_linears(block).values()}
    for parameter in model.parameters():
        entries, kept = parameter.data.view(-1), parameter.data.clone()
        entries[7] = torch.nextafter(entries[7], entries[7] + 1)
        changed = [fingerprint(model, Windows.parse(WINDOWS))]
        if len(kept.unique()) > 1:  # not the norms, whose entries are all 1
            parameter.data.copy_(kept)
            entries[[3, 9]] = entries[[9, 3]]
            changed.append(fingerprint(model, Windows.parse(WINDOWS)))
        for after in changed:
            assert (after["model"] == before["model"]) == (id(parameter) in pruned)
            blocks_changed = sum(a != b for a, b in zip(after["blocks"], before["blocks"], strict=True))
            assert blocks_changed == (id(parameter) in pruned)
        parameter.data.copy_(kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8])
def test_a_digest_is_of_all_bits(dtype):
    """Of any format, shape and layout, but only of what a tensor holds."""
    digest = importlib.import_module("maiht_lightning.pruning.journal")._digest
    entries = torch.arange(-12, 12).to(dtype).view(4, 6)

    def of(tensor, name="a"):
        return digest({name: lambda: tensor})

    same = [entries.clone(), entries.T.contiguous().T, torch.stack([entries, entries], 2)[..., 0]]
    assert {of(tensor) for tensor in same} == {of(entries)}
    others = [entries.view(6, 4), entries.flip(0), entries.roll(1), -entries, entries[0], entries[0, 0]]
    others += [entries.to(torch.complex64), entries.bool()]
    assert len({of(entries), of(entries, "b"), *map(of, others)}) == 2 + len(others)
    # Of the same bits in another format.
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert of(entries.view(same_size)) != of(entries)
    both = {"a": lambda: entries, "b": lambda: entries.T}
    assert digest(both) == digest(dict(reversed(both.items())))


SCRIPT = """
import sys, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from safetensors.torch import save_file
from maiht_lightning.pruning.pruner import prune

folder, result, wait = sys.argv[1:]
torch.set_num_threads(1)
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
                     num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None)
model = LlamaForCausalLM(config)
windows = torch.randint(64, (4, 12))
solved = []
prune(model, windows, journal_dir=folder if folder != "none" else None, progress=False,
      on_block=lambda records: (solved.append(records[0].block), time.sleep(float(wait))))
save_file({k: v.contiguous() for k, v in model.state_dict().items()}, result)
"""


@pytest.mark.slow
def test_a_killed_process_is_resumed_by_another(tmp_path):
    """SIGKILL when the first block's file appears: no handler, no clean-up."""

    def start(folder, result, wait):
        arguments = [str(folder), str(tmp_path / result), str(wait)]
        return subprocess.Popen([*python(), "-c", SCRIPT, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"})

    journal = tmp_path / "journal"
    whole, victim = start("none", "whole.safetensors", 0), start(journal, "victim.safetensors", 60)
    deadline = time.monotonic() + 120
    while not (journal / "block_00000.safetensors").exists():
        assert victim.poll() is None, "the process ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert kill(victim) == -signal.SIGKILL
    assert not (tmp_path / "victim.safetensors").exists()
    assert not (journal / "block_00001.safetensors").exists()
    written = (journal / "block_00000.safetensors").stat().st_mtime_ns

    assert start(journal, "resumed.safetensors", 0).wait(120) == 0
    assert whole.wait(120) == 0
    assert (journal / "block_00000.safetensors").stat().st_mtime_ns == written
    resumed, expected = load_file(tmp_path / "resumed.safetensors"), load_file(tmp_path / "whole.safetensors")
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert sum(int((t == 0).sum()) for t in expected.values()) > 10_000


def test_what_the_journal_takes_is_counted_and_is_no_solving(make, monkeypatch, tmp_path):
    """By a clock that stands still but for the journal: 7 s to be opened, and 5 s for each of four blocks."""
    clock, whole, write = [0.0], fingerprint, Journal.save

    def digest(*arguments):
        clock[0] += 7
        return whole(*arguments)

    def save(self, *arguments):
        clock[0] += 5
        write(self, *arguments)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr("maiht_lightning.pruning.pruner.fingerprint", digest)
    monkeypatch.setattr(Journal, "save", save)
    for config in ("paper", "best"):
        few = replace(PRESETS[config], iterations=3, refine_iterations=2)
        settings = {"config": few, "progress": False}
        report = prune(make(), WINDOWS, journal_dir=tmp_path / config, **settings)
        assert (report.journal_seconds, report.seconds) == (27.0, 27.0)
        assert prune(make(), WINDOWS, **settings).journal_seconds == 0
