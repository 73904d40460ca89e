"""A zero-shot task of a few short documents, and what a model is asked for it."""

import contextlib

from transformers.models.llama import modeling_llama

from helpers.byte_model import byte_tokenizer


def write_boolq(folder):
    """BoolQ's files, as `MAIHT_DATA_DIR` is laid out: five documents to ask, four to draw solved examples from."""
    import pyarrow
    import pyarrow.parquet

    (folder / "tasks" / "boolq").mkdir(parents=True)
    for split, count in (("train", 4), ("validation", 5)):
        documents = [
            {"question": f"is {i} odd", "passage": f"Of {split}: number {i}.", "idx": i, "label": i % 2}
            for i in range(count)
        ]
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(documents), folder / "tasks" / "boolq" / f"{split}.parquet"
        )


@contextlib.contextmanager
def questions(monkeypatch):
    """A list that fills with the batches of BoolQ's questions that a LLaMA of bytes is given, as lists of texts."""
    asked, forward = [], modeling_llama.LlamaForCausalLM.forward

    def watch(self, input_ids=None, *args, **kwargs):
        texts = [byte_tokenizer().decode(ids) for ids in input_ids]
        if all("Question:" in text for text in texts):
            asked.append(texts)
        return forward(self, input_ids, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama.LlamaForCausalLM, "forward", watch)
        yield asked
