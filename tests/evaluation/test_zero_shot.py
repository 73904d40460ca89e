import copy
import json
import logging
import math
import os
import random
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
import torch

from helpers.warm import python
from maiht_lightning.evaluation import lm_eval_tasks
from maiht_lightning.evaluation.evaluation import Evaluation
from maiht_lightning.evaluation.lm_eval_tasks import PAPER_TASKS, load_tasks
from maiht_lightning.evaluation.zero_shot import zero_shot
from maiht_lightning.records import StageResult

pytest.importorskip("lm_eval")


@pytest.fixture
def long_llama(tiny_llama):
    """A tiny model with room for BoolQ's passages."""
    return tiny_llama(max_position_embeddings=1024)


def copy_rows(source, target, rows=None):
    """A copy of a parquet file with only these rows."""
    table = pq.read_table(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table if rows is None else table.take(rows), target)


def write_yamls(folder, data_dir, names):
    """Task files for lm-eval: as registered, but read from the local copies; datasets' copies stay in the folder."""
    index = lm_eval_tasks._task_manager(names).task_index
    for name in names:
        files = {file.stem: str(file) for file in (data_dir / "tasks" / name).glob("*.parquet")}
        changes = {
            "include": str(index[name].yaml_path),
            "task": name,
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: files[split] for split in ("validation", "test") if split in files},
                "cache_dir": str(folder / "cache"),
            },
            "training_split": None,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(changes))  # JSON is YAML


def numbers(metrics):
    """lm-eval's entry of a task as zero_shot gives it."""
    return {key.removesuffix(",none"): value for key, value in metrics.items() if isinstance(value, float)}


def log_likelihood(model, tokenizer, context, continuation):
    """The definition: sum of log-probabilities of the tokens that the continuation adds, one after another."""
    start = len(tokenizer(context).input_ids)
    tokens = tokenizer(context + continuation).input_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0].double()
    return sum(logits[place - 1].log_softmax(-1)[tokens[place]].item() for place in range(start, len(tokens)))


def accuracies_by_definition(model, tokenizer, questions):
    """(acc, acc_norm) of (context, choices, gold): the choice likeliest in all, or per character, is the answer."""
    right, right_norm = [], []
    for context, choices, gold in questions:
        scores = [log_likelihood(model, tokenizer, context, " " + choice) for choice in choices]
        right.append(np.argmax(scores) == gold)
        right_norm.append(
            np.argmax([score / len(choice) for score, choice in zip(scores, choices, strict=True)]) == gold
        )
    return np.mean(right), np.mean(right_norm)


def boolq_questions(data_dir, count):
    rows = pq.read_table(data_dir / "tasks/boolq/validation.parquet").slice(0, count).to_pylist()
    for row in rows:
        yield f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], row["label"]


def arc_questions(data_dir, count):
    rows = pq.read_table(data_dir / "tasks/arc_easy/test.parquet").slice(0, count).to_pylist()
    for row in rows:
        gold = row["choices"]["label"].index(row["answerKey"])
        yield f"Question: {row['question']}\nAnswer:", row["choices"]["text"], gold


@pytest.mark.slow
def test_accuracies_equal_the_definition(long_llama, tokenizer, local_data, no_hub):
    tasks = load_tasks(["boolq", "arc_easy"])
    results = zero_shot(long_llama, tokenizer, tasks, limit=16, batch_size=3, progress=False)
    boolq, _ = accuracies_by_definition(long_llama, tokenizer, boolq_questions(local_data, 16))
    acc, acc_norm = accuracies_by_definition(long_llama, tokenizer, arc_questions(local_data, 16))
    assert 0 < boolq < 1
    assert acc != acc_norm

    def spread(mean):  # of a mean of 16 zeros and ones
        return pytest.approx(math.sqrt(mean * (1 - mean) / 15), rel=1e-12)

    assert results == {
        "boolq": {"acc": boolq, "acc_stderr": spread(boolq)},
        "arc_easy": {"acc": acc, "acc_stderr": spread(acc), "acc_norm": acc_norm, "acc_norm_stderr": spread(acc_norm)},
    }
    assert all(type(value) is float for metrics in results.values() for value in metrics.values())


