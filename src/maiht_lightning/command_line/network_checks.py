"""Whether the Hugging Face hub and W&B answer; asked with short timeouts, and no answer is no failure."""

import os
import threading
from collections.abc import Callable
from urllib.error import HTTPError
from urllib.request import Request, urlopen

# Seconds. A machine without a network may take longer to say so, and nobody waits for it.
TIMEOUT = 3.0
TRUE = ("1", "true", "yes", "on")


def reachable() -> dict[str, str]:
    """What becomes of requests to the hub and to W&B, in words, by name."""
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    wandb = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    checks = {
        "Hugging Face hub": lambda: (
            "offline, as HF_HUB_OFFLINE says: models come from folders and from the cache"
            if os.environ.get("HF_HUB_OFFLINE", "").lower() in TRUE
            else _answers(hub, "give models as folders or .gguf files, and texts in MAIHT_DATA_DIR")
        ),
        "W&B": lambda: (
            f"{os.environ['WANDB_MODE']}, as WANDB_MODE says"
            if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
            else _answers(wandb, "give --trainer.logger.offline true, and `wandb sync` later")
        ),
    }
    return _all_at_once(checks)


def _answers(address: str, otherwise: str) -> str:
    try:
        with urlopen(Request(address, method="HEAD"), timeout=TIMEOUT):
            pass
    except HTTPError:
        # An answer all the same.
        pass
    except (OSError, ValueError) as error:
        return f"{address} not reached ({getattr(error, 'reason', error)}): {otherwise}"
    return f"{address} reached"


def _all_at_once(checks: dict[str, Callable[[], str]]) -> dict[str, str]:
    """The results of all checks; those that do not come in time are left to themselves."""
    found = dict.fromkeys(checks, f"no answer within {TIMEOUT:.0f} s")

    def check(name: str) -> None:
        found[name] = checks[name]()

    # A name server that does not answer cannot be given a timeout.
    threads = [threading.Thread(target=check, args=(name,), daemon=True) for name in checks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT + 1)
    return dict(found)
