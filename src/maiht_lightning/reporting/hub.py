"""A run's saved model on the Hugging Face hub."""

import re
from pathlib import Path
from typing import Any

from .model_card import COMPACT, REPO_ID, STAGE_OF
from .summary import Summary


def check_repo_id(repo_id: str) -> str:
    """Return a repository's name as the hub takes it.

    Raises:
        ValueError: It is no `USER/NAME`.
    """
    if not isinstance(repo_id, str) or not re.fullmatch(REPO_ID, repo_id):
        raise ValueError(f"push_to_hub must be a repository such as USER/NAME, but found {repo_id!r}")
    return repo_id


def find_model(run: Path, name: str | None = None) -> Path:
    """Find the folder of a run's model that is to be published: the newest one, or the one of this name.

    Raises:
        ValueError: There is none of that name.
        FileNotFoundError: The folder is not a run's.
    """
    saved = [each for each in STAGE_OF if each in Summary.read(run).saved and (run / each).is_dir()]
    pruned = [each for each in saved if each != "model_dense"]
    if not pruned:
        raise ValueError(f"{run} holds no pruned model: is its run finished?")
    saved += [COMPACT] if (run / COMPACT).is_dir() else []
    if name is not None and name not in saved:
        raise ValueError(f"{run} holds the models {', '.join(saved)}, but found {name!r}")
    return run / (name or pruned[-1])


def push(run: Path, repo_id: str, *, name: str | None = None, private: bool = True, api: Any = None) -> str:
    """Upload a run's saved model with its card to a repository on the hub, which is made if there is none.

    Args:
        run: The run's folder.
        repo_id: `USER/NAME` or `ORGANISATION/NAME`.
        name: The folder in the run: `model`, `model_finetuned`, `model_compact` or `model_dense`. None: the newest.
        private: Whether a repository that is made is private.
        api: The hub's client; by default `huggingface_hub.HfApi()`, with the token of `hf auth login` or `HF_TOKEN`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: There is no such model, or `repo_id` is no repository's name; nothing is sent.
        OSError: The hub refuses or cannot be reached.
    """
    check_repo_id(repo_id)
    folder = find_model(run, name)
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi(library_name="maiht-lightning")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        message = f"{folder.name} of {run.name}, by maiht-lightning"
        sent = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    except Exception as error:
        # Of the hub, of its client, of the network below it.
        raise OSError(
            f"{folder} could not be pushed to {repo_id}: {error}. Is there a token for it (hf auth login, "
            f"or HF_TOKEN)? `maiht push {run} {repo_id}` tries again"
        ) from error
    return str(getattr(sent, "commit_url", sent))
