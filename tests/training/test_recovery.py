"""The sparse fine-tune from the real command line, killed and resumed, in W&B, and with several processes."""

import json
import math
import os
import subprocess
import textwrap
import time
from pathlib import Path

import pytest
import torch
import yaml

from helpers.counts import assert_total_is, check_zeros
from helpers.warm import kill, python
from maiht_lightning import CausalLMModule
from maiht_lightning.cli import main
from maiht_lightning.models.loading import load_model
from maiht_lightning.models.sparsity import count_zeros

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src")}


@pytest.fixture
def options(tiny_folder, tmp_path, monkeypatch):
    """Options of a small run with a sparse fine-tune, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    every_step = {"every_n_train_steps": 1, "save_top_k": -1, "save_last": True}
    config = {
        "model": {"name_or_path": str(tiny_folder), "learning_rate": 1e-3},
        "data": {"class_path": "PythonDocsDataModule", "init_args": {"seqlen": 64, "batch_size": 4}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 3,
            "limit_train_batches": 12,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            "logger": False,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": every_step}],
        },
        "pruning": {
            "method": "wanda",
            "sparsity": 0.6,
            "calibration": {"class_path": "PythonDocsCalibration", "init_args": {"samples": 8, "seqlen": 64}},
            "evaluation": {"perplexity": ["python_docs"], "seqlen": 64, "max_windows": 2},
        },
        "sparse_finetune": {"max_steps": 18, "learning_rate": 2e-3},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return ["--config", "run.yaml"]


def weights_of(path):
    return {name: p.detach() for name, p in load_model(str(path)).named_parameters()}


@pytest.mark.slow
def test_one_command_trains_prunes_and_trains_on(options, tmp_path, capsys):
    main(["fit", *options, "--output_dir", "out"])
    pruned, finetuned = weights_of("out/model"), weights_of("out/model_finetuned")
    for name, weight in pruned.items():
        if "_proj" in name:
            check_zeros(weight == 0, "unstructured", 0.6)
            assert torch.equal(weight == 0, finetuned[name] == 0)
            assert not torch.equal(weight, finetuned[name])
    summary = json.loads(Path("out/summary.json").read_text())
    assert list(summary["stages"]) == ["dense", "pruned", "finetuned"]
    perplexities = [stage["perplexity"]["python_docs"] for stage in summary["stages"].values()]
    assert perplexities[2] < perplexities[1]
    table = capsys.readouterr().out
    assert f"{perplexities[2]:.3f}" in table
    page = Path("out/report.html").read_text()
    assert "finetuned" in page
    saved = torch.load("out/sparse_checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 21
    assert yaml.safe_load(Path("out/config.yaml").read_text())["sparse_finetune"]["max_steps"] == 18


@pytest.mark.slow
def test_the_schedule_of_the_second_fit_is_its_own(options, tmp_path):
    main(["fit", *options, "--output_dir", "out", "--model.warmup_fraction", "0"])
    rates = {}
    for path in Path("out/sparse_checkpoints").glob("epoch*.ckpt"):
        saved = torch.load(path, weights_only=True)
        rates[saved["global_step"] - 3] = saved["optimizer_states"][0]["param_groups"][0]["lr"]
    # The rate of the step that comes next; a cosine from its own rate to 0.
    assert rates == {
        step: pytest.approx(1e-3 * (1 + torch.cos(torch.tensor(step / 18 * torch.pi))).item(), abs=1e-9)
        for step in range(1, 19)
    }


@pytest.mark.slow
def test_the_second_phase_is_what_the_file_says(options, tiny_folder, tokenizer, tmp_path, monkeypatch):
    """Length, learning rate, warm-up, distillation and temperature, against a plain loop over the same batches."""
    sharp = load_model(str(tiny_folder))
    with torch.no_grad():
        for name, weight in sharp.named_parameters():
            # So that the pruned model predicts something else than the dense one, and both something of their own.
            weight.mul_(30 if "lm_head" in name else 10 if "_proj" in name else 1)
    sharp.save_pretrained("sharp")
    tokenizer.save_pretrained("sharp")
    rate, share, weight, temperature = 2e-3, 0.25, 0.4, 2.0
    config = yaml.safe_load(Path("run.yaml").read_text())
    config["model"]["name_or_path"] = "sharp"
    config["data"]["init_args"] = {"seqlen": 32, "batch_size": 2}
    config["trainer"] |= {"limit_train_batches": 8, "enable_checkpointing": False, "callbacks": None}
    config["sparse_finetune"] = {
        "max_epochs": 1,
        "learning_rate": rate,
        "warmup_fraction": share,
        "distillation": weight,
        "temperature": temperature,
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    batches, losses, step_of = [], [], CausalLMModule.training_step

    def training_step(self, batch, batch_idx):
        loss = step_of(self, batch, batch_idx)
        batches.append(batch["input_ids"])
        losses.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(CausalLMModule, "training_step", training_step)
    main(["fit", *options, "--output_dir", "out"])
    assert len(losses) == 3 + 8

    dense, student = load_model("out/model_dense").eval(), load_model("out/model").train()
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, weight_decay=0.0)
    for step, batch in enumerate(batches[3:]):
        output = student(input_ids=batch, labels=batch)
        with torch.no_grad():
            target = dense(input_ids=batch).logits

        def divergence(temperature, output=output, target=target):
            q, p = (torch.log_softmax(x[:, :-1].double() / temperature, -1) for x in (output.logits, target))
            return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()

        loss = (1 - weight) * output.loss + weight * divergence(temperature)
        assert losses[3 + step] == pytest.approx(float(loss), rel=1e-4)
        for other in ((1 - weight) * output.loss + weight * divergence(1.0), output.loss):
            assert losses[3 + step] != pytest.approx(float(other), rel=1e-3)
        optimizer.zero_grad()
        loss.backward()
        cosine = (1 + math.cos(math.pi * (step - 2) / 6)) / 2
        optimizer.param_groups[0]["lr"] = rate * (step / 2 if step < 2 else cosine)  # two of eight steps are warm-up
        for name, p in student.named_parameters():
            p.grad *= (start[name] != 0) | ("_proj" not in name)
        optimizer.step()
    for name, finetuned in weights_of("out/model_finetuned").items():
        moved, expected = finetuned - start[name], student.get_parameter(name).detach() - start[name]
        assert (moved - expected).norm() < 0.02 * expected.norm(), name


@pytest.mark.slow
def test_a_fit_resumed_after_its_pruning_goes_on_in_its_folder(options):
    """Without --output_dir: the checkpoint knows the run's folder."""
    command = ["fit", *options, "--pruning.prune_at", "step:2", "--sparse_finetune.max_steps", "null"]
    main([*command, "--output_dir", "out", "--trainer.max_steps", "3"])
    (checkpoint,) = Path("out").glob("**/*step=3.ckpt")
    finished = weights_of("out/model_finetuned")
    main([*command, "--ckpt_path", str(checkpoint), "--trainer.max_steps", "6"])
    assert not Path("runs").exists()
    assert list(json.loads(Path("out/summary.json").read_text())["stages"]) == ["dense", "pruned", "finetuned"]
    pruned, further = weights_of("out/model"), weights_of("out/model_finetuned")
    assert any(not torch.equal(weight, further[name]) for name, weight in finished.items())
    assert all(torch.equal(w == 0, further[name] == 0) for name, w in pruned.items() if "_proj" in name)