@pytest.mark.slow
def test_batch_size_is_what_the_model_sees_and_changes_nothing(long_llama, tokenizer, local_data):
    tasks = load_tasks(["arc_easy"])
    sizes = []
    long_llama.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    one = zero_shot(long_llama, tokenizer, tasks, limit=10, batch_size=1, progress=False)
    assert set(sizes) == {1}
    sizes.clear()
    five = zero_shot(long_llama, tokenizer, tasks, limit=10, batch_size=5, progress=False)
    assert max(sizes) == 5
    assert one["arc_easy"]["acc"] == five["arc_easy"]["acc"]


@pytest.mark.parametrize(("settings", "largest"), [({}, 2), ({"task_batch_size": 3}, 3)])
def test_tasks_have_a_batch_size_of_their_own(long_llama, tokenizer, local_data, settings, largest):
    windows = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    evaluation = Evaluation(perplexity={"mine": [windows]}, tasks=["arc_easy"], limit=3, batch_size=2, **settings)
    loaded, sizes = evaluation.load(long_llama, tokenizer), []
    # Four windows are batches of two, and a task's answers fill some batches, if not the last.
    long_llama.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    loaded.measure(long_llama, tokenizer, progress=False)
    assert max(sizes) == largest
    assert 2 in sizes


def test_one_document_has_no_standard_error_and_bfloat16_runs(long_llama, tokenizer, local_data):
    model = long_llama.to(torch.bfloat16)
    results = zero_shot(model, tokenizer, load_tasks(["arc_easy"]), limit=1, progress=False)
    assert set(results["arc_easy"]) == {"acc", "acc_norm"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def surroundings(model, tokenizer):
    """Everything that lm-eval could leave changed, comparable with ==."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface as wrapper

    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm_eval.models.huggingface")]
    algorithm, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (algorithm, keys.tolist(), rest),
        "torch": torch.get_rng_state().tolist(),
        "modes": [part.training for part in model.modules()],
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "attributes": sorted(vars(model)),
        "weights": [(name, id(weight)) for name, weight in model.named_parameters(remove_duplicate=False)],
        "tokenizer": (tokenizer.pad_token, tokenizer.padding_side, tokenizer.truncation_side, len(tokenizer)),
        "environment": dict(os.environ),
        "logging": [(logger.level, logger.handlers[:], logger.filters[:]) for logger in loggers],
        "bars": [place.tqdm for place in (lm_eval.api.model, lm_eval.api.task, wrapper)],
        "datasets": datasets.are_progress_bars_disabled(),
    }


class Broken(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("has_room", [True, False])
def test_a_model_in_host_memory_is_measured_on_another_device(long_llama, tokenizer, local_data, monkeypatch, has_room):
    """The other device is the CPU, taken for another one."""
    tasks = load_tasks(["winogrande"])
    expected = zero_shot(long_llama, tokenizer, tasks, limit=4, batch_size=2, progress=False)
    monkeypatch.setattr("maiht_lightning.models.offload._same", lambda one, other: False)
    monkeypatch.setattr("maiht_lightning.models.offload._has_room", lambda device, model: has_room)
    device = torch.device("cpu")
    assert zero_shot(long_llama, tokenizer, tasks, limit=4, batch_size=2, progress=False, device=device) == expected


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_all_is_left_as_found(tiny_llama, tokenizer, local_data, fails):
    # The config says tied, but the weights are two: lm-eval would tie them.
    model = tiny_llama(tie_word_embeddings=True, max_position_embeddings=1024)
    model.lm_head.weight = torch.nn.Parameter(2 * model.model.embed_tokens.weight.detach())
    model.train()
    model.model.layers[0].eval()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    tokenizer.padding_side = "right"
    drawn = []

    def forward_pre_hook(part, _):
        assert not part.training
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))  # noqa: NPY002
        if fails:
            raise Broken

    model.register_forward_pre_hook(forward_pre_hook)
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        before = surroundings(model, tokenizer)
        with pytest.raises(Broken) if fails else nullcontext():
            zero_shot(model, tokenizer, load_tasks(["arc_easy"]), limit=2, progress=False)
        after = surroundings(model, tokenizer)
        assert [name for name in before if before[name] != after[name]] == []
    assert len(drawn) >= 2
    assert drawn[0] == drawn[len(drawn) // 2]  # seeded anew each time: a task that draws does so alike


@pytest.mark.slow
def test_importing_lm_eval_leaves_the_environment_alone(data_dir):
    """In a fresh process, as lm-eval sets variables when it is first imported."""
    code = (
        "import os, random\n"
        "from maiht_lightning.evaluation.lm_eval_tasks import load_tasks\n"
        "import sys; assert 'lm_eval' not in sys.modules\n"
        "found, state = dict(os.environ), random.getstate()\n"
        "load_tasks(['arc_easy'])\n"
        "assert 'lm_eval' in sys.modules and random.getstate() == state\n"
        "assert dict(os.environ) == found, set(os.environ.items()) ^ set(found.items())\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_XET")}
    environment = kept | {"MAIHT_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_progress_nothing_is_printed(long_llama, tokenizer, local_data, capfd):
    tasks = load_tasks(["arc_easy"])
    zero_shot(long_llama, tokenizer, tasks, limit=2, progress=False)
    assert capfd.readouterr() == ("", "")


def test_bars_have_the_description(long_llama, tokenizer, local_data, capsys):
    zero_shot(long_llama, tokenizer, load_tasks(["arc_easy"]), limit=2, description="Tasks dense")
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if line.strip()]
    assert any("100%" in line for line in lines)
    assert all(line.startswith("Tasks dense: ") for line in lines)


def test_a_context_too_short_is_told_once(tiny_llama, tokenizer, local_data, caplog):
    zero_shot(tiny_llama(max_position_embeddings=64), tokenizer, load_tasks(["boolq"]), limit=3, progress=False)
    (record,) = [record for record in caplog.records if record.name.startswith("lm_eval")]
    assert "exceeds model's maximum length (64)" in record.getMessage()


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        ([], {}, r"tasks must be a list with at least one name, but found \[\]"),
        ("boolq", {}, "tasks must be a list with at least one name, but found 'boolq'"),
        (["boolq"], {"num_fewshot": -1}, "num_fewshot must be a whole number, at least 0, but found -1"),
        (["boolq"], {"num_fewshot": 1.0}, r"num_fewshot must be a whole number, at least 0, but found 1\.0"),
        (["boolq"], {"num_fewshot": True}, "num_fewshot must be a whole number, at least 0, but found True"),
        (["boolq"], {"num_fewshot": 2}, "num_fewshot must be 0 for boolq.*validation.*found 2.*train.parquet"),
    ],
)
def test_bad_settings_of_tasks(local_data, names, settings, message):
    with pytest.raises(ValueError, match=message):
        load_tasks(names, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "limit must be a whole number, at least 1, but found 0"),
        ({"limit": 0.5}, r"limit must be a whole number, at least 1, but found 0\.5"),
        ({"limit": True}, "limit must be a whole number, at least 1, but found True"),
        ({"batch_size": 0}, "batch_size must be a whole number, at least 1, but found 0"),
        ({"batch_size": "auto"}, "batch_size must be a whole number, at least 1, but found 'auto'"),
        ({"tasks": {}}, "tasks must hold at least one task, but found none"),
        ({"tasks": ["boolq"]}, "tasks must be the dictionary that load_tasks returns, but found list"),
    ],
)
def test_bad_settings_of_an_evaluation(settings, message):
    arguments = {"tasks": {"boolq": None}, **settings}
    with pytest.raises((ValueError, TypeError), match=message):
        zero_shot(torch.nn.Linear(1, 1), None, **arguments)


@pytest.mark.parametrize("missing", ["lm_eval", "lm_eval.models.huggingface"])
def test_without_lm_eval_the_error_says_what_to_install(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'maiht-lightning\[eval\]'"):
        load_tasks(["boolq"])


def test_mean_accuracy_is_the_plain_mean_of_acc():
    results = {
        "boolq": {"acc": 0.5, "acc_stderr": 0.1},
        "hellaswag": {"acc": 0.25, "acc_norm": 0.75},
        "wikitext": {"word_perplexity": 12.0},
    }
    assert StageResult({}, results).mean_accuracy == 0.375
    assert StageResult({}, {"wikitext": {"word_perplexity": 12.0}}).mean_accuracy is None
    assert StageResult().mean_accuracy is None


def test_a_missing_file_is_named(data_dir, tmp_path, monkeypatch, no_hub):
    """Also where another split is there: it must not be evaluated in place of the task's own."""
    monkeypatch.setenv("MAIHT_DATA_DIR", str(tmp_path))
    copy_rows(data_dir / "tasks/arc_easy/validation.parquet", tmp_path / "tasks/arc_easy/validation.parquet")
    with pytest.raises(FileNotFoundError, match=r"tasks/arc_easy/test\.parquet"):
        load_tasks(["arc_easy"])


def test_a_changed_file_is_read_anew(data_dir, tmp_path, monkeypatch, no_hub):
    monkeypatch.setenv("MAIHT_DATA_DIR", str(tmp_path))
    source, target = data_dir / "tasks/rte/validation.parquet", tmp_path / "tasks/rte/validation.parquet"
    for rows in ([0, 1], [5, 6, 7]):
        copy_rows(source, target, rows)
        documents = load_tasks(["rte"])["rte"].eval_docs
        assert list(documents) == pq.read_table(source).take(rows).to_pylist()
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["validation.parquet"]


@pytest.mark.slow
def test_documents_are_prepared_once(local_data, no_hub):
    task = load_tasks(["hellaswag"])["hellaswag"]
    assert task.eval_docs is task.eval_docs  # lm-eval asks for them several times an evaluation
    assert {"query", "choices"} <= set(task.eval_docs.column_names)
    assert len(task.eval_docs) == pq.read_table(local_data / "tasks/hellaswag/validation.parquet").num_rows


@pytest.mark.slow
def test_local_examples_come_from_validation_and_are_the_same_each_time(long_llama, tokenizer, local_data, no_hub):
    tasks = load_tasks(["arc_easy"], num_fewshot=2)
    prompts = []
    for _ in range(2):
        zero_shot(long_llama, tokenizer, tasks, limit=3, progress=False)
        prompts.append([instance.args[0] for instance in tasks["arc_easy"].instances])
    assert prompts[0] == prompts[1]
    validation = set(pq.read_table(local_data / "tasks/arc_easy/validation.parquet")["question"].to_pylist())
    for prompt in prompts[0]:
        *examples, question = prompt.split("\n\nQuestion: ")
        assert len(examples) == 2
        asked = [example.removeprefix("Question: ").split("\nAnswer: ")[0] for example in examples]
        assert set(asked) <= validation
        assert question.endswith("\nAnswer:")


def test_local_examples_come_from_train_if_it_is_there(data_dir, tmp_path, monkeypatch, no_hub):
    monkeypatch.setenv("MAIHT_DATA_DIR", str(tmp_path))
    source = data_dir / "tasks/boolq/validation.parquet"
    copy_rows(source, tmp_path / "tasks/boolq/validation.parquet", [0, 1, 2])
    copy_rows(source, tmp_path / "tasks/boolq/train.parquet", [3, 4, 5])
    task = load_tasks(["boolq"], num_fewshot=3)["boolq"]
    assert list(task.eval_docs) == pq.read_table(source).slice(0, 3).to_pylist()
    assert list(task.fewshot_docs()) == pq.read_table(source).slice(3, 3).to_pylist()
    assert not load_tasks(["boolq"])["boolq"].has_training_docs()  # nor is it read where it is not needed


def test_a_task_that_fixes_no_examples_keeps_it(long_llama, tokenizer, local_data, no_hub, tmp_path, monkeypatch):
    import lm_eval.tasks

    registered = lm_eval_tasks._task_manager(["arc_easy"]).task_index["arc_easy"].yaml_path
    fixed = {"include": str(registered), "task": "arc_easy", "num_fewshot": 0}
    (tmp_path / "arc_easy.yaml").write_text(json.dumps(fixed))
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=tmp_path)
    monkeypatch.setattr(lm_eval_tasks, "_task_manager", lambda names: manager)
    tasks = load_tasks(["arc_easy"], num_fewshot=2)
    zero_shot(long_llama, tokenizer, tasks, limit=2, progress=False)
    prompts = [instance.args[0] for instance in tasks["arc_easy"].instances]
    assert {prompt.count("Question:") for prompt in prompts} == {1}


