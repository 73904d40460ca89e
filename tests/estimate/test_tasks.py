"""Zero-shot tasks in predictions."""

from dataclasses import replace

import pytest

from maiht_lightning.cli import main
from maiht_lightning.estimate.advice import advise
from maiht_lightning.estimate.devices import SHEETS
from maiht_lightning.estimate.plan import Job, estimate
from maiht_lightning.estimate.shape import ModelShape
from maiht_lightning.estimate.tasks import TASKS
from maiht_lightning.evaluation.lm_eval_tasks import PAPER_TASKS, load_tasks

# A published config's sizes: weights of a block's linear layers, and of the head.
BLOCK, HEAD = 4 * 4096**2 + 3 * 4096 * 11008, 32000 * 4096
WEIGHTS = 2 * 6_738_415_616


@pytest.fixture(scope="module")
def llama():
    return ModelShape.from_source("huggyllama/llama-7b")


def tasks_of(llama, device="a100-80gb", **settings):
    job = Job(**{"config": "paper", "eval_windows": 0, "tasks": ["rte"], **settings})
    return next((p for p in estimate(llama, job, SHEETS[device]).phases if p.name == "tasks"), None)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER_TASKS)
def test_sizes_are_those_of_the_documents(tokenizer, real_data, name):
    task = load_tasks([name])[name]
    task.build_all_requests(limit=None, rank=0, world_size=1)
    texts = [context + continuation for context, continuation in (each.args for each in task.instances)]
    # The last token is only scored, and what is equal before it goes through the model once.
    rows = {tuple(tokens[:-1]) for tokens in tokenizer(texts).input_ids}
    found, lengths = TASKS[name], [len(row) for row in rows]
    assert found.documents == len(task.eval_docs)
    assert (found.sequences, found.tokens, found.longest) == (len(rows), sum(lengths), max(lengths))


def test_operations_and_seconds_by_hand(llama):
    size, device = TASKS["rte"], SHEETS["a100-80gb"]
    found = tasks_of(llama, task_batch_size=32)
    # Twice: products with all weights, and half of causal attention's, 2 · 2 · 4,096 a token and a token before it.
    length = size.tokens / size.sequences
    expected = 2 * size.tokens * (32 * (2 * BLOCK + length * 2 * 4096) + 2 * HEAD)
    assert found.flops == pytest.approx(expected, rel=1e-3)
    assert found.seconds > found.flops / device.flops_bf16
    # A sequence at a time, the weights are read for each one.
    one = tasks_of(llama, task_batch_size=1)
    moved = found.seconds - found.flops / device.flops_bf16
    assert one.seconds == pytest.approx(2 * size.sequences * WEIGHTS / device.bandwidth + moved, rel=0.01)
    assert one.flops == found.flops
    assert one.device_bytes < found.device_bytes


def test_what_is_asked_for_counts(llama):
    both = tasks_of(llama, tasks=["rte", "boolq"]).flops
    assert both == tasks_of(llama).flops + tasks_of(llama, tasks=["boolq"]).flops
    assert tasks_of(llama, task_limit=10).flops == pytest.approx(tasks_of(llama).flops * 10 / 277, rel=0.01)
    assert tasks_of(llama, task_limit=1000) == tasks_of(llama)
    assert tasks_of(llama, eval_batch_size=4) == tasks_of(llama, eval_batch_size=7, task_batch_size=4)
    assert tasks_of(llama, tasks=["mine"]) is None
    assert tasks_of(llama, tasks=["mine", "rte"]) == tasks_of(llama)


@pytest.mark.parametrize("setting", ["task_limit", "task_batch_size"])
def test_numbers_below_one_are_refused(setting):
    with pytest.raises(ValueError, match=f"{setting} must be at least 1, but found 0"):
        Job(**{setting: 0})


def test_a_model_in_host_memory_goes_there_twice_or_in_every_pass(llama):
    sizes = {"task_batch_size": 277, "offload": "cpu"}
    large, link = SHEETS["a100-80gb"], SHEETS["a100-80gb"].host_link
    brought = tasks_of(llama, **sizes).seconds - tasks_of(llama, task_batch_size=277).seconds
    assert brought == pytest.approx(2 * WEIGHTS / link, rel=1e-6)
    # 13.5 GB do not fit into 16: each of twice 14 passes brings them.
    small = replace(large, memory=16e9)
    job = Job(config="paper", eval_windows=0, tasks=["rte"], task_batch_size=20, offload="cpu")
    (found,) = (p for p in estimate(llama, job, small).phases if p.name == "tasks")
    plain = tasks_of(llama, task_batch_size=20)
    assert found.seconds - plain.seconds == pytest.approx(2 * 14 * WEIGHTS / link, rel=1e-6)
    assert found.device_bytes < plain.device_bytes


def test_a_smaller_batch_is_advised(llama):
    job = Job(config="paper", eval_windows=0, tasks=["boolq"], task_batch_size=2000)
    device = SHEETS["a100-80gb"]
    (said,) = advise(llama, job, device, estimate(llama, job, device))
    assert said.startswith("tasks does not fit on a100-80gb: with task_batch_size: 1 ")


def test_a_task_of_unknown_size_is_named(capsys):
    main(["estimate", "--model", "huggyllama/llama-7b", "--gpu", "a100-80gb", "--tasks", "[rte,mmlu]"])
    said = capsys.readouterr().out
    assert "Not in it: the tasks mmlu, whose size is not known here." in said
    assert "│ tasks " in said
