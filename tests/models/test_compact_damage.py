"""Damaged compact files: an error that names file and tensor, or the same weights, and never others."""

import json
import random
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.byte_model import byte_tokenizer
from helpers.families import FAMILIES, make
from maiht_lightning import load_compact, prune, save_compact
from maiht_lightning.models import compact
from maiht_lightning.models.compact_index import CompactFileError

WINDOWS = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folders(tiny_llama, tmp_path_factory):
    """(folder, folder of another model of the same shape, the first one's tensors)."""
    path, models = tmp_path_factory.mktemp("compact"), []
    for seed in (0, 1):
        model = tiny_llama(vocab_size=64, hidden_size=32, intermediate_size=40, seed=seed).bfloat16()
        prune(model, WINDOWS, sparsity=0.6, method="magnitude", progress=False)
        save_compact(model, path / str(seed), tokenizer=byte_tokenizer())
        models.append(model)
    return path / "0", path / "1", models[0].state_dict()


@pytest.fixture
def damaged(folders):
    """The folder, which is put right again afterwards, and the tensors it held."""
    folder, _, expected = folders
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    yield folder, expected
    restore(folder, content)


def restore(folder, content):
    for path in folder.iterdir():
        if path.name not in content:
            path.unlink()
    for name, written in content.items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != written:
            (folder / name).write_bytes(written)


def same(model, expected):
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[name].dtype == expected[name].dtype for name in expected)


def weights(folder):
    return sorted(folder.glob("*.safetensors"))


def header_bytes(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def flip(path, start, end, rng):
    written = bytearray(path.read_bytes())
    written[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    path.write_bytes(written)


def resave(path, rng, change):
    tensors = load_file(path)
    change(tensors, rng)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_index(folder, change):
    index = json.loads((folder / "compact.json").read_text())
    change(index)
    (folder / "compact.json").write_text(json.dumps(index))


# ---- Kinds of damage: each is given the folder, another model's folder and a generator of random numbers


def flips_a_bit_of_the_data(folder, other, rng):
    path = rng.choice(weights(folder))
    flip(path, header_bytes(path), path.stat().st_size, rng)


def flips_a_bit_of_the_header(folder, other, rng):
    path = rng.choice(weights(folder))
    flip(path, 0, header_bytes(path), rng)


def flips_a_bit_of_another_file(folder, other, rng):
    path = folder / rng.choice(["compact.json", "compact.json", "config.json", "generation_config.json"])
    flip(path, 0, path.stat().st_size, rng)


def truncates(folder, other, rng):
    path = rng.choice([*weights(folder), folder / "compact.json"])
    path.write_bytes(path.read_bytes()[: rng.choice([0, 7, 8, 100, rng.randrange(path.stat().st_size)])])


def appends(folder, other, rng):
    path = rng.choice([*weights(folder), folder / "compact.json"])
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 99)))


def overwrites_a_piece(folder, other, rng):
    path = rng.choice([*weights(folder), folder / "compact.json", folder / "config.json"])
    written = bytearray(path.read_bytes())
    start = rng.randrange(len(written))
    piece = written[start : start + rng.randrange(1, 600)]
    written[start : start + len(piece)] = rng.choice([bytes(len(piece)), rng.randbytes(len(piece))])
    path.write_bytes(written)


def lies_about_the_header(folder, other, rng):
    path = rng.choice(weights(folder))
    size = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, rng.randrange(2**64), header_bytes(path) - 9])
    path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])


def lies_about_sizes_in_the_header(folder, other, rng):
    path = rng.choice(weights(folder))
    written = path.read_bytes()
    header = json.loads(written[8 : header_bytes(path)])
    name = rng.choice([name for name in header if name != "__metadata__"])
    key, value = rng.choice(
        [
            ("shape", [2**40]),
            ("shape", [2**62, 4]),
            ("shape", [*header[name]["shape"], 1]),
            ("shape", header[name]["shape"][::-1] * 2),
            ("dtype", rng.choice(["F64", "F16", "I64", "BOOL", "F8_E4M3", "NONE"])),
            ("data_offsets", [0, 2**50]),
            ("data_offsets", [end := header[name]["data_offsets"][1], end]),
        ]
    )
    header[name][key] = value
    lied = json.dumps(header).encode()
    path.write_bytes(len(lied).to_bytes(8, "little") + lied + written[header_bytes(path) :])


