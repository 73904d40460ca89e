"""Small copies of the texts and the seven tasks, in the papers' files and columns, for where the real ones are not."""

import gzip
import json
import random

import pyarrow
import pyarrow.parquet

ROWS = 24
TEXT = """
river stone light engine market garden winter signal copper island letter bridge harbour morning captain silver window
forest teacher number village planet glacier memory silent yellow ancient broken narrow distant carries follows measures
opens keeps reaches turns between above beneath toward without because although
"""
WORDS = TEXT.split()


def write_small_data(folder):
    """Write all of them below a folder, the same each time; returns it."""
    chance = random.Random(0)

    def words(low, high):
        return " ".join(chance.choices(WORDS, k=chance.randint(low, high)))

    def sentence(low=5, high=14):
        return words(low, high).capitalize() + "."

    def text(sentences):
        return " ".join(sentence() for _ in range(sentences))

    def choices():
        return {"text": [words(1, 6) for _ in range(4)], "label": ["A", "B", "C", "D"]}

    def question(name, number):
        return {
            "boolq": lambda: {
                "question": words(4, 8),
                "passage": text(5),
                "idx": number,
                "label": chance.randrange(2),
            },
            "rte": lambda: {
                "sentence1": text(2),
                "sentence2": sentence(),
                "label": chance.randrange(2),
                "idx": number,
            },
            "winogrande": lambda: {
                "sentence": f"The {words(1, 1)} met the {words(1, 1)} where the _ {words(3, 5)}.",
                "option1": words(1, 1),
                "option2": words(2, 2),
                "answer": str(chance.randint(1, 2)),
            },
            "hellaswag": lambda: {
                "ind": number,
                "activity_label": words(2, 2),
                "ctx_a": (first := sentence()),
                "ctx_b": (second := words(2, 3)),
                "ctx": f"{first} {second}",
                "endings": [words(2, 9) for _ in range(4)],
                "source_id": f"small~{number}",
                "split": "val",
                "split_type": "indomain",
                "label": str(chance.randrange(4)),
            },
            "openbookqa": lambda: {
                "id": f"small-{number}",
                "question_stem": words(5, 9),
                "choices": choices(),
                "answerKey": chance.choice("ABCD"),
            },
        }.get(
            name,
            lambda: {
                "id": f"small_{number}",
                "question": f"{words(5, 9)}?",
                "choices": choices(),
                "answerKey": chance.choice("ABCD"),
            },
        )()

    splits = {"validation": ("boolq", "rte", "winogrande", "hellaswag", "openbookqa", "arc_easy", "arc_challenge")}
    splits["test"] = ("openbookqa", "arc_easy", "arc_challenge")
    for split, names in splits.items():
        for name in names:
            _write(folder / "tasks" / name / f"{split}.parquet", [question(name, number) for number in range(ROWS)])
    for split, articles in (("train", 120), ("validation", 60), ("test", 60)):
        rows = []
        for _ in range(articles):
            rows += ["", f" = {words(1, 3).title()} = \n", "", *(f" {text(8)} \n" for _ in range(6))]
        _write(folder / "wikitext2" / f"{split}.parquet", [{"text": row} for row in rows])
    (folder / "c4").mkdir()
    for name in ("train", "validation"):
        with gzip.open(folder / "c4" / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            for number in range(200):
                document = {"text": text(chance.randint(5, 120)), "timestamp": "", "url": f"http://small/{number}"}
                file.write(json.dumps(document) + "\n")
    return folder


def _write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
