"""What lm-eval changes around itself in a process, put back when its work is done.

lm-eval is made for a process of its own. Here it works in the middle of a run: whatever it sets for the process, for
the model or for the screen is as before afterwards, also where it fails.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..data.randomness import seeded

# The seeds of lm-eval's command line: of `random`, and of NumPy, torch and the choice of solved examples.
PYTHON_SEED = 0
OTHER_SEED = 1234


@contextmanager
def lm_eval_at_work() -> Iterator[None]:
    """Import lm-eval and let it work; put the environment, the random states and the log levels back.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
    """
    with _environment_kept(), seeded(PYTHON_SEED, OTHER_SEED), _quiet():
        try:
            import lm_eval.evaluator
            import lm_eval.models.huggingface
            import lm_eval.tasks  # noqa: F401
        except ImportError as error:
            raise ModuleNotFoundError(
                f"zero-shot tasks need lm-eval, which cannot be imported ({error}): pip install 'maiht-lightning[eval]'"
            ) from error
        yield


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Put environment variables back as they were: importing lm-eval sets some for the whole process."""
    found = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(found):
            del os.environ[name]
        os.environ.update({name: value for name, value in found.items() if os.environ.get(name) != value})


@contextmanager
def _quiet() -> Iterator[None]:
    """Let lm-eval log errors and the first prompt that it cuts, unless the user has set its level; hide data bars."""
    import datasets

    package, wrapper = logging.getLogger("lm_eval"), logging.getLogger("lm_eval.models.huggingface")
    cut: list[logging.LogRecord] = []

    def only_the_first_cut(record: logging.LogRecord) -> bool:
        cuts = record.levelno == logging.WARNING and "Truncating" in record.getMessage()
        # A model with a short context may cut thousands of prompts, each with a warning.
        if cuts:
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
def tying_off(model: nn.Module) -> Iterator[None]:
    """Leave the model's weights tied or untied as they are: lm-eval ties those that the config calls tied."""
    own = {name: value for name, value in vars(model).items() if name == "tie_weights"}
    vars(model)["tie_weights"] = lambda *_, **__: None
    try:
        yield
    finally:
        del vars(model)["tie_weights"]
        vars(model).update(own)


@contextmanager
def named_bars(progress: bool, description: str) -> Iterator[None]:
    """Put a description before the names of lm-eval's progress bars, or hide all of its bars.

    lm-eval has no setting for either. Its modules hold `tqdm` by name, so that name is replaced in each of them.

    Args:
        progress: Show the bars that have a name.
        description: What to put before their names; empty for nothing.
    """

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
