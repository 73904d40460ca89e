"""Zero-shot accuracy through EleutherAI's lm-eval, on a model in memory.

Background: https://github.com/EleutherAI/lm-evaluation-harness. Prompts, scoring and standard errors are lm-eval's
own, so figures are those of its command line with the same batch size. What lm-eval would change around itself
(random state, environment, log levels, the tokenizer's padding, the model's modes and tied weights) is put back.
"""

import copy
import functools
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from tqdm.auto import tqdm

from ..data.local import VARIABLE, local_copy
from ..distributed import Ranks
from ..models.blocks import evaluation_mode
from ..models.offload import offloaded_forward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAPER_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")

# Where lm-eval keeps them. Reading all of its 14,000 task files takes seconds, these few none.
_PAPER_FOLDERS = ("super_glue/boolq", "glue/rte", "hellaswag", "winogrande", "arc", "openbookqa")

# The seeds of lm-eval's command line.
_PYTHON_SEED = 0
_OTHER_SEED = 1234

# lm-eval's default, so that standard errors are those of its command line. The standard error of a mean (acc, acc_norm)
# has a closed form, for which nothing is drawn: the number costs time only with metrics such as F1. Zero would leave
# out the closed forms as well.
_BOOTSTRAP_ITERATIONS = 100_000


def load_tasks(names: Sequence[str], *, num_fewshot: int | None = None) -> dict[str, Any]:
    """The tasks with their documents, ready for :func:`zero_shot`: what may fail does so here, before any evaluation.

    Where ``MAIHT_DATA_DIR`` is set, documents are read from ``tasks/<task>/<split>.parquet`` in that folder, columns as
    on the hub, and nothing else is asked for them. Otherwise lm-eval fetches them from the Hugging Face hub.

    Args:
        names: lm-eval's names, :data:`PAPER_TASKS` or any others; groups and tags stand for their tasks.
        num_fewshot: Solved examples before each question; by default the task's own number, which is mostly 0. As with
            lm-eval's command line, a task that fixes 0 keeps it. From local copies, examples come from the split that
            the task names, from ``train``, or else from ``validation`` where another split is evaluated.

    Returns:
        lm-eval's ``Task`` by name, each once.

    Raises:
        ValueError: Unknown or unsuitable task, bad ``num_fewshot``, or no local split to draw examples from.
        FileNotFoundError: ``MAIHT_DATA_DIR`` is set, but lacks the folder or a split's file.
        ModuleNotFoundError: lm-eval is not installed.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"tasks: expected a list with at least one name, found {names!r}")
    if num_fewshot is not None:
        _check_integer(0, num_fewshot=num_fewshot)
    with _environment_kept(), _seeded(), _quiet():
        _import_lm_eval()
        unique = list(dict.fromkeys(names))
        manager = _task_manager(unique)
        if os.environ.get(VARIABLE):
            tasks = _load_local(unique, manager, num_fewshot)
        else:
            tasks = _load_from_hub(unique, manager)
        for name, task in tasks.items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise ValueError(
                    f"tasks: expected tasks of plain text, found {name}, which needs images or sound or runs code that "
                    "the model writes; evaluate it with lm-eval's own command line"
                )
            task.set_config("num_fewshot", _shots(task.get_config("num_fewshot"), num_fewshot))
    return tasks


def zero_shot(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Mapping[str, Any],
    *,
    limit: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
    description: str = "",
    device: torch.device | None = None,
    process_group: ProcessGroup | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluates a causal language model on tasks; needs no copy of it on disk.

    The model runs on its own device and in its own dtype. As in lm-eval, log-probabilities have the dtype of the
    logits: in bfloat16 their rounding may turn a close choice.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: The model's tokenizer; a copy of it is used.
        tasks: From :func:`load_tasks`.
        limit: Only the first so many documents of each task, for a quick look.
        batch_size: Sequences a forward pass. As padding moves float rounding, a close choice may turn with it.
        progress: Show progress bars.
        description: Stands before the bars' names.
        device: Where to compute; by default where the model is. From host memory each layer is brought there by
            Accelerate, in every forward pass: a large `batch_size` pays.
        process_group: Processes that have the same model, or shards of one, and share the documents; all of them get
            the result.

    Returns:
        By task the metrics that lm-eval reports for it, such as ``acc``, ``acc_stderr``, ``acc_norm``,
        ``acc_norm_stderr``: fractions of 1 for these. A standard error that lm-eval cannot give, as for a single
        document, is absent. lm-eval's suffix ``,none`` is dropped, the name of another filter stays.

    Raises:
        ValueError: Bad ``limit`` or ``batch_size``, or no tasks.
        TypeError: ``tasks`` is not what :func:`load_tasks` returns.
        ModuleNotFoundError: lm-eval is not installed.
    """
    _check_integer(1, batch_size=batch_size)
    if limit is not None:
        _check_integer(1, limit=limit)
    if not isinstance(tasks, Mapping):
        raise TypeError(f"tasks: expected the dictionary that load_tasks returns, found {type(tasks).__name__}")
    if not tasks:
        raise ValueError("tasks: expected at least one, found none")
    ranks = Ranks(process_group)
    with (
        _environment_kept(),
        _seeded(),
        _quiet(),
        evaluation_mode(model),
        _tying_off(model),
        offloaded_forward(model, device),
    ):
        _import_lm_eval()
        from lm_eval.evaluator import evaluate

        with _bars(progress and ranks.is_main, description):
            wrapped = _wrapped(model, tokenizer, batch_size, ranks)
            for task in tasks.values():
                task.set_fewshot_seed(_OTHER_SEED)  # at each evaluation, so that all stages see the same examples
            # Not `simple_evaluate`: it reads all task files again and has git and pip describe the machine.
            answer = evaluate(
                wrapped,
                {"tasks": dict(tasks), "groups": {}, "group_map": {}},
                limit=limit,
                bootstrap_iters=_BOOTSTRAP_ITERATIONS,
                log_samples=False,
            )
    # lm-eval answers at the first process only.
    numbers = {name: _numbers(answer["results"][name]) for name in tasks} if answer is not None else {}
    return ranks.broadcast_object(numbers)