@pytest.fixture
def fake_hub(data_dir, monkeypatch):
    """`datasets.load_dataset` answers from the local copies; gives the list of what was asked."""
    import datasets

    monkeypatch.delenv("MAIHT_DATA_DIR", raising=False)
    asked = []

    def answer(path, name=None, **_):
        asked.append((path, name))
        rows = datasets.Dataset(pq.read_table(data_dir / f"tasks/{name}/validation.parquet"))
        return {"train": rows, "validation": rows}

    monkeypatch.setattr(datasets, "load_dataset", answer)
    return asked


@pytest.mark.slow
def test_without_local_copies_lm_eval_asks_the_hub(long_llama, tokenizer, fake_hub, data_dir, monkeypatch):
    tasks = load_tasks(["rte", "rte"])
    assert fake_hub == [("nyu-mll/glue", "rte")]
    from_hub = zero_shot(long_llama, tokenizer, tasks, limit=4, progress=False)
    monkeypatch.setenv("MAIHT_DATA_DIR", str(data_dir))
    assert from_hub == zero_shot(long_llama, tokenizer, load_tasks(["rte"]), limit=4, progress=False)


def test_an_unreachable_hub_is_told_with_a_way_out(monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise ConnectionError("no internet")

    monkeypatch.delenv("MAIHT_DATA_DIR", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConnectionError) as caught:
        load_tasks(["rte"])
    assert "MAIHT_DATA_DIR" in "".join(caught.value.__notes__)


# From here on lm-eval reads all of its task files once, which takes seconds.


@pytest.mark.slow
def test_an_unknown_task_is_told_with_similar_names(local_data):
    with pytest.raises(ValueError, match=r"found 'bool_q': similar names are .*boolq"):
        load_tasks(["rte", "bool_q"])


@pytest.mark.slow
def test_other_names_with_local_copies(data_dir, local_data, no_hub):
    assert list(load_tasks(["boolq", "ai2_arc", "arc_easy"])) == ["boolq", "arc_challenge", "arc_easy"]  # a tag
    with pytest.raises(FileNotFoundError, match=r"tasks/piqa/validation\.parquet"):
        load_tasks(["piqa"])
    with pytest.raises(FileNotFoundError, match=r"tasks/mmlu_[a-z_]+/test\.parquet"):
        load_tasks(["mmlu"])  # a group of groups
    with pytest.raises(ValueError, match="found 'squadv2', which it puts together in another way"):
        load_tasks(["squadv2"])


@pytest.mark.slow
def test_another_task_with_a_local_copy(long_llama, tokenizer, tmp_path, monkeypatch, no_hub):
    """PIQA's columns; lm-eval's prompt is `Question: ...\\nAnswer:`."""
    rows = [
        {"goal": "boil water", "sol1": "heat it", "sol2": "freeze it until it is hard", "label": 0},
        {"goal": "cut bread", "sol1": "use a spoon and a lot of time", "sol2": "use a knife", "label": 1},
    ]
    monkeypatch.setenv("MAIHT_DATA_DIR", str(tmp_path))
    (tmp_path / "tasks/piqa").mkdir(parents=True)
    pq.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "tasks/piqa/validation.parquet")
    results = zero_shot(long_llama, tokenizer, load_tasks(["piqa"]), progress=False)
    questions = [(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]) for row in rows]
    acc, acc_norm = accuracies_by_definition(long_llama, tokenizer, questions)
    assert (results["piqa"]["acc"], results["piqa"]["acc_norm"]) == (acc, acc_norm)


