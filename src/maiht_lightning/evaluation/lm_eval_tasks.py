"""lm-eval's tasks: finding them by name, and loading their documents from local copies or from the hub."""

import functools
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..data.local import VARIABLE, local_copy
from ..validation import check_integer
from .lm_eval_state import lm_eval_at_work

PAPER_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")

# Folders of lm-eval in which the papers' tasks are. Reading these few files takes no time, all 14,000 take seconds.
_PAPER_FOLDERS = ("super_glue/boolq", "glue/rte", "hellaswag", "winogrande", "arc", "openbookqa")


def load_tasks(names: Sequence[str], *, num_fewshot: int | None = None) -> dict[str, Any]:
    """Load tasks with their documents for `zero_shot`: what may fail does so here, before any evaluation.

    Where `MAIHT_DATA_DIR` is set, documents are read from `tasks/<task>/<split>.parquet` in that folder, with columns
    as on the hub, and nothing else is asked for them. Otherwise lm-eval fetches them from the Hugging Face hub.

    Args:
        names: lm-eval's names, those in `PAPER_TASKS` or any others; groups and tags stand for their tasks.
        num_fewshot: Solved examples before each question; by default the task's own number, which is mostly 0. As with
            lm-eval's command line, a task that fixes 0 keeps it. From local copies, examples come from the split that
            the task names, from `train`, or else from `validation` where another split is evaluated.

    Returns:
        lm-eval's `Task` by name, each once.

    Raises:
        ValueError: A task is unknown or unsuitable, `num_fewshot` is out of range, or there is no local split to draw
            examples from.
        FileNotFoundError: `MAIHT_DATA_DIR` is set, but lacks the folder or a split's file.
        ModuleNotFoundError: lm-eval is not installed.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"tasks must be a list with at least one name, but found {names!r}")
    if num_fewshot is not None:
        check_integer(0, num_fewshot=num_fewshot)
    with lm_eval_at_work():
        unique = list(dict.fromkeys(names))
        manager = _task_manager(unique)
        if os.environ.get(VARIABLE):
            tasks = _load_local(unique, manager, num_fewshot)
        else:
            tasks = _load_from_hub(unique, manager)
        for name, task in tasks.items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise ValueError(
                    f"tasks must be of plain text, but found {name}, which needs images or sound or runs code that "
                    "the model writes: evaluate it with lm-eval's own command line"
                )
            task.set_config("num_fewshot", _num_fewshot_for(task.get_config("num_fewshot"), num_fewshot))
    return tasks


def _num_fewshot_for(task_default: int | None, requested: int | None) -> int:
    """Choose the number of solved examples by the rule of lm-eval's command line: a task that says 0 means it."""
    if requested is None or task_default == 0:
        return task_default or 0
    return requested


def _task_manager(names: Sequence[str]) -> Any:
    """Read lm-eval's index of tasks as far as these names need it.

    Raises:
        ValueError: lm-eval does not know one of them.
    """
    import lm_eval.tasks

    folders = [Path(lm_eval.tasks.__file__).parent / folder for folder in _PAPER_FOLDERS]
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)
    # The short index knows tags such as `glue`, but not all of their tasks: only the papers' own names may use it.
    if not set(names) <= set(PAPER_TASKS) & set(manager.all_tasks):
        manager = _all_tasks()
    for name in names:
        if name not in manager.task_index:
            similar = get_close_matches(str(name), manager.all_tasks, n=5)
            advice = f"similar names are {', '.join(similar)}" if similar else "`lm_eval ls tasks` lists them"
            raise ValueError(f"tasks must be names of lm-eval's tasks, groups or tags, but found {name!r}: {advice}")
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
    # lm-eval merges settings into a registered task only where the task is a group's member, so we make a group.
    members = [{"task": name, **_local_settings(name, manager.task_index[name].cfg, num_fewshot)} for name in leaves]
    tasks: dict[str, Any] = manager.load([{"group": "local_copies", "task": members}])["tasks"]
    for task in tasks.values():
        # lm-eval prepares the documents at each access. Without the hub's cache files that would cost the same again.
        if task.config.process_docs is not None:
            task.config.process_docs = functools.cache(task.config.process_docs)
    return tasks


def _leaves(name: str, index: Mapping[str, Any]) -> list[str]:
    """List the tasks that a name stands for: itself, or those of its group or tag.

    Raises:
        ValueError: It stands for something that is put together in Python or inline.
    """
    kind = index[name].kind.name
    if kind == "TASK":
        return [name]
    members = sorted(index[name].tags) if kind == "TAG" else (index[name].cfg or {}).get("task")
    if isinstance(members, list) and all(isinstance(member, str) and member in index for member in members):
        return [leaf for member in members for leaf in _leaves(member, index)]
    raise ValueError(
        f"tasks must be those that lm-eval defines in YAML, or lists of such, where {VARIABLE} is set, but found "
        f"{name!r}, which it puts together in another way: name its tasks, or unset {VARIABLE} to read from the "
        "Hugging Face hub"
    )


def _local_settings(name: str, registered: Mapping[str, Any], num_fewshot: int | None) -> dict[str, Any]:
    """Find what to change in a task's registered settings so that it reads its local copies.

    The splits stay as registered as far as their files are needed, so that lm-eval evaluates the same split as ever
    and treats examples as it would with the hub's data.

    Raises:
        ValueError: The task has no split to evaluate, or none to draw examples from.
        FileNotFoundError: The file of a split that is needed is missing.
    """
    evaluated = registered.get("test_split") or registered.get("validation_split")
    if not evaluated:
        raise ValueError(f"tasks must have a test or validation split, but found {name!r}, which has none")
    files = {evaluated: local_copy(f"tasks/{name}/{evaluated}.parquet")}
    no_examples: dict[str, Any] = {"fewshot_split": None, "fewshot_config": None}
    if count := _num_fewshot_for(registered.get("num_fewshot"), num_fewshot):
        no_examples = {}
        source = _examples_split(name, registered, evaluated, count)
        if source is not None:
            files[source] = local_copy(f"tasks/{name}/{source}.parquet")

    def read(**_: Any) -> dict[str, Any]:
        import datasets
        from pyarrow.parquet import read_table  # type: ignore[import-untyped]

        # The tables are read into memory: `load_dataset` would copy the files into the Hugging Face cache.
        return {split: datasets.Dataset(read_table(file)) for split, file in files.items()}

    splits = {key: registered.get(key) for key in ("training_split", "validation_split", "test_split")}
    splits = {key: split if split in files else None for key, split in splits.items()}
    data = {"custom_dataset": read, "dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": None}
    return {**splits, **no_examples, **data}


def _examples_split(name: str, registered: Mapping[str, Any], evaluated: str, count: int) -> str | None:
    """Find the split that so many solved examples come from; None where the task brings its own.

    Raises:
        ValueError: No file of a split that may be used is there.
    """
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
        f"num_fewshot must be 0 for {name}, which has no local split besides the evaluated one, {evaluated}, to draw "
        f"examples from, but found {count}: put {wanted} into {folder}, or unset {VARIABLE} to read from the Hugging "
        "Face hub"
    )
