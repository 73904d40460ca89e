"""Comments in a printed configuration: what each setting is."""

import argparse
import re
import textwrap
from collections.abc import Iterator

import jsonargparse
import yaml

WIDTH = 100
# Of a setting's comment, in characters, beyond its first sentence.
LONGEST = 300
HEADER = (
    "Every setting, with its value. What is left out of a file has the value that stands here without a file; settings "
    "on the command line come before those of the file."
)


def commented(text: str, parser: argparse.ArgumentParser) -> str:
    """Put before each setting what the parser's help says of it.

    Args:
        text: A configuration in YAML, in block style.
        parser: Knows the settings.

    Returns:
        The same configuration: comments alone were added.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    notes = dict(_notes(root, _help_of(parser))) if isinstance(root, yaml.MappingNode) else {}
    lines = [f"# {line}" for line in textwrap.wrap(HEADER, WIDTH - 2)]
    for number, line in enumerate(text.splitlines()):
        if note := notes.get(number):
            indent = " " * (len(line) - len(line.lstrip()))
            wrapped = textwrap.wrap(note, WIDTH - 2 - len(indent), break_long_words=False, break_on_hyphens=False)
            lines += [f"{indent}# {part}" for part in wrapped]
        lines.append(line)
    return "\n".join(lines) + "\n"


def _help_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """What the help says of each setting, by its dotted name; sections have their groups' titles."""
    found: dict[str, str] = {}
    for group in parser._action_groups:
        for action in group._group_actions:
            if not isinstance(action.help, str) or action.help == argparse.SUPPRESS:
                continue
            # The option of a section would say that it takes a file.
            is_section = action.metavar == "CONFIG" and action.dest != "config"
            text = group.title if is_section and group.title else re.sub(r"%\(\w+\)s|%%", "", action.help)
            found.setdefault(action.dest, _beginning(" ".join(text.split())))
    return found


def _beginning(text: str) -> str:
    """The first sentences of a text, at least one: `--help_all` has the rest."""
    sentences = re.split(r"(?<=[.;]) ", text)
    kept = sentences[0]
    for sentence in sentences[1:]:
        if len(kept) + len(sentence) > LONGEST:
            break
        kept += f" {sentence}"
    return kept


def _notes(node: yaml.MappingNode, texts: dict[str, str], prefix: str = "") -> Iterator[tuple[int, str]]:
    """(line, text) of the settings in a mapping and below it."""
    values = {key.value: value for key, value in node.value}
    chosen = values.get("class_path")
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name in texts and _begins_its_line(key):
            yield key.start_mark.line, texts[name]
        if key.value == "init_args" and chosen is not None and isinstance(value, yaml.MappingNode):
            yield from _notes(value, _help_of_class(chosen.value))
        elif isinstance(value, yaml.MappingNode):
            yield from _notes(value, texts, f"{name}.")
        elif isinstance(value, yaml.SequenceNode):
            for each in value.value:
                if isinstance(each, yaml.MappingNode):
                    yield from _notes(each, {})


def _begins_its_line(key: yaml.Node) -> bool:
    """Whether a comment can stand before it: not in braces, and not behind the dash of a list."""
    mark = key.start_mark
    assert mark.buffer is not None  # of a string
    return not mark.buffer[: mark.pointer].rpartition("\n")[2].strip()


def _help_of_class(path: str) -> dict[str, str]:
    """What a class says of its settings; nothing where it cannot be asked."""
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(__import__(module, fromlist=[name]), name)
        parser = jsonargparse.ArgumentParser()
        parser.add_class_arguments(cls, fail_untyped=False)
    except Exception:
        # A class of the user's own, which need not be one that a parser understands: it has no comments then.
        return {}
    return _help_of(parser)
