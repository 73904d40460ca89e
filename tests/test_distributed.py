"""Two processes that prune one model, with gloo on the CPU."""

import importlib
import json
import os
import socket
import subprocess
import textwrap
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import LlamaForCausalLM

from helpers.own_module import OwnModule, trainer
from helpers.warm import kill, python
from maiht_lightning import MAIHTPruning
from maiht_lightning.callbacks.compatibility import check_trainer
from maiht_lightning.distributed import Ranks
from maiht_lightning.models.sparsity import count_zeros, measured_sparsity
from maiht_lightning.pruning.pruner import prune

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}

HEAD = """
    import os, sys, time
    from datetime import timedelta
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM
    from maiht_lightning.pruning.pruner import prune

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
    )).eval()
    windows = torch.randint(0, 64, (7, 32), generator=torch.Generator().manual_seed(1))
    world = int(os.environ["WORLD_SIZE"])  # Lightning takes it away at a fit's end
    alone = world == 1
    if not alone:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = None if alone else dist.group.WORLD
    rank = int(os.environ["RANK"])
"""


def launch(program, processes, folder, *arguments):
    """The processes of a program, each with a rank, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    path = folder / "program.py"
    path.write_text(textwrap.dedent(HEAD) + textwrap.dedent(program))
    started = []
    for rank in range(processes):
        process = {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": rank, "MASTER_PORT": port}
        variables = {**ENVIRONMENT, "MASTER_ADDR": "localhost", **{name: str(value) for name, value in process.items()}}
        started.append(
            subprocess.Popen(
                [*python(), path, *arguments], cwd=folder, env=variables, stderr=subprocess.PIPE, text=True
            )
        )
    return started


def finished(program, processes, folder, *arguments):
    """The errors of a program that has run to its end without any."""
    for process in launch(program, processes, folder, *arguments):
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]


PRUNE = """
    import copy
    from maiht_lightning.solvers import MAIHTConfig
    dense, found = model, []
    journal = {"journal_dir": "journal"} if "journal" in sys.argv else {}
    for text in sys.argv[1].split():
        method, pattern, batch_size, *config = text.split(",", 3)
        model = copy.deepcopy(dense)
        settings = {"sparsity": 0.5, "method": method, "pattern": pattern, "batch_size": int(batch_size)}
        if config:
            # A preset, perhaps with changes, or an allocation of the zeros with the published setting.
            allocation = config[0] in ("owl", "error")
            settings["config"] = MAIHTConfig(allocation=config[0]) if allocation else config[0]
        report = prune(model, windows, process_group=group, progress=False, **settings, **journal)
        records = [(r.name, r.zeros, r.relative_error, r.objective) for r in report.layers]
        found.append({"weights": model.state_dict(), "records": records})
    torch.save(found, f"of_{world}_{rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_as_one(tmp_path):
    """Seven windows: one process has one more than the other, and the last batch is smaller. Nothing is trained."""
    sublayers = "maiht,unstructured,1,balanced,reconstruction_epochs=0"
    for processes in (1, 2):
        finished(PRUNE, processes, tmp_path, f"{sublayers} maiht,2:4,2,paper sparsegpt,row,3 wanda,row,1,error")
    results = (torch.load(tmp_path / f"of_{name}.pt", weights_only=True) for name in ("1_0", "2_0", "2_1"))
    for alone, first, second in zip(*results, strict=True):
        assert first["records"] == second["records"] == alone["records"]
        for name, weight in alone["weights"].items():
            assert torch.equal(first["weights"][name], weight), name
            assert torch.equal(second["weights"][name], weight), name


@pytest.mark.slow
def test_processes_that_reconstruct_end_with_the_same_weights(tmp_path):
    """They share the batches: a step takes one from each, so that the weights are others than those of one process."""
    for processes in (1, 2):
        finished(PRUNE, processes, tmp_path, "maiht,unstructured,1,best")
    (alone,), (first,), (second,) = (
        torch.load(tmp_path / f"of_{name}.pt", weights_only=True) for name in ("1_0", "2_0", "2_1")
    )
    assert first["records"] == second["records"]
    for name, weight in first["weights"].items():
        assert torch.equal(second["weights"][name], weight), name
    for (name, zeros, *_), (other, others, *_) in zip(first["records"], alone["records"], strict=True):
        assert (name, zeros) == (other, others)
    # Of the first block the supports are those of one process.
    for name, weight in first["weights"].items():
        if name.startswith("model.layers.0.") and name.endswith("_proj.weight"):
            assert torch.equal(weight == 0, alone["weights"][name] == 0), name


OWN = """
    from maiht_lightning.evaluation.evaluation import Evaluation
    generator = torch.Generator().manual_seed(rank)
    rows = [torch.randint(0, 64, (5 + n % 3,), generator=generator) for n in range(9)]
    report = prune(model, rows, config="paper", process_group=group, progress=False)

    def fails_in_one(model):
        if rank == 1:
            raise KeyError("its own fault")
        return {"never": 1.0}

    failed = []
    evaluation = Evaluation(perplexity={"mine": windows}, metrics=[lambda model: {"rank": rank}, fails_in_one])
    stage = evaluation.load(model).measure(
        model, process_group=group, progress=False, on_failure=lambda what, error: failed.append((what, str(error)))
    )
    torch.save({"weights": model.state_dict(), "stage": stage.to_json(), "failed": failed}, f"of_{world}_{rank}.pt")
"""


@pytest.mark.slow
def test_windows_and_metrics_are_the_first_processes(tmp_path):
    """Each process has a loader of its own, which gives others; what fails in one process fails in both."""
    for processes in (1, 2):
        finished(OWN, processes, tmp_path)
    alone, first, second = (torch.load(tmp_path / f"of_{name}.pt", weights_only=True) for name in ("1_0", "2_0", "2_1"))
    for name, weight in alone["weights"].items():
        assert torch.equal(first["weights"][name], weight), name
        assert torch.equal(second["weights"][name], weight), name
    assert first["stage"] == second["stage"]
    assert first["stage"]["metrics"] == {"rank": 0.0}
    assert first["stage"]["perplexity"]["mine"] == pytest.approx(alone["stage"]["perplexity"]["mine"], rel=1e-6)
    assert alone["stage"]["metrics"] == {"rank": 0.0, "never": 1.0}
    assert all("its own fault" in each["failed"][0][1] for each in (first, second))


@pytest.mark.slow
def test_three_processes_resume_the_journal_of_two(tmp_path):
    settings = "maiht,unstructured,1,balanced,reconstruction_epochs=0"
    finished(PRUNE, 2, tmp_path, settings, "journal")
    (tmp_path / "journal" / "block_00002.safetensors").unlink()
    finished(PRUNE, 3, tmp_path, settings, "journal")
    (two,), (three,) = (torch.load(tmp_path / f"of_{name}.pt", weights_only=True) for name in ("2_0", "3_2"))
    assert all(torch.equal(weight, three["weights"][name]) for name, weight in two["weights"].items())
    assert not (tmp_path / "journal.1").exists()


FAIL = """
    from maiht_lightning.solvers import LayerSolver
    def fail(self, weight, pattern):
        raise FloatingPointError("made to fail")
    if rank == 1:
        LayerSolver.prune = fail
    try:
        prune(model, windows, config="paper", process_group=group, progress=False)
    except RuntimeError as error:
        open(f"error_{rank}", "w").write(str(error))
"""


@pytest.mark.slow
def test_what_fails_in_one_process_ends_all(tmp_path):
    finished(FAIL, 2, tmp_path)
    messages = [(tmp_path / f"error_{rank}").read_text() for rank in (0, 1)]
    assert all("made to fail" in message and "model.layers.0" in message for message in messages)
    assert "process 1" in messages[0]


# One process fails alone: in a step of the reconstruction, or when it writes a block.
FAIL_ALONE = """
    from maiht_lightning.pruning import reconstruction
    from maiht_lightning.pruning.journal import Journal

    calls, real = [0], reconstruction.relative_error_per_token

    def failing(*tensors):
        calls[0] += 1
        if rank == 1 and calls[0] == int(sys.argv[1]):
            raise RuntimeError("made to fail")
        return real(*tensors)

    def full(*_):
        raise OSError("the disk is full, made to fail")

    reconstruction.relative_error_per_token = failing
    if sys.argv[1] == "0":
        Journal.save = full
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    try:
        prune(model, windows, config="best", process_group=group, progress=False, journal_dir="journal")
    except (RuntimeError, OSError) as error:
        open(f"error_{rank}", "w").write(str(error))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
"""


@pytest.mark.slow
# The second process has three of the seven windows, too few to hold one out: its fourth call is the first step's.
@pytest.mark.parametrize(("call", "failed"), [("1", 1), ("4", 1), ("0", 0)], ids=["held out", "step", "journal"])
def test_what_fails_in_one_process_within_reconstruction_or_writing_ends_all(tmp_path, call, failed):
    finished(FAIL_ALONE, 2, tmp_path, call)
    messages = [(tmp_path / f"error_{rank}").read_text() for rank in (0, 1)]
    assert all("made to fail" in message for message in messages)
    assert f"process {failed} has failed" in messages[1 - failed]
    if failed:
        assert all("model.layers.0 could not be reconstructed" in message for message in messages)


FAIL_LEARNING = """
    from maiht_lightning.pruning.rescaling import Rescaling

    calls, real = [], Rescaling._gradient

    def failing(self, *arguments):
        calls.append(None)
        if rank == 1 and len(calls) == 2:
            raise RuntimeError("made to fail")
        return real(self, *arguments)

    Rescaling._gradient = failing
    try:
        prune(model, windows, config="paper,rescaling_epochs=1,iterations=2", process_group=group, progress=False)
    except RuntimeError as error:
        open(f"error_{rank}", "w").write(str(error))
"""


@pytest.mark.slow
def test_what_fails_in_one_process_while_factors_are_learnt_ends_all(tmp_path):
    finished(FAIL_LEARNING, 2, tmp_path)
    messages = [(tmp_path / f"error_{rank}").read_text() for rank in (0, 1)]
    assert all("could not be rescaled" in message and "made to fail" in message for message in messages)
    assert "process 1 has failed" in messages[0]


LEARN = """
    from maiht_lightning.solvers import MAIHTConfig

    for parameter in model.parameters():  # larger than at the start, so that there is something to learn
        parameter.data += 0.1 * torch.randn_like(parameter)
    config = MAIHTConfig(rescaling_epochs=2)
    report = prune(model, windows, method="magnitude", config=config, process_group=group, progress=False)
    torch.save({"weights": model.state_dict(), "divergence": report.divergence}, f"of_{world}_{rank}.pt")
"""


@pytest.mark.slow
def test_factors_are_shared_by_processes(tmp_path):
    """A step takes a window from each, so that the factors are others than those of one process."""
    for processes in (1, 2):
        finished(LEARN, processes, tmp_path)
    alone, first, second = (torch.load(tmp_path / f"of_{name}.pt", weights_only=True) for name in ("1_0", "2_0", "2_1"))
    assert first["divergence"] == second["divergence"]
    for found in (alone, first):
        before, after = found["divergence"]
        assert after < before
    for name, weight in first["weights"].items():
        assert torch.equal(second["weights"][name], weight), name
        assert torch.equal(alone["weights"][name] == 0, weight == 0), name


SHARDED_FACTORS = """
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        fully_shard(block)
    try:
        prune(model, windows, config="best", process_group=group, progress=False)
    except ValueError as error:
        open(f"error_{rank}", "w").write(str(error))
"""


@pytest.mark.slow
def test_shards_of_a_model_are_not_rescaled(tmp_path):
    finished(SHARDED_FACTORS, 2, tmp_path)
    for rank in (0, 1):
        assert "is in shards, and to learn factors" in (tmp_path / f"error_{rank}").read_text()


WAIT = """
    import pathlib
    def on_block(records):
        pathlib.Path(f"at_{rank}").touch()
        if rank == 1:
            time.sleep(600)
    prune(model, windows, process_group=group, progress=False, on_block=on_block)
"""


@pytest.mark.slow
def test_a_killed_process_ends_the_others(tmp_path):
    first, second = launch(WAIT, 2, tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "at_1").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    kill(second)
    _, errors = first.communicate(timeout=45)  # gloo's own time limit is 60 s
    second.communicate()
    assert first.returncode not in (0, None)
    assert "Connection closed by peer" in errors or "Connection reset" in errors, errors[-2000:]


# ---- Through Lightning

TRAIN = """
    from lightning.pytorch.strategies import DDPStrategy
    from helpers.own_module import NoTokenizer, OwnModule, Windows, trainer as make_trainer
    from maiht_lightning import MAIHTPruning, SparseFinetune, sparse_finetune
    from maiht_lightning.callbacks import preparation
    from maiht_lightning.evaluation.evaluation import Evaluation, LoadedEvaluation

    preparation.find_tokenizer = lambda *_: NoTokenizer()
    Evaluation.load = lambda self, *_: LoadedEvaluation(self, {"random": windows}, {})

    class Module(OwnModule):
        def train_dataloader(self):
            data = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(5))
            # Each process takes its share, so that they have together what one has alone.
            return torch.utils.data.DataLoader(data[self.global_rank :: world], batch_size=4 // world)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    strategy = "auto" if alone else DDPStrategy(process_group_backend="gloo")
    pruning = MAIHTPruning(0.5, method=sys.argv[1], calibration=Windows(), output_dir=None if alone else "two")
    trainer = make_trainer(pruning, strategy=strategy, devices=world, use_distributed_sampler=False)
    module = Module(model)
    trainer.fit(module)
    sparse_finetune(trainer, module, SparseFinetune(max_epochs=1))
    stages = {name: stage.to_json() for name, stage in pruning.summary.stages.items()}
    torch.save(
        {"weights": model.state_dict(), "stages": stages, "folder": str(pruning.output_dir)},
        f"of_{world}_{rank}.pt",
    )
"""


@pytest.mark.slow
def test_a_fit_with_two_processes_prunes_and_trains_on(tmp_path):
    finished(TRAIN, 1, tmp_path, "wanda")
    finished(TRAIN, 2, tmp_path, "wanda")
    alone, first, second = (torch.load(tmp_path / f"of_{name}.pt", weights_only=True) for name in ("1_0", "2_0", "2_1"))
    assert first["stages"] == second["stages"]
    assert list(first["stages"]) == ["dense", "pruned", "finetuned"]
    for stage, found in alone["stages"].items():
        assert first["stages"][stage]["perplexity"]["random"] == pytest.approx(found["perplexity"]["random"], rel=1e-5)
    for name, weight in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        # The gradients of two halves are averaged in another order.
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-4, atol=1e-6)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["stages"] == first["stages"]
    assert (tmp_path / "two" / "report.html").is_file()
    assert (tmp_path / "two" / "model_finetuned" / "model.safetensors").is_file()