def _wrapped(model: nn.Module, tokenizer: "PreTrainedTokenizerBase", batch_size: int, ranks: Ranks) -> Any:
    """lm-eval's wrapper around a model in memory, at work for its process's share of the documents."""
    from lm_eval.models.huggingface import HFLM

    class Wrapped(HFLM):
        # lm-eval knows several processes only where it has loaded the model itself.
        def all_gather(self, tensor: Tensor) -> Tensor:
            return torch.stack(ranks.all_gather_object(tensor.cpu())).flatten()

        def barrier(self) -> None:
            ranks.all_gather_object(None)

        def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
            gathered = ranks.all_gather_object(obj)
            return gathered if ranks.rank == dst else None

    # The copy because lm-eval may give it a padding token and sets its padding side.
    wrapped = Wrapped(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    wrapped._rank, wrapped._world_size = ranks.rank, ranks.size
    return wrapped


def _check_integer(minimum: int, **settings: object) -> None:
    for name, value in settings.items():
        # Not a float either: lm-eval's `limit` of 0.5 is a half of all documents, and 1.0 is one of them.
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"{name}: expected an integer of at least {minimum}, found {value!r}")


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics from lm-eval's entry of a task: its keys with a filter (``acc,none``) whose values are numbers."""
    numbers = {key: value for key, value in metrics.items() if "," in key and isinstance(value, Real)}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items()}


def _shots(of_task: int | None, asked: int | None) -> int:
    """Examples before a question by the rule of lm-eval's command line: a task that says 0 means it."""
    return of_task or 0 if asked is None or of_task == 0 else asked


def _import_lm_eval() -> None:
    try:
        import lm_eval.evaluator
        import lm_eval.models.huggingface
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            f"zero-shot tasks need lm-eval, which cannot be imported ({error}): pip install 'maiht-lightning[eval]'"
        ) from error


