"""Other people's batches, read into token sequences without padding."""

import random
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import BatchEncoding, DataCollatorWithFlattening, DataCollatorWithPadding

from helpers.byte_model import byte_tokenizer
from maiht_lightning.data import batches
from maiht_lightning.data.batches import Windows

# Four sequences, the last two of one length; 0 is a token like any other in them.
SEQUENCES = [[5, 0, 7, 9, 1], [3, 3, 0], [8, 2, 0, 4], [0, 6, 1, 0]]
LENGTHS = [len(sequence) for sequence in SEQUENCES]
PAD = 63


def padded(sequences=SEQUENCES, *, left=False, pad=PAD):
    """Token ids and mask (windows, longest)."""
    longest = max(map(len, sequences))
    ids, mask = torch.full((len(sequences), longest), pad), torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if left else slice(len(sequence))
        ids[row, place], mask[row, place] = torch.tensor(sequence), 1
    return ids, mask


def sequences_of(windows):
    return sorted(row.tolist() for group in windows.groups for row in group)


def pairs(rows):
    """A list of batches of two rows each, of some tensors (rows, ...)."""
    return list(zip(*(tensor.split(2) for tensor in rows), strict=True))


class Rows(Dataset):
    """Samples as people keep them: token ids of different lengths in lists."""

    def __init__(self, form):
        self.form = form

    def __len__(self):
        return len(SEQUENCES)

    def __getitem__(self, index):
        return self.form(SEQUENCES[index])


Named = namedtuple("Named", "input_ids attention_mask")
RIGHT, LEFT = padded(), padded(left=True)
PACKED = torch.tensor([[token for sequence in SEQUENCES for token in sequence]])
PLACES = torch.tensor([[place for length in LENGTHS for place in range(length)]])


def mapped(rows):
    return [{"input_ids": ids, "attention_mask": mask, "labels": ids} for ids, mask in pairs(rows)]


def with_tokenizer(side):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = "<end>", side
    samples = Rows(lambda ids: {"input_ids": ids, "attention_mask": [1] * len(ids)})
    return DataLoader(samples, batch_size=3, collate_fn=DataCollatorWithPadding(tokenizer))


FORMS = {
    "dictionaries, padded on the right": mapped(RIGHT),
    "dictionaries, padded on the left": mapped(LEFT),
    "a collator of transformers, right": with_tokenizer("right"),
    "a collator of transformers, left": with_tokenizer("left"),
    "BatchEncoding": [BatchEncoding(batch) for batch in mapped(RIGHT)],
    "what a tokenizer returns": BatchEncoding({"input_ids": RIGHT[0], "attention_mask": RIGHT[1]}),
    "bool masks": [{"input_ids": ids, "attention_mask": mask.bool()} for ids, mask in pairs(RIGHT)],
    "float masks and int32": [(ids.int(), mask.float()) for ids, mask in pairs(LEFT)],
    "objects": [SimpleNamespace(input_ids=ids, attention_mask=mask) for ids, mask in pairs(LEFT)],
    "named tuples": [Named(*pair) for pair in pairs(LEFT)],
    "a TensorDataset with labels": DataLoader(TensorDataset(*RIGHT, RIGHT[0]), batch_size=3),
    "a dictionary and its index": [(batch, index) for index, batch in enumerate(mapped(RIGHT))],
    "several loaders, in a dictionary": [{"a": batch, "b": other} for batch, other in [mapped(RIGHT)]],
    "several loaders, in a list": [mapped(RIGHT)],
    "samples in dictionaries": DataLoader(
        Rows(lambda ids: {"input_ids": ids}), batch_size=2, collate_fn=lambda samples: samples
    ),
    "samples in tensors": DataLoader(Rows(torch.tensor), batch_size=2, collate_fn=lambda samples: samples),
    "no batches": DataLoader(Rows(torch.tensor), batch_size=None),
    "a row of a dictionary at a time": Rows(lambda ids: {"input_ids": ids}),
    "rows of lists": [{"input_ids": SEQUENCES, "attention_mask": [[1] * length for length in LENGTHS]}],
    "NumPy": [{"input_ids": np.array(ids), "attention_mask": np.array(mask)} for ids, mask in pairs(RIGHT)],
    "packed": [{"input_ids": PACKED, "position_ids": PLACES}],
    "packed and padded": [
        {
            "input_ids": torch.cat([PACKED, torch.tensor([[PAD, PAD]])], 1),
            "position_ids": torch.cat([PLACES, PLACES[:, :1], PLACES[:, :1]], 1),
        }
    ],
    "packed, with padding between": [
        {"input_ids": ids.view(1, -1), "attention_mask": mask.view(1, -1), "position_ids": torch.arange(5).repeat(4)}
        for ids, mask in [RIGHT]
    ],
    "padded on the left, with positions": [
        {
            "input_ids": LEFT[0],
            "attention_mask": LEFT[1],
            "position_ids": (LEFT[1].cumsum(1) - 1).masked_fill(LEFT[1] == 0, 1),
        }
    ],
    "flattened by transformers": [DataCollatorWithFlattening()([{"input_ids": ids} for ids in SEQUENCES])],
    "a generator": None,
}


@pytest.mark.parametrize("form", FORMS)
def test_whatever_the_batches_are_the_sequences_are_the_same(form):
    source = (batch for batch in mapped(LEFT)) if form == "a generator" else FORMS[form]
    source = [source[i] for i in range(len(source))] if isinstance(source, Rows) else source
    windows = Windows.parse(source)
    assert sequences_of(windows) == sorted(SEQUENCES)
    assert [group.shape for group in windows.groups] == [(1, 5), (2, 4), (1, 3)]
    assert all(group.dtype == torch.int64 for group in windows.groups)
    assert (windows.samples, windows.tokens) == (4, 16)


