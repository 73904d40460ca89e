"""LightningModules and their data as people write them who have never heard of pruning."""

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


def language_model(seed=0):
    """A small LLaMA that came from nowhere, so that no tokenizer is beside it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                bos_token_id=None,
                eos_token_id=None,
            )
        )


def sequences(seed=0, count=8):
    """Token ids of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 24, (count,), generator=generator).tolist()
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


def pad(rows, *, left=False):
    """Token ids and mask (windows, longest), as a collator makes them."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(longest - len(tokens), None) if left else slice(len(tokens))
        ids[row, place], mask[row, place] = tokens, 1
    return ids, mask


def dictionaries(rows):
    """A collate function's work: a padded batch with labels."""
    ids, mask = pad(rows)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Stranger(LightningModule):
    """What the five have in common: nothing but their data's size."""

    @staticmethod
    def loader(seed=0):
        return DataLoader(sequences(seed), batch_size=2, collate_fn=dictionaries)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Nested(Stranger):
    """The model is an attribute of an attribute, among other parts."""

    def __init__(self):
        super().__init__()
        self.agent = nn.Module()
        self.agent.parts = nn.ModuleDict({"policy": language_model(), "value": nn.Linear(32, 1)})

    def training_step(self, batch, batch_idx):
        output = self.agent.parts["policy"](**batch, output_hidden_states=True)
        return output.loss + self.agent.parts["value"](output.hidden_states[-1]).square().mean()


class Manual(Stranger):
    """Optimizer steps by hand, batches in tuples."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.lm = language_model(1)

    @staticmethod
    def loader(seed=0):
        return DataLoader(TensorDataset(*pad(sequences(seed)), torch.arange(8)), batch_size=3)

    def training_step(self, batch, batch_idx):
        ids, mask, _ = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.lm(ids, mask, labels=ids).loss)
        optimizer.step()


class Several(Stranger):
    """An optimizer for the blocks and one for the rest, in turns."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = language_model(2)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()[batch_idx % 2]
        optimizer.zero_grad()
        self.manual_backward(self.net(**batch).loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()

    def configure_optimizers(self):
        blocks = {id(parameter) for parameter in self.net.model.layers.parameters()}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in blocks]
        return (
            torch.optim.SGD(self.net.model.layers.parameters(), lr=1e-2, momentum=0.9),
            torch.optim.AdamW(rest, lr=1e-3),
        )


class Merged(Stranger):
    """Adapters were trained somewhere else and merged here."""

    def __init__(self):
        super().__init__()
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            settings = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
            self.model = get_peft_model(language_model(3), settings).merge_and_unload()
        # PEFT leaves the merged weights frozen.
        self.model.requires_grad_(True)

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss


class OwnNames(Stranger):
    """Batches padded on the left with keys of their own, and a head of its own on the backbone."""

    def __init__(self):
        super().__init__()
        self.encoder = language_model(4)
        self.head = nn.Linear(32, VOCABULARY)

    @staticmethod
    def loader(seed=0):
        def collate(rows):
            ids, mask = pad(rows, left=True)
            return {"tokens": ids, "real": mask.bool(), "source": ["web"] * len(rows)}

        return DataLoader(sequences(seed), batch_size=3, collate_fn=collate)

    def training_step(self, batch, batch_idx):
        hidden = self.encoder.model(batch["tokens"], attention_mask=batch["real"]).last_hidden_state
        real = batch["real"][:, 1:]
        return nn.functional.cross_entropy(self.head(hidden)[:, :-1][real], batch["tokens"][:, 1:][real])


STRANGERS = {kind.__name__: kind for kind in (Nested, Manual, Several, Merged, OwnNames)}
