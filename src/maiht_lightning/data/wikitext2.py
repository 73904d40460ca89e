"""WikiText-2 for fine-tuning."""

from .module import TextDataModule
from .sources import load_texts


class WikiText2DataModule(TextDataModule):
    """WikiText-2, raw (Merity et al., 2016, https://arxiv.org/abs/1609.07843): 2 M words of Wikipedia.

    It is read from the hub (`Salesforce/wikitext`, `wikitext-2-raw-v1`), or from `wikitext2/{split}.parquet` in the
    folder that `MAIHT_DATA_DIR` names. Arguments and batches are those of `TextDataModule`.

    Example::

        trainer.fit(CausalLMModule("huggyllama/llama-7b"), datamodule=WikiText2DataModule(seqlen=2048))
    """

    def texts(self, split: str) -> list[str]:
        """List the lines of a split, blank ones included."""
        return load_texts("wikitext2", split)