def removes_a_file(folder, other, rng):
    rng.choice([*weights(folder), folder / "compact.json", folder / "config.json"]).unlink()


def puts_another_models_file(folder, other, rng):
    name = rng.choice([path.name for path in weights(folder)])
    (folder / name).write_bytes((other / name).read_bytes())


def swaps_files(folder, other, rng):
    one, two = rng.sample(weights(folder), 2)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def changes_a_tensor(folder, other, rng):
    def change(tensors, rng):
        name = rng.choice(sorted(tensors))
        tensor = tensors[name]
        tensors[name] = rng.choice(
            [
                tensor[1:].clone(),
                tensor.flip(0),
                tensor.view(-1, 1).clone(),
                tensor.float() if tensor.is_floating_point() else tensor.to(torch.int16),
                torch.cat([tensor, tensor]),
                torch.zeros_like(tensor),
            ]
        )

    resave(rng.choice(weights(folder)), rng, change)


def removes_or_adds_a_tensor(folder, other, rng):
    def change(tensors, rng):
        name = rng.choice(sorted(tensors))
        if rng.random() < 0.5:
            tensors[f"{name}.more"] = tensors[name].clone()
        else:
            del tensors[name]

    resave(rng.choice(weights(folder)), rng, change)


def lies_in_the_index(folder, other, rng):
    def change(index):
        name = rng.choice(sorted(index["tensors"]))
        tensor = index["tensors"][name]
        lies = [
            lambda: tensor.update(shape=[2**30, 2**30]),
            lambda: tensor.update(shape=[2**20, 2**20]),
            lambda: tensor.update(shape=[-1, 5]),
            lambda: tensor.update(shape=[1.5]),
            lambda: tensor.update(shape=tensor["shape"][::-1] or [1]),
            lambda: tensor.update(shape=None),
            lambda: tensor.update(dtype=rng.choice(["float32", "int8", "nothing", "nn", 7])),
            lambda: tensor.update(file=rng.choice(["nowhere.safetensors", "config.json", "../0/rest.safetensors", 3])),
            lambda: tensor.update(xxh3={}),
            lambda: tensor.update(xxh3={name: "0" * 16}),
            lambda: tensor.update(xxh3=dict.fromkeys(tensor["xxh3"])),
            lambda: index["tensors"].pop(name),
            lambda: index["tensors"].update({f"{name}.x": tensor}),
            lambda: index.update(tensors=[]),
            lambda: index.update(dtype="complex"),
            lambda: index.update(version=rng.choice([0, 1, 2, 4, "3", None, 10**30])),
            lambda: index.pop(rng.choice(sorted(index))),
        ]
        rng.choice(lies)()

    edit_index(folder, change)


def puts_a_file_beside(folder, other, rng):
    (folder / f"block_{rng.randrange(9, 99):05d}.safetensors").write_bytes((other / "rest.safetensors").read_bytes())


KINDS = [
    flips_a_bit_of_the_data,
    flips_a_bit_of_the_header,
    flips_a_bit_of_another_file,
    truncates,
    appends,
    overwrites_a_piece,
    lies_about_the_header,
    lies_about_sizes_in_the_header,
    removes_a_file,
    puts_another_models_file,
    swaps_files,
    changes_a_tensor,
    removes_or_adds_a_tensor,
    lies_in_the_index,
    puts_a_file_beside,
]


def what_becomes_of(folder, expected):
    try:
        model = load_compact(folder)
    except CompactFileError as error:
        return "refused" if str(folder) in str(error) else f"an error that names no file: {error}"
    same(model, expected)
    return "the same"