@pytest.mark.slow
def test_wandb_goes_on_with_the_same_run_and_axis(options, tmp_path):
    import wandb

    from helpers.wandb_file import read_run

    logger = '{"class_path": "WandbLogger", "init_args": {"offline": true, "project": "test"}}'
    main(["fit", *options, "--output_dir", "out", "--trainer.logger", logger])
    wandb.finish()
    history, config = read_run(tmp_path / "out")
    assert [row["trainer/global_step"] for row in history if "train/loss" in row] == list(range(21))
    metrics = {key: value for row in history for key, value in row.items()}
    summary = json.loads(Path("out/summary.json").read_text())
    for stage in ("dense", "pruned", "finetuned"):
        assert metrics[f"{stage}/perplexity/python_docs"] == summary["stages"][stage]["perplexity"]["python_docs"]
    assert metrics["finetuned/sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert config["sparse_finetune"]["max_steps"] == 18


SHIPPED = {
    "smollm2_recovery": [],
    # Any file is one for recovery with this.
    "smollm2_wikitext2": ["--sparse_finetune.max_epochs", "1", "--trainer.max_epochs", "-1"],
}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # three processes, beside whatever else runs
@pytest.mark.parametrize("name", SHIPPED)
def test_killed_in_the_sparse_phase_and_resumed(name, tiny_folder, small_data, tmp_path, monkeypatch):
    """The files as they are, with a small model, less text and fewer steps, from the command in the guide."""
    monkeypatch.chdir(tmp_path)
    less = {
        "model.name_or_path": tiny_folder,
        "data.init_args.seqlen": 16,
        "trainer.max_steps": 20,
        "trainer.limit_train_batches": 45,
        "trainer.limit_val_batches": 2,
        "pruning.calibration.init_args.samples": 4,
        "pruning.calibration.init_args.seqlen": 32,
        "pruning.evaluation.seqlen": 32,
        "pruning.evaluation.max_windows": 2,
    }
    options = [text for setting, value in less.items() for text in (f"--{setting}", str(value))]
    config = str(ROOT / "configs" / f"{name}.yaml")
    command = [*python(), "-m", "maiht_lightning.cli", "fit", "--config", config, *options, *SHIPPED[name]]
    # Sums of floats depend on the number of threads.
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1", "MAIHT_DATA_DIR": str(small_data)}

    def start(run):
        with open(f"{run}.log", "w") as log:
            return subprocess.Popen([*command, "--output_dir", run], env=environment, stdout=log, stderr=log)

    # Both at the same time.
    undisturbed, process = start("whole"), start("broken")
    last, deadline = Path("broken/sparse_checkpoints/last.ckpt"), time.monotonic() + 900
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, (process.returncode, Path("broken.log").read_text()[-3000:])
    kill(process)
    assert undisturbed.wait() == 0, Path("whole.log").read_text()[-3000:]
    assert not Path("broken/model_finetuned").exists()
    assert torch.load(last, weights_only=True)["global_step"] in (40, 60)  # after 20 or 40 steps, of 45 in this phase
    for run in ("whole", "broken"):
        # Of the first phase: what a run goes on from that died in it or while it was pruned.
        (checkpoint,) = Path(run).glob("maiht-smollm2/*/checkpoints/last.ckpt")
        assert torch.load(checkpoint, weights_only=True)["global_step"] == 20

    # Without --output_dir: the checkpoint knows the run's folder.
    done = subprocess.run(
        [*command, "--ckpt_path", str(last)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole, resumed = weights_of("whole/model_finetuned"), weights_of("broken/model_finetuned")
    assert all(torch.equal(weight, resumed[layer]) for layer, weight in whole.items())
    one, two = (json.loads(Path(run, "summary.json").read_text())["stages"] for run in ("whole", "broken"))
    assert one == two
    assert list(one) == ["dense", "pruned", "finetuned"]
    sparsity = yaml.safe_load(Path("whole/config.yaml").read_text())["pruning"]["sparsity"]
    pruned = [weight for layer, weight in resumed.items() if "_proj" in layer]
    assert_total_is(sparsity, [(int((weight == 0).sum()), weight.numel()) for weight in pruned])
    assert {path.name for path in Path("runs").glob("*")} == set()
    # The last one of the phase, by the second of the files' callbacks.
    (end,) = Path("broken/sparse_checkpoints").glob("epoch*.ckpt")
    assert torch.load(end, weights_only=True)["global_step"] == 65


def test_averages_are_refused_before_the_first_phase(options, tmp_path, capsys):
    averaging = '[{"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging"}]'
    with pytest.raises(SystemExit):
        main(["fit", *options, "--output_dir", "out", "--trainer.callbacks", averaging])
    assert "EMAWeightAveraging would average" in capsys.readouterr().err
    assert not Path("out/model").exists()


@pytest.mark.slow
def test_a_sparse_checkpoint_needs_a_sparse_finetune(options, tmp_path, capsys):
    main(["fit", *options, "--output_dir", "out", "--sparse_finetune.max_steps", "1"])
    checkpoint = ["--ckpt_path", "out/sparse_checkpoints/last.ckpt"]
    with pytest.raises(SystemExit):
        main(["fit", *options, *checkpoint, "--sparse_finetune.max_steps", "null"])
    assert "was written by a sparse fine-tune" in capsys.readouterr().err


@pytest.mark.slow
def test_a_pruned_folder_is_trained_on_by_itself(options, tmp_path):
    main(["fit", *options, "--output_dir", "out", "--sparse_finetune.max_steps", "null"])
    frozen = '[{"class_path": "FrozenSparsity"}]'
    again = ["--model.name_or_path", "out/model", "--trainer.callbacks", frozen, "--sparse_finetune.max_steps", "null"]
    main(["fit", *options, *again, "--output_dir", "again", "--trainer.enable_checkpointing", "false"])
    pruned, finetuned = weights_of("out/model"), weights_of("again/model_finetuned")
    assert all(torch.equal(w == 0, finetuned[name] == 0) for name, w in pruned.items() if "_proj" in name)
    assert list(json.loads(Path("again/summary.json").read_text())["stages"]) == ["pruned", "finetuned"]
    assert not Path("again/model").exists()


# ---- The examples


@pytest.mark.slow
def test_the_example_in_own_code(tiny_folder, tmp_path):
    script = [*python(), ROOT / "docs" / "examples" / "own_code.py", "--seqlen", "64", "--steps", "5"]
    done = subprocess.run(
        [*script, "--model", tiny_folder, "--output", tmp_path / "run"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["stages"]) == ["dense", "pruned", "finetuned"]
    assert summary["measured_sparsity"] == 0.5


# ---- Several processes, compiled models

DISTRIBUTED = """
    import sys
    import torch
    from lightning.pytorch import LightningModule, Trainer, seed_everything
    from torch.utils.data import DataLoader
    from maiht_lightning import FrozenSparsity
    from maiht_lightning.models.loading import load_model

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.lm = load_model("out/model").train()
        def training_step(self, batch, batch_idx):
            return self.lm(input_ids=batch, labels=batch, use_cache=False).loss
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        def train_dataloader(self):
            windows = torch.randint(0, 1000, (40, 32), generator=torch.Generator().manual_seed(0))
            # Each process takes its share, so that they have together what one has alone.
            return DataLoader(windows[self.global_rank :: devices], batch_size=4 // devices)

    devices = int(sys.argv[1])
    strategy = "ddp" if devices > 1 else "auto"
    module = Module()
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, use_distributed_sampler=False, max_epochs=1,
        gradient_clip_val=1.0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[FrozenSparsity()],
    )
    trainer.fit(module)
    torch.save(module.lm.state_dict(), f"weights_{devices}_{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_as_one_with_the_same_batch(options, tmp_path):
    main(["fit", *options, "--output_dir", "out", "--sparse_finetune.max_steps", "null"])
    Path("program.py").write_text(textwrap.dedent(DISTRIBUTED))
    for devices in ("1", "2"):
        done = subprocess.run(
            [*python(), "program.py", devices], env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    alone, first, second = (torch.load(f"weights_{name}.pt", weights_only=True) for name in ("1_0", "2_0", "2_1"))
    start = weights_of("out/model")
    for name, weight in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight, rtol=1e-4, atol=1e-6)
        if "_proj" in name:
            assert torch.equal(first[name] == 0, start[name] == 0)
            assert (first[name] != start[name])[start[name] != 0].all()


@pytest.mark.slow
def test_a_compiled_model(tiny_llama):
    from helpers.frozen_fit import BATCHES, Module, trainer
    from maiht_lightning import FrozenSparsity, prune

    losses = []
    for compiled in (False, True):
        model = tiny_llama(vocab_size=64, hidden_size=32, intermediate_size=48)
        prune(model, BATCHES[90], sparsity=0.6, method="wanda", progress=False)
        masks = {n: p != 0 for n, p in model.named_parameters() if "_proj" in n}
        # Which backend runs it does not matter to names and masks, and Inductor takes a minute.
        module = Module(torch.compile(model.train(), backend="aot_eager") if compiled else model.train())
        trainer(FrozenSparsity(), max_steps=10).fit(module)
        assert all(torch.equal(p != 0, masks[n]) for n, p in model.named_parameters() if n in masks)
        assert sum(c.zeros for c in count_zeros(model)) == sum(int((~m).sum()) for m in masks.values())
        losses.append(module.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