SHARDED = (
    TRAIN.replace(
        'DDPStrategy(process_group_backend="gloo")',
        "ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)",
    )
    .replace("import DDPStrategy", "import ModelParallelStrategy")
    .replace(
        "class Module(OwnModule):",
        """class Module(OwnModule):
        def configure_model(self):
            if not alone and not hasattr(self, "is_sharded"):
                self.is_sharded = True
                from maiht_lightning.training.module import _shard
                _shard(self.net["lm"], self.device_mesh)
""",
    )
    .replace(
        "model.state_dict()",
        "{n: p.full_tensor() if hasattr(p, 'full_tensor') else p for n, p in model.state_dict().items()}",
    )
)


@pytest.mark.slow
def test_a_sharded_fit_prunes_and_trains_on(tmp_path):
    """FSDP2 over two processes on the CPU."""
    finished(SHARDED, 1, tmp_path, "wanda")
    finished(SHARDED, 2, tmp_path, "wanda")
    alone, first, second = (torch.load(tmp_path / f"of_{name}.pt", weights_only=True) for name in ("1_0", "2_0", "2_1"))
    assert first["stages"] == second["stages"]
    for name, weight in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-4, atol=1e-6)
    for name in ("model", "model_finetuned"):
        saved = LlamaForCausalLM.from_pretrained(tmp_path / "two" / name)
        assert measured_sparsity(count_zeros(saved)) == pytest.approx(0.5, abs=1e-3)
    assert all(torch.equal(first["weights"][name], weight) for name, weight in saved.state_dict().items())


