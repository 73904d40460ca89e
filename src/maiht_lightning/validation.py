"""Checks of settings, with one form of message."""


def check_at_least(minimum: int, **settings: int) -> None:
    """Refuses settings below a minimum, by name.

    Raises:
        ValueError: One of them is smaller.
    """
    for name, value in settings.items():
        if value < minimum:
            raise ValueError(f"{name}: expected at least {minimum}, found {value}")
