"""How numbers, names and stages are written in every report."""

from collections.abc import Mapping
from math import isfinite, isnan
from typing import Any

METHOD_NAMES = {
    "maiht": "mAIHT",
    "aiht": "AIHT",
    "iht": "IHT",
    "sparsegpt": "SparseGPT",
    "admm": "ADMM-Grad",
    "wanda": "Wanda",
}
STAGE_ORDER = ("dense", "pruned", "finetuned")
DASH = "–"


def method_name(method: str) -> str:
    """A method as its authors write it."""
    return METHOD_NAMES.get(method, method)


def in_order(stages: Mapping[str, Any]) -> dict[str, Any]:
    """Stages in the order in which they happen; unknown ones come last, in the order given."""
    known = [name for name in STAGE_ORDER if name in stages]
    return {name: stages[name] for name in [*known, *(name for name in stages if name not in known)]}


def perplexity(value: float) -> str:
    """Two decimals, fewer for large values; ∞ as such."""
    if not isfinite(value):
        return "NaN" if isnan(value) else "∞"
    if value >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.{2 if value < 1000 else 0}f}"


def error(value: float) -> str:
    """A relative error: three digits."""
    return f"{value:.3g}"


def percent(value: float) -> str:
    """A fraction in percent with two decimals, without the sign."""
    return f"{100 * value:.2f}"


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds, or hours and minutes."""
    if seconds < 99.95:
        return f"{seconds:.{2 if seconds < 10 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def memory(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.2f} GiB"


def setting(value: Any) -> str:
    """A setting's value: None as a dash, numbers short, lists joined."""
    if value is None or value in ([], {}):
        return DASH
    if isinstance(value, list | tuple):
        return ", ".join(setting(entry) for entry in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