def test_a_tensor_is_taken_as_it_is():
    whole = torch.arange(12).view(3, 4)
    windows = Windows.parse(whole)
    assert windows.groups == (whole,)
    assert not windows.is_masked
    assert Windows.parse(windows) is windows


def test_whole_windows_of_a_loader_are_those_of_the_tensor():
    """So a journal that was begun with one resumes with the other."""
    whole = torch.arange(20).view(5, 4)
    (group,) = Windows.parse(DataLoader(TensorDataset(whole, torch.ones_like(whole)), batch_size=2)).groups
    assert torch.equal(group, whole)


def test_batches_have_windows_of_one_length():
    windows = Windows.parse(mapped(RIGHT))
    assert [tuple(batch.shape) for batch in windows.batches(1)] == [(1, 5), (1, 4), (1, 4), (1, 3)]
    assert [tuple(batch.shape) for batch in windows.batches(8)] == [(1, 5), (2, 4), (1, 3)]


def test_only_what_all_batches_say_is_known_of_padding():
    assert Windows.parse(mapped(RIGHT)).is_masked
    assert not Windows.parse([*mapped(RIGHT), RIGHT[0]]).is_masked
    assert not Windows.parse(FORMS["packed"]).is_masked


def test_labels_of_zeros_and_ones_are_no_mask():
    ids = torch.tensor([[0, 1, 1, 0]])
    assert sequences_of(Windows.parse([(ids, ids.clone())])) == [[0, 1, 1, 0]]


def test_rows_of_padding_alone_are_left_out():
    ids, mask = padded()
    windows = Windows.parse([(torch.cat([ids, ids]), torch.cat([mask, torch.zeros_like(mask)]))])
    assert sequences_of(windows) == sorted(SEQUENCES)


def test_loaders_that_shuffle_give_the_same_and_draw_nothing():
    class Cropped(Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, index):
            return torch.tensor([index, random.randrange(99), int(torch.randint(99, ()))])

    loader, found = DataLoader(Cropped(), batch_size=4, shuffle=True), []
    for seed in (1, 2):
        random.seed(seed)
        torch.manual_seed(seed)
        expected = random.random(), torch.rand(()).item()
        random.seed(seed)
        torch.manual_seed(seed)
        found.append(Windows.parse(loader).groups[0])
        assert (random.random(), torch.rand(()).item()) == expected
    assert torch.equal(*found)
    assert not torch.equal(found[0][:, 0], torch.arange(32))


def test_no_more_of_a_loader_is_read_than_is_enough(caplog):
    asked = []

    def for_ever():
        while True:
            asked.append(len(asked))
            yield torch.full((2, 10), len(asked))

    windows = Windows.parse(for_ever(), tokens=45)
    assert windows.samples == 6
    assert "first 6 windows of a generator, which have 60 tokens; to take all of them, give a list" in caplog.text
    caplog.clear()
    whole = [torch.zeros(2, 10, dtype=torch.long) for _ in range(5)]
    assert Windows.parse(whole, tokens=45).samples == 10
    assert Windows.parse(iter(whole[:3]), tokens=60).samples == 6
    assert not caplog.text
    assert Windows.parse(for_ever(), samples=3).samples == 3


IDS = torch.ones(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("train", TypeError, "windows must be a LongTensor .* but found str"),
        (7, TypeError, "but found int"),
        ({"tokens": IDS}, TypeError, "but found dict"),
        ([{"tokens": IDS, "y": 1}], TypeError, "dictionaries with input_ids.* but found a dictionary with tokens, y"),
        ([3, 4], TypeError, "but found a batch of type int"),
        ([["a text"]], TypeError, "but found a batch of type list"),
        ([[[1, 2], [3]]], TypeError, "but found a batch of type list"),
        ([], ValueError, "at least one token, but found none.* is the loader empty"),
        ([(IDS, torch.zeros_like(IDS))], ValueError, "at least one token, but found none"),
        ([IDS.float()], TypeError, r"but found input_ids of torch\.float32"),
        ([IDS[None]], ValueError, r"input_ids must have shape \(windows, seqlen\), but found \(1, 2, 4\)"),
        (
            [{"input_ids": [IDS[0], IDS[1]]}],
            TypeError,
            "a list of tensors, which PyTorch's collation makes .* set_format",
        ),
        (
            [{"input_ids": IDS, "attention_mask": torch.ones(2, 1, 4, 4)}],
            ValueError,
            r"shape of input_ids, \(2, 4\), but found \(2, 1, 4, 4\): say of packed rows with position_ids",
        ),
        ([{"input_ids": IDS, "attention_mask": 2 * IDS}], ValueError, "1 for tokens and 0 for padding"),
        (
            [{"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])}],
            ValueError,
            "mask the ends of a row, but found one with masked tokens between others: give position_ids",
        ),
        ([{"input_ids": IDS, "position_ids": torch.zeros(3, 2, 4)}], ValueError, r"position_ids must .* \(3, 2, 4\)"),
    ],
)
def test_what_cannot_be_read_is_refused(source, error, message):
    with pytest.raises(error, match=message):
        Windows.parse(source)


def test_the_tokens_that_are_enough_are_those_of_papers():
    assert batches.CALIBRATION_TOKENS == 128 * 2048
