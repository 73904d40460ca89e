"""How numbers and names are written in every report."""

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
DASH = "–"


def method_name(method: str) -> str:
    """Write a method as its authors do."""
    return METHOD_NAMES.get(method, method)


def perplexity(value: float, decimals: int | None = None) -> str:
    """Write so many decimals; by default two, and fewer for large values. ∞ is written as such."""
    if not isfinite(value):
        return "NaN" if isnan(value) else "∞"
    if decimals is not None:
        return f"{value:.{decimals}f}"
    if value >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.{2 if value < 1000 else 0}f}"


def error(value: float) -> str:
    """Write a relative error with three digits."""
    return f"{value:.3g}"


def number(value: float) -> str:
    """Write a number of which nothing is known with four digits. ∞ is written as such."""
    return f"{value:,.4g}" if isfinite(value) else "NaN" if isnan(value) else "∞" if value > 0 else "−∞"


def percent(value: float) -> str:
    """Write a fraction in percent with two decimals, without the sign."""
    return f"{100 * value:.2f}"


def score(value: float | None, deviation: float | None = None) -> str:
    """Write a fraction in percent, with its standard error where one is known; a dash where nothing was measured."""
    if value is None:
        return DASH
    return percent(value) if deviation is None else f"{percent(value)} ± {percent(deviation)}"


def duration(seconds: float) -> str:
    """Write seconds, or minutes and seconds, or hours and minutes."""
    if seconds < 99.95:
        return f"{seconds:.{2 if seconds < 10 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def memory(size: float) -> str:
    """Write bytes in GiB."""
    return f"{size / 2**30:.2f} GiB"


def setting(value: Any) -> str:
    """Write a setting's value: None as a dash, numbers short, lists joined."""
    if value is None or value in ([], {}):
        return DASH
    if isinstance(value, list | tuple):
        return ", ".join(setting(entry) for entry in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Make nested settings flat, by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
