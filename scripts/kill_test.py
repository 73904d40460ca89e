"""Kill a run of `maiht fit` at random moments, resume it, and compare what it comes to with an undisturbed one.

    python scripts/kill_test.py                     # 30 times SIGKILL
    python scripts/kill_test.py --kills 10 --signal TERM --jobs 2
    python scripts/kill_test.py --kills 10 --processes 2    # DDP; all processes are killed, or one of them

The run is the real command with a small LLaMA and texts of its own: it trains with checkpoints, prunes with mAIHT,
trains on with the zeros frozen, and logs to W&B on disk. Weights, `summary.json`, `layers.csv` and W&B's rows must be
the same to the bit but for times and memory, and a run that was killed after its training must not train again. The
exit code is 0 if all were.
"""

import argparse
import csv
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

ROOT = Path(__file__).resolve().parents[1]
STEPS, SPARSE_STEPS = 8, 8
# By this variable W&B hands its service to a process's children: runs that shared it would be in use after their death.
SHARED_SERVICE = "WANDB_SERVICE"
# What differs between two undisturbed runs.
UNSTEADY = ("seconds", "predicted", "tflops", "peak_memory_bytes", "prune/seconds", "_runtime", "_timestamp", "_step")


class StepNotes(Callback):
    """Writes a line for each training step that is made, into the file that STEP_NOTES names.

    The processes' ids are in files beside it, by rank.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Write the process's id."""
        Path(f"{os.environ['STEP_NOTES']}.{trainer.global_rank}").write_text(str(os.getpid()))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Write the line."""
        if not trainer.is_global_zero:
            return
        with open(os.environ["STEP_NOTES"], "a") as file:
            file.write(f"{trainer.global_step}\n")


def write_setting(folder: Path, processes: int) -> None:
    """Write a model, its tokenizer and a configuration for so many processes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate([*alphabet, "<end>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder / "tiny")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=257, max_position_embeddings=128, bos_token_id=None, eos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    checkpoints = {"every_n_train_steps": 3, "save_top_k": 0, "save_last": True}
    settings = {
        "seed_everything": 0,
        "model": {"name_or_path": str(folder / "tiny"), "learning_rate": 3e-3},
        "data": {"class_path": "PythonDocsDataModule", "init_args": {"seqlen": 64, "batch_size": 4}},
        "trainer": {
            "accelerator": "cpu",
            "devices": processes,
            "strategy": "ddp" if processes > 1 else "auto",
            "max_steps": STEPS,
            "limit_train_batches": 5,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints},
                {"class_path": "kill_test.StepNotes"},
            ],
            "logger": {
                "class_path": "lightning.pytorch.loggers.WandbLogger",
                "init_args": {"project": "kill-test", "offline": True},
            },
        },
        "pruning": {
            "sparsity": 0.6,
            "calibration": {"class_path": "PythonDocsCalibration", "init_args": {"samples": 32, "seqlen": 64}},
            "evaluation": {"perplexity": ["python_docs"], "seqlen": 64, "max_windows": 32},
        },
        "sparse_finetune": {"max_steps": SPARSE_STEPS, "learning_rate": 1e-3, "distillation": 0.5},
    }
    # JSON is YAML.
    (folder / "run.yaml").write_text(json.dumps(settings, indent=2))


def start(folder: Path, name: str, log: str) -> "subprocess.Popen[bytes]":
    """Start `maiht fit` for a run's folder, or start it again."""
    threads = {"OMP_NUM_THREADS": "1", "STEP_NOTES": str(folder / f"{log}.steps"), "WANDB_SILENT": "true"}
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
    inherited = {name: value for name, value in os.environ.items() if name != SHARED_SERVICE}
    (folder / f"{log}.steps").touch()
    with open(folder / f"{log}.log", "w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "maiht_lightning.cli", "fit", "--config", "run.yaml", "--output_dir", name],
            cwd=folder,
            env={**inherited, **threads, "PYTHONPATH": path},
            stdout=output,
            stderr=output,
            # A process group of its own, with the processes that it starts.
            start_new_session=True,
        )