@pytest.mark.parametrize("times", [pytest.param(4, id="few"), pytest.param(80, id="many", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_damage_is_an_error_or_nothing(damaged, folders, kind, times):
    """With `many`, 1200 damaged folders."""
    folder, expected = damaged
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = Counter()
    for seed in range(times):
        kind(folder, folders[1], random.Random(seed))
        found[what_becomes_of(folder, expected)] += 1
        restore(folder, content)
    if kind is puts_a_file_beside:
        assert found == {"the same": times}
    elif kind is not flips_a_bit_of_another_file and kind is not changes_a_tensor:
        # White space in `compact.json`, or a norm of ones that is the same turned round, may change nothing.
        assert found["refused"] >= 0.9 * times
    if kind in (flips_a_bit_of_the_data, truncates, puts_another_models_file, swaps_files):
        assert found == {"refused": times}
    assert found["refused"] or kind is puts_a_file_beside
    assert found.keys() <= {"refused", "the same"}


# ---- What the error says


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: flip(f / "rest.safetensors", (n := (f / "rest.safetensors").stat().st_size) - 2, n, random),
            r"rest\.safetensors is damaged: model\.norm\.weight has another checksum than compact\.json says",
        ),
        (
            lambda f: resave(f / "block_00001.safetensors", None, lambda t, _: t.pop(f"{UP}.values")),
            rf"block_00001\.safetensors is damaged: {UP}\.values is missing",
        ),
        (
            lambda f: resave(f / "block_00001.safetensors", None, lambda t, _: t.update(more=torch.ones(1))),
            r"block_00001\.safetensors is damaged: more is unknown to compact\.json",
        ),
        (lambda f: (f / "block_00001.safetensors").unlink(), r"damaged: block_00001\.safetensors is missing"),
        (lambda f: (f / "config.json").unlink(), r"damaged: config\.json is missing"),
        (
            lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("1e-06", "1e-05")),
            r"config\.json is damaged: it is not as it was written\. If you have changed it on purpose",
        ),
        (lambda f: (f / "block_00000.safetensors").write_bytes(b""), r"block_00000\.safetensors is damaged: "),
        (lambda f: (f / "compact.json").unlink(), r"is no compact model: it has no compact\.json"),
        (lambda f: (f / "compact.json").write_text("{"), r"compact\.json is damaged: it does not describe"),
        (
            lambda f: edit_index(f, lambda index: index.update(version=4)),
            "version 3 or older, but found 'maiht-compact', version 4: a newer maiht-lightning may read it",
        ),
        (
            lambda f: edit_index(f, lambda index: index["tensors"].pop("model.norm.weight")),
            r"rest\.safetensors is damaged: model\.norm\.weight is unknown to compact\.json",
        ),
    ],
)
def test_the_error_names_file_and_tensor(damaged, damage, message):
    folder, _ = damaged
    damage(folder)
    with pytest.raises(CompactFileError, match=message):
        load_compact(folder)


def forge(folder, tensors, file="block_00001.safetensors"):
    """Give a file other tensors, and the index checksums that agree with them."""
    save_file(tensors, folder / file)
    written = {name: compact.checksum(tensor) for name, tensor in tensors.items()}

    def agree(index):
        for tensor in index["tensors"].values():
            tensor["xxh3"].update({name: written[name] for name in tensor["xxh3"] if name in written})

    edit_index(folder, agree)


def test_bits_and_values_must_fit_each_other(damaged):
    folder, _ = damaged
    tensors = load_file(folder / "block_00001.safetensors")
    forge(folder, {**tensors, f"{UP}.values": tensors[f"{UP}.values"][1:].contiguous()})
    with pytest.raises(CompactFileError, match=rf"{UP} has \d+ values for \d+ weights"):
        load_compact(folder)


def test_a_config_of_another_shape_is_refused(damaged):
    folder, _ = damaged
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    edit_index(folder, lambda index: index["files"].pop("config.json"))
    with pytest.raises(CompactFileError, match=r"mlp\.\w+\.weight of shape .* does not fit config\.json"):
        load_compact(folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CompactFileError, match=r"model\.layers\.2\.\S+ is missing"):
        load_compact(folder)


def test_a_config_that_was_changed_on_purpose_is_used(damaged):
    folder, expected = damaged
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    edit_index(folder, lambda index: index["files"].pop("config.json"))
    model = load_compact(folder)
    same(model, expected)
    assert model.config.rms_norm_eps == 0.5