def _task_manager(names: Sequence[str]) -> Any:
    """lm-eval's index of tasks, as far as needed for these."""
    import lm_eval.tasks

    folders = [Path(lm_eval.tasks.__file__).parent / folder for folder in _PAPER_FOLDERS]
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)
    # Tags must be complete: `glue` is known to the short index, but not all of its tasks are.
    if not set(names) <= set(PAPER_TASKS) & set(manager.all_tasks):
        manager = _all_tasks()
    for name in names:
        if name not in manager.task_index:
            similar = get_close_matches(str(name), manager.all_tasks, n=5)
            advice = f"similar names: {', '.join(similar)}" if similar else "`lm_eval ls tasks` lists them"
            raise ValueError(f"tasks: expected names of lm-eval's tasks, groups or tags, found {name!r}; {advice}")
    return manager


@functools.cache
def _all_tasks() -> Any:
    import lm_eval.tasks

    return lm_eval.tasks.TaskManager()


def _load_from_hub(names: list[str], manager: Any) -> dict[str, Any]:
    try:
        return manager.load(names)["tasks"]
    except Exception as error:
        error.add_note(f"These tasks come from the Hugging Face hub. Without internet, set {VARIABLE} to local copies.")
        raise


def _load_local(names: Sequence[str], manager: Any, num_fewshot: int | None) -> dict[str, Any]:
    leaves = dict.fromkeys(leaf for name in names for leaf in _leaves(name, manager.task_index))
    # Settings of a group's member are merged into the registered task's; a task given alone is not looked up.
    members = [{"task": name, **_local_settings(name, manager.task_index[name].cfg, num_fewshot)} for name in leaves]
    tasks: dict[str, Any] = manager.load([{"group": "local_copies", "task": members}])["tasks"]
    for task in tasks.values():
        # lm-eval calls it at each access, and without the hub's cache files each call would cost the same again.
        if task.config.process_docs is not None:
            task.config.process_docs = functools.cache(task.config.process_docs)
    return tasks


def _leaves(name: str, index: Mapping[str, Any]) -> list[str]:
    """The tasks that a name stands for."""
    kind = index[name].kind.name
    if kind == "TASK":
        return [name]
    members = sorted(index[name].tags) if kind == "TAG" else (index[name].cfg or {}).get("task")
    if isinstance(members, list) and all(isinstance(member, str) and member in index for member in members):
        return [leaf for member in members for leaf in _leaves(member, index)]
    raise ValueError(
        f"tasks: with {VARIABLE} set expected tasks that lm-eval defines in YAML, or lists of such, found {name!r}, "
        f"which it puts together in another way; name its tasks, or unset {VARIABLE} to read from the Hugging Face hub"
    )


def _local_settings(name: str, registered: Mapping[str, Any], num_fewshot: int | None) -> dict[str, Any]:
    """What to change in a task's registered settings so that it reads its local copies.

    The splits stay as registered as far as their files are needed, so that lm-eval evaluates the same split as ever
    and treats examples as it would with the hub's data.
    """
    evaluated = registered.get("test_split") or registered.get("validation_split")
    if not evaluated:
        raise ValueError(f"tasks: expected tasks with a test or validation split, found {name!r} without")
    files = {evaluated: local_copy(f"tasks/{name}/{evaluated}.parquet")}
    no_examples: dict[str, Any] = {"fewshot_split": None, "fewshot_config": None}
    if _shots(registered.get("num_fewshot"), num_fewshot):
        no_examples = {}
        source = _examples_split(name, registered, evaluated)
        if source is not None:
            files[source] = local_copy(f"tasks/{name}/{source}.parquet")

    def read(**_: Any) -> dict[str, Any]:
        import datasets
        from pyarrow.parquet import read_table  # type: ignore[import-untyped]

        # In memory: `load_dataset` would copy the files into the Hugging Face cache.
        return {split: datasets.Dataset(read_table(file)) for split, file in files.items()}

    splits = {key: registered.get(key) for key in ("training_split", "validation_split", "test_split")}
    splits = {key: split if split in files else None for key, split in splits.items()}
    data = {"custom_dataset": read, "dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": None}
    return {**splits, **no_examples, **data}