def is_steady(name: str) -> bool:
    """Whether a figure is the same in two undisturbed runs."""
    return not name.startswith(UNSTEADY)


def result(run: Path) -> dict[str, Any]:
    """What a finished run has come to, by name, without times and memory."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for name in ("model_dense", "model", "model_finetuned"):
        for key, tensor in load_file(run / name / "model.safetensors").items():
            found[f"{name}/{key}"] = (tuple(tensor.shape), str(tensor.dtype), tensor.numpy().tobytes())
    summary = json.loads((run / "summary.json").read_text())
    found |= {f"summary/{key}": value for key, value in summary.items() if is_steady(key)}
    with (run / "layers.csv").open() as file:
        rows = [{key: value for key, value in row.items() if is_steady(key)} for row in csv.DictReader(file)]
    found["layers.csv"] = rows
    found["wandb/rows"] = Counter(wandb_rows(run))
    return found


def wandb_rows(run: Path) -> Iterator[str]:
    """The rows of the only W&B run on disk, as JSON, with the names alone of tables and images."""
    (path,) = run.glob("wandb/offline-run-*/run-*.wandb")
    for record in _records(path.read_bytes()):
        if record.WhichOneof("record_type") != "history":
            continue
        row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        media = sorted({name.split(".")[0] for name in row if "._type" in name or name.endswith(".nrows")})
        if media:
            yield json.dumps(media)
        elif row := {name: value for name, value in row.items() if is_steady(name)}:
            yield json.dumps(row, sort_keys=True)


def _records(data: bytes) -> Iterator[Any]:
    """The records of a file in LevelDB's log format, up to the first that is not whole."""
    from wandb.proto.wandb_internal_pb2 import Record

    position, parts = 7, list[bytes]()  # after an identifier of 7 bytes
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:  # a block's end too short for a header
            position += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        position += 7 + length
        part = data[position - length : position]
        if zlib.crc32(part, zlib.crc32(bytes([kind]))) != checksum:
            return
        parts.append(part)
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts.clear()
            yield record


@dataclass
class Kill:
    """One killed and resumed run: where it was, and what is wrong with what it has come to."""

    seconds: float
    where: str
    problems: list[str]


def kill(folder: Path, name: str, seconds: float, rank: int | None, signum: int, whole: dict[str, Any]) -> Kill:
    """Kill a run after some seconds, resume it, and compare it with the undisturbed one.

    Args:
        folder: Where the runs are.
        name: The run's.
        seconds: When to kill it.
        rank: Which of its processes; None for all of them.
        signum: The signal.
        whole: What the undisturbed run has come to.
    """
    while True:
        process = start(folder, name, f"{name}-1")
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            signal_process(process, folder / f"{name}-1.steps", rank, signum)
            break
        # It was quicker than the undisturbed one, so that there was nothing to kill.
        shutil.rmtree(folder / name)
        seconds *= 0.8
    problems = []
    status, run = process.wait(), folder / name
    if not group_ends(process.pid):
        problems.append("a process lives on")
        os.killpg(process.pid, signal.SIGKILL)
    where, trained = state(run), (run / "resume.ckpt").exists() and _is_trained(run / "resume.ckpt")
    if signum != signal.SIGKILL and status not in (0, 128 + signum, -signum):
        problems.append(f"exit status {status}, not {128 + signum}")
    again = start(folder, name, f"{name}-2")
    if again.wait():
        return Kill(seconds, where, [*problems, (folder / f"{name}-2.log").read_text()[-2000:]])
    steps = [int(line) for line in (folder / f"{name}-2.steps").read_text().split()]
    if trained and any(step <= STEPS for step in steps):
        problems.append(f"trained again after its training: steps {steps}")
    found = result(run)
    for key, value in whole.items():
        if found.get(key) != value:
            shown = ""
            if key == "wandb/rows":
                shown = f": missing {value - found[key]}, too many {found[key] - value}"
            elif not isinstance(value, tuple):
                shown = f": {found.get(key)} and not {value}"
            problems.append(f"{key} differs{shown}"[:3000])
    if (run / "resume.ckpt").exists():
        problems.append("resume.ckpt is left")
    return Kill(seconds, where, problems)