RESUME = """
    from lightning.pytorch import LightningModule, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import DDPStrategy
    from helpers.own_module import trainer as make_trainer
    from maiht_lightning.data.module import TextDataModule

    class Letters:
        def __call__(self, text, **_):
            return {"input_ids": [ord(letter) - 97 for letter in text if letter.isalpha()]}

    class Text(TextDataModule):
        def texts(self, split):
            return ["".join(chr(97 + i // 26) + chr(97 + i % 26) for i in range(45))]

        def _find_tokenizer(self):
            return Letters()

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.table, self.seen = torch.nn.Embedding(26, 26), []

        def training_step(self, batch, batch_idx):
            tokens = batch["input_ids"]
            self.seen.append((self.trainer.current_epoch, (tokens[:, 0] * 26 + tokens[:, 1]).tolist()))
            return torch.nn.functional.cross_entropy(self.table(tokens[:, 0]), tokens[:, 1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.1)

    def fit(max_steps, ckpt_path=None):
        seed_everything(7, verbose=False)
        module = Module()
        saved = ModelCheckpoint(f"ckpt_{max_steps}", every_n_train_steps=max_steps)
        strategy = DDPStrategy(process_group_backend="gloo")
        make_trainer(
            saved, strategy=strategy, devices=2, max_epochs=3, max_steps=max_steps, enable_checkpointing=True
        ).fit(module, datamodule=Text(seqlen=2, batch_size=4), ckpt_path=ckpt_path)
        return {"weights": module.state_dict(), "seen": module.seen, "file": saved.best_model_path}

    # Within the second of three epochs of 45 windows: 23 in each process, six batches an epoch.
    whole, stopped = fit(18), fit(8)
    torch.save([whole, stopped, fit(18, ckpt_path=stopped["file"])], f"of_{rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_resume_within_an_epoch(tmp_path):
    """With the windows that each would have seen, to the weights of the uninterrupted fit."""
    finished(RESUME, 2, tmp_path)
    for rank in (0, 1):
        whole, stopped, resumed = torch.load(tmp_path / f"of_{rank}.pt", weights_only=True)
        assert [epoch for epoch, _ in whole["seen"]] == [0] * 6 + [1] * 6 + [2] * 6
        for epoch in range(3):
            # Our order of the epoch, taken in that of torch's DistributedSampler, which begins anew at its end.
            ours, theirs = (torch.randperm(45, generator=torch.Generator().manual_seed(7 + epoch)) for _ in range(2))
            share = ours[torch.cat([theirs, theirs[:1]])][rank::2].split(4)
            assert [seen for at, seen in whole["seen"] if at == epoch] == [windows.tolist() for windows in share]
        assert stopped["seen"] + resumed["seen"] == whole["seen"]
        assert len(resumed["seen"]) == 10
        assert all(torch.equal(weight, resumed["weights"][name]) for name, weight in whole["weights"].items())
        assert not torch.equal(stopped["weights"]["table.weight"], whole["weights"]["table.weight"])


# ---- Sharing out


def test_the_largest_pieces_go_first_to_whoever_is_free():
    ranks = Ranks()
    ranks.size = 2
    assert ranks.assign_by_cost([2.0, 1.0, 4.0, 5.0]) == [1, 0, 1, 0]
    assert [len(part) for part in (ranks.shard(range(7)),)] == [4]
    ranks.rank = 1
    assert ranks.shard(range(7)) == [1, 3, 5]


def test_too_few_windows_are_refused(tiny_llama, monkeypatch):
    class Four(Ranks):
        size, rank = 4, 0

        def broadcast_object(self, value, owner=0):
            return value

        def all_gather_object(self, value):
            return [value]

    monkeypatch.setattr("maiht_lightning.pruning.pruner.Ranks", Four)
    monkeypatch.setattr(Ranks, "__init__", lambda self, group=None: None)
    with pytest.raises(ValueError, match="3 windows in batches of 1 are too few for 4 processes"):
        prune(tiny_llama(vocab_size=64), torch.zeros(3, 8, dtype=torch.long), progress=False)


# ---- From the command line


@pytest.mark.slow
def test_maiht_prune_with_two_processes_as_with_one(tiny_folder, small_data, tmp_path):
    """Weights, perplexity and a task's accuracy, each shared out."""
    options = [
        *("--model.name_or_path", str(tiny_folder), "--data", "PythonDocsDataModule", "--trainer.logger", "false"),
        *("--trainer.accelerator", "cpu", "--pruning.calibration", "PythonDocsCalibration"),
        *("--pruning.calibration.samples", "5", "--pruning.calibration.seqlen", "64"),
        *("--pruning.evaluation.perplexity", "[python_docs]", "--pruning.evaluation.max_windows", "3"),
        *("--pruning.evaluation.tasks", "[arc_easy]", "--pruning.evaluation.limit", "9"),
        # Blocks are trained with a window of each process a step, so that their number changes the weights.
        *("--pruning.config", "balanced,reconstruction_epochs=0"),
    ]
    several = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    command = [*python(), "-m", "maiht_lightning.cli", "prune", *options, "--output_dir"]
    for name, more in (("one", []), ("two", several)):
        run = [*command, name, *more]
        environment = ENVIRONMENT | {"MAIHT_DATA_DIR": str(small_data)}
        done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (LlamaForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("one", "two"))
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())
    stages = [json.loads((tmp_path / name / "summary.json").read_text())["stages"] for name in ("one", "two")]
    for stage in ("dense", "pruned"):
        single, shared = (found[stage] for found in stages)
        assert shared["tasks"]["arc_easy"] == pytest.approx(single["tasks"]["arc_easy"])
        assert shared["perplexity"] == pytest.approx(single["perplexity"], rel=1e-6)


