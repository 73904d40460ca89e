"""Checks of settings, with one form of message: "`name` must be A, but found B"."""


def check_at_least(minimum: int, **settings: int) -> None:
    """Refuse settings below a minimum, by name.

    Raises:
        ValueError: One of them is smaller.
    """
    for name, value in settings.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, but found {value}")


def check_integer(minimum: int, **settings: object) -> None:
    """Refuse settings that are no whole numbers or are below a minimum, by name.

    Raises:
        ValueError: One of them is a float, a bool or something else, or smaller.
    """
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"{name} must be a whole number, at least {minimum}, but found {value!r}")
