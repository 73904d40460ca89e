"""Where crops of long documents begin."""

import random

from maiht_lightning.data.c4 import crop_windows


def characters(text, verbose):
    """A tokenizer with a token a character."""
    return {"input_ids": [ord(character) for character in text]}


def test_crops_begin_anywhere_and_reach_the_end():
    text = "abcdefgh"
    windows = crop_windows([text] * 100, characters, 6, samples=100, rng=random.Random(0))
    found = {"".join(map(chr, row)) for row in windows.tolist()}
    assert found == {"abcdef", "bcdefg", "cdefgh"}