SHARDED_TASK = """
    import json
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from helpers.byte_model import byte_tokenizer, llama_config
    from maiht_lightning.evaluation.lm_eval_tasks import load_tasks
    from maiht_lightning.evaluation.zero_shot import zero_shot

    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(max_position_embeddings=256)).eval()
    if not alone:
        mesh = init_device_mesh("cpu", (world,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    found = zero_shot(model, byte_tokenizer(), load_tasks(["arc_easy"]), progress=False, process_group=group)
    open(f"accuracy_{world}_{rank}.json", "w").write(json.dumps(found))
"""


@pytest.mark.slow
def test_a_task_on_shards_of_a_model(tmp_path, monkeypatch):
    """Choices that differ in their last token alone are one forward pass, but not where others wait for the shards."""
    pytest.importorskip("lm_eval")
    table = pytest.importorskip("pyarrow").Table
    rows = [
        {
            "id": str(number),
            "question": f"Which is it, number {number}?",
            "choices": {"text": texts, "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        }
        for number, texts in enumerate([["1", "2", "3", "4"], ["air", "water", "fire", "earth"]])
    ]
    folder = tmp_path / "data" / "tasks" / "arc_easy"
    folder.mkdir(parents=True)
    for split in ("validation", "test"):
        importlib.import_module("pyarrow.parquet").write_table(table.from_pylist(rows), folder / f"{split}.parquet")
    monkeypatch.setitem(ENVIRONMENT, "MAIHT_DATA_DIR", str(tmp_path / "data"))
    for processes in (1, 2):
        finished(SHARDED_TASK, processes, tmp_path)
    alone, first, second = ((tmp_path / f"accuracy_{name}.json").read_text() for name in ("1_0", "2_0", "2_1"))
    assert first == second == alone
    assert json.loads(alone)["arc_easy"].keys() >= {"acc", "acc_norm"}


@pytest.mark.parametrize("kind", [DeepSpeedStrategy, FSDPStrategy, XLAStrategy, SingleDeviceXLAStrategy])
def test_other_strategies_are_refused_before_training(kind, tiny_llama):
    """Lightning's own classes, by the hook that comes first in a fit; made without what they need to be installed."""
    pruning, module = MAIHTPruning(), OwnModule(tiny_llama(vocab_size=64))
    fit = trainer(pruning)
    fit._accelerator_connector.strategy = kind.__new__(kind)
    with pytest.raises(MisconfigurationException, match=rf"{kind.__name__}: .*strategy='ddp'.*ModelParallelStrategy"):
        pruning.setup(fit, module, "fit")


@pytest.mark.parametrize("kind", [SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy])
def test_these_strategies_and_heirs_of_them_are_not(kind):
    pruning = MAIHTPruning()
    fit = trainer(pruning)
    heir = type("Heir", (kind,), {})
    for strategy in (kind, heir):
        fit._accelerator_connector.strategy = strategy.__new__(strategy)
        check_trainer(fit, pruning, trains_on=False)
