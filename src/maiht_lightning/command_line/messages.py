"""What jsonargparse found wrong, in words of the person who typed it.

Its messages are told apart by their text, for want of anything else. A message that is not known is left as it is.
"""

import importlib
import inspect
import re
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator

from ..validation import did_you_mean


def explain(message: str, parser: ArgumentParser) -> str:
    """Say what is wrong in few words, with the nearest thing that would have been right.

    Args:
        message: From jsonargparse.
        parser: Of the command.
    """
    for pattern, answer in ANSWERS:
        if found := re.search(pattern, message, re.DOTALL):
            return answer(found, message, parser)
    return message


def options(parser: ArgumentParser) -> list[str]:
    """The settings that a parser knows, as on the command line."""
    return [name for action in parser._actions for name in action.option_strings if name.startswith("--")]


def _unrecognized(found: re.Match[str], message: str, parser: ArgumentParser) -> str:
    words = [word.partition("=")[0] for word in found[1].split()]
    unknown = [word for word in words if word.startswith("--")]
    if not unknown:
        return f"{' '.join(words)!r} is no setting: they begin with --, and each takes one value"
    return "\n".join(f"no setting {word}{did_you_mean(word, options(parser))}" for word in unknown)


def _not_in_parser(found: re.Match[str], message: str, parser: ArgumentParser) -> str:
    """A key of a file: `pruning.sparsty`."""
    group, key = found["group"], found["key"]
    key = f"{group}.{key}" if group and not key.startswith(f"{group}.") else key
    known = [name.removeprefix("--") for name in options(parser)]
    # A misspelt section has settings below it that exist, and its name alone is what is wrong.
    section, _, rest = key.partition(".")
    if rest and section not in {name.partition(".")[0] for name in known}:
        sections = dict.fromkeys(name.partition(".")[0] for name in known)
        return f"no section {section}{did_you_mean(section, sections)}"
    return f"no setting {key}{did_you_mean(key, known)}"


def _not_in_class(found: re.Match[str], message: str, parser: ArgumentParser) -> str:
    """A setting of a class that was named, such as a logger's."""
    key, path = found["key"], found["path"]
    name = path.rpartition(".")[2]
    return f"{_setting(message)}: {name} has no setting {key}{did_you_mean(key, _parameters(_load(path)))}"


def _value_in_class(found: re.Match[str], message: str, parser: ArgumentParser) -> str:
    inner = f'Parser key "{_setting(message)}.{found["key"]}":\n{found["rest"]}'
    return explain(inner, parser)


def _no_class(found: re.Match[str], message: str, parser: ArgumentParser) -> str:
    """A class that was named and is not there."""
    word = found["word"]
    bases = re.findall(r"<class '([\w.]+)'>|\[([\w.]+)\]", message.partition("Errors:")[0])
    names = [cls.__name__ for base in bases for cls in _subclasses(_load(base[0] or base[1]))]
    names = [name for name in dict.fromkeys(names) if not name.startswith("_")]
    asked = did_you_mean(word, names) or f": one of {', '.join(names[:12])}, or the path of a class of your own"
    return f"{_setting(message)}: no class {word}{asked}"


def _choice(found: re.Match[str], message: str, parser: ArgumentParser) -> str:
    """A value that is none of those that can be."""
    lists = re.findall(r"Expected a typing\.Literal\[(.*?)\]|choose from (.*?)\)", message)
    choices = [word.strip(" '\"") for one in lists for word in (one[0] or one[1]).split(",")]
    value = re.search(r"Got value: (\S+)|Given value: (\S+)|invalid choice: '?(.*?)'? \(", message)
    word = next(filter(None, value.groups()), "") if value else ""
    name = _setting(message)
    return f"{name} must be one of {', '.join(choices)}, but found {word!r}{did_you_mean(word, choices)}"


def _type(found: re.Match[str], message: str, parser: ArgumentParser) -> str:
    names = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "text"}
    wanted = names.get(found["type"], f"a {found['type']}")
    return f"{_setting(message)} must be {wanted}, but found {found['value'].strip()!r}"


def _missing(found: re.Match[str], message: str, parser: ArgumentParser) -> str:
    known = options(parser)
    keys = [key.strip() for key in found[1].split(",")]
    # Within a command `fit.model.name_or_path` is `--model.name_or_path`.
    names = [next((name for name in known if f".{key}".endswith(f".{name[2:]}")), key) for key in keys]
    return f"missing: {', '.join(names)}"


def _no_file(found: re.Match[str], message: str, parser: ArgumentParser) -> str:
    return f"--config must be a file, but found none at {found[1]}"


Answer = Callable[[re.Match[str], str, ArgumentParser], str]
ANSWERS: tuple[tuple[str, Answer], ...] = (
    (r"unrecognized arguments: (.*)", _unrecognized),
    (r"the following arguments are required: (.*)", _missing),
    (r"Problem with given class_path '(?P<path>[^']+)':\s+Option '(?P<key>[^']+)' is not accepted", _not_in_class),
    (
        r"Problem with given class_path '(?P<path>[^']+)':\s+Group '(?P<group>[^']+)' does not accept option "
        r"'(?P<key>[^']+)'",
        _not_in_class,
    ),
    (
        r"Problem with given class_path '(?P<path>[^']+)':\s+Parser key \"(?P<key>[^\"]+)\":(?P<rest>.*)",
        _value_in_class,
    ),
    (r"Subcommand '[^']+' does not accept option (?P<group>)'(?P<key>[^']+)'", _not_in_parser),
    (r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'", _not_in_parser),
    (r"Option (?P<group>)'(?P<key>[^']+)' is not accepted", _not_in_parser),
    (r"Expected a dot import path string: (?P<word>\S+)", _no_class),
    (r"Expected a typing\.Literal|invalid choice: ", _choice),
    (r"Expected a <class '(?P<type>\w+)'>\. Got value: (?P<value>[^\n]*)", _type),
    (r"\"config\": File does not exist: '([^']+)'", _no_file),
)


def _setting(message: str) -> str:
    """The setting that a message is about."""
    found = re.search(r'Parser key "([^"]+)"|argument (--\S+):', message)
    if found is None:
        return "a setting"
    return found[2] or f"--{found[1].removeprefix('--')}"


def _load(path: str) -> type | None:
    """A class that jsonargparse has named, and so loaded."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None
    return found if isinstance(found, type) else None


def _subclasses(base: type | None) -> Iterator[type]:
    """The classes that are loaded and may be given for a base."""
    if base is None or base in (type, object):
        return
    cls: type
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)


def _parameters(cls: type | None) -> Iterable[str]:
    """What the constructors of a class and of its bases take."""
    for each in () if cls is None else cls.__mro__:
        if (constructor := vars(each).get("__init__")) is not None:
            yield from inspect.signature(constructor).parameters
