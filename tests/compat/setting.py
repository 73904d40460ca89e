"""The runs from which the files in this folder come: their texts, model and configuration."""

from helpers.byte_model import llama_config, save_folder
from helpers.small_texts import write_texts


def write_setting(folder):
    """Write what the runs need into a folder from which they are started: `tiny`, a model, and `texts`."""
    config = llama_config(hidden_size=8, intermediate_size=16, tie_word_embeddings=True)
    save_folder(folder / "tiny", config)
    write_texts(folder / "texts")


def _run(max_epochs, pruning, **sections):
    checkpoints = {"every_n_train_steps": 3, "save_top_k": -1, "filename": "{step}"}
    return {
        "seed_everything": 7,
        "model": {"name_or_path": "tiny", "learning_rate": 3e-3},
        "data": {"class_path": "WikiText2DataModule", "init_args": {"seqlen": 32, "batch_size": 2}},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": max_epochs,
            "limit_train_batches": 4,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints},
            ],
        },
        "pruning": {
            "calibration": {"class_path": "C4Calibration", "init_args": {"samples": 4, "seqlen": 32}},
            "evaluation": {"perplexity": ["wikitext2"], "seqlen": 32, "max_windows": 4},
            **pruning,
        },
        **sections,
    }


RUNS = {
    # Pruned after the first and the second of three epochs, which have four steps each.
    "schedule": _run(3, {"prune_at": {"epoch:1": 0.3, "epoch:2": 0.5}}),
    # Trained for an epoch of four steps, pruned, and trained for five steps more.
    "recovery": _run(
        1,
        {"method": "sparsegpt", "sparsity": 0.5, "pattern": "2:4"},
        sparse_finetune={"max_steps": 5, "learning_rate": 2e-3},
    ),
}
# The step whose checkpoint is kept: between the prunings of the first, in the sparse fine-tune of the second.
INTERRUPTED_AT = 6
