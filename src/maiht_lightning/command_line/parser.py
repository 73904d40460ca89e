"""Parsers whose errors are one screen with the remedy, and whose printed configuration explains itself."""

import os
import sys
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from .comments import commented
from .messages import explain

# Of lines, that messages of libraries are cut to.
LONGEST = 16


class OneScreen(ArgumentParser):
    """A parser of a command.

    `--help_all` shows every setting; `--help` is shown before a parser is made, by `maiht` itself.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A prefix of a name is not taken for it: a file would not take it either, and a slip gets a suggestion.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs, "add_help": False})
        self.add_argument("--help_all", action="help", help="Show every setting and exit.")

    @property
    def command(self) -> str:
        """What calls it, such as `maiht fit`."""
        return str(self.prog).replace("[options] ", "")

    def format_usage(self) -> str:
        """One line: jsonargparse would list every setting."""
        return f"usage: {self.command} [SETTINGS]\n"

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Every setting, below one line of usage."""
        self.usage = f"{self.command} [SETTINGS]"
        return super().format_help(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong and what to do, and exit with status 2."""
        if not self.exit_on_error:
            # One of the parsers within: what it raises is told by the one around it.
            super().error(message, ex)
        if os.environ.get("MAIHT_TRACEBACK"):
            raise ValueError(message) from ex
        parser = self._at_work()
        lines = explain(message, parser).splitlines()
        if len(lines) > LONGEST:
            lines = [*lines[:LONGEST], "..."]
        told = "\n".join(lines)
        remedy = f"{parser.command} --help shows the settings that people turn, --help_all every one."
        print(f"maiht: error: {told}\n{remedy}", file=sys.stderr)
        sys.exit(2)

    def _at_work(self) -> "OneScreen":
        """The parser of the command that was given, which knows its settings."""
        commands = self._subparsers._group_actions[0].choices if self._subparsers is not None else {}
        return next((commands[word] for word in getattr(self, "args", ()) if word in commands), self)  # type: ignore

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """A configuration as text, with comments if it is to be printed."""
        text = super().dump(*args, **kwargs)
        # jsonargparse notes there that `--print_config` was given. A run's own file stays as it is.
        return commented(text, self) if hasattr(getattr(self, "parent_parser", self), "print_config") else text


class RunParser(OneScreen, LightningArgumentParser):
    """The parser of `fit`, `prune`, `validate` and `test`, and of each of them."""


class CommandParser(OneScreen):
    """The parser of a command without a Trainer."""