def signal_process(process: "subprocess.Popen[bytes]", notes: Path, rank: int | None, signum: int) -> None:
    """Send a signal to one of a run's processes, or to all; also to all as long as they are not known by rank."""
    path = Path(f"{notes}.{rank}")
    if rank is not None and path.exists():
        os.kill(int(path.read_text()), signum)
    else:
        os.killpg(process.pid, signum)


def group_ends(group: int) -> bool:
    """Whether all processes of a group end within some minutes, after the first of them has."""
    for _ in range(3000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def _is_trained(path: Path) -> bool:
    import torch

    return bool(torch.load(path, weights_only=True)["callbacks"]["MAIHTPruning"]["trained"])


def state(run: Path) -> str:
    """Where a run was, from its files."""
    if not (run / "run.json").exists():
        return "starting"
    if json.loads((run / "run.json").read_text())["finished"]:
        return "finished"
    summary = json.loads((run / "summary.json").read_text()) if (run / "summary.json").exists() else {}
    stages = summary.get("stages", {})
    if "model_finetuned" in summary.get("saved", []):
        return "measuring or reporting finetuned"
    if "pruned" in stages:
        return "sparse fine-tune, or the report before it"
    if "model" in summary.get("saved", []):
        return "measuring pruned"
    blocks = len(list((run / "journal").glob("block_*.safetensors")))
    if "dense" in stages:
        return f"pruning, {blocks} blocks done" if blocks < 4 else "saving"
    return "measuring dense" if (run / "resume.ckpt").exists() else "training"


def main() -> int:
    """Run the test and print what was found."""
    parser = argparse.ArgumentParser(description="Kill runs of maiht at random moments and resume them.")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT"], default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="Processes of a run, by DDP on the CPU.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time.")
    options = parser.parse_args()
    signum = signal.Signals[f"SIG{options.signal}"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_setting(folder, options.processes)
        began = time.monotonic()
        process = start(folder, "whole", "whole")
        while not (folder / "whole" / "run.json").exists() and process.poll() is None:
            time.sleep(0.05)
        first = time.monotonic() - began
        if process.wait():
            print((folder / "whole.log").read_text())
            return 1
        last = time.monotonic() - began
        whole = result(folder / "whole")
        print(f"The undisturbed run took {last:.1f} s, of which {first:.1f} s to begin.", flush=True)
        chance = random.Random(options.seed)
        moments = [chance.uniform(first * 0.8, last) for _ in range(options.kills)]
        # All of a run's processes die, or one alone, which the others have to notice.
        victims = [None, *range(options.processes)] if options.processes > 1 else [0]
        ranks = [chance.choice(victims) for _ in moments]
        failed, places = 0, Counter[str]()
        with ThreadPoolExecutor(options.jobs) as pool:
            names = [f"run{index}" for index in range(options.kills)]
            results = pool.map(
                lambda name, at, rank: kill(folder, name, at, rank, signum, whole), names, moments, ranks
            )
            for name, rank, each in zip(names, ranks, results, strict=True):
                failed += bool(each.problems)
                places[each.where] += 1
                told = "the same" if not each.problems else "\n  ".join(["NOT THE SAME", *each.problems])
                whom = "" if options.processes == 1 else " to all" if rank is None else f" to rank {rank}"
                print(
                    f"{name}: SIG{options.signal}{whom} after {each.seconds:.1f} s ({each.where}): {told}", flush=True
                )
        print(f"{options.kills - failed} of {options.kills} resumed runs came to the same.")
        for place, count in places.most_common():
            print(f"  {count:3d} {place}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