@pytest.mark.slow
def test_a_split_of_examples_is_needed_only_for_examples(tmp_path, monkeypatch, no_hub):
    row = {"question": "1 + 1?", "subject": "sums", "choices": ["1", "2", "3", "4"], "answer": 1}
    monkeypatch.setenv("MAIHT_DATA_DIR", str(tmp_path))
    folder = tmp_path / "tasks/mmlu_abstract_algebra"
    folder.mkdir(parents=True)
    pq.write_table(pyarrow.Table.from_pylist([row]), folder / "test.parquet")
    (task,) = load_tasks(["mmlu_abstract_algebra"]).values()
    assert list(task.eval_docs) == [row]
    with pytest.raises(FileNotFoundError, match=r"mmlu_abstract_algebra/dev\.parquet"):
        load_tasks(["mmlu_abstract_algebra"], num_fewshot=1)


@pytest.mark.slow
def test_examples_are_those_of_lm_eval(long_llama, tokenizer, local_data, tmp_path):
    """Against `simple_evaluate`, which the command line calls, on the same files."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    tasks = load_tasks(["arc_easy"], num_fewshot=3)
    ours = zero_shot(long_llama, tokenizer, tasks, limit=8, batch_size=4, progress=False)
    write_yamls(tmp_path, local_data, ["arc_easy"])
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=long_llama, tokenizer=copy.deepcopy(tokenizer), batch_size=4),
        tasks=["arc_easy"],
        num_fewshot=3,
        limit=8,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False, include_path=tmp_path),
    )
    prompts = [arguments for sample in theirs["samples"]["arc_easy"] for arguments in sample["arguments"]]
    assert [instance.args for instance in tasks["arc_easy"].instances] == prompts
    assert ours["arc_easy"] == numbers(theirs["results"]["arc_easy"])


@pytest.mark.slow
def test_all_tasks_equal_lm_evals_command_line(smollm2_folder, local_data, tmp_path, no_hub):
    """Both run at the same time with one thread each, as sums of floats depend on the number of threads.

    The model is cut to its first blocks, which changes the figures but not what makes them equal.
    """
    from maiht_lightning.models.loading import load_model, load_tokenizer

    missing = [name for name in PAPER_TASKS if not (local_data / "tasks" / name).is_dir()]
    if missing:
        pytest.skip(f"no local copies of {missing} in {local_data}")
    model, tokenizer = load_model(str(smollm2_folder)), load_tokenizer(str(smollm2_folder))
    model.model.layers = model.model.layers[:4]
    model.config.num_hidden_layers = 4
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "yaml").mkdir()
    write_yamls(tmp_path / "yaml", local_data, PAPER_TASKS)
    command = [*python(), "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'}"]
    command += ["--tasks", ",".join(PAPER_TASKS), "--include_path", str(tmp_path / "yaml"), "--device", "cpu"]
    command += ["--batch_size", "8", "--limit", "8", "--output_path", str(tmp_path / "answer")]
    threads = torch.get_num_threads()
    with (tmp_path / "log").open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        torch.set_num_threads(1)
        ours = zero_shot(model, tokenizer, load_tasks(PAPER_TASKS), limit=8, batch_size=8, progress=False)
        code = process.wait()
    finally:
        torch.set_num_threads(threads)
        process.kill()
    assert code == 0, (tmp_path / "log").read_text()[-3000:]
    (answer,) = Path(tmp_path / "answer").rglob("results_*.json")
    theirs = {name: numbers(metrics) for name, metrics in json.loads(answer.read_text())["results"].items()}
    assert ours == theirs
    assert list(ours) == list(PAPER_TASKS)
    assert all({"acc", "acc_stderr"} <= set(metrics) for metrics in ours.values())
    assert len({metrics["acc"] for metrics in ours.values()}) > 3  # not all the same by some accident