@pytest.mark.parametrize("name", ["../outside.safetensors", "sub/../rest.safetensors", "/etc/passwd", "..", "", "a\\b"])
def test_names_do_not_leave_the_folder(damaged, monkeypatch, name):
    folder, _ = damaged
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes((folder / "rest.safetensors").read_bytes())
    opened = []
    monkeypatch.setattr(compact, "safe_open", lambda path, **_: opened.append(path) or safe_open(path, framework="pt"))
    for change in (
        lambda index: index["tensors"]["model.norm.weight"].update(file=name),
        lambda index: index["files"].update({name: "0" * 16}),
    ):
        edit_index(folder, change)
        with pytest.raises(CompactFileError, match=r"compact\.json is damaged.*is no file's name"):
            load_compact(folder)
    assert not opened


def test_sizes_are_compared_before_anything_is_made(damaged, monkeypatch):
    folder, _ = damaged
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, **kw: made.append(torch.Size(shape)) or empty(shape, **kw))
    edit_index(folder, lambda index: index["tensors"][UP].update(shape=[2**20, 2**20]))
    with pytest.raises(CompactFileError, match=rf"{UP}\.mask is torch\.uint8 \(160,\), but compact\.json says"):
        load_compact(folder)
    assert all(shape.numel() < 5000 for shape in made)


def test_what_the_disk_has_changed_is_seen_when_it_is_written(tiny_llama, tmp_path, monkeypatch):
    model = tiny_llama(vocab_size=64)

    def bad_disk(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        flip(path, header_bytes(path), path.stat().st_size, random.Random(0))

    monkeypatch.setattr(compact, "save_file", bad_disk)
    with pytest.raises(CompactFileError, match="has another checksum"):
        save_compact(model, tmp_path / "compact")
    assert not (tmp_path / "compact").exists()


# ---- Other models, and memory


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_comes_back(family, tmp_path):
    model = make(family)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        for path, linear in compact.find_blocks(model).linears():
            linear.weight[torch.rand(linear.weight.shape, generator=torch.Generator().manual_seed(len(path))) < 0.5] = 0
        loaded = load_compact(save_compact(model, tmp_path / "compact"))
        same(loaded, model.state_dict())
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()


def test_the_generation_config_comes_back(tiny_llama, tmp_path):
    model = tiny_llama(vocab_size=64)
    model.generation_config.max_new_tokens = 7
    assert load_compact(save_compact(model, tmp_path / "compact")).generation_config.max_new_tokens == 7


def test_tensors_keep_their_own_dtypes(tiny_llama, tmp_path):
    model = tiny_llama(vocab_size=64).bfloat16()
    model.model.norm.float()
    prune(model, WINDOWS, method="magnitude", progress=False)
    folder = save_compact(model, tmp_path / "compact")
    same(load_compact(folder), model.state_dict())
    assert {p.dtype for p in load_compact(folder, torch.float16).parameters()} == {torch.float16}


def as_second_version(folder):
    """Make a folder what version 2 wrote, which had CRC-32 for checksums."""
    index = json.loads((folder / "compact.json").read_text())
    index |= {
        "version": 2,
        "files": {name: f"{zlib.crc32((folder / name).read_bytes()):08x}" for name in index["files"]},
    }
    for tensor in index["tensors"].values():
        parts = load_file(folder / tensor["file"])
        values = {part: parts[part].view(torch.uint8).numpy().tobytes() for part in tensor.pop("xxh3")}
        tensor["crc32"] = {part: f"{zlib.crc32(value):08x}" for part, value in values.items()}
    (folder / "compact.json").write_text(json.dumps(index))


def test_the_second_version_is_read_and_its_checksums_compared(damaged, caplog):
    folder, expected = damaged
    as_second_version(folder)
    same(load_compact(folder), expected)
    assert not caplog.text
    path = folder / "block_00001.safetensors"
    tensors = load_file(path)
    tensors[f"{UP}.values"][3] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CompactFileError, match=rf"{UP}\.values has another checksum"):
        load_compact(folder)
    edit_index(folder, lambda index: index["files"].update({"config.json": "00000000"}))
    with pytest.raises(CompactFileError, match=r"config\.json is damaged: it is not as it was written"):
        load_compact(folder)