def _examples_split(name: str, registered: Mapping[str, Any], evaluated: str) -> str | None:
    """The split that solved examples come from; None where the task brings its own."""
    own = registered.get("fewshot_config") or {}
    named = own.get("split") or registered.get("fewshot_split")
    if named:
        return named
    if own.get("samples"):
        return None
    candidates = [registered.get("training_split"), registered.get("validation_split")]
    candidates = [split for split in candidates if split and split != evaluated]
    folder = Path(os.environ[VARIABLE]).expanduser() / "tasks" / name
    for split in candidates:
        if (folder / f"{split}.parquet").is_file():
            return split
    wanted = " or ".join(f"{split}.parquet" for split in candidates) or "no split that could be used"
    raise ValueError(
        f"num_fewshot: expected 0 for {name}, as there is no local split to draw examples from besides the evaluated "
        f"one, {evaluated} (in {folder}: {wanted}); put the file there, or unset {VARIABLE} to read from the hub"
    )


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Variables as found afterwards: importing lm-eval sets some for the whole process."""
    found = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(found):
            del os.environ[name]
        os.environ.update({name: value for name, value in found.items() if os.environ.get(name) != value})


@contextmanager
def _seeded() -> Iterator[None]:
    """Seeded as by lm-eval's command line, for tasks that draw; all generators as found afterwards."""
    # Only where CUDA is in use already: a model on the CPU must not initialise it.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=devices):
        try:
            random.seed(_PYTHON_SEED)
            np.random.seed(_OTHER_SEED)  # noqa: NPY002
            # `torch.manual_seed` would also seed a CUDA that is initialised later, where nothing could be put back.
            torch.default_generator.manual_seed(_OTHER_SEED)
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(_OTHER_SEED)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval logs only errors, and the first prompt it cuts, unless the user set its level; `datasets` has no bars."""
    import datasets

    package, wrapper = logging.getLogger("lm_eval"), logging.getLogger("lm_eval.models.huggingface")
    cut: list[logging.LogRecord] = []

    def only_the_first_cut(record: logging.LogRecord) -> bool:
        cuts = record.levelno == logging.WARNING and "Truncating" in record.getMessage()
        if cuts:  # there may be thousands
            cut.append(record)
        return record.levelno >= logging.ERROR or (cuts and len(cut) == 1)

    with ExitStack() as stack:
        if not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        if package.level == logging.NOTSET:
            stack.callback(package.setLevel, logging.NOTSET)
            stack.callback(wrapper.setLevel, wrapper.level)
            stack.callback(wrapper.removeFilter, only_the_first_cut)
            package.setLevel(logging.ERROR)
            wrapper.setLevel(logging.WARNING)
            wrapper.addFilter(only_the_first_cut)
        yield


@contextmanager
def _tying_off(model: nn.Module) -> Iterator[None]:
    """The model's weights stay tied or untied as they are: lm-eval ties those that the config calls tied."""
    own = {name: value for name, value in vars(model).items() if name == "tie_weights"}
    vars(model)["tie_weights"] = lambda *_, **__: None
    try:
        yield
    finally:
        del vars(model)["tie_weights"]
        vars(model).update(own)


@contextmanager
def _bars(progress: bool, description: str) -> Iterator[None]:
    """lm-eval's named progress bars get the description before them, or all its bars go: it has no setting for it."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            name = kwargs.get("desc")
            kwargs["disable"] = not progress or not name or bool(kwargs.get("disable"))
            kwargs["desc"] = f"{description}: {name}" if description else name
            super().__init__(*args, **kwargs)

    modules = [module for name, module in list(sys.modules.items()) if name.startswith("lm_eval.")]
    modules = [module for module in modules if isinstance(vars(module).get("tqdm"), type)]
    found = [vars(module)["tqdm"] for module in modules]
    for module in modules:
        vars(module)["tqdm"] = Bar
    try:
        yield
    finally:
        for module, bar in zip(modules, found, strict=True):
            vars(module)["tqdm"] = bar