def test_checksums_are_the_published_xxh3(damaged):
    # The empty input's, as in the library's own test values.
    assert compact.checksum(torch.empty(0)) == "2d06800538d394c2"
    folder, _ = damaged
    index = json.loads((folder / "compact.json").read_text())
    assert {len(value) for t in index["tensors"].values() for value in t["xxh3"].values()} == {16}


def as_first_version(folder):
    """Make a folder what version 1 wrote."""
    index = json.loads((folder / "compact.json").read_text())
    shapes = {name: t["shape"] for name, t in index["tensors"].items() if f"{name}.mask" in t["xxh3"]}
    files = [path.name for path in weights(folder)]
    old = {"format": "maiht-compact", "version": 1, "dtype": "bfloat16", "files": files, "shapes": shapes}
    (folder / "compact.json").write_text(json.dumps(old, indent=1) + "\n")


def test_the_first_version_is_read_and_said_to_have_no_checksums(damaged, caplog):
    folder, expected = damaged
    load_compact(folder)
    assert not caplog.text
    as_first_version(folder)
    same(load_compact(folder), expected)
    assert "has no checksums, since an older version wrote it" in caplog.text
    tensors = load_file(folder / "block_00001.safetensors")
    save_file({**tensors, f"{UP}.values": tensors[f"{UP}.values"][1:].contiguous()}, folder / "block_00001.safetensors")
    with pytest.raises(CompactFileError, match=rf"{UP} has \d+ values for \d+ weights"):
        load_compact(folder)
    save_file({n: t for n, t in tensors.items() if not n.startswith(UP)}, folder / "block_00001.safetensors")
    with pytest.raises(CompactFileError, match=rf"{UP} is missing"):
        load_compact(folder)


def test_the_description_is_enough_to_read_the_files(folders):
    """By NumPy and JSON alone, as docs/compact_format.md says; bfloat16 as the upper half of float32."""
    folder, _, expected = folders
    index = json.loads((folder / "compact.json").read_text())
    for name, stored in index["tensors"].items():
        written = (folder / stored["file"]).read_bytes()
        start = 8 + int.from_bytes(written[:8], "little")
        header = json.loads(written[8:start])

        def part(name, kind, header=header, written=written, start=start):
            begin, end = header[name]["data_offsets"]
            return np.frombuffer(written[start + begin : start + end], kind)

        weight = np.zeros(stored["shape"], np.uint16)
        if f"{name}.mask" in stored["xxh3"]:
            kept = np.unpackbits(part(f"{name}.mask", np.uint8), count=weight.size).astype(bool)
            weight.reshape(-1)[kept] = part(f"{name}.values", np.uint16)
        else:
            weight[:] = part(name, np.uint16).reshape(weight.shape)
        found = (weight.astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(found, expected[name].float().numpy()), name


MEMORY = """
import resource, sys
import torch
from transformers import AutoModelForCausalLM
from maiht_lightning import load_compact

load_compact(sys.argv[1])  # what libraries take once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_compact(sys.argv[2])
taken = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print(taken / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.slow
def test_loading_takes_little_more_memory_than_the_model(folders, tiny_llama, tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12, "num_key_value_heads": 4}
    model = tiny_llama(vocab_size=64, **sizes)
    with torch.no_grad():
        for _, linear in compact.find_blocks(model).linears():
            linear.weight[torch.rand_like(linear.weight) < 0.5] = 0
    large = save_compact(model, tmp_path / "large")
    command = [sys.executable, "-c", MEMORY, str(folders[0]), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # One for the model, a twelfth for a block and a file of half its size, and what the allocator keeps.
    assert float(done.stdout.split()[-1]) < 1.3


def test_the_folder_is_replaced_only_when_the_new_one_is_whole(folders, tiny_llama, tmp_path, monkeypatch):
    model = tiny_llama(vocab_size=64)
    folder = save_compact(model, tmp_path / "compact")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(compact, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_compact(model, folder)
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == before
